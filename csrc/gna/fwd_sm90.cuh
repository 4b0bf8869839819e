// Neighborhood attention forward on Hopper. One producer warp streams boxes of K and V with the bulk tensor
// copy engine straight from the natural token layout; two warpgroups of consumers hold 64 query rows each and
// take turns on the tensor cores (while one multiplies, the other does softmax). Inside a warpgroup the
// product S of the next key tile is issued before O += P V of the current one, so softmax overlaps both.
// Persistent CTAs draw query tiles from a counter. Plan, budget and measurements: README.md.
#pragma once

#include "gna/plan_sm90.cuh"
#include "gna/staging_sm90.cuh"
#include "gna/traits_sm90.cuh"

namespace nearfield::gna {

// ---- Layouts and storage ----

template <class Tag, int kHeadDim_>
struct FwdTraits : HeadTraits<Tag, kHeadDim_> {
  using Base = HeadTraits<Tag, kHeadDim_>;
  using typename Base::AtomK, typename Base::AtomMN, typename Base::Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr FwdTile kTile = fwd_tile(kHeadDim);
  static constexpr int kBlockM = kTile.kBlockM, kBlockN = kTile.kBlockN, kStages = kTile.kStages;
  static constexpr int kConsumers = kBlockM / 64;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(registers_fit(kProducerRegisters, kConsumerRegisters, kConsumers));

  using LayoutQ = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockM>, Int<kHeadDim>>{}));
  using LayoutK = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockN>, Int<kHeadDim>, Int<kStages>>{}));
  // V seen as the B operand of P V: (D, keys), D contiguous.
  using LayoutVt = decltype(tile_to_shape(AtomMN{}, cute::Shape<Int<kHeadDim>, Int<kBlockN>, Int<kStages>>{},
                                          Step<_2, _1, _3>{}));

  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kBlockN>, Int<kHeadDim>>>(),
      Layout<cute::Shape<Int<kConsumers>, _1, _1>>{}));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kHeadDim>, Int<kBlockN>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      Layout<cute::Shape<Int<kConsumers>, _1, _1>>{}));

  struct alignas(1024) Storage {
    alignas(1024) Element q[kBlockM * kHeadDim];
    alignas(1024) Element k[kStages * kBlockN * kHeadDim];
    alignas(1024) Element v[kStages * kBlockN * kHeadDim];
    alignas(1024) Element o[kTile.kOwnOutput ? kBlockM * kHeadDim : 64];
    BoxMask<kBlockN> mask;
    MovingTile key_tile[kStages];
    PlannedTile<kBlockM> plan[kPlannedTiles];
    Ring<1> ring_q;
    Ring<kStages> ring_k, ring_v;
    Ring<kPlannedTiles> ring_plan;
    Ring<1> ring_draw;
  };
  static_assert(sizeof(Storage) <= 227 * 1024 - 1024, "a Hopper CTA has 227 KB of shared memory");
};

struct FwdMaps {
  CUtensorMap q, k, v, add_k, add_v;
};

struct FwdKernelParams {
  Problem problem;
  Schedule schedule;
  Box q_box, kv_box;
  TokenMap fold_q, fold_k, fold_v, fold_add_k, fold_add_v;
  float scale_log2;
  int64_t batch_offset;  // of a launch that handles one batch entry (split folding of 3-D problems)
  void* out;             // [B, X, H, Dv], contiguous but for the dilation of a launch per group
  Tokens<float> lse;     // [B, X, H]: its strides count rows of `out` too
  int* next_work;
};

// Named barriers; 0 belongs to __syncthreads.
enum FwdBarrier : int { kTurn0 = 1 };  // kTurn0 + g: warpgroup g may issue to the tensor cores

// ---- Producer: one thread of warp 0 issues the copies ----

