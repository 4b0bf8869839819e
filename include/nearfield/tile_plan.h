// Which tiles attention over neighborhoods visits, and what that costs.
//
// A query tile is a box of queries. The union of its windows is a box too, because windows are monotone in
// every dimension, and the kernel covers that box with key tiles. Seen along one dimension that is an
// interval covered by a run of tiles (TileRun), of which a contiguous part needs no mask. Everything is a
// product over dimensions, so a whole problem is counted with one loop per dimension. The gradients of keys
// and values are the same picture with the roles exchanged: a key tile stays and the queries of its inverse
// windows are covered.
//
// The first half is arithmetic on single tiles, for host and device: what a kernel asks for its own tile. The
// second half counts whole problems and searches for the cheapest tile shapes; it is host code.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "nearfield/window.h"

namespace nearfield {

// Where the first tile of a run begins.
enum class Placement : int {
  kGrid,  // on a multiple of the tile size: the tiles of a permuted or padded copy
  kSpan,  // where the covered interval begins: never more tiles than kGrid; needs loads by coordinate
};

// Tiles along one dimension of one dilation group. Tile n begins at origin + n * size.
struct TileRun {
  int origin;      // the last tile can end beyond the dimension
  int count;       // tiles to visit
  int full_begin;  // tiles [full_begin, full_end) need no mask in this dimension
  int full_end;

  NEARFIELD_HOST_DEVICE bool is_full(int n) const { return n >= full_begin && n < full_end; }
  NEARFIELD_HOST_DEVICE int full_count() const { return full_end - full_begin; }
};

// Covers `any`, the indices that some row of the tile needs; a tile inside `all`, which every row needs, is
// full. Both lie inside the dimension, so a full tile never holds padding.
NEARFIELD_HOST_DEVICE TileRun cover(Range any, Range all, int tile, Placement placement) {
  const int origin = placement == Placement::kGrid ? any.begin - any.begin % tile : any.begin;
  const int count = (any.end - origin + tile - 1) / tile;
  const int common = all.end - all.begin;
  if (common < tile) return {origin, count, 0, 0};
  const int full_begin = (all.begin - origin + tile - 1) / tile;
  const int full_end = (all.end - origin) / tile;
  if (full_end <= full_begin) return {origin, count, 0, 0};
  return {origin, count, full_begin, full_end};
}

// Key tiles for the queries [first, last], both inside the dimension: clip a partial query tile first.
NEARFIELD_HOST_DEVICE TileRun key_tiles(const Window& window, int first, int last, int tile,
                                        Placement placement) {
  return cover(window.any_sees(first, last), window.all_see(first, last), tile, placement);
}

// Query tiles for the keys [first, last]. A full tile here also holds no padding queries.
NEARFIELD_HOST_DEVICE TileRun query_tiles(const Window& window, int first, int last, int tile,
                                          Placement placement) {
  const Range all{window.queries(last).begin, window.queries(first).end};
  return cover(window.any_seen_by(first, last), all, tile, placement);
}

// ---- Host: whole problems ----

constexpr int kMaxTileSide = 256;  // of one TMA box

// Which operand stays while the other is visited: queries for the output and dQ, keys for dK and dV.
enum class Direction : int { kForward, kBackward };

// One dimension of the token grid.
struct Axis {
  int length;
  int window;
  int stride = 1;
  int dilation = 1;
  bool causal = false;
};

// What one dimension contributes. Sums over tiles and dilation groups of products over dimensions are
// products of these sums.
struct AxisCounts {
  int64_t q_tiles = 0;
  int64_t kv_tiles = 0;
  int64_t visited = 0;  // pairs of a staying tile and a visited one
  int64_t full = 0;     // those that need no mask in this dimension
};

// Calls visit(window, copies) for the at most two kinds of dilation groups of a dimension: a longer and a
// shorter one.
template <class Visit>
void for_each_group(const Axis& axis, Visit visit) {
  const int longer = axis.length % axis.dilation;
  const Window window{group_length(axis.length, axis.dilation, 0), axis.window, axis.stride, axis.causal};
  if (longer == 0) return visit(window, axis.dilation);
  visit(window, longer);
  visit(Window{window.length - 1, axis.window, axis.stride, axis.causal}, axis.dilation - longer);
}

inline AxisCounts count_axis(const Axis& axis, int q_tile, int kv_tile, Placement placement,
                             Direction direction) {
  const bool forward = direction == Direction::kForward;
  const int staying = forward ? q_tile : kv_tile;
  AxisCounts sum;
  for_each_group(axis, [&](const Window& window, int64_t copies) {
    const int length = window.length;
    sum.q_tiles += copies * ((length + q_tile - 1) / q_tile);
    sum.kv_tiles += copies * ((length + kv_tile - 1) / kv_tile);
    for (int first = 0; first < length; first += staying) {
      const int last = std::min(first + staying, length) - 1;
      const TileRun run = forward ? key_tiles(window, first, last, kv_tile, placement)
                                  : query_tiles(window, first, last, q_tile, placement);
      sum.visited += copies * run.count;
      sum.full += copies * run.full_count();
    }
  });
  return sum;
}

// Sum over the queries of one dimension of the keys they see.
inline int64_t count_pairs(const Axis& axis) {
  if (!axis.causal) return int64_t{axis.length} * axis.window;
  int64_t pairs = 0;
  for_each_group(axis, [&](const Window& window, int64_t copies) {
    // A causal window only grows inside a stride group: an arithmetic series.
    for (int first = 0; first < window.length; first += window.stride) {
      const int64_t queries = std::min(window.stride, window.length - first);
      const int64_t shortest = window.end(first) - window.start(first);
      pairs += copies * (queries * shortest + queries * (queries - 1) / 2);
    }
  });
  return pairs;
}

struct TilePlan {
  int64_t tokens = 1;
  int64_t pairs = 1;  // (query, key) pairs that attention needs
  int64_t q_tiles = 1;
  int64_t kv_tiles = 1;
  int64_t visited = 1;      // pairs of a query tile and a key tile that the kernel multiplies
  int64_t full = 1;         // those without a mask
  int64_t dense_tiles = 1;  // the pairs of tiles of dense attention over all tokens
  int64_t q_tile_size = 1;
  int64_t kv_tile_size = 1;

