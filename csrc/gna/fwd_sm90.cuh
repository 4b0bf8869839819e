// Neighborhood attention forward on Hopper. One producer warp streams boxes of K and V with the bulk tensor
// copy engine straight from the natural token layout; two warpgroups of consumers hold 64 query rows each.
// Inside a warpgroup the product S of the next key tile is issued before O += P V of the current one, so that
// softmax overlaps both.
// Persistent CTAs draw query tiles from a counter. Plan, budget and measurements: README.md.
#pragma once

#include "gna/query_stationary_sm90.cuh"
#include "gna/staging_sm90.cuh"

namespace nearfield::gna {

// ---- Layouts and storage ----

template <class Tag, int kHeadDim_, bool kBiased_, bool kWide = false>
struct FwdTraits : HeadTraits<Tag, kHeadDim_> {
  using Base = HeadTraits<Tag, kHeadDim_>;
  using typename Base::AtomK, typename Base::AtomMN, typename Base::Element;
  static constexpr bool kIs8Bit = sizeof(Element) == 1;
  using Output = std::conditional_t<kIs8Bit, cutlass::bfloat16_t, Element>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr FwdTile kTile = fwd_tile(kHeadDim, kBiased_, kWide);
  static constexpr int kBlockM = kTile.kBlockM, kBlockN = kTile.kBlockN, kStages = kTile.kStages;
  static constexpr bool kWithDout = false, kBiased = kBiased_;
  static constexpr int kTransposers = kIs8Bit ? 2 : 0;  // warps
  static constexpr int kLift = kIs8Bit ? 8 : 0;         // P is at most 2^8, of at most 448 in e4m3
  static constexpr int kConsumers = kBlockM / 64;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr bool kBarePlan = kTile.kBarePlan;
  // Not for small head dims: tiles with few visits wait for the warp that plans, and it prefetches as well.
  static constexpr int kQueryParts = kHeadDim == 128 && !kBiased && !kIs8Bit ? kConsumers : 1;
  static constexpr bool kOutInBoxes = kQueryParts > 1;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(registers_fit(kProducerRegisters, kConsumerRegisters, kConsumers));

  using LayoutQ = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockM>, Int<kHeadDim>>{}));
  using LayoutK = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockN>, Int<kHeadDim>, Int<kStages>>{}));
  // V seen as the B operand of P V: (D, keys), D contiguous; 8 bits: transposed, keys contiguous.
  using AtomVt = std::conditional_t<kIs8Bit, GMMA::Layout_K_SW128_Atom<Element>, AtomMN>;
  using LayoutVt = decltype(tile_to_shape(AtomVt{}, cute::Shape<Int<kHeadDim>, Int<kBlockN>, Int<kStages>>{},
                                          std::conditional_t<kIs8Bit, Step<_1, _2, _3>, Step<_2, _1, _3>>{}));
  using Transposed = TransposedValues<Element, kHeadDim, kBlockN, kStages>;

  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kBlockN>, Int<kHeadDim>>>(),
      Layout<cute::Shape<Int<kConsumers>, _1, _1>>{}));
  static_assert(
      decltype(size<1>(typename MmaQK::AtomShape_MNK{}))::value == kBlockN,
      "the whole block in one instruction: 80 columns need CuTe's extended shapes (CMakeLists.txt)");
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kHeadDim>, Int<kBlockN>>,
                           GMMA::Major::K, kIs8Bit ? GMMA::Major::K : GMMA::Major::MN>(),
      Layout<cute::Shape<Int<kConsumers>, _1, _1>>{}));

  struct alignas(1024) Storage {
    alignas(1024) Element q[kBlockM * kHeadDim];
    alignas(1024) Element k[kStages * kBlockN * kHeadDim];
    alignas(1024) Element v[kStages * kBlockN * kHeadDim];
    alignas(kTile.kOwnOutput ? 1024 : 16) Output o[kTile.kOwnOutput ? kBlockM * kHeadDim : 8];
    BoxMask<kBlockN> mask;
    BoxRows<kBlockN> columns;
    MovingTile key_tile[kStages];
    using Plan = std::conditional_t<kBarePlan, BarePlan<kBlockM>, PlannedTile<kBlockM>>;
    Plan plan[kPlannedTiles];
    typename Plan::Scratch plan_scratch;
    Ring<kQueryParts> ring_q;  // each warpgroup's, or the first for both
    Ring<kStages> ring_k, ring_v;
    Ring<kPlannedTiles> ring_plan;
    Ring<1> ring_draw;
  };
  using Bias = BiasSlices<kBlockM, kBlockN, kStages, bias_places(kHeadDim), Direction::kForward>;
};