template <class Traits>
__device__ void load(typename Traits::Storage& s, const FwdMaps& maps, const FwdKernelParams& p) {
  constexpr int kD = Traits::kHeadDim, kM = Traits::kBlockM, kN = Traits::kBlockN;
  const uint32_t q_bytes = p.q_box.volume() * kD * 2, kv_bytes = p.kv_box.volume() * kD * 2;
  const int add_tiles = static_cast<int>((p.problem.additional + kN - 1) / kN);
  const int group_size = static_cast<int>(p.problem.heads_per_kv());
  const bool box_fills_block = p.kv_box.volume() == kN;
  RingIndex<1> at_q;
  RingIndex<Traits::kStages> at_k, at_v;

  follow_plan(s, [&](const StayingTile& tile) {
    if (threadIdx.x != 0) return;
    const int window_tiles = tile.num_visits(), num_tiles = window_tiles + add_tiles;
    const int head_kv = tile.head / group_size;

    const auto load_q = [&] {
      int x[3];
      tile.position(p.problem, tile.first, x);
      s.ring_q.wait_empty(at_q);
      s.ring_q.expect_bytes(at_q, q_bytes);
      load_box<kD, kM>(maps.q, p.fold_q, &s.ring_q.full[0], s.q, x, tile.head, tile.batch);
      at_q.advance();
    };
    const auto describe = [&](const int (&first)[3], uint32_t tests) {
      MovingTile& t = s.key_tile[at_k.stage];
      for (int d = 0; d < 3; ++d) t.first[d] = first[d];
      t.tests = tests;
    };
    const auto load_kv = [&](auto& ring, auto& at, typename Traits::Element* smem, const CUtensorMap& map,
                             const TokenMap& fold, const int (&x)[3], uint32_t bytes) {
      ring.expect_bytes(at, bytes);
      load_box<kD, kN>(map, fold, &ring.full[at.stage], smem + at.stage * kN * kD, x, head_kv, tile.batch);
      at.advance();
    };

    // V of a tile is needed one step later than its K, so it is requested after the next K.
    TileCounter counter;
    int x_v[3] = {0, 0, 0};
    allow_draw(s, num_tiles, num_tiles);
    for (int n = 0; n <= num_tiles; ++n) {
      if (n > 0) allow_draw(s, num_tiles - n, num_tiles - n + 1);
      int x[3] = {0, 0, (n - window_tiles) * kN};
      if (n < num_tiles) s.ring_k.wait_empty(at_k);
      if (n < window_tiles) {
        int first[3];
        uint32_t tests = box_fills_block ? 0 : kTestBox;
#pragma unroll
        for (int d = 0; d < 3; ++d) {
          first[d] = tile.visits[d].origin + counter.n[d] * p.kv_box.side[d];
          if (!tile.visits[d].is_full(counter.n[d])) tests |= kTestDim0 << d;
        }
        tile.position(p.problem, first, x);
        counter.advance(tile);
        describe(first, tests);
        load_kv(s.ring_k, at_k, s.k, maps.k, p.fold_k, x, kv_bytes);
      } else if (n < num_tiles) {
        const int valid = static_cast<int>(p.problem.additional) - x[2];
        describe({valid, 0, 0}, valid < kN ? kTestTail : 0);
        load_kv(s.ring_k, at_k, s.k, maps.add_k, p.fold_add_k, x, kN * kD * 2);
      }
      if (n == 0) load_q();
      if (n > 0) {
        s.ring_v.wait_empty(at_v);
        if (n <= window_tiles) {
          load_kv(s.ring_v, at_v, s.v, maps.v, p.fold_v, x_v, kv_bytes);
        } else {
          load_kv(s.ring_v, at_v, s.v, maps.add_v, p.fold_add_v, x_v, kN * kD * 2);
        }
      }
#pragma unroll
      for (int d = 0; d < 3; ++d) x_v[d] = x[d];
    }
  });
}

// ---- Consumers ----

