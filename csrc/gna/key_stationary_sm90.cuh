// What the kernels that hold keys and walk over queries share: the producer warps (warp 0 loads, warp 1 adds
// dQ, warp 2 gathers lse, delta and bias, warp 3 plans), the kernel's frame and its launch.
#pragma once

#include "gna/bias_sm90.cuh"
#include "gna/dq_beside_sm90.cuh"
#include "gna/plan_sm90.cuh"
#include "gna/traits_sm90.cuh"
#include "nearfield/dependent_launch.cuh"

namespace nearfield::gna {

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
  BiasParams bias;
  bool with_dq;
  DqBesideParams beside;
  int* next_work;
};

enum BwdBarrier : int { kDsWritten = 1, kDsRead = 2, kVRead = 3, kFirstS = 4, kFirstDp = 5 };

// Of rows that are no query: exp2(anything - inf) = 0.
constexpr RowStats kNoQuery{std::numeric_limits<float>::infinity(), 0.f};

// A row of the box of queries, the same in all visits.
struct BoxRow {
  int64_t offset;  // of its statistics, from the first row's; -1: the box has no such row
  uint16_t coordinate[3];
};

// ---- Producer warps ----

template <class Traits>
__device__ void load_queries(typename Traits::Storage& s, const BwdMaps& maps, const BwdKernelParams& p) {
  constexpr int kD = Traits::kHeadDim, kM = Traits::kBlockM, kN = Traits::kBlockN;
  const uint32_t q_bytes = p.q_box.volume() * kD * 2, kv_bytes = p.kv_box.volume() * kD * 2;
  const int group_size = static_cast<int>(p.problem.heads_per_kv());
  const bool box_fills_block = p.q_box.volume() == kM;
  RingIndex<1> at_kv;
  RingIndex<Traits::kStages> at_q;
  RingIndex<Traits::kDoutStages> at_dout;

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
    // A function of its own: fewer registers are spilled (284 -> 252 bytes).
    const auto load_visit = [&](int head, const TileCounter& counter) {
      allow_draw(s, --left, left + 1);
      int first[3];
      uint32_t tests = box_fills_block ? 0 : kTestBox;
      locate_visit(tile, counter, p.q_box, first, tests);
      tile.position(p.problem, first, x);
      s.ring_q.wait_empty(at_q);
      s.q_tile[at_q.stage] = {{first[0], first[1], first[2]}, tests};
      s.ring_q.expect_bytes(at_q, q_bytes);
      load_box<kD, kM>(maps.q, p.fold_q, &s.ring_q.full[at_q.stage], s.q + at_q.stage * kM * kD, x, head,
                       tile.batch);
      at_q.advance();
      s.ring_dout.wait_empty(at_dout);
      s.ring_dout.expect_bytes(at_dout, q_bytes);
      load_box<kD, kM>(maps.dout, p.fold_dout, &s.ring_dout.full[at_dout.stage],
                       s.dout + at_dout.stage * kM * kD, x, head, tile.batch);
      at_dout.advance();
    };
    allow_draw(s, left, left);
    for (int g = 0; g < group_size; ++g) {
      for (TileCounter counter; counter.n[0] < tile.visits[0].count; counter.advance(tile)) {
        load_visit(tile.head * group_size + g, counter);
      }
    }
  });
}

// Calls visit(tile, head, first query of the box) for every query tile that load_queries loads, and
// after(tile) behind the last one of a tile.
template <class Storage, class After, class Visit>
__device__ __forceinline__ void follow_queries(Storage& s, const BwdKernelParams& p, const After& after,
                                               const Visit& visit) {
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
    after(tile);
  });
}

// Asynchronous and without divisions: a visit of short rows is over soon. What is the same for all visits
// lies in shared memory, because a spilled register comes back from the L2 cache.
template <class Traits>
__device__ void gather_stats(typename Traits::Storage& s, const BwdKernelParams& p) {
  constexpr int kM = Traits::kBlockM;
  const int lane = threadIdx.x % 32;
  RingIndex<Traits::kStages> at;
  const auto after = [](const StayingTile&) {};
  follow_queries(s, p, after, [&](const StayingTile& tile, int head, const int (&first)[3]) {
    int64_t box_at = (tile.batch + p.batch_offset) * p.stats.batch + head * p.stats.head;
    bool whole = true;  // inside the grid
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      box_at += (tile.group[d] + int64_t{p.problem.dilation[d]} * first[d]) * p.stats.x[d];
      whole &= first[d] + p.q_box.side[d] <= tile.window[d].length;
    }
    s.ring_q.wait_empty(at);
    if constexpr (Traits::kBiased) {
      bias_slices<Traits>().fill(at.stage, p.bias.table, head, p.problem, p.q_box, p.kv_box, first,
                                 tile.first, false);
    }
#pragma unroll 1
    for (int i = 0; i < kM / 32; ++i) {
      const int row = lane + 32 * i;
      const BoxRow at_row = s.q_row[row];
      if (at_row.offset < 0) continue;
      bool inside = true;
      if (!whole) {
#pragma unroll
        for (int d = 0; d < 3; ++d) inside &= first[d] + at_row.coordinate[d] < tile.window[d].length;
      }
      const RowStats* from = p.stats.data + box_at + at_row.offset;
      float &lse = s.lse[at.stage][row], &delta = s.delta[at.stage][row];
      if (inside) {
        cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(from->lse, lse);
        cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(from->delta, delta);
      } else {
        lse = kNoQuery.lse;
        delta = kNoQuery.delta;
        __threadfence_block();  // the arrival below waits for copies only
      }
    }
    cutlass::arch::cpasync_barrier_arrive_noinc(&s.ring_q.full[at.stage]);
    at.advance();
  });
}

