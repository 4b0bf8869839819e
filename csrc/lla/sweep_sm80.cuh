// What the portable kernels share: a CTA whose warps hold 16 rows each (queries, or keys for their
// gradients), rows as left operands in shared memory, and the walk over tiles of the other side through two
// buffers, of which one is filled while the other is read.
#pragma once

#include <cuda_runtime_api.h>

#include <cute/arch/copy_sm80.hpp>

#include "lla/operand_layout.cuh"
#include "lla/sm80.h"
#include "nearfield/element.cuh"
#include "nearfield/shared_memory.cuh"
#include "nearfield/softmax.cuh"
#include "nearfield/warp_mma.cuh"

namespace nearfield::lla {

constexpr float kLog2eSm80 = 1.44269504088896341f, kLn2Sm80 = 0.693147180559945309f;

// lse to the nearest integer, in units of log2; 0 where nothing is visible or one key.
__device__ __forceinline__ float whole_log2(float lse, bool lone) {
  return lone || lse == -INFINITY ? 0.f : rintf(lse * kLog2eSm80);
}

template <class Tag>
using operand_t = std::conditional_t<std::is_same_v<Tag, fp16>, cutlass::half_t, float>;

// ---- Tiles ----

// kResident operands of the rows and, per buffer, kMovingOperands of the others.
// kOnGrid: who sees whom is said by a grid, else by Visibility.
template <class Tag, int kHeadDim_, bool kOnGrid_, int kWarps_, int kResident_, int kMoving_,
          int kMovingOperands_ = 1>
struct PortableTraits {
  static constexpr bool kOnGrid = kOnGrid_;
  static constexpr int kTilesOfBox = kBoxRows / kMoving_;  // moving tiles
  using Element = operand_t<Tag>;
  static constexpr bool kIsHalf = sizeof(Element) == 2;
  static constexpr int kD = kHeadDim_, kWarps = kWarps_, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kMoving = kMoving_, kMovingOperands = kMovingOperands_;
  static constexpr int kRow = kPaddedRow<Element, kD>;
  static constexpr int kQuads = kD / 8;
  using Vector = Accumulator<1, kD>;
  using Scores = Accumulator<1, kMoving>;
  struct Storage {
    alignas(16) Element resident[kResident_][kRows * kRow];
    alignas(16) Element moving[2][kMovingOperands][kMoving * kRow];
    alignas(16) PairRow pairs[2][kMovingOperands > 1 ? kMoving : 1];
    // On a grid: the tiles that the rows see, or that see them, and what of them each row.
    Grid::Tiles boxes;
    Grid::Reach reach[kOnGrid ? kRows : 1];
  };
  static_assert(sizeof(Storage) <= 99 * 1024, "what a CTA has on every GPU since Ampere");
  static_assert(kTileRows % kMoving == 0 && kTileRows % kRows == 0);
};

// ---- Operands ----

// Where `column`, the first of 16 bytes, of `row` of a head lies.
template <class Element, int kD>
__device__ __forceinline__ int64_t operand_offset(int row, int column) {
  if constexpr (sizeof(Element) == 2) {
    return static_cast<int64_t>(row / kTileRows) * tile_elements(kD) +
           tile_offset<kD>(row % kTileRows, column);
  } else {
    return static_cast<int64_t>(row) * kD + column;
  }
}

template <class Element, int kD>
__device__ __forceinline__ const Element* operand_of(const Operand& operand, int head) {
  return static_cast<const Element*>(operand.tiles) +
         static_cast<int64_t>(head) * operand.tiles_per_head * tile_elements(kD);
}

// Starts the copy of kRows rows from `first` on to padded rows, by kThreads threads.
template <class Element, int kD, int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(Element* to, const Element* head, int first, int thread) {
  constexpr int kPiece = 16 / sizeof(Element), kPieces = kD / kPiece;
  static_assert(kRows * kPieces % kThreads == 0);
  CUTE_UNROLL
  for (int n = 0; n < kRows * kPieces / kThreads; ++n) {
    const int i = n * kThreads + thread, row = i / kPieces, column = i % kPieces * kPiece;
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
        *reinterpret_cast<const cute::uint128_t*>(head + operand_offset<Element, kD>(first + row, column)),
        *reinterpret_cast<cute::uint128_t*>(to + row * kPaddedRow<Element, kD> + column));
  }
}

