// Gradients of neighborhood attention on Hopper, keys staying. A CTA holds one box of 128 keys, K and V in
// shared memory, dK and dV in the registers of two warpgroups (64 keys each), and walks over the boxes of 64
// queries whose neighborhoods meet it. All products are transposed, so that P^T and dS^T come out of the
// tensor cores in the register layout in which they are the left operand of the next product:
//   S^T = K Q^T, dP^T = V dO^T, P^T = exp2(S^T - lse), dS^T = P^T (dP^T - delta), dV += P^T dO, dK += dS^T Q.
// dS^T also goes through shared memory to give dQ = dS K, which is added to a float32 buffer in global memory
// by the copy engine (reduce-add of a box). Without that last part (deterministic mode) bwd_dq_sm90.cuh
// computes dQ. Roles of the producer warpgroup: warp 0 loads, warp 1 adds dQ, warp 2 gathers lse and delta,
// warp 3 plans.
#pragma once

#include "gna/plan_sm90.cuh"
#include "gna/staging_sm90.cuh"
#include "gna/traits_sm90.cuh"

namespace nearfield::gna {

// ---- Layouts and storage ----

template <class Tag, int kHeadDim_>
struct BwdTraits : HeadTraits<Tag, kHeadDim_> {
  using Base = HeadTraits<Tag, kHeadDim_>;
  using typename Base::AtomK, typename Base::AtomMN, typename Base::Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr BwdTile kTile = bwd_tile(kHeadDim);
  static constexpr int kBlockM = kTile.kBlockM, kBlockN = kTile.kBlockN, kStages = kTile.kStages;
  static constexpr int kConsumers = kBlockN / 64;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(registers_fit(kProducerRegisters, kConsumerRegisters, kConsumers));
  static_assert(kBlockM == 64 && kConsumers == 2);
  // dQ is one 64-row product per query tile; each warpgroup computes half of the features.
  static constexpr int kDqFeatures = kHeadDim / kConsumers;
  // Where those begin in K: a chunk further at D = 128, else inside the chunk.
  static constexpr int kDqOffset = kHeadDim == 128 ? kBlockN * 64 : kDqFeatures;

