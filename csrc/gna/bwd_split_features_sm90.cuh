// Gradients of keys, values and queries, head dims up to 256. dK and dV of 64 keys are 2 x 64 x 256 numbers,
// too many for the registers of one warpgroup, so the two warpgroups hold the same 64 keys and half of the
// features each. S^T and dP^T they compute for half of the queries each, and hand P^T and dS^T to each other
// through shared memory, where both are left operands of what follows:
//   S^T = K Q^T, dP^T = V dO^T            64 keys x 32 queries a warpgroup
//   P^T = exp2(S^T - lse), dS^T = P^T (dP^T - delta)
//   dV += P^T dO, dQ = dS K, dK += dS^T Q    64 rows x 128 features a warpgroup
// dO has one buffer: it is free after dV, and the next one arrives under dQ and dK. dQ leaves in four rounds
// of 64 features, because nothing more fits beside the operands.
#pragma once

#include "gna/key_stationary_sm90.cuh"
#include "gna/staging_sm90.cuh"

namespace nearfield::gna {

// ---- Layouts and storage ----

template <class Tag, int kHeadDim_, bool kBiased_>
struct SplitFeatures : HeadTraits<Tag, kHeadDim_> {
  using Base = HeadTraits<Tag, kHeadDim_>;
  using typename Base::AtomK, typename Base::AtomMN, typename Base::Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr BwdTile kTile = bwd_tile(kHeadDim);
  static constexpr int kBlockM = kTile.kBlockM, kBlockN = kTile.kBlockN, kStages = kTile.kStages;
  static constexpr bool kBiased = kBiased_;
  static constexpr int kConsumers = 2;
  static constexpr int kDoutStages = 1, kDqStages = 2, kDqRounds = 4;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // no spills in either
  static_assert(registers_fit(kProducerRegisters, kConsumerRegisters, kConsumers));
  static_assert(kBlockM == 64 && kBlockN == 64 && kHeadDim == 256);
  static constexpr int kFeatures = kHeadDim / kConsumers;  // of dK, dV and dQ in a warpgroup
  static constexpr int kQueries = kBlockM / kConsumers;    // of S and dP in a warpgroup

  using LayoutKV = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockN>, Int<kHeadDim>>{}));
  using LayoutQ = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockM>, Int<kHeadDim>, Int<kStages>>{}));
  using LayoutDout =
      decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockM>, Int<kHeadDim>, Int<kDoutStages>>{}));
  // Half of the features of a stage of R rows, as right operand: (features, R, 2 * stage + half).
  template <int kRows, int kCount>
  using LayoutHalves = decltype(tile_to_shape(
      AtomMN{}, cute::Shape<Int<kFeatures>, Int<kRows>, Int<2 * kCount>>{}, Step<_2, _1, _3>{}));
  // P^T and dS^T as left operand, (keys, queries); dS, (queries, keys): the same bytes.
  using LayoutP = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockN>, Int<kBlockM>>{}));
  using LayoutDs = decltype(tile_to_shape(AtomMN{}, cute::Shape<Int<kBlockM>, Int<kBlockN>>{}));

  // S^T and dP^T: (keys, queries)
  using MmaS =
      decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float,
                                                   cute::Shape<Int<kBlockN>, Int<kQueries>, Int<kHeadDim>>>(),
                              Layout<cute::Shape<_1, Int<kConsumers>, _1>>{}));
  // dK and dV: (keys, features), one warpgroup
  using MmaKV = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kBlockN>, Int<kFeatures>, Int<kBlockM>>,
                           GMMA::Major::K, GMMA::Major::MN>()));
  // dQ: (queries, features), one warpgroup
  using MmaQ = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kFeatures>, Int<kBlockN>>,
                           GMMA::Major::MN, GMMA::Major::MN>()));

  struct alignas(1024) Storage {
    alignas(1024) Element k[kBlockN * kHeadDim];
    alignas(1024) Element v[kBlockN * kHeadDim];  // later dV and dK on their way out
    alignas(1024) Element q[kStages * kBlockM * kHeadDim];
    alignas(1024) Element dout[kDoutStages * kBlockM * kHeadDim];
    alignas(1024) Element p[kBlockN * kBlockM];
    alignas(1024) Element ds[kBlockN * kBlockM];
    alignas(1024) float dq[kDqStages][kBlockM * kHeadDim / kDqRounds];
    BoxMask<kBlockM> mask;
    MovingTile q_tile[kStages];
    PlannedTile<kBlockN> plan[kPlannedTiles];
    typename PlannedTile<kBlockN>::Scratch plan_scratch;
    BoxRow q_row[kBlockM];
    alignas(16) float lse[kStages][kBlockM];  // times log2(e)
    alignas(16) float delta[kStages][kBlockM];
    Ring<1> ring_kv;
    Ring<kStages> ring_q;  // with lse, delta and bias
    Ring<kDoutStages> ring_dout;
    Ring<kDqStages> ring_dq;
    Ring<kPlannedTiles> ring_plan;
    Ring<1> ring_draw;
    DqBesideStorage<kHeadDim, !kBiased> beside;
  };
  using Bias = BiasSlices<kBlockN, kBlockM, kStages, bias_places(kHeadDim), Direction::kBackward>;
};

