// Matrix multiply of one warp on the instructions that every GPU since Ampere has. A warp holds 16 *
// kRowTiles rows of an accumulator; both operands are rows in shared memory, or the left one is an
// accumulator that stays in registers.
//
// Rows are padded by 16 bytes: eight rows of 16 bytes (ldmatrix), or eight rows of four floats, then fall
// into different banks, and every address is a lane's own plus a constant.
//
// float32 is multiplied as three products of tf32 numbers (3xTF32): x = high + low, each with 11 bits, and
// the product of the two low parts is below the last bit of a float. The tensor cores truncate when they
// add, so they add up eight products only, and the sum over these is an ordinary rounded addition.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>
#include <cutlass/numeric_conversion.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/tensor.hpp>

#include "nearfield/pairs.cuh"

namespace nearfield {

template <class Element, int kFeatures>
constexpr int kPaddedRow = kFeatures + 16 / static_cast<int>(sizeof(Element));  // elements

// What a thread holds of a warp's rows: of each 16 x 8 tile rows lane / 4 and that + 8, columns lane % 4 * 2
// and the next.
template <int kRowTiles, int kColumns>
struct Accumulator {
  static constexpr int kRows = 2 * kRowTiles;
  float tile[kRowTiles][kColumns / 8][4];

  __device__ __forceinline__ void clear() {
    CUTE_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      CUTE_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) {
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) tile[m][n][i] = 0.f;
      }
    }
  }

  // As (row, column): rows 8 apart, columns 8 j + lane % 4 * 2 + {0, 1}.
  __device__ __forceinline__ auto rows_cols() {
    using namespace cute;
    return make_tensor(&tile[0][0][0], Layout<Shape<Shape<_2, Int<kRowTiles>>, Shape<_2, Int<kColumns / 8>>>,
                                              Stride<Stride<_2, Int<kColumns / 2>>, Stride<_1, _4>>>{});
  }
};

// How the operands of one product of 16 x 8 come into registers: 16-bit types.
template <class Element>
struct Fragments {
  static constexpr int kDepth = 16;    // length of the sum in one product
  static constexpr int kColumns = 16;  // of the right operand brought by one load
  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[2];
  };

  // 16 rows, kDepth columns.
  __device__ __forceinline__ static A left(const Element* rows, int stride) {
    A a;
    const int lane = threadIdx.x % 32;
    const auto& at = *reinterpret_cast<const cute::uint128_t*>(rows + lane % 16 * stride + lane / 16 * 8);
    cute::SM75_U32x4_LDSM_N::copy(at, a.word[0], a.word[1], a.word[2], a.word[3]);
    return a;
  }

  // The same from columns [column, column + kDepth) of an accumulator, rounded.
  template <int kRowTiles, int kAccumulated>
  __device__ __forceinline__ static A left(const Accumulator<kRowTiles, kAccumulated>& c, int m, int column) {
    A a;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* from = &c.tile[m][column / 8 + i / 2][i % 2 * 2];
      a.word[i] = pack<Element>(from[0], from[1]);
    }
    return a;
  }

  // Transposed: kColumns rows, kDepth elements of each.
  __device__ __forceinline__ static void right_transposed(B (&b)[2], const Element* rows, int stride) {
    const int lane = threadIdx.x % 32;
    const auto& at = *reinterpret_cast<const cute::uint128_t*>(rows + (lane / 16 * 8 + lane % 8) * stride +
                                                               lane / 8 % 2 * 8);
    cute::SM75_U32x4_LDSM_N::copy(at, b[0].word[0], b[0].word[1], b[1].word[0], b[1].word[1]);
  }

  // As they are: kDepth rows, kColumns elements of each.
  __device__ __forceinline__ static void right(B (&b)[2], const Element* rows, int stride) {
    const int lane = threadIdx.x % 32;
    const auto& at = *reinterpret_cast<const cute::uint128_t*>(rows + lane % 16 * stride + lane / 16 * 8);
    cute::SM75_U16x8_LDSM_T::copy(at, b[0].word[0], b[0].word[1], b[1].word[0], b[1].word[1]);
  }

  __device__ __forceinline__ static void multiply(float (&c)[4], const A& a, const B& b) {
    using Mma = std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                                   cute::SM80_16x8x16_F32BF16BF16F32_TN, cute::SM80_16x8x16_F32F16F16F32_TN>;
    Mma::fma(c[0], c[1], c[2], c[3], a.word[0], a.word[1], a.word[2], a.word[3], b.word[0], b.word[1], c[0],
             c[1], c[2], c[3]);
  }
};

template <>
struct Fragments<float> {
  static constexpr int kDepth = 8;
  static constexpr int kColumns = 8;
  struct Split {
    uint32_t high, low;