template <class Traits>
__device__ void add_dq(typename Traits::Storage& s, const BwdMaps& maps, const BwdKernelParams& p) {
  constexpr int kChunk = 32;  // floats in a 128-byte swizzle span
  constexpr int kRounds = Traits::kDqRounds, kChunks = Traits::kHeadDim / kChunk / kRounds;
  RingIndex<Traits::kDqStages> at;
  // The first dQ of the next tile is microseconds away.
  const auto after = [&](const StayingTile& tile) {
    if (p.beside.counters.units > 0 && threadIdx.x % 32 == 0) {
      count_arrived(p.beside.counters.done(tile.batch * p.beside.heads_kv + tile.head));
    }
  };
  follow_queries(s, p, after, [&](const StayingTile& tile, int head, const int (&first)[3]) {
    for (int round = 0; round < kRounds; ++round) {
      s.ring_dq.wait_full(at);
      if (p.with_dq && threadIdx.x % 32 == 0) {
        // Here and not by the consumers, who would wait for hundreds of cycles while the tensor cores read.
        cutlass::arch::fence_view_async_shared();
        // The buffer is [batch, head, group] x [group grid] x [features]: see DqBuffer.
        const int groups = p.problem.dilation[0] * p.problem.dilation[1] * p.problem.dilation[2];
        const int group =
            (tile.group[0] * p.problem.dilation[1] + tile.group[1]) * p.problem.dilation[2] + tile.group[2];
        const int outer = static_cast<int>((tile.batch * p.problem.heads + head) * groups) + group;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int feature = (c * kRounds + round) * kChunk;
          if (feature < p.problem.dim) {  // features that the compiled head dim adds do not exist
            cute::SM90_TMA_REDUCE_ADD_5D::copy(&maps.dq, s.dq[at.stage] + c * Traits::kBlockM * kChunk,
                                               feature, first[2], first[1], first[0], outer);
          }
        }
        cute::tma_store_arrive();
        cute::tma_store_wait<0>();
      }
      __syncwarp();
      s.ring_dq.release(at);
      at.advance();
    }
  });
}

template <class Traits>
__device__ __forceinline__ void plan_and_work_beside(typename Traits::Storage& s, const BwdKernelParams& p) {
  const auto plan = [&](auto&& beside) {
    plan_tiles_of_cta<Direction::kBackward>(s, p, p.kv_box, p.q_box, p.kv_rows,
                                            static_cast<int>(p.problem.heads_per_kv()), 0, beside);
  };
  if constexpr (Traits::kBiased) {
    plan(NothingBeside{});
  } else {
    DqBeside<Traits> beside(s.beside, p.beside);
    plan(beside);
    beside.finish();
  }
}

// ---- Consumers ----

