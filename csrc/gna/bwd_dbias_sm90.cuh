// Gradient of the bias on Hopper: the sum of dS = exp2(S - lse) (dP - delta) over all pairs with the same
// relative position. Two pairs of boxes whose first tokens are equally far apart agree in the relative
// position of every element, so their dS can be added element by element, in the registers where it is
// computed. Therefore the boxes of keys lie on a lattice around the box of queries, and a CTA takes one cell
// of it after the other, each time walking over the queries of the grid. Only when the cell changes are
// elements with the same offset summed, in shared memory, and added to the CTA's table.
// A head is dealt out to a fixed number of CTAs, which take equal shares of the list of all (cell, box of
// queries): every sum has a fixed order.
#pragma once

#include "gna/dbias_pairs_sm90.cuh"

namespace nearfield::gna {

enum DbiasBarrier : int {
  kSliceWritten = 1,
  kCellSummed = 2,
  kRowSummed = 3  // and 4: one per warpgroup
};

// ---- Layouts and storage ----

template <class Tag, int kHeadDim_>
struct DbiasTraits : HeadTraits<Tag, kHeadDim_> {
  using Base = HeadTraits<Tag, kHeadDim_>;
  using typename Base::AtomK, typename Base::Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr DbiasTile kTile = dbias_tile(kHeadDim);
  static constexpr int kBlockM = kTile.kBlockM, kBlockN = kTile.kBlockN, kSlots = kTile.kSlots;
  static constexpr int kVisits = 2;
  static constexpr int kColumns = 64;  // of a product: with S and dP of 128 the sum spills registers
  static constexpr int kConsumers = kBlockM / 64;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(registers_fit(kProducerRegisters, kConsumerRegisters, kConsumers));
  static constexpr int kStripRows = 8;
  static constexpr int kStripPitch = kBlockN + 8;  // eight rows of pairs of floats meet in no bank

  using LayoutM = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockM>, Int<kHeadDim>, Int<kSlots>>{}));
  using LayoutN = decltype(tile_to_shape(AtomK{}, cute::Shape<Int<kBlockN>, Int<kHeadDim>, Int<kSlots>>{}));
  using MmaS =
      decltype(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float,
                                                   cute::Shape<Int<kBlockM>, Int<kColumns>, Int<kHeadDim>>>(),
                              Layout<cute::Shape<Int<kConsumers>, _1, _1>>{}));
  using Slice = BiasSlices<kBlockM, kBlockN, 1, bias_places(kHeadDim), Direction::kForward>;

  // What the consumers must know about a pair.
  struct Visit {
    MovingTile keys;
    int distance[3];  // of its boxes
    int head;
    bool ends_cell;
    Range range[kBlockM + 2];  // visible keys per coordinate of the box of queries, dimension after dimension
    alignas(16) RowStats stats[kBlockM];
  };
  struct alignas(1024) Storage {
    alignas(1024) Element rows[kSlots * kBlockM * kHeadDim];     // Q or dO
    alignas(1024) Element columns[kSlots * kBlockN * kHeadDim];  // K or V
    alignas(16) float strip[kConsumers][kStripRows * kStripPitch];
    float
        totals[bias_places(kHeadDim)];  // of the second warpgroup; those of the first take the slice's place
    Slice slice;
    BoxMask<kBlockN> mask;
    Visit visit[kVisits];
    uint32_t row[kBlockM];    // coordinates in the box, 10 bits a dimension
    Range tiles[kMostCells];  // of the queries, that have a key in the cell; dimension after dimension
    PairOfBoxes first;        // of this CTA
    int count;                // of its pairs
    Ring<kSlots> ring_slots;
    Ring<kVisits> ring_visits;
  };
  static_assert(sizeof(Storage) <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");
};

// ---- Producers ----
// Warp 0 loads Q and K, 1 loads dO and V, 2 tells what is visible, 3 gathers lse and delta.