  int64_t partial() const { return visited - full; }
  bool mask_free() const { return full == visited; }
  // Largest possible speedups over dense attention: by arithmetic alone, and with whole tiles.
  double flop_bound() const { return double(tokens) * double(tokens) / double(pairs); }
  double tile_bound() const { return double(dense_tiles) / double(visited); }
  double full_share() const { return double(full) / double(visited); }
  // Computed and needed pairs; 1 means that no work is wasted on masked or padded pairs.
  double utilization() const {
    return double(pairs) / (double(visited) * double(q_tile_size) * double(kv_tile_size));
  }
  // Rows of all query (key) tiles beyond the tokens they hold, as a share of the tokens.
  double q_padding() const { return double(q_tiles * q_tile_size) / double(tokens) - 1.0; }
  double kv_padding() const { return double(kv_tiles * kv_tile_size) / double(tokens) - 1.0; }
  // Predicted time in units of one full tile.
  double cost(double partial_cost) const { return double(full) + partial_cost * double(partial()); }
};

using TileShape = std::vector<int>;  // one side per dimension of the grid, outermost first

inline int64_t volume(const TileShape& shape) {
  int64_t product = 1;
  for (int side : shape) product *= side;
  return product;
}

inline void check_axes(const std::vector<Axis>& axes) {
  if (axes.empty() || axes.size() > 3) {
    throw std::invalid_argument("the grid has " + std::to_string(axes.size()) +
                                " dimensions; supported: 1, 2 or 3");
  }
  for (const Axis& a : axes) {
    const auto fail = [](const std::string& text) { throw std::invalid_argument(text); };
    if (a.length < 1) fail("grid holds " + std::to_string(a.length) + "; every side must be at least 1");
    if (a.window < 1) fail("window holds " + std::to_string(a.window) + "; every side must be at least 1");
    if (a.dilation < 1) fail("dilation holds " + std::to_string(a.dilation) + "; it must be at least 1");
    if (a.stride < 1 || a.stride > a.window) {
      fail("stride " + std::to_string(a.stride) + " is not between 1 and the window " +
           std::to_string(a.window));
    }
    if (int64_t{a.window} * a.dilation > a.length) {
      fail("window " + std::to_string(a.window) + " times dilation " + std::to_string(a.dilation) +
           " exceeds the grid's side " + std::to_string(a.length));
    }
  }
}

inline void check_tile(const char* name, const TileShape& tile, size_t rank) {
  if (tile.size() != rank) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(tile.size()) +
                                " sides, the grid has " + std::to_string(rank));
  }
  for (int side : tile) {
    if (side < 1 || side > kMaxTileSide) {
      throw std::invalid_argument(std::string(name) + " has a side of " + std::to_string(side) +
                                  "; supported: 1 to " + std::to_string(kMaxTileSide));
    }
  }
}

inline TilePlan plan_tiles(const std::vector<Axis>& axes, const TileShape& q_tile, const TileShape& kv_tile,
                           Placement placement, Direction direction = Direction::kForward) {
  check_axes(axes);
  check_tile("q_tile", q_tile, axes.size());
  check_tile("kv_tile", kv_tile, axes.size());
  TilePlan plan;
  plan.q_tile_size = volume(q_tile);
  plan.kv_tile_size = volume(kv_tile);
  for (size_t i = 0; i < axes.size(); ++i) {
    const AxisCounts counts = count_axis(axes[i], q_tile[i], kv_tile[i], placement, direction);
    plan.tokens *= axes[i].length;
    plan.pairs *= count_pairs(axes[i]);
    plan.q_tiles *= counts.q_tiles;
    plan.kv_tiles *= counts.kv_tiles;
    plan.visited *= counts.visited;
    plan.full *= counts.full;
  }
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  plan.dense_tiles = ceil_div(plan.tokens, plan.q_tile_size) * ceil_div(plan.tokens, plan.kv_tile_size);
  return plan;
}

