// What the portable kernels share. A CTA draws a tile of staying tokens (queries, or keys for their
// gradients), computes what its rows see, and walks over the tiles of the moving tokens. Every row of a block
// comes through its own coordinates: tables hold, per row of a box, the packed coordinates and the offset
// from the box's first token, so that one addition and one comparison place a row, whatever the rank, the
// box, the dilation and the strides.
#pragma once

#include <cuda_runtime_api.h>

#include <cute/arch/copy_sm80.hpp>

#include "gna/box_mask.cuh"
#include "gna/sm80.h"
#include "gna/tiles.h"
#include "gna/work.cuh"
#include "nearfield/shared_memory.cuh"
#include "nearfield/softmax.cuh"
#include "nearfield/warp_mma.cuh"

namespace nearfield::gna {

template <class Tag>
using element_t = std::conditional_t<std::is_same_v<Tag, bf16>, cutlass::bfloat16_t,
                                     std::conditional_t<std::is_same_v<Tag, fp16>, cutlass::half_t, float>>;

constexpr float kLog2e = 1.44269504088896341f;

// ---- Tokens ----

template <class Element>
struct Operand {
  Tokens<const Element> tokens;
  int features;
  bool aligned;  // every row can be copied 16 bytes at a time
};

// Coordinates in a box, 10 bits a dimension. The top bit of each field is free: it stays set in limit -
// coordinate exactly where the coordinate is at most the limit.
constexpr uint32_t kGuard = 1u << 9 | 1u << 19 | 1u << 29;
constexpr uint32_t kNoToken = 511u << 20;  // beyond every limit

// Lets through the coordinates below `room`.
__device__ __forceinline__ uint32_t limit_of(const int (&room)[3]) {
  uint32_t limit = kGuard;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    limit += static_cast<uint32_t>(min(max(room[d], 0), kMaxTileSide) - 1) << 10 * (2 - d);
  }
  return limit;
}

__device__ __forceinline__ bool is_inside(uint32_t coordinate, uint32_t limit) {
  return ((limit - coordinate) & kGuard) == kGuard;
}

template <class T>
__device__ __forceinline__ int64_t offset_of(const Tokens<T>& t, int batch, int head, const int (&x)[3]) {
  return batch * t.batch + head * t.head + x[0] * t.x[0] + x[1] * t.x[1] + x[2] * t.x[2];
}

// A row of a block for one tensor; read as one 16-byte load.
struct alignas(16) RowEntry {
  int64_t offset;  // bytes
  uint32_t coordinate;
  int place;  // in the table of the bias, from that of the box's first token
};

template <int kRows, int kTensors>
struct RowTable {
  RowEntry entry[kTensors][kRows];

  // `stride(t, d)`: bytes of tensor t in dimension d; `step`: the dilation; `places`: steps in the bias.
  template <class Stride>
  __device__ void build(const Box& box, const int (&step)[3], const Stride& stride, const int (&places)[3],
                        int num_threads) {
    for (int r = threadIdx.x; r < kRows; r += num_threads) {
      const int outer = r / box.side[2];
      const int c[3] = {outer / box.side[1], outer % box.side[1], r % box.side[2]};
      const uint32_t coordinate =
          c[0] < box.side[0] ? static_cast<uint32_t>(c[0]) << 20 | static_cast<uint32_t>(c[1]) << 10 | c[2]
                             : kNoToken;
      for (int t = 0; t < kTensors; ++t) {
        int64_t at = 0;
        for (int d = 0; d < 3; ++d) at += static_cast<int64_t>(c[d]) * step[d] * stride(t, d);
        entry[t][r] = {at, coordinate, c[0] * places[0] + c[1] * places[1] + c[2] * places[2]};
      }
    }
  }
};

// Starts the copy of a block of rows. Rows without a token and features beyond the operand's become zero.
template <int kRows, int kHeadDim, int kThreads, class Element>
__device__ __forceinline__ void gather(Element* to, const Operand<Element>& from, int64_t first,
                                       const RowEntry* row, uint32_t limit) {
  constexpr int kPiece = 16 / sizeof(Element), kPieces = kHeadDim / kPiece, kRowsAtOnce = kThreads / kPieces;
  static_assert(kRows % kRowsAtOnce == 0 && kThreads % kPieces == 0);
  const int column = threadIdx.x % kPieces * kPiece, first_row = threadIdx.x / kPieces;
  const char* source = reinterpret_cast<const char*>(from.tokens.data + first + column);
  to += first_row * kPaddedRow<Element, kHeadDim> + column;
  row += first_row;
  if (from.aligned) {
    const bool exists = column < from.features;
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      const RowEntry entry = row[i];
      cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
          *reinterpret_cast<const cute::uint128_t*>(source + entry.offset),
          *reinterpret_cast<cute::uint128_t*>(to + i * kPaddedRow<Element, kHeadDim>),
          exists && is_inside(entry.coordinate, limit));
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      const RowEntry entry = row[i];
      const auto* elements = reinterpret_cast<const Element*>(source + entry.offset);
      for (int c = 0; c < kPiece; ++c) {
        to[i * kPaddedRow<Element, kHeadDim> + c] =
            column + c < from.features && is_inside(entry.coordinate, limit) ? elements[c] : Element(0.f);
      }
    }
  }
}