  using LayoutKV = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockN>, Int<kHeadDim>>{}));
  using LayoutQ = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockM>, Int<kHeadDim>, Int<kStages>>{}));
  using LayoutQt = decltype(tile_to_shape(AtomMN{}, cute::Shape<Int<kHeadDim>, Int<kBlockM>, Int<kStages>>{},
                                          Step<_2, _1, _3>{}));
  using LayoutKt =
      decltype(tile_to_shape(AtomMN{}, cute::Shape<Int<chunk_of(kHeadDim)>, Int<kBlockN>>{}, Step<_2, _1>{}));
  // dS as left operand, (queries, keys) with queries contiguous.
  using LayoutDs = decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{},
                                          cute::Shape<Int<kBlockM>, Int<kBlockN>, _2>{}));

  using Rows2 = Layout<cute::Shape<Int<kConsumers>, _1, _1>>;
  // S^T and dP^T: (keys, queries)
  using MmaS = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kBlockN>, Int<kBlockM>, Int<kHeadDim>>>(),
      Rows2{}));
  // dK and dV: (keys, features)
  using MmaKV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, cute::Shape<Int<kBlockN>, Int<kHeadDim>, Int<kBlockM>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      Rows2{}));
  // dQ: (queries, features), one warpgroup
  using MmaQ = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kDqFeatures>, Int<kBlockN>>,
                           GMMA::Major::MN, GMMA::Major::MN>()));
  // The same on a whole chunk of K; gives the descriptors, whose layout does not depend on the columns used.
  static constexpr int kChunk = chunk_of(kHeadDim);
  using MmaChunk = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kChunk>, Int<kBlockN>>,
                           GMMA::Major::MN, GMMA::Major::MN>()));

  struct alignas(1024) Storage {
    alignas(1024) Element k[kBlockN * kHeadDim];
    alignas(1024) Element v[kBlockN * kHeadDim];  // later dV and dK on their way out
    alignas(1024) Element q[kStages * kBlockM * kHeadDim];
    alignas(1024) Element dout[kStages * kBlockM * kHeadDim];
    alignas(1024) Element ds[2][kBlockM * kBlockN];
    alignas(1024) float dq[kBlockM * kHeadDim];
    BoxMask<kBlockM> mask;
    MovingTile q_tile[kStages];
    PlannedTile<kBlockN> plan[kPlannedTiles];
    alignas(16) float lse[kStages][kBlockM];  // times log2(e)
    alignas(16) float delta[kStages][kBlockM];
    Ring<1> ring_kv;
    Ring<kStages> ring_q, ring_dout, ring_stats;
    Ring<1> ring_dq;
    Ring<kPlannedTiles> ring_plan;
    Ring<1> ring_draw;
  };
  static_assert(sizeof(Storage) <= 226 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

struct BwdMaps {
  CUtensorMap q, k, v, dout, dq;
};

struct BwdKernelParams {
  Problem problem;
  Schedule schedule;
  Box q_box, kv_box;
  TokenMap fold_q, fold_k, fold_v, fold_dout;
  float scale, scale_log2;
  int64_t batch_offset;
  Tokens<const RowStats> stats;  // [B, X, H]
  Tokens<void> kv_rows;          // strides of [B, X, Hkv] in rows of dk and dv
  void *dk_data, *dv_data;
  bool with_dq;
  int* next_work;
};

enum BwdBarrier : int { kDsWritten = 1, kVRead = 2 };

// ---- Producer warps ----

template <class Traits>
__device__ void bwd_load(typename Traits::Storage& s, const BwdMaps& maps, const BwdKernelParams& p) {
  constexpr int kD = Traits::kHeadDim, kM = Traits::kBlockM, kN = Traits::kBlockN;
  const uint32_t q_bytes = p.q_box.volume() * kD * 2, kv_bytes = p.kv_box.volume() * kD * 2;
  const int group_size = static_cast<int>(p.problem.heads_per_kv());
  const bool box_fills_block = p.q_box.volume() == kM;
  RingIndex<1> at_kv;
  RingIndex<Traits::kStages> at_q;

  follow_plan(s, [&](const StayingTile& tile) {
    if (threadIdx.x != 0) return;
    int x[3];
    tile.position(p.problem, tile.first, x);
    s.ring_kv.wait_empty(at_kv);
    s.ring_kv.expect_bytes(at_kv, 2 * kv_bytes);
    load_box<kD, kN>(maps.k, p.fold_k, &s.ring_kv.full[0], s.k, x, tile.head, tile.batch);
    load_box<kD, kN>(maps.v, p.fold_v, &s.ring_kv.full[0], s.v, x, tile.head, tile.batch);
    at_kv.advance();
    int left = tile.num_visits() * group_size;
    allow_draw(s, left, left);
    for (int g = 0; g < group_size; ++g) {
      const int head = tile.head * group_size + g;
      for (TileCounter counter; counter.n[0] < tile.visits[0].count; counter.advance(tile)) {
        allow_draw(s, --left, left + 1);
        int first[3];
        uint32_t tests = box_fills_block ? 0 : kTestBox;
#pragma unroll
        for (int d = 0; d < 3; ++d) {
          first[d] = tile.visits[d].origin + counter.n[d] * p.q_box.side[d];
          if (!tile.visits[d].is_full(counter.n[d])) tests |= kTestDim0 << d;
        }
        tile.position(p.problem, first, x);
        s.ring_q.wait_empty(at_q);
        s.q_tile[at_q.stage] = {{first[0], first[1], first[2]}, tests};
        s.ring_q.expect_bytes(at_q, q_bytes);
        load_box<kD, kM>(maps.q, p.fold_q, &s.ring_q.full[at_q.stage], s.q + at_q.stage * kM * kD, x, head,
                         tile.batch);
        s.ring_dout.wait_empty(at_q);
        s.ring_dout.expect_bytes(at_q, q_bytes);
        load_box<kD, kM>(maps.dout, p.fold_dout, &s.ring_dout.full[at_q.stage], s.dout + at_q.stage * kM * kD,
                         x, head, tile.batch);
        at_q.advance();
      }
    }
  });
}

// Calls visit(tile, head, first query of the box) for every query tile that bwd_load loads.
template <class Storage, class Visit>
__device__ __forceinline__ void follow_queries(Storage& s, const BwdKernelParams& p, const Visit& visit) {
  const int group_size = static_cast<int>(p.problem.heads_per_kv());
  follow_plan(s, [&](const StayingTile& tile) {
    for (int g = 0; g < group_size; ++g) {
      for (TileCounter counter; counter.n[0] < tile.visits[0].count; counter.advance(tile)) {
        int first[3];
#pragma unroll
        for (int d = 0; d < 3; ++d) first[d] = tile.visits[d].origin + counter.n[d] * p.q_box.side[d];
        visit(tile, tile.head * group_size + g, first);
      }
    }
  });
}

template <class Traits>
__device__ void bwd_gather_stats(typename Traits::Storage& s, const BwdKernelParams& p) {
  constexpr int kM = Traits::kBlockM;
  const int lane = threadIdx.x % 32;
  RingIndex<Traits::kStages> at;
  follow_queries(s, p, [&](const StayingTile& tile, int head, const int (&first)[3]) {
    RowStats value[kM / 32];
#pragma unroll
    for (int i = 0; i < kM / 32; ++i) {
      const int row = lane + 32 * i, outer = row / p.q_box.side[2];
      const int c[3] = {outer / p.q_box.side[1], outer % p.q_box.side[1], row % p.q_box.side[2]};
      bool inside = c[0] < p.q_box.side[0];
      int64_t at_token = (tile.batch + p.batch_offset) * p.stats.batch + head * p.stats.head;
#pragma unroll
      for (int d = 0; d < 3; ++d) {
        inside &= first[d] + c[d] < tile.window[d].length;
        at_token +=
            (tile.group[d] + static_cast<int64_t>(p.problem.dilation[d]) * (first[d] + c[d])) * p.stats.x[d];
      }
      // A query beyond the grid: exp2(anything - inf) = 0.
      value[i] = inside ? p.stats.data[at_token] : RowStats{INFINITY, 0.f};
    }
    s.ring_stats.wait_empty(at);
#pragma unroll
    for (int i = 0; i < kM / 32; ++i) {
      s.lse[at.stage][lane + 32 * i] = value[i].lse;
      s.delta[at.stage][lane + 32 * i] = value[i].delta;
    }
    __syncwarp();
    if (lane == 0) s.ring_stats.arrive_full(at);
    at.advance();
  });
}

template <class Traits>
__device__ void bwd_add_dq(typename Traits::Storage& s, const BwdMaps& maps, const BwdKernelParams& p) {
  constexpr int kChunk = 32;  // floats in a 128-byte swizzle span
  RingIndex<1> at;
  follow_queries(s, p, [&](const StayingTile& tile, int head, const int (&first)[3]) {
    s.ring_dq.wait_full(at);
    if (p.with_dq && threadIdx.x % 32 == 0) {
      // The buffer is [batch, head, group] x [group grid] x [features]: see DqBuffer.
      const int groups = p.problem.dilation[0] * p.problem.dilation[1] * p.problem.dilation[2];
      const int group =
          (tile.group[0] * p.problem.dilation[1] + tile.group[1]) * p.problem.dilation[2] + tile.group[2];
      const int outer = static_cast<int>((tile.batch * p.problem.heads + head) * groups) + group;
#pragma unroll
      for (int c = 0; c < Traits::kHeadDim / kChunk; ++c) {
        if (c * kChunk < p.problem.dim) {  // features that the compiled head dim adds do not exist
          cute::SM90_TMA_REDUCE_ADD_5D::copy(&maps.dq, s.dq + c * Traits::kBlockM * kChunk, c * kChunk,
                                             first[2], first[1], first[0], outer);
        }
      }
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
    __syncwarp();
    s.ring_dq.release(at);
    at.advance();
  });
}

// ---- Consumers ----

template <class Traits>
__device__ void bwd_multiply(typename Traits::Storage& s, const BwdKernelParams& p) {
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kBlockM, kN = Traits::kBlockN, kD = Traits::kHeadDim;
  const int thread = threadIdx.x - 128, warpgroup = thread / 128, warp = thread / 32, lane = thread % 32,
            quad = thread % 4;
  const int first_row = warp * 16 + lane / 4;  // and first_row + 8

  Tensor sK = make_tensor(make_smem_ptr(s.k), typename Traits::LayoutKV{});         // (N, D)
  Tensor sV = make_tensor(make_smem_ptr(s.v), typename Traits::LayoutKV{});         // (N, D)
  Tensor sQ = make_tensor(make_smem_ptr(s.q), typename Traits::LayoutQ{});          // (M, D, stage)
  Tensor sDout = make_tensor(make_smem_ptr(s.dout), typename Traits::LayoutQ{});    // (M, D, stage)
  Tensor sQt = make_tensor(make_smem_ptr(s.q), typename Traits::LayoutQt{});        // (D, M, stage)
  Tensor sDoutT = make_tensor(make_smem_ptr(s.dout), typename Traits::LayoutQt{});  // (D, M, stage)
  // One chunk of K seen as (features, N), from this warpgroup's first feature on.
  Tensor sKt = make_tensor(make_smem_ptr(s.k + warpgroup * Traits::kDqOffset), typename Traits::LayoutKt{});
  Tensor sDs = make_tensor(make_smem_ptr(s.ds[0]), typename Traits::LayoutDs{});  // (M, N, 2), M contiguous
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
  Tensor scores = make_tensor(tSrS.data(), accumulator_rows_cols(tSrS.layout()));
  Tensor dprobs = make_tensor(tSrDp.data(), accumulator_rows_cols(tSrDp.layout()));
  Tensor rP = make_tensor<Element>(accumulator_as_a(tSrS.layout()));
  Tensor rDs = make_tensor<Element>(accumulator_as_a(tSrS.layout()));

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

    for (int n = 0; n < num_tiles; ++n) {
      s.ring_q.wait_full(at_q);
      issue_gemm<true>(mma_s, tSrK, tSrQ(_, _, _, at_q.stage), tSrS);
      s.ring_dout.wait_full(at_q);
      issue_gemm<true>(mma_s, tSrV, tSrDout(_, _, _, at_q.stage), tSrDp);
      s.ring_stats.wait_full(at_q);
      const MovingTile tile = s.q_tile[at_q.stage];
      warpgroup_wait<1>();  // S

      // P^T = exp2(scale * S^T - lse)
      if (tile.tests != 0 || plan.cut) {
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          // Rows beyond the grid hold zeros; their P must not become inf, which makes NaN of 0 in dQ.
          uint32_t visible = plan.row[first_row + 8 * i] < 0 ? 0u : s.mask.columns(p.q_box, quad);
          CUTE_UNROLL
          for (int d = 0; d < 3; ++d) {
            if (!(tile.tests & kTestDim0 << d)) continue;
            const Range seen_by = plan.range[first_row + 8 * i][d];
            visible &=
                s.mask.interval(p.q_box, d, seen_by.begin - tile.first[d], seen_by.end - tile.first[d], quad);
          }
          mask_row(scores, i, visible);
        }
      }
      CUTE_UNROLL
      for (int j = 0; j < kM / 8; ++j) {
        const float2 lse = *reinterpret_cast<const float2*>(&s.lse[at_q.stage][8 * j + 2 * quad]);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          scores(i, 2 * j) = exp2_approx(scores(i, 2 * j) * p.scale_log2 - lse.x);
          scores(i, 2 * j + 1) = exp2_approx(scores(i, 2 * j + 1) * p.scale_log2 - lse.y);
        }
      }
      Tensor p_view = make_tensor(tSrS.data(), rP.layout());
      convert_to(p_view, rP);
      warpgroup_fence_operand(rP);  // keeps the exponentials above the wait, under the product dP
      warpgroup_wait<0>();          // dP
      issue_gemm<false>(mma_kv, rP, tVrDout(_, _, _, at_q.stage), tVrdV);

      // dS^T = P^T (dP^T - delta), under dV; the scale follows at the end.
      CUTE_UNROLL
      for (int j = 0; j < kM / 8; ++j) {
        const float2 delta = *reinterpret_cast<const float2*>(&s.delta[at_q.stage][8 * j + 2 * quad]);
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          dprobs(i, 2 * j) = scores(i, 2 * j) * (dprobs(i, 2 * j) - delta.x);
          dprobs(i, 2 * j + 1) = scores(i, 2 * j + 1) * (dprobs(i, 2 * j + 1) - delta.y);
        }
      }
      Tensor ds_view = make_tensor(tSrDp.data(), rDs.layout());
      convert_to(ds_view, rDs);
      s.ring_stats.release(at_q);
      // Two dS buffers: this one was last read two tiles ago, before the barrier of the tile between.
      store_transposed(s.ds[n % 2], rDs, warp);
      cutlass::arch::fence_view_async_shared();
      cutlass::arch::NamedBarrier::sync(Traits::kConsumers * 128, kDsWritten);

      Tensor tQrdQ = partition_fragment_C(mma_q, cute::Shape<Int<kM>, Int<Traits::kDqFeatures>>{});
      issue_gemm<true>(mma_q, tQrDs(_, _, _, n % 2), tQrK, tQrdQ);
      issue_gemm<false>(mma_kv, rDs, tKrQ(_, _, _, at_q.stage), tKrdK);
      s.ring_dq.wait_empty(at_dq);
      warpgroup_wait<1>();  // dV, dQ
      s.ring_dout.release(at_q);
      Tensor dq = make_tensor(tQrdQ.data(), accumulator_rows_cols(tQrdQ.layout()));
      store_float_rows<kM>(s.dq, dq, warp % 4, warpgroup * Traits::kDqFeatures);
      cutlass::arch::fence_view_async_shared();
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

// ---- Kernel and launch ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bwd_kernel(const __grid_constant__ BwdMaps maps, const __grid_constant__ BwdKernelParams p) {
  auto& s = shared_storage<typename Traits::Storage>();
  if (threadIdx.x == 0) {
    if (cast_smem_ptr_to_uint(&s) % kStorageAlignment != 0) __trap();
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.dout, &maps.dq}) prefetch_map(*map);
    s.ring_kv.init(1, Traits::kConsumerWarps);
    s.ring_q.init(1, Traits::kConsumerWarps);
    s.ring_dout.init(1, Traits::kConsumerWarps);
    s.ring_stats.init(1, Traits::kConsumerWarps);
    s.ring_dq.init(Traits::kConsumerWarps, 1);
    s.ring_draw.init(1, 1);
    s.ring_plan.init(1, Traits::kConsumerWarps + 3);  // and three producer warps
    cutlass::arch::fence_barrier_init();
  }
  s.mask.build(p.q_box, threadIdx.x, Traits::kThreads);
  if (p.q_box.volume() != Traits::kBlockM || p.kv_box.volume() != Traits::kBlockN) {
    fill_zero(&s, offsetof(typename Traits::Storage, ds), Traits::kThreads);
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) bwd_load<Traits>(s, maps, p);
    if (warp == 1) bwd_add_dq<Traits>(s, maps, p);
    if (warp == 2) bwd_gather_stats<Traits>(s, p);
    if (warp == 3) {
      plan_tiles_of_cta<Direction::kBackward>(s, p, p.kv_box, p.q_box, p.kv_rows,
                                              static_cast<int>(p.problem.heads_per_kv()), 0);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    bwd_multiply<Traits>(s, p);
  }
}

