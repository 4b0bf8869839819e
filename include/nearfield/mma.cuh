// Warpgroup matrix multiply with CuTe: issue, wait, and views of the accumulator.
#pragma once

#include <cutlass/numeric_conversion.h>
#include <cute/tensor.hpp>

namespace nearfield {

// Issues C (+)= A B as one group of asynchronous instructions and commits it; the caller waits with
// warpgroup_wait.
template <bool kZeroInit, class Mma, class TensorA, class TensorB, class TensorC>
__device__ __forceinline__ void issue_gemm(Mma& mma, const TensorA& tCrA, const TensorB& tCrB,
                                           TensorC& tCrC) {
  using namespace cute;
  constexpr bool kRegisterA = !is_base_of<GMMA::DescriptorIterator, typename TensorA::iterator>::value;
  if constexpr (kRegisterA) warpgroup_fence_operand(const_cast<TensorA&>(tCrA));
  warpgroup_fence_operand(tCrC);
  warpgroup_arrive();
  if constexpr (kZeroInit) mma.accumulate_ = GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < size<2>(tCrA); ++k) {
    cute::gemm(mma, tCrA(_, _, k), tCrB(_, _, k), tCrC);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
  warpgroup_fence_operand(tCrC);
  if constexpr (kRegisterA) warpgroup_fence_operand(const_cast<TensorA&>(tCrA));
}

// ((2, 2, N/8), M, 1) accumulator -> (row, col): each thread holds two rows per 64, and pairs of columns 8
// apart.
template <class Layout>
__device__ __forceinline__ auto accumulator_rows_cols(Layout acc) {
  using namespace cute;
  auto l = flatten(acc);  // (2, 2, N/8, M, 1)
  return make_layout(make_layout(get<1>(l), get<3>(l)), make_layout(get<0>(l), get<2>(l), get<4>(l)));
}

// The accumulator of one product as the A operand, in registers, of the next: ((2, 2, N/8), M, 1) ->
// ((2, 2, 2), M, N/16).
template <class Layout>
__device__ __forceinline__ auto accumulator_as_a(Layout acc) {
  using namespace cute;
  auto l = logical_divide(get<0>(acc), cute::Shape<Underscore, Underscore, _2>{});  // (2, 2, (2, N/16))
  return make_layout(make_layout(get<0>(l), get<1>(l), get<2, 0>(l)), get<1>(acc), get<2, 1>(l));
}

// The same for 8-bit operands: -> (((2, 2), 2, 2), M, N/32). Four neighboring columns of the operand are a
// pair of columns of the accumulator and the pair eight columns on: in every 16 columns the operand has the
// order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15, and the other operand must have it as well.
template <class Layout>
__device__ __forceinline__ auto accumulator_as_8bit_a(Layout acc) {
  using namespace cute;
  auto l = logical_divide(get<0>(acc), cute::Shape<Underscore, Underscore, _4>{});  // (2, 2, (4, N/32))
  auto pairs = flatten(logical_divide(get<2, 0>(l), cute::Shape<_2>{}));            // (2, 2)
  return make_layout(make_layout(make_layout(get<0>(l), get<0>(pairs)), get<1>(l), get<1>(pairs)),
                     get<1>(acc), get<2, 1>(l));
}

// Rounds fp32 registers to a 16-bit type, two at a time.
template <class Source, class Target>
__device__ __forceinline__ void convert_to(const Source& source, Target& target) {
  using namespace cute;
  using From = typename Source::value_type;
  using To = typename Target::value_type;
  constexpr int n = decltype(size(source))::value;
  static_assert(n % 2 == 0);
  cutlass::NumericArrayConverter<To, From, 2> convert;
  auto from = recast<cutlass::Array<From, 2> const>(source);
  auto to = recast<cutlass::Array<To, 2>>(target);
  CUTE_UNROLL
  for (int i = 0; i < n / 2; ++i) to(i) = convert(from(i));
}

// Rounds fp32 registers to an 8-bit type, four at a time, which need not be neighbors.
template <class Source, class Target>
__device__ __forceinline__ void convert_to_8bit(const Source& source, Target& target) {
  using namespace cute;
  using To = typename Target::value_type;
  cutlass::NumericArrayConverter<To, float, 4> convert;
  auto to = recast<cutlass::Array<To, 4>>(target);
  CUTE_UNROLL
  for (int i = 0; i < size(to); ++i)
    to(i) = convert({source(4 * i), source(4 * i + 1), source(4 * i + 2), source(4 * i + 3)});
}

}  // namespace nearfield