// The copies that this thread started have arrived, and so have everyone's.
__device__ __forceinline__ void wait_for_copies() {
  cute::cp_async_wait<0>();
  __syncthreads();
}

// Writes a warp's rows of an accumulator, rounded, to out[row * features + column]; row < 0: none.
template <class Element, int kRowTiles, int kColumns>
__device__ __forceinline__ void store_rows(Accumulator<kRowTiles, kColumns>& c, const int64_t* row,
                                           Element* out, int features, int first_column) {
  const int lane = threadIdx.x % 32;
  auto values = c.rows_cols();
  CUTE_UNROLL
  for (int i = 0; i < c.kRows; ++i) {
    const int64_t at = row[8 * i + lane / 4];
    if (at < 0) continue;
    Element* to = out + at * features;
    CUTE_UNROLL
    for (int j = 0; j < kColumns / 8; ++j) {
      const int column = first_column + 8 * j + lane % 4 * 2;
      cutlass::NumericArrayConverter<Element, float, 2> convert;
      const auto pair = convert(cutlass::Array<float, 2>{values(i, 2 * j), values(i, 2 * j + 1)});
      if (features % 2 == 0) {
        if (column < features) {
          *reinterpret_cast<cutlass::AlignedArray<Element, 2>*>(to + column) =
              reinterpret_cast<const cutlass::AlignedArray<Element, 2>&>(pair);
        }
      } else {
        if (column < features) to[column] = pair[0];
        if (column + 1 < features) to[column + 1] = pair[1];
      }
    }
  }
}

// ---- Kernels ----

// kStayingTensors: how many operands stay (Q; Q and dO; K and V). Two always move.
template <class Tag, int kHeadDim_, PortableTile (*kTileOf)(int, int), int kStayingTensors_,
          Direction kDirection_>
struct PortableTraits {
  using Element = element_t<Tag>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr PortableTile kTile = kTileOf(kHeadDim, sizeof(Element));
  static constexpr int kStaying = kTile.kStaying, kMoving = kTile.kMoving, kRowTiles = kTile.kRowTiles;
  static constexpr int kStayingTensors = kStayingTensors_;
  static constexpr Direction kDirection = kDirection_;
  static constexpr int kThreads = kStaying / (16 * kRowTiles) * 32;
  static constexpr int kRow = kPaddedRow<Element, kHeadDim>;

  struct Storage {
    alignas(16) Element staying[kStayingTensors][kStaying * kRow];
    alignas(16) Element moving[2][kMoving * kRow];
    alignas(16) RowStats stats[kMoving];  // of visited queries
    BoxMask<kMoving> mask;
    PlannedTile<kStaying> plan;
    RowTable<kStaying, kStayingTensors> staying_rows;
    RowTable<kMoving, 3> moving_rows;  // two operands and the statistics
    RowTable<kMoving, 2> line_rows;    // additional tokens
    int next_work;
  };
  static_assert(sizeof(Storage) <= 99 * 1024, "what a CTA has on every GPU since Ampere");

  struct Params {
    Problem problem;
    Schedule schedule;
    Box staying_box, moving_box;
    Operand<Element> staying[kStayingTensors], moving[2];
    Operand<Element> line[2];      // additional keys and values; unused without
    int line_length;               // how many of them are visited after the neighborhood
    Tokens<const RowStats> stats;  // [B, X, H]
    Tokens<float> rows;            // strides of the results in rows
    Element* result[2];            // rows of `features` of the operand they belong to, contiguous
    float* lse;
    float scale, scale_log2;
    BiasTable<const float> bias;  // with one, scores leave add_bias in powers of two, and scale_log2 is 1
    float bias_scale_log2;
    BiasGradient<float> dbias;
    int* next_work;

    void set_scale(float value, const BiasTable<const float>& table) {
      scale = value;
      bias = table;
      bias_scale_log2 = value * kLog2e;
      scale_log2 = table.data != nullptr ? 1.f : value * kLog2e;
    }
  };
};

