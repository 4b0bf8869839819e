// Gradient of the queries on Hopper, queries staying: the deterministic mode. It recomputes S and dP instead
// of adding up what the keys' kernel knows, so that every dQ is summed by one warpgroup in a fixed order:
//   S = Q K^T, dP = dO V^T, dS = exp2(S - lse) (dP - delta), dQ += dS K.
// The producers are the forward's.
#pragma once

#include "gna/query_stationary_sm90.cuh"
#include "gna/staging_sm90.cuh"

namespace nearfield::gna {

template <class Tag, int kHeadDim_>
struct DqTraits : HeadTraits<Tag, kHeadDim_> {
  using Base = HeadTraits<Tag, kHeadDim_>;
  using typename Base::AtomK, typename Base::AtomMN, typename Base::Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr FwdTile kTile = dq_tile(kHeadDim);
  static constexpr int kBlockM = kTile.kBlockM, kBlockN = kTile.kBlockN, kStages = kTile.kStages;
  static constexpr bool kWithDout = true, kBiased = false;  // with a bias the portable kernel runs
  static constexpr int kTransposers = 0;                    // 8-bit inputs have no gradient
  static constexpr int kConsumers = kBlockM / 64;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kProducerRegisters = kHeadDim <= 128 ? 56 : 24;
  static constexpr int kConsumerRegisters = kHeadDim <= 128 ? 224 : 240;
  static_assert(registers_fit(kProducerRegisters, kConsumerRegisters, kConsumers));