// Loads every second slot from `slot` on.
template <class Traits>
__device__ void load_boxes(typename Traits::Storage& s, const CUtensorMap& rows, const TokenMap& fold_rows,
                           const CUtensorMap& columns, const TokenMap& fold_columns, const DbiasParams& p,
                           int slot) {
  if (threadIdx.x % 32 != 0) return;
  constexpr int kD = Traits::kHeadDim, kM = Traits::kBlockM, kN = Traits::kBlockN;
  const uint32_t bytes = (p.q_box.volume() + p.kv_box.volume()) * kD * sizeof(typename Traits::Element);
  const int heads_per_kv = static_cast<int>(p.problem.heads_per_kv());
  PairWalk<typename Traits::Storage> walk(s, p);
  RingIndex<Traits::kSlots> at;
  if (slot == 1) at.advance();
  for (; walk.more(); walk.advance()) {
    int x_q[3], x_k[3];
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      x_q[d] = walk.group[d] + p.problem.dilation[d] * walk.query(d);
      x_k[d] = x_q[d] + p.problem.dilation[d] * walk.distance(d);
    }
    s.ring_slots.wait_empty(at);
    s.ring_slots.expect_bytes(at, bytes);
    uint64_t* full = &s.ring_slots.full[at.stage];
    load_box<kD, kM>(rows, fold_rows, full, s.rows + at.stage * kM * kD, x_q, walk.head, walk.batch);
    load_box<kD, kN>(columns, fold_columns, full, s.columns + at.stage * kN * kD, x_k,
                     walk.head / heads_per_kv, walk.batch);
    at.advance();
    at.advance();
  }
}

template <class Traits>
__device__ void describe_pairs(typename Traits::Storage& s, const DbiasParams& p) {
  const int lane = threadIdx.x % 32;
  const Box& q = p.q_box;
  const int coordinates = q.side[0] + q.side[1] + q.side[2];
  PairWalk<typename Traits::Storage> walk(s, p);
  RingIndex<Traits::kVisits> at;
  for (; walk.more(); walk.advance()) {
    const auto of_dim = [](int d, const auto& values) {
      return d == 0 ? values(0) : d == 1 ? values(1) : values(2);
    };
    const auto first = [&](int d) { return of_dim(d, [&](int i) { return walk.query(i); }); };
    const auto keys_of = [&](int d, int coordinate) {
      const Window window = p.problem.axis(d, of_dim(d, [&](int i) { return walk.group[i]; }));
      return window.keys(min(first(d) + coordinate, window.length - 1));
    };
    // Windows are monotone: what the first and the last query of the box see, all see.
    uint32_t tests = p.kv_box.volume() == Traits::kBlockN ? 0 : kTestBox;
    if (lane < 6) {
      const int d = lane / 2;
      const Range keys = keys_of(d, lane % 2 == 0 ? 0 : q.side[d] - 1);
      const int key = first(d) + of_dim(d, [&](int i) { return walk.distance(i); });
      if (key < keys.begin || key + p.kv_box.side[d] > keys.end) tests |= kTestDim0 << d;
    }
    tests = __reduce_or_sync(0xffffffffu, tests);
    s.ring_visits.wait_empty(at);
    auto& visit = s.visit[at.stage];
    for (int i = lane; i < coordinates; i += 32) {
      const int d = i < q.side[0] ? 0 : i < q.side[0] + q.side[1] ? 1 : 2;
      if (tests & kTestDim0 << d) {
        visit.range[i] = keys_of(d, i - (d == 0 ? 0 : d == 1 ? q.side[0] : q.side[0] + q.side[1]));
      }
    }
    if (lane == 0) {
      visit.keys.tests = tests;
#pragma unroll
      for (int d = 0; d < 3; ++d) {
        visit.distance[d] = walk.distance(d);
        visit.keys.first[d] = walk.query(d) + visit.distance[d];
      }
      visit.head = walk.head;
      visit.ends_cell = walk.ends_cell();
    }
    __syncwarp();
    if (lane == 0) s.ring_visits.arrive_full(at);
    at.advance();
  }
}