// Which tile shapes a search considers.
enum class Shapes : int {
  kPowersOfTwo,  // sides are powers of two and the box holds exactly the block: coordinates are bit fields
  kExact,        // any sides whose product is the block
  kFitting,  // any box that fills at least 7/8 of the block; the rest stays empty and needs a mask everywhere
};

inline std::vector<TileShape> tile_shapes(int rank, int block, Shapes shapes) {
  std::vector<TileShape> found;
  TileShape shape(rank);
  const auto place = [&](auto&& self, int axis, int room) -> void {
    const bool last = axis + 1 == rank;
    for (int side = 1; side <= std::min(room, kMaxTileSide); ++side) {
      if (shapes == Shapes::kPowersOfTwo && (side & (side - 1)) != 0) continue;
      if (shapes != Shapes::kFitting && (room % side != 0 || (last && side != room))) continue;
      shape[axis] = side;
      if (last) {
        if (volume(shape) * 8 >= int64_t{block} * 7) found.push_back(shape);
      } else {
        self(self, axis + 1, room / side);
      }
    }
  };
  place(place, 0, block);
  return found;
}

// Numbers the different sides of some shapes.
struct SideIndex {
  std::array<int, kMaxTileSide + 1> of{};
  int count = 0;

  explicit SideIndex(const std::vector<TileShape>& shapes) {
    of.fill(-1);
    for (const TileShape& shape : shapes) {
      for (int side : shape) {
        if (of[side] < 0) of[side] = count++;
      }
    }
  }
};

struct TileChoice {
  TileShape q_tile;
  TileShape kv_tile;
  TilePlan plan;
};

// The pair of shapes with the smallest predicted time: full tiles + partial_cost * partial tiles. Among
// equals the first in the order of tile_shapes, which is the one with the longest innermost runs. Pairs with
// more than `most_offsets` relative positions are left out.
inline TileChoice best_tiles(const std::vector<Axis>& axes, int block_m, int block_n, Placement placement,
                             double partial_cost = 1.1, Direction direction = Direction::kForward,
                             Shapes shapes = Shapes::kPowersOfTwo,
                             int64_t most_offsets = std::numeric_limits<int64_t>::max()) {
  check_axes(axes);
  const int rank = static_cast<int>(axes.size());
  const std::vector<TileShape> q_shapes = tile_shapes(rank, block_m, shapes);
  const std::vector<TileShape> kv_shapes = tile_shapes(rank, block_n, shapes);
  if (q_shapes.empty() || kv_shapes.empty()) {
    throw std::invalid_argument("no box with sides up to " + std::to_string(kMaxTileSide) +
                                " holds blocks of " + std::to_string(block_m) + " and " +
                                std::to_string(block_n) + " tokens");
  }
  // A dimension meets few different pairs of sides: count each pair once.
  const SideIndex q_sides(q_shapes), kv_sides(kv_shapes);
  std::vector<AxisCounts> counted(rank * q_sides.count * kv_sides.count);
  const auto count = [&](int axis, int q, int kv) -> const AxisCounts& {
    AxisCounts& entry = counted[(axis * q_sides.count + q_sides.of[q]) * kv_sides.count + kv_sides.of[kv]];
    if (entry.visited == 0) entry = count_axis(axes[axis], q, kv, placement, direction);
    return entry;
  };
  double least = 0.0;
  const TileShape* best_q = nullptr;
  const TileShape* best_kv = nullptr;
  for (const TileShape& q : q_shapes) {
    for (const TileShape& kv : kv_shapes) {
      TilePlan plan;
      bool in_reach = true;  // a dilated box spans more positions than it holds
      int64_t offsets = 1;
      for (int axis = 0; axis < rank; ++axis) {
        in_reach &= (std::max(q[axis], kv[axis]) - 1) * axes[axis].dilation < kMaxTileSide;
        offsets *= q[axis] + kv[axis] - 1;
        const AxisCounts& counts = count(axis, q[axis], kv[axis]);
        plan.visited *= counts.visited;
        plan.full *= counts.full;
      }
      if (!in_reach || offsets > most_offsets) continue;
      const bool filled = direction == Direction::kForward ? volume(kv) == block_n : volume(q) == block_m;
      if (!filled) plan.full = 0;
      const double cost = plan.cost(partial_cost);
      if (best_q == nullptr || cost < least) {
        least = cost;
        best_q = &q;
        best_kv = &kv;
      }
    }
  }
  if (best_q == nullptr) throw std::invalid_argument("no box of these blocks reaches over the dilation");
  return {*best_q, *best_kv, plan_tiles(axes, *best_q, *best_kv, placement, direction)};
}

}  // namespace nearfield