// ---- Consumers ----

// Where V comes from.
template <class Traits>
__device__ __forceinline__ auto& values_of(typename Traits::Storage& s) {
  if constexpr (Traits::kIs8Bit) {
    return transposed_values<Traits>();
  } else {
    return s;
  }
}

// The rows of a staying tile: planned, or worked out here.
template <class Traits>
struct PlannedRows {
  using Storage = typename Traits::Storage;
  const Storage& s;
  const typename Storage::Plan& plan;
  const QueryParams& p;
  int first = 0;

  __device__ __forceinline__ PlannedRows from(int r) const { return {s, plan, p, r}; }
  __device__ __forceinline__ void ranges(int r, Range (&keys)[3]) const {
    int c[3];
    s.plan_scratch.rows.coordinates(first + r, c);
    CUTE_UNROLL
    for (int d = 0; d < 3; ++d) {
      if constexpr (Traits::kBarePlan) {
        keys[d] = range_of<Direction::kForward>(c[d], d, plan.tile);
      } else {
        keys[d] = plan.range[first + r][d];
      }
    }
  }
  __device__ __forceinline__ int64_t operator[](int r) const {
    if constexpr (Traits::kBarePlan) {
      int c[3];
      s.plan_scratch.rows.coordinates(first + r, c);
      return row_of(c, plan.tile, p.problem, p.q_box, plan.tile.batch + p.batch_offset, p.lse);
    } else {
      return plan.row[first + r];
    }
  }
};

// Sends the rows of a warpgroup out, by the copy engine.
template <class Traits, class TensorO>
__device__ __forceinline__ void store_as_box(typename Traits::Storage& s, const QueryMaps& maps,
                                             const QueryParams& p, const StayingTile& tile,
                                             const TensorO& tOrO, int warpgroup) {
  constexpr int kD = Traits::kHeadDim, kRows = 64;
  auto* own = s.o + warpgroup * kRows * kD;
  const bool sends = threadIdx.x % 128 == 0;
  if (sends) tma_store_wait<0>();  // the last box has been read
  cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup);
  CUTE_UNROLL
  for (int c = 0; c < kD / 64; ++c) {
    Tensor rounded = make_tensor<typename Traits::Element>(cute::Shape<_32>{});
    convert_to(make_tensor(tOrO.data() + 32 * c, rounded.layout()), rounded);
    store_transposed<64>(transposed_at(own + c * kRows * 64, threadIdx.x / 32 % 4, 0), rounded);
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup);
  if (sends) {
    int x[3];
    position_of_part<Traits>(p, tile, warpgroup, x);
    store_box<kD, kRows>(maps.out, p.fold_out, own, x, tile.head, tile.batch);
    tma_store_arrive();
  }
}