template <class Traits>
__device__ void gather_stats_of_pairs(typename Traits::Storage& s, const DbiasParams& p) {
  constexpr int kM = Traits::kBlockM;
  const int lane = threadIdx.x % 32;
  int coordinate[kM / 32][3];
  int64_t offset[kM / 32];
#pragma unroll
  for (int i = 0; i < kM / 32; ++i) {
    const int row = lane + 32 * i, outer = row / p.q_box.side[2];
    coordinate[i][0] = outer / p.q_box.side[1];
    coordinate[i][1] = outer % p.q_box.side[1];
    coordinate[i][2] = row % p.q_box.side[2];
    offset[i] = 0;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      offset[i] += static_cast<int64_t>(p.problem.dilation[d]) * coordinate[i][d] * p.stats.x[d];
    }
  }
  PairWalk<typename Traits::Storage> walk(s, p);
  RingIndex<Traits::kVisits> at;
  for (; walk.more(); walk.advance()) {
    int room[3];
    int64_t first = (walk.batch + p.batch_offset) * p.stats.batch + walk.head * p.stats.head;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      room[d] = group_length(p.problem.size[d], p.problem.dilation[d], walk.group[d]) - walk.query(d);
      first += (walk.group[d] + static_cast<int64_t>(p.problem.dilation[d]) * walk.query(d)) * p.stats.x[d];
    }
    RowStats value[kM / 32];
#pragma unroll
    for (int i = 0; i < kM / 32; ++i) {
      bool inside = coordinate[i][0] < p.q_box.side[0];
#pragma unroll
      for (int d = 0; d < 3; ++d) inside &= coordinate[i][d] < room[d];
      // A query beyond the grid: exp2(anything - inf) = 0.
      value[i] = inside ? p.stats.data[first + offset[i]] : RowStats{INFINITY, 0.f};
    }
    s.ring_visits.wait_empty(at);
#pragma unroll
    for (int i = 0; i < kM / 32; ++i) s.visit[at.stage].stats[lane + 32 * i] = value[i];
    __syncwarp();
    if (lane == 0) s.ring_visits.arrive_full(at);
    at.advance();
  }
}

// ---- Consumers ----

template <class Traits>
__device__ void build_rows(typename Traits::Storage& s, const Box& box) {
  for (int r = threadIdx.x; r < Traits::kBlockM; r += Traits::kThreads) {
    const int outer = r / box.side[2];
    s.row[r] = static_cast<uint32_t>(outer / box.side[1]) << 20 |
               static_cast<uint32_t>(outer % box.side[1]) << 10 | static_cast<uint32_t>(r % box.side[2]);
  }
}

// Adds the sum of the dS of a cell to the CTA's table. The elements of a row have different offsets: a
// warpgroup takes its rows one after the other, a thread per column, and sums in shared memory.
template <class Traits, class Tensor>
__device__ void reduce_cell(typename Traits::Storage& s, const DbiasParams& p, const Tensor& sum,
                            const SliceOfTable& at, float* table) {
  constexpr int kThreads = Traits::kConsumers * 128, kRows = Traits::kStripRows;
  using Barrier = cutlass::arch::NamedBarrier;
  const int thread = threadIdx.x - 128, warpgroup = thread / 128, column = thread % 128, lane = thread % 32;
  const int count = places_of_slice(p.q_box, p.kv_box);
  Barrier::sync(kThreads, kCellSummed);  // nobody reads the bias of the cell any more
  float* totals = warpgroup == 0 ? s.slice.slice[0] : s.totals;
  for (int n = column; n < count; n += 128) totals[n] = 0.f;
  float* strip = s.strip[warpgroup];
  const bool is_key = column < p.kv_box.volume();
  char* of_column = reinterpret_cast<char*>(totals) +
                    (is_key ? s.slice.column[column / 2 % 4][column / 8 * 2 + column % 2] : 0);
  for (int n = 0; n < 64 / kRows; ++n) {
    if (column / 32 == n / 2) {
      CUTE_UNROLL
      for (int j = 0; j < Traits::kBlockN / 8; ++j) {
        *reinterpret_cast<float2*>(strip + lane / 4 * Traits::kStripPitch + 8 * j + lane % 4 * 2) =
            n % 2 == 0 ? float2{sum(0, 2 * j), sum(0, 2 * j + 1)} : float2{sum(1, 2 * j), sum(1, 2 * j + 1)};
      }
    }
    Barrier::sync(128, kRowSummed + warpgroup);
    float value[kRows];
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) value[r] = is_key ? strip[r * Traits::kStripPitch + column] : 0.f;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = warpgroup * 64 + n * kRows + r;
      if (is_key && row < p.q_box.volume())
        *reinterpret_cast<float*>(of_column + s.slice.row[row]) += value[r];
      Barrier::sync(128, kRowSummed + warpgroup);
    }
  }
  Barrier::sync(kThreads, kCellSummed);
  for (int n = thread; n < count; n += kThreads) {
    const SlicePlace place = s.slice.place[n];
    if (at.holds(place)) table[at.first + place.offset] += s.slice.slice[0][n] + s.totals[n];
  }
}