// The queries of a visited tile that a thread's two keys are seen by.
template <class Plan, int kBlockM>
__device__ __forceinline__ void visible_queries(uint32_t (&visible)[2], const BoxMask<kBlockM>& table,
                                                const Box& box, const MovingTile& tile, const Plan& plan,
                                                int first_row, int quad) {
  // Both rows at once: shared memory answers late while the tensor cores read it.
  bool is_key[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    // Rows beyond the grid hold zeros; their P must not become inf, which makes NaN of 0 in dQ.
    is_key[i] = plan.row[first_row + 8 * i] >= 0;
    visible[i] = table.columns(box, quad);
  }
  CUTE_UNROLL
  for (int d = 0; d < 3; ++d) {
    if (!(tile.tests & kTestDim0 << d)) continue;  // the tile is full in this dimension
    const Range sees[2] = {plan.range[first_row][d], plan.range[first_row + 8][d]};
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      visible[i] &= table.interval(box, d, sees[i].begin - tile.first[d], sees[i].end - tile.first[d], quad);
    }
  }
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) visible[i] = is_key[i] ? visible[i] : 0u;
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
    s.ring_q.init(1 + 32, Traits::kConsumerWarps);  // queries, and their statistics from a warp
    s.ring_dout.init(1, Traits::kConsumerWarps);
    s.ring_dq.init(Traits::kConsumerWarps, 1);
    s.ring_draw.init(1, 1);
    if constexpr (!Traits::kBiased) cutlass::arch::ClusterTransactionBarrier::init(&s.beside.full, 1);
    s.ring_plan.init(1, Traits::kConsumerWarps + 3);  // and three producer warps
    cutlass::arch::fence_barrier_init();
  }
  s.plan_scratch.rows.build(p.kv_box, threadIdx.x, Traits::kThreads);
  for (int r = threadIdx.x; r < Traits::kBlockM; r += Traits::kThreads) {
    const int outer = r / p.q_box.side[2];
    const int c[3] = {outer / p.q_box.side[1], outer % p.q_box.side[1], r % p.q_box.side[2]};
    BoxRow row{0, {}};
    for (int d = 0; d < 3; ++d) {
      row.offset += int64_t{p.problem.dilation[d]} * c[d] * p.stats.x[d];
      row.coordinate[d] = static_cast<uint16_t>(c[d]);
    }
    if (c[0] >= p.q_box.side[0]) row.offset = -1;
    s.q_row[r] = row;
  }
  __syncthreads();
  s.mask.build(p.q_box, threadIdx.x, Traits::kThreads, [&](int column, int (&c)[3]) {
    for (int d = 0; d < 3; ++d) c[d] = s.q_row[column].coordinate[d];
  });
  // Rows that the box does not fill get no others.
  for (int i = threadIdx.x; i < Traits::kStages * Traits::kBlockM; i += Traits::kThreads) {
    s.lse[0][i] = kNoQuery.lse;
    s.delta[0][i] = kNoQuery.delta;
  }
  if constexpr (Traits::kBiased) {
    bias_slices<Traits>().build(p.q_box, p.kv_box, p.bias.table, Traits::kThreads);
  }
  if (p.q_box.volume() != Traits::kBlockM || p.kv_box.volume() != Traits::kBlockN) {
    fill_zero(&s, offsetof(typename Traits::Storage, dq), Traits::kThreads);
  }
  let_kernel_after_begin();
  if (p.beside.stats_ctas == 0) wait_for_kernel_before();
  __syncthreads();

  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) load_queries<Traits>(s, maps, p);
    if (warp == 1) add_dq<Traits>(s, maps, p);
    if (warp == 2) gather_stats<Traits>(s, p);
    if (warp == 3) plan_and_work_beside<Traits>(s, p);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    multiply(Traits{}, s, p);
  }
}

template <class Traits>
int launch_key_stationary(const BwdSm90Args& a, void* stream_) {
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kShared = shared_bytes<Traits>();
  if (const cudaError_t e = allow_shared_memory(bwd_kernel<Traits>, kShared)) return e;
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
  p.bias = {a.bias, 1.f / a.scale};
  p.with_dq = a.dq != nullptr;
  p.next_work = a.next_work;
  const Launches launches(problem, kHeadDim);
  p.problem.batch = launches.batch;
  const DqCounters counters(problem, a.beside, a.next_work + 1);
  p.schedule = a.to_additional ? Schedule(p.problem, static_cast<int>(problem.additional), Traits::kBlockN,
                                          problem.heads_kv)
                               : Schedule(p.problem, a.kv_box, problem.heads_kv);
  if (p.schedule.total > std::numeric_limits<int>::max() / 2) return cudaErrorInvalidConfiguration;
  if (a.to_additional) p.kv_box = Box{{1, 1, Traits::kBlockN}};
  if (a.beside) {
    p.beside.counters = counters;
    p.beside.cleared = static_cast<int>(a.cleared);
    p.beside.stats_units = a.stats_units;
    p.beside.stats_ctas = a.stats_ctas;
    p.beside.tiles = static_cast<int>(p.schedule.total / counters.units);
    p.beside.heads = static_cast<int>(problem.heads);
    p.beside.heads_kv = static_cast<int>(problem.heads_kv);
    p.beside.heads_per_kv = static_cast<int>(problem.heads_per_kv());
    p.beside.tokens = static_cast<int>(problem.tokens());
    p.beside.scale = a.scale;
    p.beside.buffer = a.dq;
    p.beside.dq = a.dq_out;
  }
  const DqBuffer buffer(p.problem);
  for (int64_t b = 0; b < launches.count; ++b) {
    const TokenEncoder encode{launches, b, sizeof(typename Traits::Element), kHeadDim, problem};
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
    if (e != cudaSuccess) return e;
    p.batch_offset = b;
    const int grid = static_cast<int>(std::min<int64_t>(p.schedule.total, a.num_sms));
    p.beside.at_once = std::min(grid, std::max(1, a.num_sms - a.stats_ctas));
    if (a.counters_cleared && b == 0) {
      e = launch_dependent(bwd_kernel<Traits>, grid, Traits::kThreads, kShared, stream, maps, p);
    } else {
      e = cudaMemsetAsync(a.next_work, 0, (1 + counters.total()) * sizeof(int), stream);
      if (e != cudaSuccess) return e;
      bwd_kernel<Traits><<<grid, Traits::kThreads, kShared, stream>>>(maps, p);
      e = cudaGetLastError();
    }
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace nearfield::gna