// ---- Consumers ----

template <class Tag, int kHeadDim, bool kBiased>
__device__ void multiply(SplitFeatures<Tag, kHeadDim, kBiased>,
                         typename SplitFeatures<Tag, kHeadDim, kBiased>::Storage& s,
                         const BwdKernelParams& p) {
  using Traits = SplitFeatures<Tag, kHeadDim, kBiased>;
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kBlockM, kN = Traits::kBlockN, kF = Traits::kFeatures;
  constexpr int kQueries = Traits::kQueries;
  // Known to be the same in a whole warp, descriptors stay in uniform registers.
  const int warpgroup = cutlass::canonical_warp_group_idx() - 1;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, quad = thread % 4;
  const int first_row = warp * 16 + lane / 4;  // and first_row + 8

  Tensor sK = make_tensor(make_smem_ptr(s.k), typename Traits::LayoutKV{});          // (N, D)
  Tensor sV = make_tensor(make_smem_ptr(s.v), typename Traits::LayoutKV{});          // (N, D)
  Tensor sQ = make_tensor(make_smem_ptr(s.q), typename Traits::LayoutQ{});           // (M, D, stage)
  Tensor sDout = make_tensor(make_smem_ptr(s.dout), typename Traits::LayoutDout{});  // (M, D, stage)
  // (D / 2, rows, 2 * stage + half)
  Tensor sKt = make_tensor(make_smem_ptr(s.k), typename Traits::template LayoutHalves<kN, 1>{});
  Tensor sQt = make_tensor(make_smem_ptr(s.q), typename Traits::template LayoutHalves<kM, Traits::kStages>{});
  Tensor sDoutT =
      make_tensor(make_smem_ptr(s.dout), typename Traits::template LayoutHalves<kM, Traits::kDoutStages>{});
  Tensor sP = make_tensor(make_smem_ptr(s.p), typename Traits::LayoutP{});     // (N, M)
  Tensor sDst = make_tensor(make_smem_ptr(s.ds), typename Traits::LayoutP{});  // (N, M)
  Tensor sDs = make_tensor(make_smem_ptr(s.ds), typename Traits::LayoutDs{});  // (M, N)
  typename Traits::MmaS mma_s;
  typename Traits::MmaKV mma_kv;
  typename Traits::MmaQ mma_q;
  auto thread_s = mma_s.get_slice(warpgroup * 128);
  auto thread_kv = mma_kv.get_slice(0);
  auto thread_q = mma_q.get_slice(0);
  Tensor tSrK = thread_s.partition_fragment_A(sK);
  Tensor tSrV = thread_s.partition_fragment_A(sV);
  Tensor tSrQ = thread_s.partition_fragment_B(sQ);
  Tensor tSrDout = thread_s.partition_fragment_B(sDout);
  Tensor tVrP = thread_kv.partition_fragment_A(sP);
  Tensor tKrDs = thread_kv.partition_fragment_A(sDst);
  Tensor tVrDout = thread_kv.partition_fragment_B(sDoutT);
  Tensor tKrQ = thread_kv.partition_fragment_B(sQt);
  Tensor tQrDs = thread_q.partition_fragment_A(sDs);
  Tensor tQrK = thread_q.partition_fragment_B(sKt);
  Tensor tSrS = partition_fragment_C(mma_s, cute::Shape<Int<kN>, Int<kM>>{});   // S^T, then P^T
  Tensor tSrDp = partition_fragment_C(mma_s, cute::Shape<Int<kN>, Int<kM>>{});  // dP^T, then dS^T
  Tensor tKrdK = partition_fragment_C(mma_kv, cute::Shape<Int<kN>, Int<kF>>{});
  Tensor tVrdV = partition_fragment_C(mma_kv, cute::Shape<Int<kN>, Int<kF>>{});
  Tensor scores = make_tensor(tSrS.data(), accumulator_rows_cols(tSrS.layout()));
  Tensor dprobs = make_tensor(tSrDp.data(), accumulator_rows_cols(tSrDp.layout()));

  const uint32_t p_at = transposed_at(s.p, warp, warpgroup * kQueries);
  const uint32_t ds_at = transposed_at(s.ds, warp, warpgroup * kQueries);
  const uint32_t dq_at = float_rows_at<kM>(s.dq[0], warp, warpgroup * kF / Traits::kDqRounds);

  RingIndex<1> at_kv;
  RingIndex<Traits::kDoutStages> at_dout;
  RingIndex<Traits::kDqStages> at_dq;
  RingIndex<kPlannedTiles> at_plan;
  RingIndex<Traits::kStages> at_q;

  while (true) {
    s.ring_plan.wait_full(at_plan);
    const PlannedTile<kN>& plan = s.plan[at_plan.stage];
    const int num_tiles = plan.num_tiles;
    if (num_tiles == 0) break;
    s.ring_kv.wait_full(at_kv);
    clear(tKrdK);
    clear(tVrdV);

    for (int n = 0; n < num_tiles; ++n) {
      s.ring_q.wait_full(at_q);
      issue_gemm<true>(mma_s, tSrK, tSrQ(_, _, _, at_q.stage), tSrS);
      s.ring_dout.wait_full(at_dout);
      issue_gemm<true>(mma_s, tSrV, tSrDout(_, _, _, at_dout.stage), tSrDp);
      const MovingTile tile = s.q_tile[at_q.stage];
      const float* lse_row = s.lse[at_q.stage] + warpgroup * kQueries;
      const float* delta_row = s.delta[at_q.stage] + warpgroup * kQueries;
      const bool masked = tile.tests != 0 || plan.cut;
      uint32_t visible[2];
      if (masked) visible_queries(visible, s.mask, p.q_box, tile, plan, first_row, quad);
      warpgroup_wait<1>();  // S
      if constexpr (kBiased) {
        bias_slices<Traits>().add(scores, at_q.stage, first_row, quad, p.bias.per_scale,
                                  warpgroup * kQueries);
      }

      // P^T = exp2(scale * S^T - lse)
      if (masked) {
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) mask_row(scores, i, visible[i] >> warpgroup * (kQueries / 4));
      }
      CUTE_UNROLL
      for (int j = 0; j < kQueries / 8; ++j) {
        const float2 lse = *reinterpret_cast<const float2*>(lse_row + 8 * j + 2 * quad);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          scores(i, 2 * j) = exp2_approx(scores(i, 2 * j) * p.scale_log2 - lse.x);
          scores(i, 2 * j + 1) = exp2_approx(scores(i, 2 * j + 1) * p.scale_log2 - lse.y);
        }
      }
      warpgroup_fence_operand(tSrS);  // keeps the exponentials above the wait, under the product dP
      warpgroup_wait<0>();            // dP
      CUTE_UNROLL
      for (int j = 0; j < kQueries / 8; ++j) {
        const float2 delta = *reinterpret_cast<const float2*>(delta_row + 8 * j + 2 * quad);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          dprobs(i, 2 * j) = scores(i, 2 * j) * (dprobs(i, 2 * j) - delta.x);
          dprobs(i, 2 * j + 1) = scores(i, 2 * j + 1) * (dprobs(i, 2 * j + 1) - delta.y);
        }
      }
      Tensor rP = make_tensor<Element>(accumulator_as_a(tSrS.layout()));
      Tensor rDs = make_tensor<Element>(accumulator_as_a(tSrS.layout()));
      Tensor p_view = make_tensor(tSrS.data(), rP.layout());
      Tensor ds_view = make_tensor(tSrDp.data(), rDs.layout());
      convert_to(p_view, rP);
      convert_to(ds_view, rDs);
      // The other warpgroup may still read what it was given for the tile before.
      cutlass::arch::NamedBarrier::sync(Traits::kConsumers * 128, kDsRead);
      store_transposed<kQueries>(p_at, rP);
      store_transposed<kQueries>(ds_at, rDs);
      cutlass::arch::fence_view_async_shared();
      cutlass::arch::NamedBarrier::sync(Traits::kConsumers * 128, kDsWritten);

      Tensor tQrdQ = partition_fragment_C(mma_q, cute::Shape<Int<kM>, Int<kF>>{});
      issue_gemm<true>(mma_q, tQrDs, tQrK(_, _, _, warpgroup), tQrdQ);
      issue_gemm<false>(mma_kv, tVrP, tVrDout(_, _, _, 2 * at_dout.stage + warpgroup), tVrdV);
      issue_gemm<false>(mma_kv, tKrDs, tKrQ(_, _, _, 2 * at_q.stage + warpgroup), tKrdK);
      warpgroup_wait<2>();  // dQ
      CUTE_UNROLL
      for (int round = 0; round < Traits::kDqRounds; ++round) {
        constexpr int kColumns = kF / Traits::kDqRounds;
        if (round == 1) {
          warpgroup_wait<1>();  // dV
          s.ring_dout.release(at_dout);
          at_dout.advance();
        }
        constexpr int kPerThread = kColumns / 2;  // registers: two rows, a quarter of the columns
        Tensor part = make_tensor(
            tQrdQ.data() + round * kPerThread,
            accumulator_rows_cols(Layout<cute::Shape<cute::Shape<_2, _2, Int<kColumns / 8>>, _1, _1>>{}));
        s.ring_dq.wait_empty(at_dq);
        store_float_rows<kM>(dq_at + at_dq.stage * sizeof(s.dq[0]), part);
        __syncwarp();
        if (lane == 0) s.ring_dq.arrive_full(at_dq);
        at_dq.advance();
      }
      warpgroup_wait<0>();  // dK
      s.ring_q.release(at_q);
      at_q.advance();
    }

    // Epilogue: both go through the V buffer, which nobody reads any more.
    cutlass::arch::NamedBarrier::sync(Traits::kConsumers * 128, kVRead);
    Element* staging = s.v + (warpgroup * 4 + warp) * 16 * kF;
    const int64_t* row = plan.row + warp * 16;
    Tensor dv = make_tensor(tVrdV.data(), accumulator_rows_cols(tVrdV.layout()));
    store_rows<kF>(staging, dv, row, static_cast<Element*>(p.dv_data), p.problem.dim_v, warpgroup * kF);
    Tensor dk = make_tensor(tKrdK.data(), accumulator_rows_cols(tKrdK.layout()));
    const float factor[2] = {p.scale, p.scale};
    scale_rows(dk, factor);
    store_rows<kF>(staging, dk, row, static_cast<Element*>(p.dk_data), p.problem.dim, warpgroup * kF);
    cutlass::arch::fence_view_async_shared();  // the next V comes through the async proxy
    __syncwarp();
    s.ring_kv.release(at_kv);
    at_kv.advance();
    s.ring_plan.release(at_plan);
    at_plan.advance();
  }
}

}  // namespace nearfield::gna
