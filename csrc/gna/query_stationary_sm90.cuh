// What the kernels that hold queries and walk over keys share: the forward and the deterministic gradient of
// the queries.
#pragma once

#include "gna/bias_sm90.cuh"
#include "gna/plan_sm90.cuh"
#include "gna/traits_sm90.cuh"
#include "gna/transpose_sm90.cuh"

namespace nearfield::gna {

struct QueryMaps {
  CUtensorMap q, k, v, add_k, add_v;
  CUtensorMap dout;  // for the gradient of the queries only
  CUtensorMap out;   // of the forward, if out_in_boxes
};

struct QueryParams {
  Problem problem;
  Schedule schedule;
  Box q_box, kv_box;
  Box q_part;   // what is copied of q_box at a time: the rows of a warpgroup, where they are a box, or all
  int q_parts;  // of them in q_box
  TokenMap fold_q, fold_k, fold_v, fold_add_k, fold_add_v, fold_dout, fold_out;
  float scale, scale_log2;
  int64_t batch_offset;  // of a launch that handles one batch entry (split folding of 3-D problems)
  void* out;          // O or dQ, [B, X, H, features], contiguous but for the dilation of a launch per group
  Tokens<float> lse;  // [B, X, H]: its strides count rows of `out` and of the statistics too
  const RowStats* stats;  // for the gradient of the queries only
  BiasParams bias;
  Descales descale;  // of 8-bit inputs, as out_is_fp16
  bool out_is_fp16;
  bool out_in_boxes;  // the output leaves as boxes, one for each warpgroup
  int* next_work;
};

// A warpgroup that is done with its queries gets the next ones, whatever the other does.
template <class Traits>
constexpr int query_parts() {
  if constexpr (Traits::kWithDout) {
    return 1;
  } else {
    return Traits::kQueryParts;
  }
}
template <class Traits>
constexpr int kQueryParts = query_parts<Traits>();

// The rows of each warpgroup, half of a full box, as boxes: half of its outermost dimension.
template <class Traits>
inline Box part_of(const Box& box) {
  Box part = box;
  if (kQueryParts<Traits> == 1 || box.volume() != Traits::kBlockM) return part;
  int d = 0;
  while (d < 2 && box.side[d] == 1) ++d;
  if (box.side[d] % kQueryParts<Traits> == 0) part.side[d] /= kQueryParts<Traits>;
  return part;
}

// Constant where it can be, so that the kernels without parts do not pay for them.
template <class Traits>
__device__ __forceinline__ int query_parts_of(const QueryParams& p) {
  return kQueryParts<Traits> == 1 ? 1 : p.q_parts;
}

// Where part i of the queries of a tile begins on the grid.
template <class Traits>
__device__ __forceinline__ void position_of_part(const QueryParams& p, const StayingTile& tile, int i,
                                                 int (&x)[3]) {
  if constexpr (kQueryParts<Traits> == 1) {
    tile.position(p.problem, tile.first, x);
  } else {
    int first[3];
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      first[d] = tile.first[d] + (p.q_part.side[d] < p.q_box.side[d] ? i * p.q_part.side[d] : 0);
    }
    tile.position(p.problem, first, x);
  }
}

// Beside planning: the next queries, which the copy engine is asked for when the last ones have been read,
// wait in the L2 cache.
template <class Traits>
struct PrefetchQueries : NothingBeside {
  const QueryMaps& maps;
  const QueryParams& p;

  __device__ __forceinline__ PrefetchQueries(const QueryMaps& m, const QueryParams& params)
      : maps(m), p(params) {}
  __device__ __forceinline__ void prepare(const StayingTile& tile) const {
    if constexpr (kQueryParts<Traits> == 1) return;
    if (const int i = threadIdx.x % 32; i < p.q_parts) {
      int x[3];
      position_of_part<Traits>(p, tile, i, x);
      prefetch_box<Traits::kHeadDim, sizeof(typename Traits::Element)>(maps.q, p.fold_q, x, tile.head,
                                                                       tile.batch);
    }
  }
};

// ---- Producers: one thread of warp 0 issues the copies, warp 1 plans, warp 2 brings the bias,
// warps 2 and 3 transpose 8-bit values ----