__device__ __forceinline__ void wait_for_copies() {
  cute::cp_async_wait<0>();
  __syncthreads();
}

// C(l) += L_l B^T for several left operands: each part of B is read once.
template <int kFeatures, int kColumns, int kLefts, class Element, class Target>
__device__ __forceinline__ void multiply_together(const Element* const (&lefts)[kLefts], const Element* b,
                                                  const Target& target) {
  using F = Fragments<Element>;
  constexpr int kStride = kPaddedRow<Element, kFeatures>;
  CUTE_UNROLL
  for (int k = 0; k < kFeatures; k += F::kDepth) {
    typename F::A left[kLefts];
    CUTE_UNROLL
    for (int l = 0; l < kLefts; ++l) left[l] = F::left(lefts[l] + k, kStride);
    CUTE_UNROLL
    for (int n = 0; n < kColumns; n += F::kColumns) {
      typename F::B right[F::kColumns / 8];
      F::right_transposed(right, b + n * kStride + k, kStride);
      CUTE_UNROLL
      for (int j = 0; j < F::kColumns / 8; ++j) {
        CUTE_UNROLL
        for (int l = 0; l < kLefts; ++l) F::multiply(target(l).tile[0][n / 8 + j], left[l], right[j]);
      }
    }
  }
}

// ---- Rows of a warp ----

__device__ __forceinline__ void add_over_row(float (&v)[2]) {
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    v[i] += __shfl_xor_sync(0xffffffffu, v[i], 1);
    v[i] += __shfl_xor_sync(0xffffffffu, v[i], 2);
  }
}
__device__ __forceinline__ void max_over_row(float (&v)[2]) {
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    v[i] = fmaxf(v[i], __shfl_xor_sync(0xffffffffu, v[i], 1));
    v[i] = fmaxf(v[i], __shfl_xor_sync(0xffffffffu, v[i], 2));
  }
}

// f(quad of columns j, value 0..3, row 0..1, element): values 0 and 1 are neighbors in the first row, 2 and 3
// in the second, 8 below.
template <int kColumns, class F>
__device__ __forceinline__ void for_each_value(Accumulator<1, kColumns>& v, const F& f) {
  CUTE_UNROLL
  for (int j = 0; j < kColumns / 8; ++j) {
    CUTE_UNROLL
    for (int c = 0; c < 4; ++c) f(j, c, c / 2, v.tile[0][j][c]);
  }
}

// What a matrix product will see of two neighbors; adds it to `sum`.
template <class Element>
__device__ __forceinline__ float2 rounded_pair(float a, float b) {
  if constexpr (sizeof(Element) == 2) return __half22float2(__floats2half2_rn(a, b));
  return {a, b};
}
__device__ __forceinline__ void store_operand_pair(cutlass::half_t* at, float a, float b) {
  *reinterpret_cast<__half2*>(at) = __floats2half2_rn(a, b);
}
__device__ __forceinline__ void store_operand_pair(float* at, float a, float b) {
  *reinterpret_cast<float2*>(at) = float2{a, b};
}
__device__ __forceinline__ float2 load_operand_pair(const cutlass::half_t* at) {
  return __half22float2(*reinterpret_cast<const __half2*>(at));
}
__device__ __forceinline__ float2 load_operand_pair(const float* at) {
  return *reinterpret_cast<const float2*>(at);
}

template <int kColumns>
__device__ __forceinline__ void largest_of_rows(Accumulator<1, kColumns>& v, float (&out)[2]) {
  out[0] = out[1] = 0.f;
  for_each_value(v, [&](int, int, int i, float x) { out[i] = fmaxf(out[i], fabsf(x)); });
  max_over_row(out);
}

