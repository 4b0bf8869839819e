// From a work index to a tile: batch, head, dilation group, position, and the tiles of the other operand it
// visits. The forward holds a box of queries and visits keys; the gradients of keys and values hold keys and
// visit queries.
#pragma once

#include "gna/sm90.h"
#include "nearfield/tile_plan.h"

namespace nearfield::gna {

// The tile that a CTA holds.
struct StayingTile {
  int batch, head;
  int group[3];   // dilation group: position inside the dilation step
  int first[3];   // first token of the box, as index inside the group
  int extent[3];  // tokens of the staying operand in the group
  Window window[3];
  TileRun visits[3];  // tiles of the other operand, per dimension

  // Groups differ in length by one, so the last tile of a shorter group can be empty.
  __device__ __forceinline__ bool empty() const {
    return first[0] >= extent[0] || first[1] >= extent[1] || first[2] >= extent[2];
  }
  __device__ __forceinline__ int num_visits() const {
    return visits[0].count * visits[1].count * visits[2].count;
  }

  // Index inside the group -> position on the grid.
  __device__ __forceinline__ void position(const Problem& p, const int (&index)[3], int (&x)[3]) const {
#pragma unroll
    for (int d = 0; d < 3; ++d) x[d] = group[d] + p.dilation[d] * index[d];
  }
};

// What a consumer must know about a visited tile: written by the producer, so that the consumers' registers
// stay free.
struct MovingTile {
  int first[3];    // index of the box's first token inside the group; additional tokens: first[0] = valid
                   // columns
  uint32_t tests;  // 0: every row sees every column
};
enum TileTest : uint32_t {
  kTestDim0 = 1,  // << d: the rows' intervals in dimension d cut the tile
  kTestBox = 8,   // the box does not fill the block
  kTestTail = 16  // the last tile of the additional tokens
};

// Counts through the visited tiles, innermost dimension fastest; done when n[0] reaches visits[0].count.
struct TileCounter {
  int n[3] = {0, 0, 0};

  __device__ __forceinline__ void advance(const StayingTile& tile) {
    if (++n[2] < tile.visits[2].count) return;
    n[2] = 0;
    if (++n[1] < tile.visits[1].count) return;
    n[1] = 0;
    ++n[0];
  }
};

// Where in its group the visited tile at `counter` begins; adds to `tests` the dimensions that cut it.
__device__ __forceinline__ void locate_visit(const StayingTile& tile, const TileCounter& counter,
                                             const Box& box, int (&first)[3], uint32_t& tests) {
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    first[d] = tile.visits[d].origin + counter.n[d] * box.side[d];
    if (!tile.visits[d].is_full(counter.n[d])) tests |= kTestDim0 << d;
  }
}

// The rows of a box, once per launch, so that nobody divides by its sides. Rows that the box does not fill
// lie beyond it in dimension 0.
template <int kRows>
struct BoxRows {
  uint32_t word[kRows];  // eight bits a coordinate

  __device__ __forceinline__ void build(const Box& box, int thread, int num_threads) {
    for (int r = thread; r < kRows; r += num_threads) {
      const int outer = r / box.side[2];
      word[r] = (outer / box.side[1]) << 16 | (outer % box.side[1]) << 8 | r % box.side[2];
    }
  }
  __device__ __forceinline__ void coordinates(int r, int (&c)[3]) const {
    const uint32_t w = word[r];
    c[0] = w >> 16, c[1] = w >> 8 & 255, c[2] = w & 255;
  }
};

// The row of the token at a place in the box of a staying tile, in a contiguous [B, X, H] whose strides in
// rows are `index`; -1: no token.
template <class T>
__device__ __forceinline__ int64_t row_of(const int (&c)[3], const StayingTile& tile, const Problem& p,
                                          const Box& box, int64_t batch, const Tokens<T>& index) {
  bool inside = c[0] < box.side[0];
  int64_t at = batch * index.batch + tile.head * index.head;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    const int i = tile.first[d] + c[d];
    inside &= i < tile.extent[d];
    at += (tile.group[d] + static_cast<int64_t>(p.dilation[d]) * i) * index.x[d];
  }
  return inside ? at : -1;
}