// The keys that a thread's two rows, first_row and first_row + 8, see.
template <class Traits>
__device__ __forceinline__ void see_keys(uint32_t (&visible)[2], const typename Traits::Storage& s,
                                         const DbiasParams& p, const MovingTile& keys,
                                         const typename Traits::Visit& visit, int first_row, int quad) {
  Range seen[2][3];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    // Rows that are not in the box take the ranges of any other.
    const uint32_t c = s.row[first_row + 8 * i];
    seen[i][0] = visit.range[min(static_cast<int>(c >> 20), p.q_box.side[0] - 1)];
    seen[i][1] = visit.range[p.q_box.side[0] + static_cast<int>(c >> 10 & 1023)];
    seen[i][2] = visit.range[p.q_box.side[0] + p.q_box.side[1] + static_cast<int>(c & 1023)];
  }
  visible_keys(visible, s.mask, p.kv_box, keys, seen, quad);
}

template <class Traits>
__device__ void sum_pairs(typename Traits::Storage& s, const DbiasParams& p) {
  constexpr int kM = Traits::kBlockM, kN = Traits::kBlockN, kThreads = Traits::kConsumers * 128;
  constexpr int kColumns = Traits::kColumns;
  const int thread = threadIdx.x - 128, warpgroup = cutlass::canonical_warp_group_idx() - 1,
            warp = thread / 32, lane = thread % 32, quad = thread % 4;
  const int first_row = warp * 16 + lane / 4;  // and first_row + 8
  float* table = p.gradient.table.data + p.part() * p.gradient.part;

  Tensor sRows = make_tensor(make_smem_ptr(s.rows), typename Traits::LayoutM{});        // (M, D, slot)
  Tensor sColumns = make_tensor(make_smem_ptr(s.columns), typename Traits::LayoutN{});  // (N, D, slot)
  typename Traits::MmaS mma_s;
  auto thread_s = mma_s.get_slice(warpgroup * 128);
  Tensor tSrRows = thread_s.partition_fragment_A(sRows);
  Tensor tSrS = partition_fragment_C(mma_s, cute::Shape<Int<kM>, Int<kColumns>>{});
  Tensor tSrDp = partition_fragment_C(mma_s, cute::Shape<Int<kM>, Int<kColumns>>{});
  Tensor tSrSum = partition_fragment_C(mma_s, cute::Shape<Int<kM>, Int<kN>>{});
  Tensor scores = make_tensor(tSrS.data(), accumulator_rows_cols(tSrS.layout()));
  Tensor dprobs = make_tensor(tSrDp.data(), accumulator_rows_cols(tSrDp.layout()));
  Tensor sum = make_tensor(tSrSum.data(), accumulator_rows_cols(tSrSum.layout()));

  RingIndex<Traits::kSlots> at_slot;
  RingIndex<Traits::kVisits> at;
  bool begins_cell = true;
  const int heads =
      (static_cast<int>(p.problem.heads) - p.first_head() + p.heads_at_once() - 1) / p.heads_at_once();
  for (int left = s.count * heads; left > 0; --left) {
    s.ring_visits.wait_full(at);
    const auto& visit = s.visit[at.stage];
    const MovingTile keys = visit.keys;
    const bool ends_cell = visit.ends_cell;
    if (begins_cell) {
      const SliceOfTable within(p.bias.table, p.problem, p.q_box, visit.distance);
      const float* bias = p.bias.table.data + visit.head * p.bias.table.head;
      const int count = places_of_slice(p.q_box, p.kv_box);
      for (int n = thread; n < count; n += kThreads) {
        const auto place = s.slice.place[n];
        s.slice.slice[0][n] = within.holds(place) ? bias[within.first + place.offset] : 0.f;
      }
      clear(tSrSum);
      cutlass::arch::NamedBarrier::sync(kThreads, kSliceWritten);
    }

    const auto at_qk = at_slot;
    at_slot.advance();
    // Shared memory answers late under the products.
    RowStats stats[2];
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) stats[i] = visit.stats[first_row + 8 * i];
    uint32_t visible[2];
    CUTE_UNROLL
    for (int n = 0; n < kN / kColumns; ++n) {
      Tensor tSrColumns = thread_s.partition_fragment_B(
          local_tile(sColumns, cute::Shape<Int<kColumns>, Int<Traits::kHeadDim>>{}, make_coord(n, 0)));
      if (n == 0) s.ring_slots.wait_full(at_qk);
      issue_gemm<true>(mma_s, tSrRows(_, _, _, at_qk.stage), tSrColumns(_, _, _, at_qk.stage), tSrS);
      if (n == 0) s.ring_slots.wait_full(at_slot);
      issue_gemm<true>(mma_s, tSrRows(_, _, _, at_slot.stage), tSrColumns(_, _, _, at_slot.stage), tSrDp);
      if (n == 0 && keys.tests != 0) see_keys<Traits>(visible, s, p, keys, visit, first_row, quad);
      warpgroup_wait<1>();  // S
      if (n + 1 == kN / kColumns) s.ring_slots.release(at_qk);
      s.slice.add(scores, 0, first_row, quad, p.bias.per_scale, n * kColumns);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        CUTE_UNROLL
        for (int j = 0; j < kColumns / 4; ++j) {
          scores(i, j) = exp2_approx(scores(i, j) * p.scale_log2 - stats[i].lse);
        }
      }
      warpgroup_fence_operand(tSrS);
      warpgroup_wait<0>();  // dP
      if (n + 1 == kN / kColumns) s.ring_slots.release(at_slot);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        CUTE_UNROLL
        for (int j = 0; j < kColumns / 4; ++j) scores(i, j) *= dprobs(i, j) - stats[i].delta;
      }
      // Not before, so that nothing comes of NaN in what is not seen.
      if (keys.tests != 0) {
        CUTE_UNROLL
        for (int i = 0; i < 2; ++i) {
          CUTE_UNROLL
          for (int j = 0; j < kColumns / 4; ++j) {
            if (!(visible[i] >> (n * kColumns / 4 + j) & 1u)) scores(i, j) = 0.f;
          }
        }
      }
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        CUTE_UNROLL
        for (int j = 0; j < kColumns / 4; ++j) sum(i, n * kColumns / 4 + j) += scores(i, j);
      }
    }
    at_slot.advance();
    if (ends_cell) {
      reduce_cell<Traits>(s, p, sum, SliceOfTable(p.bias.table, p.problem, p.q_box, visit.distance),
                          table + visit.head * p.gradient.table.head);
    }
    begins_cell = ends_cell;
    __syncwarp();
    s.ring_visits.release(at);
    at.advance();
  }
}