// The visited tiles of one staying tile, one after the other: its neighborhood (for keys once per query
// head), then the additional tokens. There is always one: every query sees a key, every key is seen.
template <class Traits>
class Walk {
  using Element = typename Traits::Element;
  static constexpr bool kForward = Traits::kDirection == Direction::kForward;

 public:
  __device__ __forceinline__ Walk(typename Traits::Storage& s, const typename Traits::Params& p)
      : s(s), p(p) {
    locate();
  }

  // Moves on to the next tile; false behind the last.
  __device__ __forceinline__ bool advance() {
    if (line_first < 0) {
      counter.advance(s.plan.tile);
      const bool more = counter.n[0] < s.plan.tile.visits[0].count;
      if (!more) counter = {};
      if (more || (!kForward && ++head_of_group < p.problem.heads_per_kv())) {
        locate();
        return true;
      }
    }
    if (!kForward) return false;
    line_first = line_first < 0 ? 0 : line_first + Traits::kMoving;
    if (line_first >= p.line_length) return false;
    locate_line();
    return true;
  }

  // Starts the copy of moving operand t of the current tile.
  template <int t>
  __device__ __forceinline__ void gather_moving() const {
    const bool line = line_first >= 0;
    gather<Traits::kMoving, Traits::kHeadDim, Traits::kThreads>(
        s.moving[t], line ? p.line[t] : p.moving[t], offset[t],
        line ? s.line_rows.entry[t] : s.moving_rows.entry[t], limit);
  }

  // The same of the statistics of visited queries. Where there is no query, zeros: the mask hides them.
  __device__ __forceinline__ void gather_stats() const {
    for (int r = threadIdx.x; r < Traits::kMoving; r += Traits::kThreads) {
      const RowEntry entry = s.moving_rows.entry[2][r];
      const auto* from = reinterpret_cast<const char*>(p.stats.data + offset[2]) + entry.offset;
      cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint64_t>::copy(*reinterpret_cast<const uint64_t*>(from),
                                                            *reinterpret_cast<uint64_t*>(&s.stats[r]),
                                                            is_inside(entry.coordinate, limit));
    }
  }