template <class Traits>
__device__ void load(typename Traits::Storage& s, const QueryMaps& maps, const QueryParams& p) {
  constexpr int kD = Traits::kHeadDim, kM = Traits::kBlockM, kN = Traits::kBlockN;
  const uint32_t row_bytes = kD * sizeof(typename Traits::Element);
  const uint32_t q_bytes = p.q_part.volume() * row_bytes, kv_bytes = p.kv_box.volume() * row_bytes;
  const int add_tiles = static_cast<int>((p.problem.additional + kN - 1) / kN);
  const int group_size = static_cast<int>(p.problem.heads_per_kv());
  const bool box_fills_block = p.kv_box.volume() == kN;
  uint32_t q_phase = 0;
  RingIndex<Traits::kStages> at_k, at_v;

  follow_plan(s, [&](const StayingTile& tile) {
    if (threadIdx.x != 0) return;
    const int window_tiles = tile.num_visits(), num_tiles = window_tiles + add_tiles;
    const int head_kv = tile.head / group_size;

    const auto load_q = [&] {
      constexpr int kParts = kQueryParts<Traits>, kRows = kM / kParts;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (i == query_parts_of<Traits>(p)) break;
        int x[3];
        position_of_part<Traits>(p, tile, i, x);
        const RingIndex<kParts> at{i, q_phase};
        s.ring_q.wait_empty(at);
        s.ring_q.expect_bytes(at, q_bytes * (Traits::kWithDout ? 2 : 1));
        load_box<kD, kM>(maps.q, p.fold_q, &s.ring_q.full[i],
                         s.q + i * kRows * chunk_of(kD, sizeof(typename Traits::Element)), x, tile.head,
                         tile.batch);
        if constexpr (Traits::kWithDout) {
          load_box<kD, kM>(maps.dout, p.fold_dout, &s.ring_q.full[0], s.dout, x, tile.head, tile.batch);
        }
      }
      q_phase ^= 1;
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

    // In the forward V of a tile is needed one step later than its K, so it is requested after the next K.
    constexpr int kLag = Traits::kWithDout ? 0 : 1;
    TileCounter counter;
    int x_v[3] = {0, 0, 0};
    allow_draw(s, num_tiles, num_tiles);
    for (int n = 0; n < num_tiles + kLag; ++n) {
      if (n > 0) allow_draw(s, num_tiles - n, num_tiles - n + 1);
      int x[3] = {0, 0, (n - window_tiles) * kN};
      if (n < num_tiles) s.ring_k.wait_empty(at_k);
      if (n < window_tiles) {
        int first[3];
        uint32_t tests = box_fills_block ? 0 : kTestBox;
        locate_visit(tile, counter, p.kv_box, first, tests);
        tile.position(p.problem, first, x);
        counter.advance(tile);
        describe(first, tests);
        load_kv(s.ring_k, at_k, s.k, maps.k, p.fold_k, x, kv_bytes);
      } else if (n < num_tiles) {
        const int valid = static_cast<int>(p.problem.additional) - x[2];
        describe({valid, 0, 0}, valid < kN ? kTestTail : 0);
        load_kv(s.ring_k, at_k, s.k, maps.add_k, p.fold_add_k, x, kN * row_bytes);
      }
      if (n == 0) load_q();
      const auto remember_v = [&] {
#pragma unroll
        for (int d = 0; d < 3; ++d) x_v[d] = x[d];
      };
      if (kLag == 0) remember_v();
      if (n >= kLag) {
        s.ring_v.wait_empty(at_v);
        if (n - kLag < window_tiles) {
          load_kv(s.ring_v, at_v, s.v, maps.v, p.fold_v, x_v, kv_bytes);
        } else {
          load_kv(s.ring_v, at_v, s.v, maps.add_v, p.fold_add_v, x_v, kN * row_bytes);
        }
      }
      if (kLag > 0) remember_v();
    }
  });
}