  using LayoutQ = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockM>, Int<kHeadDim>>{}));
  using LayoutK = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockN>, Int<kHeadDim>, Int<kStages>>{}));
  using LayoutKt = decltype(tile_to_shape(AtomMN{}, cute::Shape<Int<kHeadDim>, Int<kBlockN>, Int<kStages>>{},
                                          Step<_2, _1, _3>{}));
  using Rows = Layout<cute::Shape<Int<kConsumers>, _1, _1>>;
  using MmaS = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kBlockN>, Int<kHeadDim>>>(),
      Rows{}));
  using MmaQ = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kHeadDim>, Int<kBlockN>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      Rows{}));

  struct alignas(1024) Storage {
    alignas(1024) Element q[kBlockM * kHeadDim];  // later dQ on its way out
    alignas(1024) Element dout[kBlockM * kHeadDim];
    alignas(1024) Element k[kStages * kBlockN * kHeadDim];
    alignas(1024) Element v[kStages * kBlockN * kHeadDim];
    BoxMask<kBlockN> mask;
    BoxRows<kBlockN> columns;
    MovingTile key_tile[kStages];
    PlannedTile<kBlockM> plan[kPlannedTiles];
    typename PlannedTile<kBlockM>::Scratch plan_scratch;
    Ring<1> ring_q;
    Ring<kStages> ring_k, ring_v;
    Ring<kPlannedTiles> ring_plan;
    Ring<1> ring_draw;
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

template <class Traits>
__device__ void differentiate_queries(typename Traits::Storage& s, const QueryParams& p) {
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kBlockM, kN = Traits::kBlockN, kD = Traits::kHeadDim;
  const int thread = threadIdx.x - 128, warpgroup = thread / 128, warp = thread / 32, lane = thread % 32,
            quad = thread % 4;
  const int first_row = warp * 16 + lane / 4;  // and first_row + 8

  Tensor sQ = make_tensor(make_smem_ptr(s.q), typename Traits::LayoutQ{});        // (M, D)
  Tensor sDout = make_tensor(make_smem_ptr(s.dout), typename Traits::LayoutQ{});  // (M, D)
  Tensor sK = make_tensor(make_smem_ptr(s.k), typename Traits::LayoutK{});        // (N, D, stage)
  Tensor sV = make_tensor(make_smem_ptr(s.v), typename Traits::LayoutK{});        // (N, D, stage)
  Tensor sKt = make_tensor(make_smem_ptr(s.k), typename Traits::LayoutKt{});      // (D, N, stage)
  typename Traits::MmaS mma_s;
  typename Traits::MmaQ mma_q;
  auto thread_s = mma_s.get_slice(warpgroup * 128);
  auto thread_q = mma_q.get_slice(warpgroup * 128);
  Tensor tSrQ = thread_s.partition_fragment_A(sQ);
  Tensor tSrDout = thread_s.partition_fragment_A(sDout);
  Tensor tSrK = thread_s.partition_fragment_B(sK);
  Tensor tSrV = thread_s.partition_fragment_B(sV);
  Tensor tQrK = thread_q.partition_fragment_B(sKt);
  Tensor tSrS = partition_fragment_C(mma_s, cute::Shape<Int<kM>, Int<kN>>{});
  Tensor tSrDp = partition_fragment_C(mma_s, cute::Shape<Int<kM>, Int<kN>>{});
  Tensor tQrdQ = partition_fragment_C(mma_q, cute::Shape<Int<kM>, Int<kD>>{});
  Tensor scores = make_tensor(tSrS.data(), accumulator_rows_cols(tSrS.layout()));
  Tensor dprobs = make_tensor(tSrDp.data(), accumulator_rows_cols(tSrDp.layout()));
  Tensor dq = make_tensor(tQrdQ.data(), accumulator_rows_cols(tQrdQ.layout()));
  Tensor rDs = make_tensor<Element>(accumulator_as_a(tSrS.layout()));

  RingIndex<1> at_q;
  RingIndex<kPlannedTiles> at_plan;
  RingIndex<Traits::kStages> at_k;
  while (true) {
    s.ring_plan.wait_full(at_plan);
    const PlannedTile<kM>& plan = s.plan[at_plan.stage];
    const int num_tiles = plan.num_tiles;
    if (num_tiles == 0) break;
    Range keys[2][3];
    RowStats stats[2];
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t row = plan.row[first_row + 8 * i];
      stats[i] = row >= 0 ? p.stats[row] : RowStats{INFINITY, 0.f};
      CUTE_UNROLL
      for (int d = 0; d < 3; ++d) keys[i][d] = plan.range[first_row + 8 * i][d];
    }
    clear(tQrdQ);
    s.ring_q.wait_full(at_q);
    for (int n = 0; n < num_tiles; ++n) {
      s.ring_k.wait_full(at_k);
      issue_gemm<true>(mma_s, tSrQ, tSrK(_, _, _, at_k.stage), tSrS);
      s.ring_v.wait_full(at_k);
      issue_gemm<true>(mma_s, tSrDout, tSrV(_, _, _, at_k.stage), tSrDp);
      const MovingTile tile = s.key_tile[at_k.stage];
      uint32_t visible[2];
      if (tile.tests != 0) visible_keys(visible, s.mask, p.kv_box, tile, keys, quad);
      warpgroup_wait<1>();  // S
      if (tile.tests != 0) mask_rows(scores, visible);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        CUTE_UNROLL
        for (int j = 0; j < size<1>(scores); ++j) {
          scores(i, j) = exp2_approx(scores(i, j) * p.scale_log2 - stats[i].lse);
        }
      }
      warpgroup_fence_operand(tSrS);
      warpgroup_wait<0>();  // dP
      s.ring_v.release(at_k);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        CUTE_UNROLL
        for (int j = 0; j < size<1>(scores); ++j)
          dprobs(i, j) = scores(i, j) * (dprobs(i, j) - stats[i].delta);
      }
      Tensor ds_view = make_tensor(tSrDp.data(), rDs.layout());
      convert_to(ds_view, rDs);
      issue_gemm<false>(mma_q, rDs, tQrK(_, _, _, at_k.stage), tQrdQ);
      warpgroup_wait<0>();
      s.ring_k.release(at_k);
      at_k.advance();
    }

    // Over the Q rows, once all warps of the warpgroup have read them.
    const float factor[2] = {p.scale, p.scale};
    scale_rows(dq, factor);
    cutlass::arch::NamedBarrier::sync(128, 1 + warpgroup);
    store_rows<kD>(s.q + staging_in_own_rows<kD, kM>(warp), dq, plan.row + warp * 16,
                   static_cast<Element*>(p.out), p.problem.dim);
    cutlass::arch::fence_view_async_shared();  // the next Q comes through the async proxy
    __syncwarp();
    s.ring_q.release(at_q);
    at_q.advance();
    s.ring_plan.release(at_plan);
    at_plan.advance();
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bwd_dq_kernel(const __grid_constant__ QueryMaps maps, const __grid_constant__ QueryParams p) {
  auto& s = shared_storage<typename Traits::Storage>();
  prepare_storage<Traits>(s, maps, p, offsetof(typename Traits::Storage, mask));
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    produce<Traits>(s, maps, p);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    differentiate_queries<Traits>(s, p);
  }
}

template <class Tag, int kHeadDim>
int bwd_dq_sm90<Tag, kHeadDim>::run(const BwdSm90Args& a, void* stream_) {
  using Traits = DqTraits<Tag, kHeadDim>;
  constexpr int kShared = sizeof(typename Traits::Storage);
  if (const cudaError_t e = allow_shared_memory(bwd_dq_kernel<Traits>, kShared)) return e;
  const auto stream = static_cast<cudaStream_t>(stream_);
  QueryParams params{};
  params.out = a.dq_out.data;
  params.stats = a.stats.data;
  const Tokens<float> rows{nullptr, a.stats.batch, {a.stats.x[0], a.stats.x[1], a.stats.x[2]}, a.stats.head};
  return launch_query_stationary<Traits>(
      a, rows, params, stream, [&](const QueryMaps& maps, const QueryParams& p, int grid) {
        bwd_dq_kernel<Traits><<<grid, Traits::kThreads, kShared, stream>>>(maps, p);
      });
}

}  // namespace nearfield::gna