  // Scores times scale plus bias, both times log2(e). A pair that does not see each other can be beyond the
  // table; it is hidden later.
  template <class Tensor>
  __device__ __forceinline__ void add_bias(Tensor& scores, int first_row) const {
    using cute::size;
    if (p.bias.data == nullptr) return;
    const int lane = threadIdx.x % 32, quad = lane % 4;
    const bool line = line_first >= 0;
    const float* table = p.bias.data + query_head * p.bias.head;
    const uint32_t first = first_place();
    constexpr int kRows = 2 * Traits::kRowTiles;
    uint32_t row_place[kRows];
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      row_place[i] = s.staying_rows.entry[0][first_row + 8 * i + lane / 4].place;
    }
    CUTE_UNROLL
    for (int j = 0; j < size<1>(scores); ++j) {
      const uint32_t column_place = s.moving_rows.entry[0][8 * (j / 2) + 2 * quad + j % 2].place;
      CUTE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const uint32_t at = first + (kForward ? column_place - row_place[i] : row_place[i] - column_place);
        const float bias = !line && at < static_cast<uint32_t>(p.bias.size) ? __ldg(table + at) : 0.f;
        scores(i, j) = fmaf(scores(i, j), p.bias_scale_log2, bias * kLog2e);
      }
    }
  }

  // Adds dS of the current tile, [staying][moving] in shared memory, to the table of a head. One thread sums
  // all pairs of one offset, row by row: the order is fixed.
  __device__ __forceinline__ void sum_offsets(const float* dscores, float* table) const {
    const Box &q = p.staying_box, &k = p.moving_box;
    int offsets[3], base[3];
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      offsets[d] = q.side[d] + k.side[d] - 1;
      base[d] = tile.first[d] - s.plan.tile.first[d] + p.problem.window[d] - 1;
    }
    for (int n = threadIdx.x; n < offsets[0] * offsets[1] * offsets[2]; n += Traits::kThreads) {
      const int outer = n / offsets[2];
      const int o[3] = {outer / offsets[1] - (q.side[0] - 1), outer % offsets[1] - (q.side[1] - 1),
                        n % offsets[2] - (q.side[2] - 1)};
      bool exists = true;
      int begin[3], end[3], at = 0;
#pragma unroll
      for (int d = 0; d < 3; ++d) {
        const int place = base[d] + o[d];
        exists &= place >= 0 && place < 2 * p.problem.window[d] - 1;
        at += place * p.dbias.table.step[d];
        begin[d] = max(0, -o[d]);
        end[d] = min(q.side[d], k.side[d] - o[d]);
      }
      if (!exists) continue;
      float sum = 0.f;
      for (int c0 = begin[0]; c0 < end[0]; ++c0) {
        for (int c1 = begin[1]; c1 < end[1]; ++c1) {
          const float* row = dscores + (c0 * q.side[1] + c1) * q.side[2] * Traits::kMoving +
                             ((c0 + o[0]) * k.side[1] + c1 + o[1]) * k.side[2] + o[2];
          for (int c2 = begin[2]; c2 < end[2]; ++c2) sum += row[c2 * (Traits::kMoving + 1)];
        }
      }
      if (sum != 0.f) table[at] += sum;
    }
  }

  // Hides what the warp's rows, from first_row on, must not see in the current tile.
  template <class Tensor>
  __device__ __forceinline__ void mask(Tensor& scores, int first_row) const {
    using cute::size;
    if (tile.tests == 0) return;
    const int lane = threadIdx.x % 32, quad = lane % 4;
    CUTE_UNROLL
    for (int i = 0; i < size<0>(scores); ++i) {
      uint32_t visible = 0;
      if (tile.tests & kTestTail) {
        CUTE_UNROLL
        for (int j = 0; j < size<1>(scores); ++j) {
          if (8 * (j / 2) + 2 * quad + j % 2 < tile.first[0]) visible |= 1u << j;
        }
      } else {
        visible =
            visible_columns(s.mask, p.moving_box, tile, s.plan.range[first_row + 8 * i + lane / 4], quad);
      }
      mask_row(scores, i, visible);
    }
  }

 private:
  // Place in the bias of the first staying and the first moving token.
  __device__ __forceinline__ uint32_t first_place() const {
    int place = 0;
#pragma unroll
    for (int d = 0; d < 3; ++d) place += (tile.first[d] - s.plan.tile.first[d]) * p.bias.step[d];
    return static_cast<uint32_t>(p.bias.center + (kForward ? place : -place));
  }

  __device__ __forceinline__ void locate() {
    const StayingTile& from = s.plan.tile;
    int room[3], x[3];
    tile.tests = p.moving_box.volume() == Traits::kMoving ? 0 : kTestBox;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      tile.first[d] = from.visits[d].origin + counter.n[d] * p.moving_box.side[d];
      if (!from.visits[d].is_full(counter.n[d])) tile.tests |= kTestDim0 << d;
      room[d] = from.window[d].length - tile.first[d];
    }
    from.position(p.problem, tile.first, x);
    limit = limit_of(room);
    const int group_size = static_cast<int>(p.problem.heads_per_kv());
    const int head = kForward ? from.head / group_size : from.head * group_size + head_of_group;
    query_head = kForward ? from.head : head;
#pragma unroll
    for (int t = 0; t < 2; ++t) offset[t] = offset_of(p.moving[t].tokens, from.batch, head, x);
    if (!kForward) offset[2] = offset_of(p.stats, from.batch, head, x);
  }

  __device__ __forceinline__ void locate_line() {
    const StayingTile& from = s.plan.tile;
    const int valid = p.line_length - line_first;
    tile.first[0] = valid;
    tile.tests = valid < Traits::kMoving ? kTestTail : 0;
    limit = limit_of({1, 1, valid});
    const int head = from.head / static_cast<int>(p.problem.heads_per_kv());
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      offset[t] = offset_of(p.line[t].tokens, from.batch, head, {0, 0, line_first});
    }
  }

  typename Traits::Storage& s;
  const typename Traits::Params& p;
  TileCounter counter;
  int head_of_group = 0;
  int query_head;
  int line_first = -1;  // first additional token of the tile; -1: it is one of the neighborhood
  // The current tile.
  MovingTile tile;
  uint32_t limit;
  int64_t offset[3];  // of its first token, per operand and for the statistics
};

// The n-th work item of a head: its tiles, by batch entry and dilation group.
__device__ __forceinline__ int work_of_head(const Schedule& schedule, const Problem& p, int head, int n) {
  const int of_entry = schedule.tiles[0] * schedule.tiles[1] * schedule.tiles[2] * p.dilation[0] *
                       p.dilation[1] * p.dilation[2];
  const int batch = n / of_entry;
  return (batch * schedule.heads + head) * of_entry + n - batch * of_entry;
}