template <class Traits>
__device__ void attend(typename Traits::Storage& s, const FwdKernelParams& p) {
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kBlockM, kN = Traits::kBlockN, kD = Traits::kHeadDim;
  const int thread = threadIdx.x - 128, warpgroup = thread / 128, quad = thread % 4;

  Tensor sQ = make_tensor(make_smem_ptr(s.q), typename Traits::LayoutQ{});    // (M, D)
  Tensor sK = make_tensor(make_smem_ptr(s.k), typename Traits::LayoutK{});    // (N, D, stage)
  Tensor sVt = make_tensor(make_smem_ptr(s.v), typename Traits::LayoutVt{});  // (D, N, stage)
  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  auto thread_qk = mma_qk.get_slice(warpgroup * 128);
  auto thread_pv = mma_pv.get_slice(warpgroup * 128);
  Tensor tSrQ = thread_qk.partition_fragment_A(sQ);   // (MMA, 1, D/16)
  Tensor tSrK = thread_qk.partition_fragment_B(sK);   // (MMA, 1, D/16, stage)
  Tensor tOrV = thread_pv.partition_fragment_B(sVt);  // (MMA, 1, N/16, stage)
  Tensor tSrS = partition_fragment_C(mma_qk, cute::Shape<Int<kM>, Int<kN>>{});
  Tensor tOrO = partition_fragment_C(mma_pv, cute::Shape<Int<kM>, Int<kD>>{});
  Tensor scores = make_tensor(tSrS.data(), accumulator_rows_cols(tSrS.layout()));
  Tensor outputs = make_tensor(tOrO.data(), accumulator_rows_cols(tOrO.layout()));
  Tensor tOrP = make_tensor<Element>(accumulator_as_a(tSrS.layout()));
  const auto round_p = [&] {
    Tensor p_view = make_tensor(tSrS.data(), tOrP.layout());
    convert_to(p_view, tOrP);
  };

  // Warpgroups take turns at issuing matrix multiplies, so that one's softmax runs under the other's
  // products.
  const auto wait_turn = [&] {
    if constexpr (Traits::kConsumers > 1)
      cutlass::arch::NamedBarrier::sync(Traits::kConsumers * 128, kTurn0 + warpgroup);
  };
  const auto pass_turn = [&] {
    if constexpr (Traits::kConsumers > 1) {
      const int next = warpgroup + 1 == Traits::kConsumers ? 0 : warpgroup + 1;
      cutlass::arch::NamedBarrier::arrive(Traits::kConsumers * 128, kTurn0 + next);
    }
  };
  if (warpgroup == Traits::kConsumers - 1) pass_turn();

  const int first_row = warpgroup * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;  // and first_row + 8
  Range keys[2][3];
  RingIndex<1> at_q;
  RingIndex<kPlannedTiles> at_plan;
  RingIndex<Traits::kStages> at_k, at_v;

  // Hides what the rows must not see in the key tile of a K stage.
  const auto mask = [&](const MovingTile& tile) {
    if (tile.tests == 0) return;
    if (tile.tests & kTestTail) {
      CUTE_UNROLL
      for (int j = 0; j < size<1>(scores); ++j) {
        if (8 * (j / 2) + 2 * quad + j % 2 >= tile.first[0]) scores(0, j) = scores(1, j) = -INFINITY;
      }
      return;
    }
    uint32_t visible[2];
    visible[0] = visible[1] = s.mask.columns(p.kv_box, quad);
    CUTE_UNROLL
    for (int d = 0; d < 3; ++d) {
      if (!(tile.tests & kTestDim0 << d)) continue;
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const Range& k = keys[i][d];
        visible[i] &= s.mask.interval(p.kv_box, d, k.begin - tile.first[d], k.end - tile.first[d], quad);
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) mask_row(scores, i, visible[i]);
  };

  while (true) {
    s.ring_plan.wait_full(at_plan);
    const PlannedTile<kM>& plan = s.plan[at_plan.stage];
    const int num_tiles = plan.num_tiles;
    if (num_tiles == 0) break;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      CUTE_UNROLL
      for (int d = 0; d < 3; ++d) keys[i][d] = plan.range[first_row + 8 * i][d];
    }

    OnlineSoftmax<2> softmax(p.scale_log2);
    float rescale[2];
    s.ring_q.wait_full(at_q);
    s.ring_k.wait_full(at_k);
    issue_gemm<true>(mma_qk, tSrQ, tSrK(_, _, _, at_k.stage), tSrS);
    MovingTile key_tile = s.key_tile[at_k.stage];
    warpgroup_wait<0>();
    s.ring_k.release(at_k);
    at_k.advance();
    mask(key_tile);
    softmax.step(scores, rescale);
    round_p();
    clear(tOrO);

    for (int n = 1; n < num_tiles; ++n) {
      s.ring_k.wait_full(at_k);
      wait_turn();
      issue_gemm<true>(mma_qk, tSrQ, tSrK(_, _, _, at_k.stage), tSrS);
      s.ring_v.wait_full(at_v);
      issue_gemm<false>(mma_pv, tOrP, tOrV(_, _, _, at_v.stage), tOrO);
      pass_turn();
      key_tile = s.key_tile[at_k.stage];
      warpgroup_wait<1>();
      s.ring_k.release(at_k);
      at_k.advance();
      mask(key_tile);
      softmax.step(scores, rescale);
      warpgroup_fence_operand(tSrS);  // keeps the exponentials above the wait, under the product P V
      warpgroup_wait<0>();
      s.ring_v.release(at_v);
      at_v.advance();
      round_p();
      scale_rows(outputs, rescale);
    }
    if constexpr (Traits::kTile.kOwnOutput) s.ring_q.release(at_q);
    s.ring_v.wait_full(at_v);
    issue_gemm<false>(mma_pv, tOrP, tOrV(_, _, _, at_v.stage), tOrO);
    float inverse[2], lse[2];
    softmax.finish(inverse, lse);
    warpgroup_wait<0>();
    s.ring_v.release(at_v);
    at_v.advance();
    scale_rows(outputs, inverse);

    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t row = plan.row[first_row + 8 * i];
      if (quad == 0 && row >= 0) p.lse.data[row] = lse[i];
    }
    const int warp = thread / 32;
    // Without a buffer of its own the output goes over the Q rows that this warp alone still reads.
    Element* sO = (Traits::kTile.kOwnOutput ? s.o : s.q) + warp * 16 * kD;
    if constexpr (!Traits::kTile.kOwnOutput)
      cutlass::arch::NamedBarrier::sync(kM * 2, kTurn0 + Traits::kConsumers);
    store_rows<kD>(sO, outputs, plan.row + warp * 16, static_cast<Element*>(p.out), p.problem.dim_v);
    if constexpr (!Traits::kTile.kOwnOutput) {
      cutlass::arch::fence_view_async_shared();  // the next Q comes through the async proxy
      __syncwarp();
      s.ring_q.release(at_q);
    }
    at_q.advance();
    s.ring_plan.release(at_plan);
    at_plan.advance();
  }
}