template <class Traits>
__device__ void attend(typename Traits::Storage& s, const QueryMaps& maps, const QueryParams& p) {
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kBlockM, kN = Traits::kBlockN, kD = Traits::kHeadDim;
  // Known to be the same in a whole warp, descriptors stay in uniform registers.
  const int warpgroup = cutlass::canonical_warp_group_idx() - 1;
  const int thread = threadIdx.x - 128, quad = thread % 4;

  auto& values = values_of<Traits>(s);
  Tensor sQ = make_tensor(make_smem_ptr(s.q), typename Traits::LayoutQ{});         // (M, D)
  Tensor sK = make_tensor(make_smem_ptr(s.k), typename Traits::LayoutK{});         // (N, D, stage)
  Tensor sVt = make_tensor(make_smem_ptr(values.v), typename Traits::LayoutVt{});  // (D, N, stage)
  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  auto thread_qk = mma_qk.get_slice(warpgroup * 128);
  auto thread_pv = mma_pv.get_slice(warpgroup * 128);
  Tensor tSrQ = thread_qk.partition_fragment_A(sQ);   // (MMA, 1, D/16); of 8 bits D/32
  Tensor tSrK = thread_qk.partition_fragment_B(sK);   // (MMA, 1, D/16, stage)
  Tensor tOrV = thread_pv.partition_fragment_B(sVt);  // (MMA, 1, N/16, stage)
  Tensor tSrS = partition_fragment_C(mma_qk, cute::Shape<Int<kM>, Int<kN>>{});
  Tensor tOrO = partition_fragment_C(mma_pv, cute::Shape<Int<kM>, Int<kD>>{});
  Tensor scores = make_tensor(tSrS.data(), accumulator_rows_cols(tSrS.layout()));
  Tensor outputs = make_tensor(tOrO.data(), accumulator_rows_cols(tOrO.layout()));
  Tensor tOrP = make_tensor<Element>(partition_shape_A(mma_pv, cute::Shape<Int<kM>, Int<kN>>{}));
  const auto round_p = [&] {
    if constexpr (Traits::kIs8Bit) {
      convert_to_8bit(make_tensor(tSrS.data(), accumulator_as_8bit_a(tSrS.layout())), tOrP);
    } else {
      convert_to(make_tensor(tSrS.data(), tOrP.layout()), tOrP);
    }
  };

  const int first_row = warpgroup * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;  // and first_row + 8
  Range keys[2][3];
  uint32_t q_phase = 0;
  const auto at_q = [&] {
    return RingIndex<Traits::kQueryParts>{query_parts_of<Traits>(p) > 1 ? warpgroup : 0, q_phase};
  };
  RingIndex<kPlannedTiles> at_plan;
  RingIndex<Traits::kStages> at_k, at_v;

  while (true) {
    s.ring_plan.wait_full(at_plan);
    const auto& plan = s.plan[at_plan.stage];
    const int num_tiles = plan.num_tiles;
    if (num_tiles == 0) break;
    const PlannedRows<Traits> rows{s, plan, p};
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) rows.ranges(first_row + 8 * i, keys[i]);

    float scale_log2 = p.scale_log2, descale_v = 1.f;
    if constexpr (Traits::kIs8Bit) {
      const int64_t batch = plan.tile.batch + p.batch_offset;
      const int head_kv = plan.tile.head / static_cast<int>(p.problem.heads_per_kv());
      scale_log2 *= Descales::of(p.descale.q, batch, head_kv) * Descales::of(p.descale.k, batch, head_kv);
      descale_v = Descales::of(p.descale.v, batch, head_kv);
    }
    OnlineSoftmax<2, Traits::kLift> softmax(scale_log2);
    float rescale[2];
    s.ring_q.wait_full(at_q());
    s.ring_k.wait_full(at_k);
    issue_gemm<true>(mma_qk, tSrQ, tSrK(_, _, _, at_k.stage), tSrS);
    MovingTile key_tile = s.key_tile[at_k.stage];
    warpgroup_wait<0>();
    s.ring_k.release(at_k);
    if constexpr (Traits::kBiased) add_bias<Traits>(scores, p.bias, at_k, first_row, quad);
    at_k.advance();
    ColumnBits<kN> visible[2];
    if (key_tile.tests != 0) {
      visible_keys(visible, s.mask, p.kv_box, key_tile, keys, quad);
      mask_rows(scores, visible);
    }
    softmax.step(scores, rescale);
    round_p();
    clear(tOrO);

    for (int n = 1; n < num_tiles; ++n) {
      s.ring_k.wait_full(at_k);
      issue_gemm<true>(mma_qk, tSrQ, tSrK(_, _, _, at_k.stage), tSrS);
      values.ring_v.wait_full(at_v);
      issue_gemm<false>(mma_pv, tOrP, tOrV(_, _, _, at_v.stage), tOrO);
      key_tile = s.key_tile[at_k.stage];
      if (key_tile.tests != 0) visible_keys(visible, s.mask, p.kv_box, key_tile, keys, quad);  // under S
      warpgroup_wait<1>();
      s.ring_k.release(at_k);
      if constexpr (Traits::kBiased) add_bias<Traits>(scores, p.bias, at_k, first_row, quad);
      at_k.advance();
      if (key_tile.tests != 0) mask_rows(scores, visible);
      softmax.step(scores, rescale);
      warpgroup_fence_operand(tSrS);  // keeps the exponentials above the wait, under the product P V
      warpgroup_wait<0>();
      values.ring_v.release(at_v);
      at_v.advance();
      round_p();
      scale_rows(outputs, rescale);
    }
    if constexpr (Traits::kTile.kOwnOutput) s.ring_q.release(at_q());
    values.ring_v.wait_full(at_v);
    issue_gemm<false>(mma_pv, tOrP, tOrV(_, _, _, at_v.stage), tOrO);
    float inverse[2], lse[2];
    softmax.finish(inverse, lse);
    warpgroup_wait<0>();
    values.ring_v.release(at_v);
    at_v.advance();
    if constexpr (Traits::kIs8Bit) {
      inverse[0] *= descale_v;
      inverse[1] *= descale_v;
    }
    scale_rows(outputs, inverse);

    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t row = rows[first_row + 8 * i];
      if (quad == 0 && row >= 0) p.lse.data[row] = lse[i];
    }
    const int warp = thread / 32;
    // Without a buffer of its own the output goes over the Q rows, once its warpgroup has read them.
    void* sO = Traits::kTile.kOwnOutput ? static_cast<void*>(s.o + warp * 16 * kD)
                                        : s.q + staging_in_own_rows<kD, kM>(warp);
    if constexpr (!Traits::kTile.kOwnOutput) cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup);
    const auto store = [&](auto type) {
      using Output = decltype(type);
      store_rows<kD, Traits::kIs8Bit>(static_cast<Output*>(sO), outputs, rows.from(warp * 16),
                                      static_cast<Output*>(p.out), p.problem.dim_v);
    };
    const auto store_as_rows = [&] {
      if (Traits::kIs8Bit && p.out_is_fp16) {
        store(cutlass::half_t{});
      } else {
        store(typename Traits::Output{});
      }
    };
    if constexpr (Traits::kOutInBoxes) {
      if (p.out_in_boxes) {
        store_as_box<Traits>(s, maps, p, plan.tile, tOrO, warpgroup);
      } else {
        store_as_rows();
      }
    } else {
      store_as_rows();
    }
    if constexpr (!Traits::kTile.kOwnOutput) {
      cutlass::arch::fence_view_async_shared();  // the next Q comes through the async proxy
      __syncwarp();
      s.ring_q.release(at_q());
    }
    q_phase ^= 1;
    s.ring_plan.release(at_plan);
    at_plan.advance();
  }
  if (Traits::kOutInBoxes && thread % 128 == 0) tma_store_wait<0>();  // before the shared memory goes
}

