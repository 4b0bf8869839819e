// Masks of partial tiles. The neighborhood is a product of one interval per dimension, so whether row r may
// see column c is the AND of three interval tests. For each dimension a table holds, for every k, the set of
// columns whose coordinate is below k; an interval [lo, hi) is then table[hi] & ~table[lo]. The tables depend
// on the box alone, so one is built per CTA, already in the order in which a thread holds its columns: thread
// `quad` (lane % 4) of a row has columns 8 j + 2 quad + {0, 1}, and bit 2 j + {0, 1} of its word stands for
// them.
#pragma once

#include <cstdint>
#include <cute/tensor.hpp>
#include <type_traits>

#include "gna/work.cuh"

namespace nearfield::gna {

// A bit for each of a thread's columns.
template <int kBlockN>
using ColumnBits = std::conditional_t<(kBlockN > 128), uint64_t, uint32_t>;

template <int kBlockN>
struct BoxMask {
  static_assert(kBlockN <= 256, "a thread's columns must fit a 64-bit word");
  using Bits = ColumnBits<kBlockN>;
  // The sides of a box multiply to at most kBlockN, so their sum is at most kBlockN + 2; each side has side +
  // 1 rows.
  static constexpr int kRows = kBlockN + 8;
  Bits word[kRows][4];

  __device__ __forceinline__ static int first_row(const Box& box, int dim) {
    return dim == 0 ? 0 : dim == 1 ? box.side[0] + 1 : box.side[0] + box.side[1] + 2;
  }

  __device__ void build(const Box& box, int thread, int num_threads) {
    build(box, thread, num_threads, [&](int column, int (&c)[3]) {
      c[2] = column % box.side[2], c[1] = column / box.side[2] % box.side[1];
      c[0] = column / box.side[2] / box.side[1];
    });
  }

  // coordinates(column, c) gives the place of a column in the box, beyond it in dimension 0 if there is none.
  template <class Coordinates>
  __device__ __forceinline__ void build(const Box& box, int thread, int num_threads,
                                        const Coordinates& coordinates) {
    const int rows = box.side[0] + box.side[1] + box.side[2] + 3;
    for (int i = thread; i < rows * 4; i += num_threads) {
      const int row = i / 4, quad = i % 4;
      const int dim = row >= first_row(box, 2) ? 2 : row >= first_row(box, 1) ? 1 : 0;
      const int limit = row - first_row(box, dim);
      Bits bits = 0;
      for (int b = 0; b < kBlockN / 4; ++b) {
        const int column = 8 * (b / 2) + 2 * quad + b % 2;
        int c[3];
        coordinates(column, c);
        if (c[0] < box.side[0] && (dim == 0 ? c[0] : dim == 1 ? c[1] : c[2]) < limit) bits |= Bits{1} << b;
      }
      word[row][quad] = bits;
    }
  }

  // The columns of this thread that belong to the box.
  __device__ __forceinline__ Bits columns(const Box& box, int quad) const {
    return word[first_row(box, 2) + box.side[2]][quad];
  }

  // Columns of this thread whose coordinate in `dim` lies in [lo, hi); both are clamped to the box.
  __device__ __forceinline__ Bits interval(const Box& box, int dim, int lo, int hi, int quad) const {
    const int side = box.side[dim], first = first_row(box, dim);
    lo = min(max(lo, 0), side);
    hi = min(max(hi, 0), side);
    return word[first + hi][quad] & ~word[first + lo][quad];
  }
};

// The columns of this thread that a row sees in a visited tile: `sees` holds the row's interval per
// dimension. Dimensions in which the tile is full drop out.
template <int kBlockN>
__device__ __forceinline__ ColumnBits<kBlockN> visible_columns(const BoxMask<kBlockN>& table, const Box& box,
                                                               const MovingTile& tile, const Range* sees,
                                                               int quad) {
  ColumnBits<kBlockN> visible = table.columns(box, quad);
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    if (!(tile.tests & kTestDim0 << d)) continue;
    visible &= table.interval(box, d, sees[d].begin - tile.first[d], sees[d].end - tile.first[d], quad);
  }
  return visible;
}

// Sets the logits of masked columns to -inf. `scores` is the (row, column) view of the accumulator.
template <class Tensor, class Bits>
__device__ __forceinline__ void mask_row(Tensor& scores, int row, Bits visible) {
  using namespace cute;
  CUTE_UNROLL
  for (int j = 0; j < size<1>(scores); ++j) {
    if (!(visible >> j & 1u)) scores(row, j) = -INFINITY;
  }
}

}  // namespace nearfield::gna
