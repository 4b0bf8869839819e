// How the CPU kernels walk a problem. Up to kLanes stationary elements (queries, or keys in the pass for dK
// and dV) form an n-dimensional tile, one vector lane each. Their partners (the keys they see, or the queries
// that see them) lie in a box, the product over dimensions of the unions of their windows. Several tiles
// stacked along one axis form a macro tile: they share the rows that are copied from memory, block by block,
// so scratch memory stays bounded.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "gna/bias.h"
#include "gna/cpu_lanes.h"
#include "gna/gna.h"

namespace nearfield::gna {

constexpr int kBlockRows = 256;  // rows of one block: panels of 16 KB, so that scores stay in the L1 cache
constexpr int kMacroTiles = 8;   // tiles that share one copy of their rows
// Fixed cost of a tile (transposing in and out), in rows. Only chooses the shape of tiles.
constexpr int kTileOverhead = 24;

enum class Lanes { queries, keys };

inline int length_of(Range r) { return r.end - r.begin; }
inline bool contains(Range outer, Range inner) {
  return outer.begin <= inner.begin && inner.end <= outer.end;
}
inline Range intersect(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

// One dimension of one dilation group, seen from the side that sits in the lanes.
struct Axis {
  Window window;
  Lanes lanes;

  Range partners(int i) const { return lanes == Lanes::queries ? window.keys(i) : window.queries(i); }
  Range partners_of_any(int first, int last) const {
    return lanes == Lanes::queries ? window.any_sees(first, last) : window.any_seen_by(first, last);
  }
};

// Shape of tiles and macro tiles; the same for all dilation groups.
struct Tiling {
  int tile[3];
  int axis;  // along which tiles are stacked: the first that is longer than 1, so that the rows of a tile are
             // consecutive among the rows of its macro tile
  int macro[3];      // elements of a macro tile
  int64_t count[3];  // macro tiles; a group that is one shorter may have none for the last index
  int64_t total() const { return count[0] * count[1] * count[2]; }
};

// Chooses the tile shape that visits the fewest rows. Rows are a product over dimensions, so sums per
// dimension do.
inline Tiling make_tiling(const Problem& p, Lanes lanes, int num_lanes, int macro_tiles) {
  constexpr int kMax = 16;
  double rows[3][kMax + 1], tiles[3][kMax + 1];
  for (int d = 0; d < 3; ++d) {
    const Axis axis{p.axis(d, 0), lanes};
    const int length = axis.window.length;
    for (int t = 1; t <= std::min(num_lanes, length); ++t) {
      rows[d][t] = 0;
      for (int i = 0; i < length; i += t)
        rows[d][t] += length_of(axis.partners_of_any(i, std::min(i + t, length) - 1));
      tiles[d][t] = (length + t - 1) / t;
    }
  }
  Tiling best{};
  double best_cost = std::numeric_limits<double>::infinity();
  const int length[3] = {p.axis(0, 0).length, p.axis(1, 0).length, p.axis(2, 0).length};
  for (int a = 1; a <= std::min(num_lanes, length[0]); ++a)
    for (int b = 1; a * b <= num_lanes && b <= length[1]; ++b)
      for (int c = 1; a * b * c <= num_lanes && c <= length[2]; ++c) {
        const double cost =
            rows[0][a] * rows[1][b] * rows[2][c] + kTileOverhead * tiles[0][a] * tiles[1][b] * tiles[2][c];
        // Ties go to the tile that is longest in the last, contiguous dimension.
        if (cost < best_cost || (cost == best_cost && c > best.tile[2])) {
          best_cost = cost;
          best.tile[0] = a, best.tile[1] = b, best.tile[2] = c;
        }
      }
  best.axis = length[0] > 1 ? 0 : length[1] > 1 ? 1 : 2;
  for (int d = 0; d < 3; ++d) {
    best.macro[d] = best.tile[d] * (d == best.axis ? macro_tiles : 1);
    best.count[d] = (length[d] + best.macro[d] - 1) / best.macro[d];
  }
  return best;
}

// One dilation group: axes in group coordinates and the way back to positions.
struct Group {
  int r[3];
  int dilation[3];
  Axis axis[3];

  Group(const Problem& p, int64_t index, Lanes lanes) {
    for (int d = 2; d >= 0; --d) {
      dilation[d] = p.dilation[d];
      r[d] = static_cast<int>(index % dilation[d]);
      index /= dilation[d];
      axis[d] = {p.axis(d, r[d]), lanes};
    }
  }
  template <class T>
  int64_t offset(const Tokens<T>& t, int i0, int i1, int i2) const {
    return (r[0] + static_cast<int64_t>(dilation[0]) * i0) * t.x[0] +
           (r[1] + static_cast<int64_t>(dilation[1]) * i1) * t.x[1] +
           (r[2] + static_cast<int64_t>(dilation[2]) * i2) * t.x[2];
  }
};

// A run of rows of a box: lines [line.begin, line.end) of its first two dimensions (row-major), each cut to
// `inner`.
struct Rows {
  Range box[3];
  Range line;
  Range inner;

  int64_t count() const { return static_cast<int64_t>(length_of(line)) * length_of(inner); }
  int i0(int l) const { return box[0].begin + l / length_of(box[1]); }
  int i1(int l) const { return box[1].begin + l % length_of(box[1]); }
};

// Calls f(Rows) for consecutive parts of a box of at most kBlockRows rows each.
template <class F>
void for_each_block(const Range (&box)[3], F&& f) {
  const int lines = length_of(box[0]) * length_of(box[1]), width = length_of(box[2]);
  if (lines <= 0 || width <= 0) return;
  const int cuts = (width + kBlockRows - 1) / kBlockRows;  // > 1: parts of one line at a time
  const int inner_step = (width + cuts - 1) / cuts, line_step = cuts > 1 ? 1 : kBlockRows / width;
  Rows rows{{box[0], box[1], box[2]}, {}, {}};
  for (int l = 0; l < lines; l += line_step)
    for (int i = 0; i < width; i += inner_step) {
      rows.line = {l, std::min(l + line_step, lines)};
      rows.inner = {box[2].begin + i, box[2].begin + std::min(i + inner_step, width)};
      f(rows);
    }
}

// Up to kLanes<C> elements and what each of them sees. Unused lanes repeat lane 0.
template <class C>
struct LaneTile {
  int lanes;
  int index[3][kLanes<C>];
  Range box[3];     // union of the windows
  Range common[3];  // their intersection: rows in it need no mask
  int begin[3][kLanes<C>], end[3][kLanes<C>];

  // Elements [first, last] of the group, at most kLanes<C>.
  void set(const Group& g, const int (&first)[3], const int (&last)[3]) {
    lanes = 0;
    for (int i0 = first[0]; i0 <= last[0]; ++i0)
      for (int i1 = first[1]; i1 <= last[1]; ++i1)
        for (int i2 = first[2]; i2 <= last[2]; ++i2, ++lanes)
          index[0][lanes] = i0, index[1][lanes] = i1, index[2][lanes] = i2;
    for (int d = 0; d < 3; ++d) {
      box[d] = g.axis[d].partners_of_any(first[d], last[d]);
      common[d] = box[d];
      for (int lane = 0; lane < kLanes<C>; ++lane) {
        if (lane >= lanes) index[d][lane] = index[d][0];
        const Range seen = g.axis[d].partners(index[d][lane]);
        begin[d][lane] = seen.begin;
        end[d][lane] = seen.end;
        common[d] = intersect(common[d], seen);
      }
    }
  }

  // The rows of a macro tile's block that lie in this tile's box; they are consecutive, from `skipped` on.
  Rows part_of(const Rows& block, int axis, int64_t& skipped) const {
    Rows part = block;
    if (axis == 2) {
      part.inner = intersect(block.inner, box[2]);
    } else {
      const int lines_per_step = axis == 0 ? length_of(block.box[1]) : 1;
      const int origin = block.box[axis].begin;
      part.line = intersect(block.line, {(box[axis].begin - origin) * lines_per_step,
                                         (box[axis].end - origin) * lines_per_step});
    }
    skipped = static_cast<int64_t>(part.line.begin - block.line.begin) * length_of(block.inner) +
              (part.inner.begin - block.inner.begin);
    if (part.line.end <= part.line.begin || part.inner.end <= part.inner.begin)
      part.line.end = part.line.begin;
    return part;
  }

  // Sets scores of pairs that do not see each other to -inf. scores: [rows, kLanes].
  void mask(C* scores, const Rows& rows) const {
    const int first0 = rows.i0(rows.line.begin), last0 = rows.i0(rows.line.end - 1);
    const Range all1 =
        first0 == last0 ? Range{rows.i1(rows.line.begin), rows.i1(rows.line.end - 1) + 1} : rows.box[1];
    const bool inner_full = contains(common[2], rows.inner);
    if (inner_full && contains(common[0], {first0, last0 + 1}) && contains(common[1], all1)) return;
    const int width = length_of(rows.inner);
    alignas(cpu::kPanel) C first[kLanes<C>], last[kLanes<C>], hidden[kLanes<C>];
    for (int lane = 0; lane < kLanes<C>; ++lane) {
      first[lane] = static_cast<C>(std::clamp(begin[2][lane] - rows.inner.begin, 0, width));
      last[lane] = static_cast<C>(std::clamp(end[2][lane] - rows.inner.begin, 0, width) - 1);
    }
    for (int l = rows.line.begin; l < rows.line.end; ++l, scores += width * kLanes<C>) {
      const int i0 = rows.i0(l), i1 = rows.i1(l);
      if (inner_full && contains(common[0], {i0, i0 + 1}) && contains(common[1], {i1, i1 + 1})) continue;
      for (int lane = 0; lane < kLanes<C>; ++lane) {
        const int seen =
            (begin[0][lane] <= i0) & (i0 < end[0][lane]) & (begin[1][lane] <= i1) & (i1 < end[1][lane]);
        hidden[lane] = static_cast<C>((1 - seen) * kBlockRows);
      }
      mask_line(scores, width, first, last, hidden);
    }
  }
};

// Calls f(row, lane, place) with the place in the bias of every pair of a tile and its rows. Pairs that do
// not see each other can be beyond the table.
template <class T, class C, class F>
void for_each_place(const BiasTable<T>& table, Lanes side, const LaneTile<C>& tile, const Rows& rows, F&& f) {
  const int64_t sign = side == Lanes::queries ? 1 : -1;  // rows are keys: key - query = row - lane
  const auto place_of = [&](int i0, int i1, int i2) {
    return sign * (int64_t{table.step[0]} * i0 + int64_t{table.step[1]} * i1 + int64_t{table.step[2]} * i2);
  };
  int64_t of_lane[kLanes<C>], row = 0;
  for (int lane = 0; lane < tile.lanes; ++lane)
    of_lane[lane] = table.center - place_of(tile.index[0][lane], tile.index[1][lane], tile.index[2][lane]);
  for (int l = rows.line.begin; l < rows.line.end; ++l)
    for (int i = rows.inner.begin; i < rows.inner.end; ++i, ++row) {
      const int64_t of_row = place_of(rows.i0(l), rows.i1(l), i);
      for (int lane = 0; lane < tile.lanes; ++lane) f(row, lane, of_row + of_lane[lane]);
    }
}

// scores += bias. scores: [rows, kLanes]; before the mask.
template <class C>
void add_bias(const BiasTable<const C>& bias, int64_t h, Lanes side, const LaneTile<C>& tile,
              const Rows& rows, C* scores) {
  if (bias.data == nullptr) return;
  const C* table = bias.data + h * bias.head;
  for_each_place(bias, side, tile, rows, [&](int64_t row, int lane, int64_t place) {
    if (place >= 0 && place < bias.size) scores[row * kLanes<C> + lane] += table[place];
  });
}

// dst[row][feature] = the features of the block's rows, widened.
template <class T, class C>
void load_rows(const Tokens<T>& t, int64_t b, int64_t h, const Group& g, const Rows& rows, int64_t features,
               C* dst) {
  const int64_t step = g.dilation[2] * t.x[2];
  for (int l = rows.line.begin; l < rows.line.end; ++l) {
    const T* src = t.at(b, h) + g.offset(t, rows.i0(l), rows.i1(l), rows.inner.begin);
    copy_rows(src, step, length_of(rows.inner), features, dst);
    dst += length_of(rows.inner) * features;
  }
}

// One statistic per row.
template <class C>
void load_row_stats(const Tokens<C>& t, int64_t b, int64_t h, const Group& g, const Rows& rows,
                    std::remove_const_t<C>* dst) {
  for (int l = rows.line.begin; l < rows.line.end; ++l)
    for (int i = rows.inner.begin; i < rows.inner.end; ++i)
      *dst++ = t.at(b, h)[g.offset(t, rows.i0(l), rows.i1(l), i)];
}

// panel[feature][lane] = the features of the tile's elements; zeros in unused lanes. `row` is scratch of one
// row.
template <class T, class C>
void load_lanes(const Tokens<T>& t, int64_t b, int64_t h, const Group& g, const LaneTile<C>& tile,
                int64_t features, C* row, C* panel) {
  for (int lane = 0; lane < kLanes<C>; ++lane) {
    if (lane >= tile.lanes) {
      for (int64_t f = 0; f < features; ++f) panel[f * kLanes<C> + lane] = C(0);
      continue;
    }
    const T* src = t.at(b, h) + g.offset(t, tile.index[0][lane], tile.index[1][lane], tile.index[2][lane]);
    copy_rows(src, 0, 1, features, row);
    for (int64_t f = 0; f < features; ++f) panel[f * kLanes<C> + lane] = row[f];
  }
}

// The way back of load_lanes, times a factor per lane (null: 1).
template <class T, class C>
void store_lanes(const Tokens<T>& t, int64_t b, int64_t h, const Group& g, const LaneTile<C>& tile,
                 int64_t features, const C* panel, const C* factor) {
  for (int lane = 0; lane < tile.lanes; ++lane) {
    T* dst = t.at(b, h) + g.offset(t, tile.index[0][lane], tile.index[1][lane], tile.index[2][lane]);
    const C f = factor ? factor[lane] : C(1);
    for (int64_t i = 0; i < features; ++i) dst[i] = static_cast<T>(panel[i * kLanes<C> + lane] * f);
  }
}

// One statistic per lane; 0 in unused lanes.
template <class C>
void load_lane_stats(const Tokens<C>& t, int64_t b, int64_t h, const Group& g,
                     const LaneTile<std::remove_const_t<C>>& tile, std::remove_const_t<C>* dst) {
  for (int lane = 0; lane < kLanes<std::remove_const_t<C>>; ++lane)
    dst[lane] = lane < tile.lanes
                    ? t.at(b, h)[g.offset(t, tile.index[0][lane], tile.index[1][lane], tile.index[2][lane])]
                    : std::remove_const_t<C>(0);
}

// Additional tokens [first, first + count) as rows.
template <class T, class C>
void load_additional(const Tokens<T>& t, int64_t b, int64_t h, int64_t first, int64_t count, int64_t features,
                     C* dst) {
  copy_rows(t.at(b, h) + first * t.x[2], t.x[2], count, features, dst);
}

// One unit of parallel work: the tiles of one macro tile of one (batch, key/value head, dilation group).
template <class C>
struct Work {
  int64_t b, kv_head;  // heads vary fastest: their features lie side by side in memory
  Group group;
  int tiles = 0;
  LaneTile<C> tile[kMacroTiles];
  Range box[3];

  // False when this (shorter) group has no such macro tile.
  Work(const Problem& p, const Tiling& tiling, Lanes lanes, int64_t task)
      : kv_head(task % p.heads_kv), group(p, task / p.heads_kv / tiling.total() % p.groups(), lanes) {
    int64_t m = task / p.heads_kv % tiling.total();
    b = task / p.heads_kv / tiling.total() / p.groups();
    int first[3], last[3];
    for (int d = 2; d >= 0; --d, m /= tiling.count[d + 1]) {
      first[d] = static_cast<int>(m % tiling.count[d]) * tiling.macro[d];
      last[d] = std::min(first[d] + tiling.macro[d], group.axis[d].window.length) - 1;
      if (first[d] > last[d]) return;
    }
    for (int d = 0; d < 3; ++d) box[d] = group.axis[d].partners_of_any(first[d], last[d]);
    const int a = tiling.axis, end = last[a];
    for (; first[a] <= end; first[a] += tiling.tile[a], ++tiles) {
      last[a] = std::min(first[a] + tiling.tile[a] - 1, end);
      tile[tiles].set(group, first, last);
    }
  }

  static int64_t count(const Problem& p, const Tiling& tiling) {
    return p.batch * p.heads_kv * p.groups() * tiling.total();
  }
};

}  // namespace nearfield::gna