// ---- Kernel and launch ----

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bwd_dbias_kernel(const __grid_constant__ DbiasMaps maps, const __grid_constant__ DbiasParams p) {
  auto& s = shared_storage<typename Traits::Storage>();
  if (threadIdx.x == 0) {
    if (cast_smem_ptr_to_uint(&s) % kStorageAlignment != 0) __trap();
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.dout}) prefetch_map(*map);
    s.ring_slots.init(1, Traits::kConsumerWarps);
    s.ring_visits.init(2, Traits::kConsumerWarps);
    cutlass::arch::fence_barrier_init();
  }
  s.mask.build(p.kv_box, threadIdx.x, Traits::kThreads);
  s.slice.build(p.q_box, p.kv_box, p.bias.table, Traits::kThreads);
  build_rows<Traits>(s, p.q_box);
  if (p.q_box.volume() != Traits::kBlockM || p.kv_box.volume() != Traits::kBlockN) {
    fill_zero(&s, offsetof(typename Traits::Storage, strip), Traits::kThreads);
  }
  find_tiles_of_cells(s, p, Traits::kThreads);
  if (threadIdx.x == 0) find_share(s, p);
  __syncthreads();
  if (s.count == 0) return;

  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) load_boxes<Traits>(s, maps.q, p.fold_q, maps.k, p.fold_k, p, 0);
    if (warp == 1) load_boxes<Traits>(s, maps.dout, p.fold_dout, maps.v, p.fold_v, p, 1);
    if (warp == 2) describe_pairs<Traits>(s, p);
    if (warp == 3) gather_stats_of_pairs<Traits>(s, p);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    sum_pairs<Traits>(s, p);
  }
}