template <class Traits>
__device__ void load_bias(typename Traits::Storage& s, const QueryParams& p) {
  auto& bias = bias_slices<Traits>();
  const int add_tiles = static_cast<int>((p.problem.additional + Traits::kBlockN - 1) / Traits::kBlockN);
  RingIndex<Traits::kStages> at;
  follow_plan(s, [&](const StayingTile& tile) {
    const int window_tiles = tile.num_visits();
    TileCounter counter;
    for (int n = 0; n < window_tiles + add_tiles; ++n) {
      int first[3];
#pragma unroll
      for (int d = 0; d < 3; ++d) first[d] = tile.visits[d].origin + counter.n[d] * p.kv_box.side[d];
      counter.advance(tile);
      bias.ring.wait_empty(at);
      bias.fill(at.stage, p.bias.table, tile.head, p.problem, p.q_box, p.kv_box, tile.first, first,
                n >= window_tiles);
      cutlass::arch::cpasync_barrier_arrive_noinc(&bias.ring.full[at.stage]);
      at.advance();
    }
  });
}

template <class Traits>
__device__ __forceinline__ void produce(typename Traits::Storage& s, const QueryMaps& maps,
                                        const QueryParams& p) {
  const int warp = threadIdx.x / 32;
  if (warp == 0) load<Traits>(s, maps, p);
  if constexpr (Traits::kBiased) {
    if (warp == 2) load_bias<Traits>(s, p);
  }
  if constexpr (Traits::kTransposers > 0) {
    if (warp >= 4 - Traits::kTransposers) transpose_values<Traits>(s);
  }
  if (warp == 1) {
    const int add_tiles = static_cast<int>((p.problem.additional + Traits::kBlockN - 1) / Traits::kBlockN);
    plan_tiles_of_cta<Direction::kForward>(s, p, p.q_box, p.kv_box, p.lse, 1, add_tiles,
                                           PrefetchQueries<Traits>(maps, p));
  }
}

// Barriers, mask tables and empty rows, before the roles part.
template <class Traits>
__device__ __forceinline__ void prepare_storage(typename Traits::Storage& s, const QueryMaps& maps,
                                                const QueryParams& p, int zeroed_bytes) {
  if (threadIdx.x == 0) {
    if (cast_smem_ptr_to_uint(&s) % kStorageAlignment != 0) __trap();
    prefetch_map(maps.q);
    prefetch_map(maps.k);
    prefetch_map(maps.v);
    s.ring_q.init(1, Traits::kConsumerWarps / query_parts_of<Traits>(p));
    s.ring_k.init(1, Traits::kConsumerWarps);
    s.ring_v.init(1, Traits::kTransposers > 0 ? Traits::kTransposers : Traits::kConsumerWarps);
    if constexpr (Traits::kTransposers > 0) {
      transposed_values<Traits>().ring_v.init(Traits::kTransposers, Traits::kConsumerWarps);
    }
    s.ring_draw.init(1, 1);
    s.ring_plan.init(1, Traits::kConsumerWarps + 1 + Traits::kBiased + Traits::kTransposers);
    cutlass::arch::fence_barrier_init();
  }
  s.columns.build(p.kv_box, threadIdx.x, Traits::kThreads);
  s.plan_scratch.rows.build(p.q_box, threadIdx.x, Traits::kThreads);
  __syncthreads();
  s.mask.build(p.kv_box, threadIdx.x, Traits::kThreads,
               [&](int column, int (&c)[3]) { s.columns.coordinates(column, c); });
  if constexpr (Traits::kBiased) {
    auto& bias = bias_slices<Traits>();
    if (threadIdx.x == 0) bias.ring.init(32, Traits::kConsumerWarps);  // the copies of a warp
    bias.build(p.q_box, p.kv_box, p.bias.table, Traits::kThreads);
  }
  if (p.q_box.volume() != Traits::kBlockM || p.kv_box.volume() != Traits::kBlockN) {
    fill_zero(&s, zeroed_bytes, Traits::kThreads);
  }
  __syncthreads();
}

// ---- Consumers ----

// The columns of a key tile that a thread's two rows see. Each dimension in which the tile is full drops out.
template <int kBlockN>
__device__ __forceinline__ void visible_keys(ColumnBits<kBlockN> (&visible)[2], const BoxMask<kBlockN>& table,
                                             const Box& box, const MovingTile& tile,
                                             const Range (&keys)[2][3], int quad) {
  if (tile.tests & kTestTail) {
    visible[0] = 0;
    CUTE_UNROLL
    for (int j = 0; j < kBlockN / 4; ++j) {
      if (8 * (j / 2) + 2 * quad + j % 2 < tile.first[0]) visible[0] |= ColumnBits<kBlockN>{1} << j;
    }
    visible[1] = visible[0];
    return;
  }
  visible[0] = visible[1] = table.columns(box, quad);
  CUTE_UNROLL
  for (int d = 0; d < 3; ++d) {
    if (!(tile.tests & kTestDim0 << d)) continue;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Range& k = keys[i][d];
      visible[i] &= table.interval(box, d, k.begin - tile.first[d], k.end - tile.first[d], quad);
    }
  }
}