// What the tokens at coordinate c of dimension d see of the other operand, as indices inside the dilation
// group. A token beyond the grid repeats the last one; it is not stored.
template <Direction kDirection>
__device__ __forceinline__ Range range_of(int c, int d, const StayingTile& tile) {
  const int i = min(tile.first[d] + c, tile.extent[d] - 1);
  return kDirection == Direction::kForward ? tile.window[d].keys(i) : tile.window[d].queries(i);
}

// A planned work item: the tile and what the consumers must know about its rows.
template <int kRows>
struct PlannedTile {
  int num_tiles;  // to visit; 0: no more work
  int cut;        // some row of the block is no token
  StayingTile tile;
  Range range[kRows][3];  // what a row sees
  int64_t row[kRows];     // row_of

  // What plans of a launch share.
  struct Scratch {
    BoxRows<kRows> rows;
    Range range[kRows + 2];  // per coordinate of each dimension: the sides multiply to at most kRows
  };

  // Row r by itself; false if it is no token.
  template <Direction kDirection, class T>
  __device__ __forceinline__ bool set_row(int r, const StayingTile& from, const Problem& p, const Box& box,
                                          int64_t batch, const Tokens<T>& index, bool all_see_all) {
    const int outer = r / box.side[2], c[3] = {outer / box.side[1], outer % box.side[1], r % box.side[2]};
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      range[r][d] = all_see_all ? Range{0, from.window[d].length} : range_of<kDirection>(c[d], d, from);
    }
    row[r] = row_of(c, from, p, box, batch, index);
    return row[r] >= 0;
  }

  // All rows of `tile`, by one warp: windows once per coordinate.
  template <Direction kDirection, class T>
  __device__ __forceinline__ void fill(Scratch& scratch, const Problem& p, const Box& box, int64_t batch,
                                       const Tokens<T>& index, bool all_see_all, int lane) {
    const int first[3] = {0, box.side[0], box.side[0] + box.side[1]};
#pragma unroll 1
    for (int n = lane; n < first[2] + box.side[2]; n += 32) {
      const int d = n >= first[2] ? 2 : n >= first[1] ? 1 : 0;
      const int c = n - (d == 2 ? first[2] : d == 1 ? first[1] : 0);
      scratch.range[n] = all_see_all ? Range{0, tile.window[d].length} : range_of<kDirection>(c, d, tile);
    }
    __syncwarp();
    bool outside = false;
#pragma unroll 1
    for (int r = lane; r < kRows; r += 32) {
      int c[3];
      scratch.rows.coordinates(r, c);
      const int64_t at = row_of(c, tile, p, box, batch, index);
      row[r] = at;
      outside |= at < 0;
      c[0] = min(c[0], box.side[0] - 1);
#pragma unroll
      for (int d = 0; d < 3; ++d) range[r][d] = scratch.range[first[d] + c[d]];
    }
    outside = __any_sync(0xffffffffu, outside);
    if (lane == 0) cut = outside;
    __syncwarp();
  }
};

// The tile alone, where there is no room for more. Consumers work out their rows where they would otherwise
// wait for the tile's first copies.
template <int kRows>
struct BarePlan {
  int num_tiles;
  StayingTile tile;

  struct Scratch {
    BoxRows<kRows> rows;
  };

  template <Direction, class T>
  __device__ __forceinline__ void fill(Scratch&, const Problem&, const Box&, int64_t, const Tokens<T>&, bool,
                                       int) {}
};

struct Schedule {
  int heads;
  int tiles[3];   // staying tiles per dimension of the longest dilation group
  int step[3];    // from one of them to the next, in work items
  int64_t total;  // work items; the launcher refuses 2^30 and more
  int line = 0;   // > 0: the staying operand is a line of so many additional tokens, seen by the whole grid