template <class Tag, int kHeadDim>
int bwd_sm90<Tag, kHeadDim>::run(const BwdSm90Args& a, void* stream_) {
  using Traits = BwdTraits<Tag, kHeadDim>;
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  constexpr int kShared = sizeof(typename Traits::Storage);
  static const cudaError_t attribute = allow_shared_memory(bwd_kernel<Traits>, kShared);
  if (attribute != cudaSuccess) return attribute;
  const auto stream = static_cast<cudaStream_t>(stream_);

  BwdMaps maps{};
  BwdKernelParams p{};
  const Problem& problem = a.problem;
  p.problem = problem;
  p.q_box = a.q_box;
  p.kv_box = a.kv_box;
  p.scale = a.scale;
  p.scale_log2 = a.scale * 1.44269504088896341f;
  p.stats = a.stats;
  p.dk_data = a.dk.data;
  p.dv_data = a.dv.data;
  p.kv_rows = {nullptr, a.dk.batch / problem.dim, {}, a.dk.head / problem.dim};
  for (int d = 0; d < 3; ++d) p.kv_rows.x[d] = a.dk.x[d] / problem.dim;
  p.with_dq = a.dq != nullptr;
  p.next_work = a.next_work;
  const Launches launches(problem, kHeadDim);
  p.problem.batch = launches.batch;
  p.schedule = a.to_additional ? Schedule(p.problem, static_cast<int>(problem.additional), Traits::kBlockN,
                                          problem.heads_kv)
                               : Schedule(p.problem, a.kv_box, problem.heads_kv);
  if (p.schedule.total > std::numeric_limits<int>::max() / 2) return cudaErrorInvalidConfiguration;
  if (a.to_additional) p.kv_box = Box{{1, 1, Traits::kBlockN}};
  const DqBuffer buffer(p.problem);
  for (int64_t b = 0; b < launches.count; ++b) {
    const TokenEncoder encode{launches, b, kBf16, kHeadDim, problem};
    cudaError_t e = encode(&maps.q, &p.fold_q, a.q, problem.dim, problem.heads, a.q_box);
    if (e == cudaSuccess) e = encode(&maps.dout, &p.fold_dout, a.dout, problem.dim_v, problem.heads, a.q_box);
    if (e == cudaSuccess) {
      e = a.to_additional ? encode.line(&maps.k, &p.fold_k, a.add_k, problem.dim, Traits::kBlockN)
                          : encode(&maps.k, &p.fold_k, a.k, problem.dim, problem.heads_kv, a.kv_box);
    }
    if (e == cudaSuccess) {
      e = a.to_additional ? encode.line(&maps.v, &p.fold_v, a.add_v, problem.dim_v, Traits::kBlockN)
                          : encode(&maps.v, &p.fold_v, a.v, problem.dim_v, problem.heads_kv, a.kv_box);
    }
    if (e == cudaSuccess && p.with_dq) {
      TmaTensor dq{};
      dq.data = a.dq + b * buffer.elements;
      dq.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
      dq.element_bytes = 4;
      dq.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
      const int64_t sizes[5] = {problem.dim, buffer.size[2], buffer.size[1], buffer.size[0],
                                launches.batch * problem.heads * problem.groups()};
      const int box[5] = {32, a.q_box.side[2], a.q_box.side[1], a.q_box.side[0], 1};
      int64_t stride = 1;
      for (int i = 0; i < 5; ++i) {
        dq.size[i] = static_cast<uint64_t>(sizes[i]);
        dq.stride[i] = stride;
        dq.box[i] = static_cast<uint32_t>(box[i]);
        dq.step[i] = 1;
        stride *= sizes[i];
      }
      e = encode_tma(&maps.dq, dq);
    }
    if (e == cudaSuccess) e = cudaMemsetAsync(a.next_work, 0, sizeof(int), stream);
    if (e != cudaSuccess) return e;
    p.batch_offset = b;
    const int grid = static_cast<int>(std::min<int64_t>(p.schedule.total, a.num_sms));
    bwd_kernel<Traits><<<grid, Traits::kThreads, kShared, stream>>>(maps, p);
    e = cudaGetLastError();
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace nearfield::gna
