// Gradients of keys, values and queries, head dims up to 128. A CTA holds one box of 128 keys, K and V in
// shared memory, dK and dV in the registers of two warpgroups (64 keys each), and walks over the boxes of 64
// queries whose neighborhoods meet it. All products are transposed, so that P^T and dS^T come out of the
// tensor cores in the register layout in which they are the left operand of the next product:
//   S^T = K Q^T, dP^T = V dO^T, P^T = exp2(S^T - lse), dS^T = P^T (dP^T - delta), dV += P^T dO, dK += dS^T Q.
// dS^T also goes through shared memory to give dQ = dS K, which is added to a float32 buffer in global memory
// by the copy engine (reduce-add of a box). Without that last part (deterministic mode) bwd_dq_sm90.cuh
// computes dQ.
#pragma once

#include "gna/key_stationary_sm90.cuh"
#include "gna/staging_sm90.cuh"

namespace nearfield::gna {

// ---- Layouts and storage ----

template <class Tag, int kHeadDim_, bool kBiased_>
struct SplitKeys : HeadTraits<Tag, kHeadDim_> {
  using Base = HeadTraits<Tag, kHeadDim_>;
  using typename Base::AtomK, typename Base::AtomMN, typename Base::Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr BwdTile kTile = bwd_tile(kHeadDim);
  static constexpr int kBlockM = kTile.kBlockM, kBlockN = kTile.kBlockN, kStages = kTile.kStages;
  static constexpr bool kBiased = kBiased_;
  static constexpr int kConsumers = kBlockN / 64;
  // Measured; at 32 neither was.
  static constexpr bool kTurns = kHeadDim == 64 || kHeadDim == 128, kTurnsOfDp = kHeadDim == 64;
  static constexpr int kDoutStages = kStages, kDqStages = 1, kDqRounds = 1;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr int kConsumerWarps = kConsumers * 4;
  // With 24 the producers spill, so they get more where the consumers can do with less.
  static constexpr bool kRoomy = kHeadDim <= 64 && kBlockM == 64;
  static constexpr int kProducerRegisters = kRoomy ? 56 : 24, kConsumerRegisters = kRoomy ? 224 : 240;
  static_assert(registers_fit(kProducerRegisters, kConsumerRegisters, kConsumers));
  static_assert(kConsumers == 2);
  // P and dS come in parts of 64 queries: those of 128 at once would not fit beside S and dP.
  static constexpr int kPart = 64, kParts = kBlockM / kPart;
  static_assert(kParts == 1 || (kParts == kConsumers && kHeadDim <= 64), "a part of Q must lie in one piece");
  // dQ: a part for each warpgroup, or half of the features of the only one.
  static constexpr int kDqFeatures = kHeadDim * kParts / kConsumers;
  // Where those begin in K: a chunk further at D = 128, else inside the chunk.
  static constexpr int kDqOffset = kHeadDim == 128 ? kBlockN * 64 : kDqFeatures % kHeadDim;