  Schedule() = default;
  Schedule(const Problem& p, const Box& staying, int64_t num_heads) : heads(static_cast<int>(num_heads)) {
    total = p.batch * heads * p.groups();
    for (int d = 0; d < 3; ++d) {
      tiles[d] = (group_length(p.size[d], p.dilation[d], 0) + staying.side[d] - 1) / staying.side[d];
      total *= tiles[d];
    }
    // The dimension of which a window covers most comes fastest: neighbors in it share most of what they
    // visit, and what the CTAs that run together visit should stay in the L2 cache. Causal dimensions come
    // last, as their tiles are uneven.
    const auto is_faster = [&](int a, int b) {
      if (p.causal[a] != p.causal[b]) return p.causal[b];
      const int64_t of_a = int64_t{p.window[a]} * p.dilation[a] * p.size[b];
      const int64_t of_b = int64_t{p.window[b]} * p.dilation[b] * p.size[a];
      return of_a > of_b || (of_a == of_b && a > b);
    };
    for (int d = 0; d < 3; ++d) {
      step[d] = 1;
      for (int other = 0; other < 3; ++other) {
        if (other != d && is_faster(other, d)) step[d] *= tiles[other];
      }
    }
  }

  Schedule(const Problem& p, int additional, int block, int64_t num_heads)
      : heads(static_cast<int>(num_heads)),
        tiles{1, 1, (additional + block - 1) / block},
        step{1, 1, 1},
        line(additional) {
    total = p.batch * heads * tiles[2];
  }

  // All tiles of one head come before those of the next, so that the CTAs that run together share their
  // operands in the L2 cache. Within a head the longest rows come first, in the order of `step`: under a
  // causal mask the last queries and the first keys.
  template <Direction kDirection>
  __device__ __forceinline__ void decode(const Problem& p, const Box& staying, const Box& moving, int work,
                                         StayingTile& tile) const {
    split<kDirection>(p, work, tile, [&](int d, int position, int group) {
      place<kDirection>(p, staying, moving, d, position, group, tile);
    });
  }

  // The same by a warp, with a lane for each dimension; `tile` is in shared memory.
  template <Direction kDirection>
  __device__ __forceinline__ void decode_by_warp(const Problem& p, const Box& staying, const Box& moving,
                                                 int work, StayingTile& tile, int lane) const {
    int own_position = 0, own_group = 0;
    split<kDirection>(p, work, tile, [&](int d, int position, int group) {
      if (d == lane) own_position = position, own_group = group;
    });
    if (lane < 3) place<kDirection>(p, staying, moving, lane, own_position, own_group, tile);
    __syncwarp();
  }

 private:
  // Calls dimension(d, position in tiles, dilation group) from the innermost dimension on.
  template <Direction kDirection, class Dimension>
  __device__ __forceinline__ void split(const Problem& p, int work, StayingTile& tile,
                                        const Dimension& dimension) const {
    const int per_head = tiles[0] * tiles[1] * tiles[2];
    const int outer = work / per_head;
    int inner = work - outer * per_head;
    if (kDirection == Direction::kForward) inner = per_head - 1 - inner;
    const int groups = p.dilation[0] * p.dilation[1] * p.dilation[2];
    const int batch_head = outer / groups;
    int group = outer - batch_head * groups;
    tile.batch = batch_head / heads;
    tile.head = batch_head - tile.batch * heads;
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      dimension(d, inner / step[d] % tiles[d], group % p.dilation[d]);
      group /= p.dilation[d];
    }
  }

  // Fills in dimension d of a tile.
  template <Direction kDirection>
  __device__ __forceinline__ void place(const Problem& p, const Box& staying, const Box& moving, int d,
                                        int position, int group, StayingTile& tile) const {
    const Window window = p.axis(d, group);
    const int begin = position * staying.side[d];
    tile.first[d] = begin;
    tile.group[d] = group;
    tile.window[d] = window;
    if (line > 0) {
      const Range all{0, window.length};
      tile.extent[d] = d == 2 ? line : 1;
      tile.visits[d] = cover(all, all, moving.side[d], Placement::kSpan);
      return;
    }
    tile.extent[d] = window.length;
    const int last = min(begin + staying.side[d], window.length) - 1, first = min(begin, last);
    tile.visits[d] = kDirection == Direction::kForward
                         ? key_tiles(window, first, last, moving.side[d], Placement::kSpan)
                         : query_tiles(window, first, last, moving.side[d], Placement::kSpan);
  }
};

}  // namespace nearfield::gna