template <class Tag, int kHeadDim>
int bwd_dbias_sm90<Tag, kHeadDim>::run(const BwdSm80Args& a, void* stream) {
  using Traits = DbiasTraits<Tag, kHeadDim>;
  constexpr int kShared = sizeof(typename Traits::Storage);
  if (const cudaError_t e = allow_shared_memory(bwd_dbias_kernel<Traits>, kShared)) return e;
  const Problem& problem = a.problem;
  const Launches launches(problem, kHeadDim);
  DbiasMaps maps{};
  DbiasParams p{};
  p.problem = problem;
  p.q_box = a.q_box;
  p.kv_box = a.kv_box;
  p.cells = Cells(problem, a.q_box, a.kv_box);
  p.problem.batch = launches.batch;
  for (int d = 0; d < 3; ++d) {
    const int side = a.q_box.side[d];
    p.tiles[d] = (group_length(problem.size[d], problem.dilation[d], 0) + side - 1) / side;
  }
  p.outers = static_cast<int>(launches.batch * problem.groups());
  p.scale_log2 = a.scale * 1.44269504088896341f;
  p.stats = a.stats;
  p.bias = {a.bias, 1.f / a.scale};
  p.gradient = a.dbias;
  for (int64_t b = 0; b < launches.count; ++b) {
    const TokenEncoder encode{launches, b, sizeof(typename Traits::Element), kHeadDim, problem};
    cudaError_t e = encode(&maps.q, &p.fold_q, a.q, problem.dim, problem.heads, a.q_box);
    if (e == cudaSuccess) e = encode(&maps.dout, &p.fold_dout, a.dout, problem.dim_v, problem.heads, a.q_box);
    if (e == cudaSuccess) e = encode(&maps.k, &p.fold_k, a.k, problem.dim, problem.heads_kv, a.kv_box);
    if (e == cudaSuccess) e = encode(&maps.v, &p.fold_v, a.v, problem.dim_v, problem.heads_kv, a.kv_box);
    if (e != cudaSuccess) return e;
    p.batch_offset = b;
    const int64_t at_once = std::clamp<int64_t>(a.num_sms / a.dbias.parts, 1, problem.heads);
    const auto grid = static_cast<unsigned>(at_once * a.dbias.parts);
    bwd_dbias_kernel<Traits><<<grid, Traits::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(maps, p);
    e = cudaGetLastError();
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace nearfield::gna