// Draws staying tiles, plans each, gathers its operands and calls body(). kByHead: no tile is drawn; a CTA's
// tiles are those of one head that are its turn, in a fixed order.
template <class Traits, bool kByHead = false, class Body>
__device__ __forceinline__ void for_each_tile(typename Traits::Storage& s, const typename Traits::Params& p,
                                              const Body& body) {
  constexpr int kThreads = Traits::kThreads;
  static_assert(Traits::kStaying <= kThreads);
  const bool line_stays = p.schedule.line > 0;
  const int (&places)[3] = p.bias.step;
  s.mask.build(p.moving_box, threadIdx.x, kThreads);
  const auto stride_of = [](const auto& operands) {
    return [&](int t, int d) { return operands[t].tokens.x[d] * int64_t{sizeof(typename Traits::Element)}; };
  };
  s.staying_rows.build(p.staying_box, p.problem.dilation, stride_of(p.staying), places, kThreads);
  s.moving_rows.build(
      p.moving_box, p.problem.dilation,
      [&](int t, int d) {
        return t < 2 ? stride_of(p.moving)(t, d) : p.stats.x[d] * int64_t{sizeof(RowStats)};
      },
      places, kThreads);
  s.line_rows.build(Box{{1, 1, Traits::kMoving}}, {1, 1, 1}, stride_of(p.line), places, kThreads);

  const int heads = p.schedule.heads, own_head = kByHead ? blockIdx.x % heads : 0;
  const int64_t total = kByHead ? p.schedule.total / heads : p.schedule.total;
  int next = kByHead ? blockIdx.x / heads : blockIdx.x;
  while (next < total) {
    const int work = kByHead ? work_of_head(p.schedule, p.problem, own_head, next) : next;
    StayingTile tile;
    p.schedule.template decode<Traits::kDirection>(p.problem, p.staying_box, p.moving_box, work, tile);
    if (threadIdx.x < Traits::kStaying) {
      s.plan.template set_row<Traits::kDirection>(threadIdx.x, tile, p.problem, p.staying_box, tile.batch,
                                                  p.rows, line_stays);
    }
    if (threadIdx.x == 0) s.plan.tile = tile;
    __syncthreads();
    if (!tile.empty()) {
      int x[3], room[3];
#pragma unroll
      for (int d = 0; d < 3; ++d) room[d] = tile.extent[d] - tile.first[d];
      tile.position(p.problem, tile.first, x);
#pragma unroll
      for (int t = 0; t < Traits::kStayingTensors; ++t) {
        gather<Traits::kStaying, Traits::kHeadDim, kThreads>(
            s.staying[t], p.staying[t], offset_of(p.staying[t].tokens, tile.batch, tile.head, x),
            s.staying_rows.entry[t], limit_of(room));
      }
      body();
    }
    if (!kByHead && threadIdx.x == 0) {
      s.next_work = static_cast<int>(gridDim.x) + atomicAdd(p.next_work, 1);
    }
    __syncthreads();
    next = kByHead ? next + static_cast<int>(gridDim.x) / heads : s.next_work;
  }
}

// ---- Launch ----

template <class Element>
Operand<Element> operand(const Tokens<const void>& t, int64_t features, int64_t batch, int64_t heads,
                         const int (&size)[3]) {
  const auto fits = [](int64_t count, int64_t stride) {
    return count == 1 || stride * static_cast<int64_t>(sizeof(Element)) % 16 == 0;
  };
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && fits(0, features) && fits(batch, t.batch) &&
                 fits(heads, t.head);
  for (int d = 0; d < 3; ++d) aligned &= fits(size[d], t.x[d]);
  return {{static_cast<const Element*>(t.data), t.batch, {t.x[0], t.x[1], t.x[2]}, t.head},
          static_cast<int>(features),
          aligned};
}

// Strides of a contiguous result in rows.
template <class T>
Tokens<float> rows_of(const Tokens<T>& t, int64_t features) {
  return {nullptr,
          t.batch / features,
          {t.x[0] / features, t.x[1] / features, t.x[2] / features},
          t.head / features};
}

template <class Traits>
cudaError_t launch_portable(void (*kernel)(const typename Traits::Params), const typename Traits::Params& p,
                            int num_sms, cudaStream_t stream) {
  if (p.schedule.total > std::numeric_limits<int>::max() / 2) return cudaErrorInvalidConfiguration;
  constexpr int kShared = sizeof(typename Traits::Storage);
  cudaError_t e = allow_shared_memory(kernel, kShared);
  int per_sm = 0;
  if (e == cudaSuccess) {
    e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, Traits::kThreads, kShared);
  }
  if (e == cudaSuccess) e = cudaMemsetAsync(p.next_work, 0, sizeof(int), stream);
  if (e != cudaSuccess) return e;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(p.schedule.total, int64_t{num_sms} * per_sm));
  kernel<<<grid, Traits::kThreads, kShared, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace nearfield::gna