// ---- Kernel and launch ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    fwd_kernel(const __grid_constant__ QueryMaps maps, const __grid_constant__ QueryParams p) {
  auto& s = shared_storage<typename Traits::Storage>();
  prepare_storage<Traits>(s, maps, p, offsetof(typename Traits::Storage, o));
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    produce<Traits>(s, maps, p);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    attend<Traits>(s, maps, p);
  }
}

template <class Traits>
cudaError_t launch_fwd(const FwdSm90Args& a, cudaStream_t stream) {
  constexpr int kShared =
      shared_bytes<Traits>() + (Traits::kIs8Bit ? sizeof(typename Traits::Transposed) : 0);
  static_assert(kShared <= 227 * 1024);
  if (const cudaError_t e = allow_shared_memory(fwd_kernel<Traits>, kShared)) return e;
  QueryParams params{};
  params.out = a.out.data;
  params.descale = a.descale;
  params.out_is_fp16 = a.out_is_fp16;
  return launch_query_stationary<Traits>(
      a, a.lse, params, stream, [&](const QueryMaps& maps, const QueryParams& p, int grid) {
        fwd_kernel<Traits><<<grid, Traits::kThreads, kShared, stream>>>(maps, p);
      });
}

template <class Tag, int kHeadDim>
int fwd_sm90<Tag, kHeadDim>::run(const FwdSm90Args& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if constexpr (!std::is_same_v<Tag, e4m3>) {
    if (a.bias.data != nullptr) return launch_fwd<FwdTraits<Tag, kHeadDim, true>>(a, on);
    if constexpr (has_wide_fwd_tile(kHeadDim)) {
      if (a.wide) return launch_fwd<FwdTraits<Tag, kHeadDim, false, true>>(a, on);
    }
  }
  return launch_fwd<FwdTraits<Tag, kHeadDim, false>>(a, on);
}

}  // namespace nearfield::gna