// 16 queries of a warp and the keys that they see.
template <class Traits>
struct QueryRows {
  using Element = typename Traits::Element;
  static constexpr int kD = Traits::kD, kQuads = Traits::kQuads;
  typename Traits::Storage& s;
  const QueryProblem& p;
  const Grid& grid;
  int batch, head, kv_head;     // heads of the operands: batch and head in one
  int warp, lane, quad, first;  // first query of the CTA
  int row[2];                   // query index; may lie beyond m
  bool inside[2];
  Range keys[2];
  Range all_see, any_sees;  // keys, of the rows of this warp
  Range tiles;              // of kMoving keys that any query of the CTA sees; at least one. On a grid: visits
  uint64_t seen[2];         // on a grid, of the tile of the visit: bit 8 j + c % 2 is the thread's own column
  float scale_log2, shift[2];  // weights are exp2(scale_log2 s - shift)
  float fit[2];                // 0: one key is visible

  // Longest rows first: the last blocks of a causal problem see the most keys.
  template <class Args>
  __device__ __forceinline__ QueryRows(typename Traits::Storage& s_, const Args& a)
      : s(s_), p(a.problem), grid(a.grid) {
    const int heads = p.batch * p.heads;
    const int blocks = (p.m + Traits::kRows - 1) / Traits::kRows, index = blockIdx.x;
    first = (blocks - 1 - index / heads) * Traits::kRows;
    head = index % heads;
    batch = head / p.heads;
    kv_head = batch * p.kv_heads + head % p.heads / (p.heads / p.kv_heads);
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
    const int own = first + warp * 16;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      row[i] = own + lane / 4 + 8 * i;
      inside[i] = row[i] < p.m;
      if constexpr (Traits::kOnGrid) {
        const Grid::Reach reach = grid.reach(row[i], false);
        keys[i] = {0, reach.count()};
        if (quad == 0) s.reach[row[i] - first] = reach;
      } else {
        keys[i] = inside[i] ? p.visible.keys(row[i]) : Range{0, 0};
      }
      fit[i] = keys[i].end - keys[i].begin == 1 ? 0.f : 1.f;
    }
    if constexpr (Traits::kOnGrid) {
      const Grid::Tiles boxes = grid.reached(first / kBoxRows, false);
      tiles = {0, boxes.total() * Traits::kTilesOfBox};
      if (threadIdx.x == 0) s.boxes = boxes;
      return;
    }
    const int last = min(own + 15, p.m - 1);
    any_sees = own < p.m ? p.visible.any_sees(own, last) : Range{0, 0};
    all_see = own + 15 < p.m ? Range{p.visible.keys(own + 15).begin, p.visible.keys(own).end} : Range{0, 0};
    const Range all = p.visible.any_sees(first, min(first + Traits::kRows, p.m) - 1);
    const int begin = min(all.begin, p.n - 1) / Traits::kMoving;
    tiles = {begin, max(begin + 1, (all.end + Traits::kMoving - 1) / Traits::kMoving)};
  }

  __device__ __forceinline__ int64_t output_row(int i) const {
    return (static_cast<int64_t>(batch) * p.m + row[i]) * p.heads + head % p.heads;
  }

  // ---- Left operands: each warp its own rows ----

  __device__ __forceinline__ Element* resident(int which) const {
    return s.resident[which] + warp * 16 * Traits::kRow;
  }
  __device__ __forceinline__ Element* pair_at(int which, int j, int i) const {
    return resident(which) + (lane / 4 + 8 * i) * Traits::kRow + 8 * j + 2 * quad;
  }
  __device__ __forceinline__ void load_resident(int which, const Operand& operand) {
    copy_rows<Element, kD, 16, 32>(resident(which), operand_of<Element, kD>(operand, head), first + warp * 16,
                                   lane);
    cute::cp_async_wait<0>();
    __syncwarp();
  }

  // Value c of column quad j is in column 8 j + 2 quad + c % 2.
  __device__ __forceinline__ int column_of(int j, int c) const { return 8 * j + 2 * quad + c % 2; }

  // ---- Walk over tiles of keys ----

  // Per tile visit<0>(t, rows of the first operand), then visit<1> with the second if there are two. A warp
  // that sees nothing of a tile does not visit it.
  template <int kOperands, class Visit>
  __device__ __forceinline__ void walk(const Operand* const (&operands)[kOperands], const Visit& visit) {
    const Element* from[kOperands];
    CUTE_UNROLL
    for (int o = 0; o < kOperands; ++o) from[o] = operand_of<Element, kD>(*operands[o], kv_head);
    const auto start = [&](int o, int t, int buffer) {
      copy_rows<Element, kD, Traits::kMoving, Traits::kThreads>(s.moving[buffer][0], from[o],
                                                                t * Traits::kMoving, threadIdx.x);
    };
    __syncthreads();  // everyone has read what the walk before left
    if (Traits::kOnGrid && tiles.begin == tiles.end) return;
    start(0, tile_at(tiles.begin), 0);
    int buffer = 0;
    for (int n = tiles.begin; n < tiles.end; ++n) {
      const int t = tile_at(n);
      const bool sees = look(n);
      CUTE_UNROLL
      for (int o = 0; o < kOperands; ++o) {
        wait_for_copies();  // this operand has arrived, and everyone has read the one before
        if (o + 1 < kOperands) {
          start(o + 1, t, buffer ^ 1);
        } else if (n + 1 < tiles.end) {
          start(0, tile_at(n + 1), buffer ^ 1);
        }
        if (sees) visit(o, t, s.moving[buffer][0]);
        buffer ^= 1;
      }
    }
  }
  __device__ __forceinline__ int tile_at(int n) const {
    if constexpr (!Traits::kOnGrid) return n;
    return s.boxes.at(n / Traits::kTilesOfBox) * Traits::kTilesOfBox + n % Traits::kTilesOfBox;
  }
  // Whether a row of the warp sees something of the tile of visit n; on a grid, what.
  __device__ __forceinline__ bool look(int n) {
    if constexpr (Traits::kOnGrid) {
      int box[3];
      s.boxes.at(n / Traits::kTilesOfBox, box);
      const int from = n % Traits::kTilesOfBox * Traits::kMoving;
      constexpr uint64_t kAll = ~uint64_t{0} >> (64 - Traits::kMoving);
      uint64_t any = 0;
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint64_t bits = grid.rows_reached(s.reach[row[i] - first], box) >> from & kAll;
        any |= bits;
        seen[i] = bits >> 2 * quad;
      }
      return __any_sync(0xffffffffu, any != 0);
    } else {
      const int key = n * Traits::kMoving;
      return key < any_sees.end && key + Traits::kMoving > any_sees.begin;
    }
  }

  // -inf where a query does not see the key.
  __device__ __forceinline__ void mask(typename Traits::Scores& scores, int t) const {
    if constexpr (Traits::kOnGrid) {
      for_each_value(scores, [&](int j, int c, int i, float& x) {
        if ((seen[i] >> (8 * j + c % 2) & 1) == 0) x = -INFINITY;
      });
      return;
    }
    const int key = t * Traits::kMoving;
    if (key >= all_see.begin && key + Traits::kMoving <= all_see.end) return;
    for_each_value(scores, [&](int j, int c, int i, float& x) {
      const int at = key + column_of(j, c);
      if (at < keys[i].begin || at >= keys[i].end) x = -INFINITY;
    });
  }
  // S -> exp2(scale_log2 S - shift), 0 where not seen.
  __device__ __forceinline__ void exponentials(typename Traits::Scores& scores, int t) const {
    for_each_value(scores, [&](int, int, int i, float& x) { x = fmaf(x, scale_log2, -shift[i]); });
    mask(scores, t);
    for_each_value(scores, [&](int, int, int, float& x) { x = exp2_approx(x); });
  }
  // Rounds scores to what the product with them sees and adds that to the row sums, so that both agree
  // exactly.
  __device__ __forceinline__ void round(typename Traits::Scores& scores, float (&sums)[2]) const {
    CUTE_UNROLL
    for (int j = 0; j < Traits::kMoving / 8; ++j) {
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        float* x = &scores.tile[0][j][2 * i];
        const float2 f = rounded_pair<Element>(x[0], x[1]);
        x[0] = f.x, x[1] = f.y;
        sums[i] += f.x + f.y;
      }
    }
  }

  // ---- Vectors between registers and tensors ----

  // Scratch memory: each element with the thread that owns it. which: 0 r, 1 x, 2 kbar.
  __device__ __forceinline__ float4* scratch(float* base, int which) const {
    const int64_t rows = static_cast<int64_t>(p.q.tiles_per_head) * kTileRows;
    const int64_t at = (static_cast<int64_t>(which) * p.batch * p.heads + head) * rows + first + warp * 16;
    return reinterpret_cast<float4*>(base) + at * (kD / 4) + lane;  // quad j of the columns at [32 j]
  }

  // From a [B, m, Hq, d] tensor times a factor; 0 beyond it, and where nothing is seen.
  __device__ __forceinline__ void load(typename Traits::Vector& v, const View<const float>& from,
                                       float factor) const {
    const float* at[2];
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i)
      at[i] = keys[i].begin < keys[i].end ? from.row(batch, row[i], head % p.heads) : nullptr;
    for_each_value(v, [&](int j, int c, int i, float& x) {
      x = at[i] != nullptr && column_of(j, c) < p.d ? at[i][column_of(j, c)] * factor : 0.f;
    });
  }
  // To a dense [B, m, Hq, features] tensor.
  __device__ __forceinline__ void store(typename Traits::Vector& v, void* to, nearfield::Element type,
                                        int features, const float (&factor)[2]) const {
    for_each_value(v, [&](int j, int c, int i, float x) {
      if (inside[i] && column_of(j, c) < features)
        store_element(to, type, output_row(i) * features + column_of(j, c), x * factor[i]);
    });
  }
  __device__ __forceinline__ View<const float> dense(const float* data) const {
    return {data, int64_t{p.m} * p.heads * p.d, int64_t{p.heads} * p.d, p.d};
  }

  // A vector as a left operand over a power of two per row: what remains of it goes to `low` if that is one.
  // `mean`: the product of what was rounded with kbar.
  struct Rounded {
    float unit[2], inverse[2], mean[2];
  };
  template <class Kbar>
  __device__ __forceinline__ Rounded round_to_resident(typename Traits::Vector& v, int high, int low,
                                                       const Kbar& kbar) {
    Rounded out;
    largest_of_rows(v, out.unit);
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      out.unit[i] = operand_unit(out.unit[i]);
      out.inverse[i] = 1.f / out.unit[i];
      out.mean[i] = 0.f;
    }
    __syncwarp();  // everyone has read the operands that this takes the place of
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      const float4 m = kbar(j);
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float a = v.tile[0][j][2 * i] * out.inverse[i], b = v.tile[0][j][2 * i + 1] * out.inverse[i];
        float2 h = rounded_pair<Element>(a, b);
        store_operand_pair(pair_at(high, j, i), h.x, h.y);
        if (low >= 0) {
          const float2 l = rounded_pair<Element>(a - h.x, b - h.y);
          store_operand_pair(pair_at(low, j, i), l.x, l.y);
          h.x += l.x, h.y += l.y;
        }
        out.mean[i] += h.x * (i == 0 ? m.x : m.z) + h.y * (i == 0 ? m.y : m.w);
      }
    }
    add_over_row(out.mean);
    __syncwarp();
    return out;
  }
};

template <class Traits, class Args>
cudaError_t launch_portable(void (*kernel)(Args), const Args& args, int64_t grid, void* stream) {
  constexpr int kShared = sizeof(typename Traits::Storage);
  const cudaError_t e = allow_shared_memory(kernel, kShared);
  if (e != cudaSuccess) return e;
  kernel<<<static_cast<unsigned>(grid), Traits::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

template <class Traits>
int64_t query_grid(const QueryProblem& p) {
  return int64_t{(p.m + Traits::kRows - 1) / Traits::kRows} * p.batch * p.heads;
}

}  // namespace nearfield::lla