  using LayoutKV = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockN>, Int<kHeadDim>>{}));
  using LayoutQ = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockM>, Int<kHeadDim>, Int<kStages>>{}));
  using LayoutQt = decltype(tile_to_shape(
      AtomMN{}, cute::Shape<Int<kHeadDim>, Int<kPart>, Int<kStages * kParts>>{}, Step<_2, _1, _3>{}));
  using LayoutKt =
      decltype(tile_to_shape(AtomMN{}, cute::Shape<Int<chunk_of(kHeadDim)>, Int<kBlockN>>{}, Step<_2, _1>{}));
  // dS as left operand, (queries, keys) with queries contiguous.
  using LayoutDs = decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{},
                                          cute::Shape<Int<kPart>, Int<kBlockN>, Int<2 * kParts>>{}));

  using Rows2 = Layout<cute::Shape<Int<kConsumers>, _1, _1>>;
  // S^T and dP^T: (keys, queries)
  using MmaS = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kBlockN>, Int<kBlockM>, Int<kHeadDim>>>(),
      Rows2{}));
  // dK and dV: (keys, features)
  using MmaKV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, cute::Shape<Int<kBlockN>, Int<kHeadDim>, Int<kPart>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      Rows2{}));
  // dQ: (queries, features), one warpgroup
  using MmaQ = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kPart>, Int<kDqFeatures>, Int<kBlockN>>,
                           GMMA::Major::MN, GMMA::Major::MN>()));
  // The same on a whole chunk of K; gives the descriptors, whose layout does not depend on the columns used.
  static constexpr int kChunk = chunk_of(kHeadDim);
  using MmaChunk = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kPart>, Int<kChunk>, Int<kBlockN>>,
                           GMMA::Major::MN, GMMA::Major::MN>()));

  struct alignas(1024) Storage {
    alignas(1024) Element k[kBlockN * kHeadDim];
    alignas(1024) Element v[kBlockN * kHeadDim];  // later dV and dK on their way out
    alignas(1024) Element q[kStages * kBlockM * kHeadDim];
    alignas(1024) Element dout[kStages * kBlockM * kHeadDim];
    alignas(1024) Element ds[2][kBlockM * kBlockN];
    alignas(1024) float dq[kDqStages][kBlockM * kHeadDim];
    BoxMask<kBlockM> mask;
    MovingTile q_tile[kStages];
    PlannedTile<kBlockN> plan[kPlannedTiles];
    typename PlannedTile<kBlockN>::Scratch plan_scratch;
    BoxRow q_row[kBlockM];
    alignas(16) float lse[kStages][kBlockM];  // times log2(e)
    alignas(16) float delta[kStages][kBlockM];
    Ring<1> ring_kv;
    Ring<kStages> ring_q, ring_dout;  // q: with lse, delta and bias
    Ring<1> ring_dq;
    Ring<kPlannedTiles> ring_plan;
    Ring<1> ring_draw;
    DqBesideStorage<kHeadDim, !kBiased> beside;
  };
  using Bias = BiasSlices<kBlockN, kBlockM, kStages, bias_places(kHeadDim), Direction::kBackward>;
};

// ---- Consumers ----