    __device__ __forceinline__ void operator=(float x) {
      cutlass::NumericConverter<cutlass::tfloat32_t, float> round;
      const auto h = round(x);
      const auto l = round(x - static_cast<float>(h));
      high = reinterpret_cast<const uint32_t&>(h);
      low = reinterpret_cast<const uint32_t&>(l);
    }
  };
  struct A {
    Split word[4];
  };
  struct B {
    Split word[2];
  };

  __device__ __forceinline__ static A left(const float* rows, int stride) {
    A a;
    const int lane = threadIdx.x % 32;
    const float* at = rows + lane / 4 * stride + lane % 4;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) a.word[i] = at[i % 2 * 8 * stride + i / 2 * 4];
    return a;
  }

  // The order of the terms of a sum is free: term t of a product is column 2 t of the accumulator, term t + 4
  // column 2 t + 1, so that every thread already has what it needs. right() brings the rows in that order.
  template <int kRowTiles, int kAccumulated>
  __device__ __forceinline__ static A left(const Accumulator<kRowTiles, kAccumulated>& c, int m, int column) {
    A a;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) a.word[i] = c.tile[m][column / 8][i % 2 * 2 + i / 2];
    return a;
  }

  __device__ __forceinline__ static void right_transposed(B (&b)[1], const float* rows, int stride) {
    const int lane = threadIdx.x % 32;
    const float* at = rows + lane / 4 * stride + lane % 4;
    b[0].word[0] = at[0];
    b[0].word[1] = at[4];
  }

  __device__ __forceinline__ static void right(B (&b)[1], const float* rows, int stride) {
    const int lane = threadIdx.x % 32;
    const float* at = rows + lane % 4 * 2 * stride + lane / 4;
    b[0].word[0] = at[0];
    b[0].word[1] = at[stride];
  }

  __device__ __forceinline__ static void multiply(float (&c)[4], const A& a, const B& b) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    add_product<&Split::low, &Split::high>(sum, a, b);
    add_product<&Split::high, &Split::low>(sum, a, b);
    add_product<&Split::high, &Split::high>(sum, a, b);
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
  }

 private:
  template <uint32_t Split::* kPartA, uint32_t Split::* kPartB>
  __device__ __forceinline__ static void add_product(float (&c)[4], const A& a, const B& b) {
    cute::SM80_16x8x8_F32TF32TF32F32_TN::fma(c[0], c[1], c[2], c[3], a.word[0].*kPartA, a.word[1].*kPartA,
                                             a.word[2].*kPartA, a.word[3].*kPartA, b.word[0].*kPartB,
                                             b.word[1].*kPartB, c[0], c[1], c[2], c[3]);
  }
};

// C += A B^T over kFeatures: A is the warp's rows, B the rows that are C's columns.
template <int kFeatures, class Element, int kRowTiles, int kColumns>
__device__ __forceinline__ void multiply_transposed(Accumulator<kRowTiles, kColumns>& c, const Element* a,
                                                    const Element* b) {
  using F = Fragments<Element>;
  constexpr int kStride = kPaddedRow<Element, kFeatures>;
  CUTE_UNROLL
  for (int k = 0; k < kFeatures; k += F::kDepth) {
    typename F::A left[kRowTiles];
    CUTE_UNROLL
    for (int m = 0; m < kRowTiles; ++m) left[m] = F::left(a + m * 16 * kStride + k, kStride);
    CUTE_UNROLL
    for (int n = 0; n < kColumns; n += F::kColumns) {
      typename F::B right[F::kColumns / 8];
      F::right_transposed(right, b + n * kStride + k, kStride);
      CUTE_UNROLL
      for (int j = 0; j < F::kColumns / 8; ++j) {
        CUTE_UNROLL
        for (int m = 0; m < kRowTiles; ++m) F::multiply(c.tile[m][n / 8 + j], left[m], right[j]);
      }
    }
  }
}

// C += P B: P is an accumulator, whose columns are the rows of B (each kFeatures long; C takes its first
// kColumns).
template <int kFeatures, class Element, int kRowTiles, int kColumns, int kDepth>
__device__ __forceinline__ void multiply(Accumulator<kRowTiles, kColumns>& c,
                                         const Accumulator<kRowTiles, kDepth>& p, const Element* b) {
  using F = Fragments<Element>;
  constexpr int kStride = kPaddedRow<Element, kFeatures>;
  CUTE_UNROLL
  for (int k = 0; k < kDepth; k += F::kDepth) {
    typename F::A left[kRowTiles];
    CUTE_UNROLL
    for (int m = 0; m < kRowTiles; ++m) left[m] = F::left(p, m, k);
    CUTE_UNROLL
    for (int n = 0; n < kColumns; n += F::kColumns) {
      typename F::B right[F::kColumns / 8];
      F::right(right, b + k * kStride + n, kStride);
      CUTE_UNROLL
      for (int j = 0; j < F::kColumns / 8; ++j) {
        CUTE_UNROLL
        for (int m = 0; m < kRowTiles; ++m) F::multiply(c.tile[m][n / 8 + j], left[m], right[j]);
      }
    }
  }
}

}  // namespace nearfield