template <class Traits, class Tensor>
__device__ __forceinline__ void add_bias(Tensor& scores, const BiasParams& p, RingIndex<Traits::kStages> at,
                                         int first_row, int quad) {
  auto& bias = bias_slices<Traits>();
  bias.ring.wait_full(at);
  bias.add(scores, at.stage, first_row, quad, p.per_scale);
  __syncwarp();
  bias.ring.release(at);
}

template <class Tensor, class Bits>
__device__ __forceinline__ void mask_rows(Tensor& scores, const Bits (&visible)[2]) {
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) mask_row(scores, i, visible[i]);
}

// ---- Launch ----

// Encodes the tensors of `args` (FwdSm90Args or BwdSm90Args) and calls launch(maps, params, grid) once, or
// once per batch entry where the folding asks for it.
template <class Traits, class Args, class Launch>
cudaError_t launch_query_stationary(const Args& a, const Tokens<float>& lse, QueryParams p,
                                    cudaStream_t stream, const Launch& launch) {
  constexpr int kHeadDim = Traits::kHeadDim;
  const Problem& problem = a.problem;
  QueryMaps maps{};
  p.problem = problem;
  p.q_box = a.q_box;
  p.kv_box = a.kv_box;
  p.q_part = part_of<Traits>(a.q_box);
  p.q_parts = a.q_box.volume() / p.q_part.volume();
  p.scale = a.scale;
  p.scale_log2 = a.scale * 1.44269504088896341f;
  p.lse = lse;
  p.bias = {a.bias, 1.f / a.scale};
  p.next_work = a.next_work;
  const Launches launches(problem, kHeadDim);
  p.problem.batch = launches.batch;
  p.schedule = Schedule(p.problem, a.q_box, problem.heads);
  if (p.schedule.total > std::numeric_limits<int>::max() / 2) return cudaErrorInvalidConfiguration;
  for (int64_t b = 0; b < launches.count; ++b) {
    const TokenEncoder encode{launches, b, sizeof(typename Traits::Element), kHeadDim, problem};
    cudaError_t e = encode(&maps.q, &p.fold_q, a.q, problem.dim, problem.heads, p.q_part);
    if (e == cudaSuccess) e = encode(&maps.k, &p.fold_k, a.k, problem.dim, problem.heads_kv, a.kv_box);
    if (e == cudaSuccess) e = encode(&maps.v, &p.fold_v, a.v, problem.dim_v, problem.heads_kv, a.kv_box);
    if constexpr (Traits::kWithDout) {
      if (e == cudaSuccess)
        e = encode(&maps.dout, &p.fold_dout, a.dout, problem.dim_v, problem.heads, a.q_box);
    } else if constexpr (Traits::kOutInBoxes) {
      // The engine steps over tokens when it reads, not when it writes.
      p.out_in_boxes = p.q_parts == Traits::kConsumers && problem.groups() == 1;
      const Tokens<const void> out{a.out.data, a.out.batch, {a.out.x[0], a.out.x[1], a.out.x[2]}, a.out.head};
      if (e == cudaSuccess && p.out_in_boxes)
        e = encode(&maps.out, &p.fold_out, out, problem.dim_v, problem.heads, p.q_part);
    }
    if (e == cudaSuccess && problem.additional > 0) {
      e = encode.line(&maps.add_k, &p.fold_add_k, a.add_k, problem.dim, Traits::kBlockN);
      if (e == cudaSuccess)
        e = encode.line(&maps.add_v, &p.fold_add_v, a.add_v, problem.dim_v, Traits::kBlockN);
    }
    if (e == cudaSuccess) e = cudaMemsetAsync(a.next_work, 0, sizeof(int), stream);
    if (e != cudaSuccess) return e;
    p.batch_offset = b;
    launch(maps, p, static_cast<int>(std::min<int64_t>(p.schedule.total, a.num_sms)));
    e = cudaGetLastError();
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace nearfield::gna