template <class Tag, int kHeadDim, bool kBiased>
__device__ void multiply(SplitKeys<Tag, kHeadDim, kBiased>,
                         typename SplitKeys<Tag, kHeadDim, kBiased>::Storage& s, const BwdKernelParams& p) {
  using Traits = SplitKeys<Tag, kHeadDim, kBiased>;
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kBlockM, kN = Traits::kBlockN, kD = Traits::kHeadDim;
  constexpr int kPart = Traits::kPart, kParts = Traits::kParts;
  // Known to be the same in a whole warp, descriptors stay in uniform registers.
  const int warpgroup = cutlass::canonical_warp_group_idx() - 1;
  const int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32, quad = thread % 4;
  const int first_row = warp * 16 + lane / 4;  // and first_row + 8

  Tensor sK = make_tensor(make_smem_ptr(s.k), typename Traits::LayoutKV{});         // (N, D)
  Tensor sV = make_tensor(make_smem_ptr(s.v), typename Traits::LayoutKV{});         // (N, D)
  Tensor sQ = make_tensor(make_smem_ptr(s.q), typename Traits::LayoutQ{});          // (M, D, stage)
  Tensor sDout = make_tensor(make_smem_ptr(s.dout), typename Traits::LayoutQ{});    // (M, D, stage)
  Tensor sQt = make_tensor(make_smem_ptr(s.q), typename Traits::LayoutQt{});        // (D, part, stage)
  Tensor sDoutT = make_tensor(make_smem_ptr(s.dout), typename Traits::LayoutQt{});  // (D, part, stage)
  // One chunk of K seen as (features, N), from this warpgroup's first feature on.
  Tensor sKt = make_tensor(make_smem_ptr(s.k + warpgroup * Traits::kDqOffset), typename Traits::LayoutKt{});
  Tensor sDs =
      make_tensor(make_smem_ptr(s.ds[0]), typename Traits::LayoutDs{});  // (part, N, 2), part contiguous
  typename Traits::MmaS mma_s;
  typename Traits::MmaKV mma_kv;
  typename Traits::MmaQ mma_q;
  auto thread_s = mma_s.get_slice(warpgroup * 128);
  auto thread_kv = mma_kv.get_slice(warpgroup * 128);
  auto thread_q = mma_q.get_slice(0);
  Tensor tSrK = thread_s.partition_fragment_A(sK);
  Tensor tSrV = thread_s.partition_fragment_A(sV);
  Tensor tSrQ = thread_s.partition_fragment_B(sQ);
  Tensor tSrDout = thread_s.partition_fragment_B(sDout);
  Tensor tKrQ = thread_kv.partition_fragment_B(sQt);
  Tensor tVrDout = thread_kv.partition_fragment_B(sDoutT);
  Tensor tQrDs = thread_q.partition_fragment_A(sDs);
  typename Traits::MmaChunk mma_chunk;
  Tensor tQrK = mma_chunk.get_slice(0).partition_fragment_B(sKt);
  Tensor tSrS = partition_fragment_C(mma_s, cute::Shape<Int<kN>, Int<kM>>{});   // S^T, then P^T
  Tensor tSrDp = partition_fragment_C(mma_s, cute::Shape<Int<kN>, Int<kM>>{});  // dP^T, then dS^T
  Tensor tKrdK = partition_fragment_C(mma_kv, cute::Shape<Int<kN>, Int<kD>>{});
  Tensor tVrdV = partition_fragment_C(mma_kv, cute::Shape<Int<kN>, Int<kD>>{});
  Tensor rP = make_tensor<Element>(accumulator_as_a(tSrS.layout()));
  Tensor rDs = make_tensor<Element>(accumulator_as_a(tSrS.layout()));
  // A part of these: as the accumulator of a product with kPart columns, as rows and columns, as operand.
  using PartLayout = Layout<cute::Shape<cute::Shape<_2, _2, Int<kPart / 8>>, _1, _1>>;
  constexpr int kOfPart = size(PartLayout{});
  const auto rows_cols_of = [](auto& t, int part) {
    return make_tensor(t.data() + part * kOfPart, accumulator_rows_cols(PartLayout{}));
  };
  const auto operand_of = [](auto& t, int part) {
    return make_tensor(t.data() + part * kOfPart, accumulator_as_a(PartLayout{}));
  };
  // Which part of dQ, or which of its features.
  const int own_part = kParts > 1 ? warpgroup : 0;
  const uint32_t ds_at = transposed_at(s.ds[0], warp, 0);
  const uint32_t dq_at =
      float_rows_at<kM>(s.dq[0], own_part * 4 + warp % 4, kParts > 1 ? 0 : warpgroup * Traits::kDqFeatures);

  RingIndex<1> at_kv, at_dq;
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

    const int cut = plan.cut;
    for (int n = 0; n < num_tiles; ++n) {
      s.ring_q.wait_full(at_q);
      s.ring_dout.wait_full(at_q);
      // Shared memory answers late under the products: what is needed behind S is asked for before it.
      const MovingTile tile = s.q_tile[at_q.stage];
      float2 stat[kPart / 8];  // lse, then delta, of a part
      const float* const lse_at = s.lse[at_q.stage] + 2 * quad;
      const float* const delta_at = s.delta[at_q.stage] + 2 * quad;
      const auto read_stat = [&](int j, const float* from) {
        stat[j] = *reinterpret_cast<const float2*>(from + 8 * j);
      };
      CUTE_UNROLL
      for (int j = 0; j < kPart / 8; ++j) read_stat(j, lse_at);
      // One warpgroup's products before the other's, so that its exponentials run under those.
      if (Traits::kTurns && warpgroup == 1) {
        cutlass::arch::NamedBarrier::sync(Traits::kConsumers * 128, kFirstS);
      }
      issue_gemm<true>(mma_s, tSrK, tSrQ(_, _, _, at_q.stage), tSrS);
      if (Traits::kTurns && warpgroup == 0) {
        cutlass::arch::NamedBarrier::arrive(Traits::kConsumers * 128, kFirstS);
      }
      if (Traits::kTurnsOfDp && warpgroup == 1) {
        cutlass::arch::NamedBarrier::sync(Traits::kConsumers * 128, kFirstDp);
      }
      issue_gemm<true>(mma_s, tSrV, tSrDout(_, _, _, at_q.stage), tSrDp);
      if (Traits::kTurnsOfDp && warpgroup == 0) {
        cutlass::arch::NamedBarrier::arrive(Traits::kConsumers * 128, kFirstDp);
      }
      // What the mask needs is looked up under S.
      const bool masked = (tile.tests | cut) != 0;
      uint32_t visible[2];
      if (masked) visible_queries(visible, s.mask, p.q_box, tile, plan, first_row, quad);
      warpgroup_wait<1>();  // S
      if constexpr (kBiased) {
        Tensor scores = make_tensor(tSrS.data(), accumulator_rows_cols(tSrS.layout()));
        bias_slices<Traits>().add(scores, at_q.stage, first_row, quad, p.bias.per_scale);
      }

      CUTE_UNROLL
      for (int part = 0; part < kParts; ++part) {
        // P^T = exp2(scale * S^T - lse), under dP or the part before
        Tensor scores = rows_cols_of(tSrS, part);
        if (masked) {
          CUTE_UNROLL
          for (int i = 0; i < 2; ++i) mask_row(scores, i, visible[i] >> part * (kPart / 4));
        }
        CUTE_UNROLL
        for (int j = 0; j < kPart / 8; ++j) {
          CUTE_UNROLL
          for (int i = 0; i < 2; ++i) {
            scores(i, 2 * j) = exp2_approx(scores(i, 2 * j) * p.scale_log2 - stat[j].x);
            scores(i, 2 * j + 1) = exp2_approx(scores(i, 2 * j + 1) * p.scale_log2 - stat[j].y);
          }
          read_stat(j, delta_at + part * kPart);
        }
        Tensor tVrP = operand_of(rP, part);
        convert_to(operand_of(tSrS, part), tVrP);
        // Before the wait for dP, which the exponentials would otherwise sink below.
        issue_gemm<false>(mma_kv, tVrP, tVrDout(_, _, _, at_q.stage * kParts + part), tVrdV);
        if (part == 0) warpgroup_wait<1>();  // dP

        // dS^T = P^T (dP^T - delta), under dV; the scale follows at the end.
        Tensor dprobs = rows_cols_of(tSrDp, part);
        CUTE_UNROLL
        for (int j = 0; j < kPart / 8; ++j) {
          CUTE_UNROLL
          for (int i = 0; i < 2; ++i) {
            dprobs(i, 2 * j) = scores(i, 2 * j) * (dprobs(i, 2 * j) - stat[j].x);
            dprobs(i, 2 * j + 1) = scores(i, 2 * j + 1) * (dprobs(i, 2 * j + 1) - stat[j].y);
          }
          if (part + 1 < kParts) read_stat(j, lse_at + (part + 1) * kPart);
        }
        Tensor tKrDs = operand_of(rDs, part);
        convert_to(operand_of(tSrDp, part), tKrDs);
        // Two dS buffers: this one was last read two tiles ago, before the barrier of the tile between.
        store_transposed<kPart>(ds_at + (n % 2 * kParts + part) * (kPart * kN * sizeof(Element)), tKrDs);
      }
      cutlass::arch::NamedBarrier::sync(Traits::kConsumers * 128, kDsWritten);
      cutlass::arch::fence_view_async_shared();

      Tensor tQrdQ = partition_fragment_C(mma_q, cute::Shape<Int<kPart>, Int<Traits::kDqFeatures>>{});
      issue_gemm<true>(mma_q, tQrDs(_, _, _, n % 2 * kParts + own_part), tQrK, tQrdQ);
      CUTE_UNROLL
      for (int part = 0; part < kParts; ++part) {
        issue_gemm<false>(mma_kv, operand_of(rDs, part), tKrQ(_, _, _, at_q.stage * kParts + part), tKrdK);
      }
      s.ring_dq.wait_empty(at_dq);
      warpgroup_wait<kParts>();  // dV, dQ
      s.ring_dout.release(at_q);
      Tensor dq = make_tensor(tQrdQ.data(), accumulator_rows_cols(tQrdQ.layout()));
      store_float_rows<kM>(dq_at, dq);
      __syncwarp();
      if (lane == 0) s.ring_dq.arrive_full(at_dq);
      at_dq.advance();
      warpgroup_wait<0>();  // dK
      s.ring_q.release(at_q);
      at_q.advance();
    }

    // Epilogue: both go through the V buffer, which nobody reads any more.
    cutlass::arch::NamedBarrier::sync(Traits::kConsumers * 128, kVRead);
    Element* staging = s.v + warp * 16 * kD;
    Tensor dv = make_tensor(tVrdV.data(), accumulator_rows_cols(tVrdV.layout()));
    store_rows<kD>(staging, dv, plan.row + warp * 16, static_cast<Element*>(p.dv_data), p.problem.dim_v);
    Tensor dk = make_tensor(tKrdK.data(), accumulator_rows_cols(tKrdK.layout()));
    const float factor[2] = {p.scale, p.scale};
    scale_rows(dk, factor);
    store_rows<kD>(staging, dk, plan.row + warp * 16, static_cast<Element*>(p.dk_data), p.problem.dim);
    cutlass::arch::fence_view_async_shared();  // the next V comes through the async proxy
    __syncwarp();
    s.ring_kv.release(at_kv);
    at_kv.advance();
    s.ring_plan.release(at_plan);
    at_plan.advance();
  }
}

}  // namespace nearfield::gna