// ---- Kernel ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    fwd_kernel(const __grid_constant__ FwdMaps maps, const __grid_constant__ FwdKernelParams p) {
  auto& s = shared_storage<typename Traits::Storage>();

  if (threadIdx.x == 0) {
    if (cast_smem_ptr_to_uint(&s) % kStorageAlignment != 0) __trap();
    prefetch_map(maps.q);
    prefetch_map(maps.k);
    prefetch_map(maps.v);
    s.ring_q.init(1, Traits::kConsumerWarps);
    s.ring_k.init(1, Traits::kConsumerWarps);
    s.ring_v.init(1, Traits::kConsumerWarps);
    s.ring_draw.init(1, 1);
    s.ring_plan.init(1, Traits::kConsumerWarps + 1);  // and the loading warp
    cutlass::arch::fence_barrier_init();
  }
  s.mask.build(p.kv_box, threadIdx.x, Traits::kThreads);
  if (p.q_box.volume() != Traits::kBlockM || p.kv_box.volume() != Traits::kBlockN) {
    fill_zero(&s, offsetof(typename Traits::Storage, o), Traits::kThreads);
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x / 32 == 0) load<Traits>(s, maps, p);
    if (threadIdx.x / 32 == 1) {
      const int add_tiles = static_cast<int>((p.problem.additional + Traits::kBlockN - 1) / Traits::kBlockN);
      plan_tiles_of_cta<Direction::kForward>(s, p, p.q_box, p.kv_box, p.lse, 1, add_tiles);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    attend<Traits>(s, p);
  }
}

// ---- Launch ----

template <class Tag, int kHeadDim>
int fwd_sm90<Tag, kHeadDim>::run(const FwdSm90Args& a, void* stream_) {
  using Traits = FwdTraits<Tag, kHeadDim>;
  constexpr bool kBf16 = std::is_same_v<Tag, bf16>;
  constexpr int kShared = sizeof(typename Traits::Storage);
  static const cudaError_t attribute = allow_shared_memory(fwd_kernel<Traits>, kShared);
  if (attribute != cudaSuccess) return attribute;
  const auto stream = static_cast<cudaStream_t>(stream_);

  FwdMaps maps;
  FwdKernelParams p;
  p.problem = a.problem;
  p.q_box = a.q_box;
  p.kv_box = a.kv_box;
  p.scale_log2 = a.scale * 1.44269504088896341f;
  p.out = a.out.data;
  p.lse = a.lse;
  p.next_work = a.next_work;
  const Problem& problem = a.problem;
  const Launches launches(problem, kHeadDim);
  p.problem.batch = launches.batch;
  p.schedule = Schedule(p.problem, a.q_box, problem.heads);
  for (int64_t b = 0; b < launches.count; ++b) {
    const TokenEncoder encode{launches, b, kBf16, kHeadDim, problem};
    cudaError_t e = encode(&maps.q, &p.fold_q, a.q, problem.dim, problem.heads, a.q_box);
    if (e == cudaSuccess) e = encode(&maps.k, &p.fold_k, a.k, problem.dim, problem.heads_kv, a.kv_box);
    if (e == cudaSuccess) e = encode(&maps.v, &p.fold_v, a.v, problem.dim_v, problem.heads_kv, a.kv_box);
    if (e == cudaSuccess && problem.additional > 0) {
      e = encode.line(&maps.add_k, &p.fold_add_k, a.add_k, problem.dim, Traits::kBlockN);
      if (e == cudaSuccess)
        e = encode.line(&maps.add_v, &p.fold_add_v, a.add_v, problem.dim_v, Traits::kBlockN);
    }
    if (e != cudaSuccess) return e;
    p.batch_offset = b;
    e = cudaMemsetAsync(a.next_work, 0, sizeof(int), stream);
    if (e != cudaSuccess) return e;
    if (p.schedule.total > std::numeric_limits<int>::max() / 2) return cudaErrorInvalidConfiguration;
    const int grid = static_cast<int>(std::min<int64_t>(p.schedule.total, a.num_sms));
    fwd_kernel<Traits><<<grid, Traits::kThreads, kShared, stream>>>(maps, p);
    e = cudaGetLastError();
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace nearfield::gna
