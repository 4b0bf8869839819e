// The grid for a CTA of Hopper's kernels: which tiles of keys its two tiles of queries see, in which order,
// and what of a tile a row sees. For the gradients of the keys rows are keys, and what they "see" are the
// queries that see them.
//
// Both row tiles walk one list. Where they are neighbors in the last dimension and see the same boxes of the
// others, the list is the union of what they see, the last dimension outermost: what each sees then is an
// interval of the list, as it is an interval of tiles in a sequence. Else the list holds the tiles of one,
// then those of the other. What a row sees of a dimension depends on its place in the box along that
// dimension only, so a table of at most 66 ranges per row tile says it all.
#pragma once

#include "lla/grid.h"

namespace nearfield::lla {

struct GridRows {
  static constexpr int kMostPlaces = 1 + 1 + kBoxRows;
  Grid::Tiles boxes[2];
  int split, total;             // visits; from `split` on they are of the second
  Range visits[2];              // that a row tile sees some of; at least one
  int log_side[3];              // of a box
  uint64_t repeats[3];          // a bit wherever the rows of a dimension start again
  Range reach[2][kMostPlaces];  // of a row tile, per place in the box: of dimension 2, then 1, then 0

  // By all threads of the CTA, before a barrier. Row tiles from `row_tiles` on are none.
  __device__ __forceinline__ void prepare(const Grid& grid, const int (&row_tile)[2], int row_tiles,
                                          bool of_keys) {
    const int thread = threadIdx.x, which = thread / kMostPlaces;
    if (which < 2) {
      int place = thread % kMostPlaces, width = 1;
      for (int d = 2; d >= 0; --d) {
        if (place >= 0 && place < grid.side[d]) {
          reach[which][thread % kMostPlaces] =
              row_tile[which] < row_tiles
                  ? grid.reach(row_tile[which] * kBoxRows + place * width, of_keys).range[d]
                  : Range{0, 0};
        }
        place -= grid.side[d];
        width *= grid.side[d];
      }
    }
    if (thread == static_cast<int>(blockDim.x) - 1) order(grid, row_tile, row_tiles, of_keys);
  }

  // The number of the tile of a visit, and that of its box in each dimension.
  __device__ __forceinline__ int at(int visit, int (&box)[3]) const {
    const Grid::Tiles& tiles = boxes[visit >= split];
    unsigned n = visit >= split ? visit - split : visit;
    const unsigned width = tiles.count[1], plane = tiles.count[0] * width;
    const unsigned outer = n / plane;
    n -= outer * plane;
    box[0] = tiles.begin[0] + n / width;
    box[1] = tiles.begin[1] + n % width;
    box[2] = tiles.begin[2] + outer;
    return ((tiles.group * tiles.boxes[0] + box[0]) * tiles.boxes[1] + box[1]) * tiles.boxes[2] + box[2];
  }
  __device__ __forceinline__ int at(int visit) const {
    int box[3];
    return at(visit, box);
  }

  // What of the tile of a visit `row` of a row tile sees: bit r is row r of the tile.
  __device__ __forceinline__ uint64_t seen(int which, int row, const int (&box)[3]) const {
    uint64_t bits = ~uint64_t{0};
    int log_width = 0, table = 0;
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      const int side = 1 << log_side[d], first = box[d] << log_side[d];
      const Range range = reach[which][table + (row >> log_width & side - 1)];
      const int begin = min(max(range.begin - first, 0), side) << log_width,
                end = min(max(range.end - first, 0), side) << log_width;
      bits &= (ones(end) & ~ones(begin)) * repeats[d];
      table += side;
      log_width += log_side[d];
    }
    return bits;
  }

  __device__ __forceinline__ int count(int which, int row) const {
    int product = 1, log_width = 0, table = 0;
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      const Range range = reach[which][table + (row >> log_width & (1 << log_side[d]) - 1)];
      product *= range.end - range.begin;
      table += 1 << log_side[d];
      log_width += log_side[d];
    }
    return product;
  }

 private:
  static __device__ __forceinline__ uint64_t ones(int n) {
    return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  }

  // A tile of rows that see nothing visits one tile all the same.
  static __device__ __forceinline__ Grid::Tiles reached(const Grid& grid, int tile, bool of_keys) {
    Grid::Tiles out = grid.reached(tile, of_keys);
    if (out.total() == 0) {
      for (int d = 0; d < 3; ++d) out.begin[d] = 0, out.count[d] = 1;
    }
    return out;
  }

  __device__ __forceinline__ void order(const Grid& grid, const int (&row_tile)[2], int row_tiles,
                                        bool of_keys) {
    int rows = 1;
    for (int d = 2; d >= 0; --d) {
      log_side[d] = __ffs(grid.side[d]) - 1;
      rows *= grid.side[d];
      repeats[d] = 1;
      for (int copied = rows; copied < kBoxRows; copied *= 2) repeats[d] |= repeats[d] << copied;
    }
    const Grid::Tiles a = reached(grid, row_tile[0], of_keys);
    boxes[0] = boxes[1] = a;
    total = split = a.total();
    visits[0] = {0, total};
    visits[1] = {0, 1};
    if (row_tile[1] >= row_tiles) return;
    const Grid::Tiles b = reached(grid, row_tile[1], of_keys);
    const int end_a = a.begin[2] + a.count[2], end_b = b.begin[2] + b.count[2];
    bool joined = a.group == b.group && a.begin[2] <= end_b && b.begin[2] <= end_a;
    for (int d = 0; d < 2; ++d) joined &= a.begin[d] == b.begin[d] && a.count[d] == b.count[d];
    if (joined) {
      const int begin = min(a.begin[2], b.begin[2]), plane = a.count[0] * a.count[1];
      boxes[0].begin[2] = begin;
      boxes[0].count[2] = max(end_a, end_b) - begin;
      total = split = boxes[0].total();
      visits[0] = {(a.begin[2] - begin) * plane, (end_a - begin) * plane};
      visits[1] = {(b.begin[2] - begin) * plane, (end_b - begin) * plane};
    } else {
      boxes[1] = b;
      total = split + b.total();
      visits[1] = {split, total};
    }
  }
};

// What the two rows of a consumer thread, `row` and row + 8, see of visit after visit. The threads of a quad
// have the same rows, so each looks at one of four visits for all of them.
struct SeenAhead {
  uint64_t ahead[2];  // of the visit that is this thread's turn

  // `visits`: of the row tile, kept in registers.
  __device__ __forceinline__ void look(const GridRows& grid, int which, int row, int quad, Range visits,
                                       int visit, uint64_t (&seen)[2]) {
    const int turn = (visit - visits.begin) % 4;
    if (turn == 0) {
      int box[3];
      grid.at(min(visit + quad, visits.end - 1), box);
#pragma unroll
      for (int i = 0; i < 2; ++i) ahead[i] = grid.seen(which, row + 8 * i, box);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) seen[i] = __shfl_sync(0xffffffffu, ahead[i], turn, 4);
  }
};

}  // namespace nearfield::lla
