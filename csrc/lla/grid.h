// Neighborhoods of a grid of tokens of one, two or three dimensions: rows in the order of boxes.
//
// Tokens are sorted by dilation group, then by box, then inside the box, the last dimension fastest. A box
// holds kBoxRows rows, as many as a tile of any kernel, and is full of rows: those that lie beyond the grid
// see nothing and nobody sees them. So a tile of queries sees a box of tiles, and of one tile a row sees a
// set of bits.
#pragma once

#include <cstdint>

#include "nearfield/window.h"

namespace nearfield::lla {

constexpr int kBoxRows = 64;

struct Grid {
  int size[3], window[3], stride[3], dilation[3],
      causal[3];  // one and two dimensions: padded with 1 on the left
  int side[3];    // of a box: powers of two, kBoxRows together; 0: there is no grid

  // Indices inside the dilation group, per dimension.
  struct Reach {
    Range range[3];
    NEARFIELD_HOST_DEVICE int count() const {
      return (range[0].end - range[0].begin) * (range[1].end - range[1].begin) *
             (range[2].end - range[2].begin);
    }
  };

  // A box of tiles.
  struct Tiles {
    int group, begin[3], count[3], boxes[3];
    NEARFIELD_HOST_DEVICE int total() const { return count[0] * count[1] * count[2]; }
    // The number of tile n, and that of its box in each dimension.
    NEARFIELD_HOST_DEVICE int at(int n, int (&box)[3]) const {
      const int outer = n / count[2];
      box[0] = begin[0] + outer / count[1], box[1] = begin[1] + outer % count[1];
      box[2] = begin[2] + n % count[2];
      return ((group * boxes[0] + box[0]) * boxes[1] + box[1]) * boxes[2] + box[2];
    }
    NEARFIELD_HOST_DEVICE int at(int n) const {
      int box[3];
      return at(n, box);
    }
  };

  NEARFIELD_HOST_DEVICE bool given() const { return side[0] > 0; }

  NEARFIELD_HOST_DEVICE int boxes(int d) const {
    return (group_length(size[d], dilation[d], 0) + side[d] - 1) / side[d];
  }
  NEARFIELD_HOST_DEVICE int64_t rows() const {
    int64_t product = kBoxRows;
    for (int d = 0; d < 3; ++d) product *= int64_t{dilation[d]} * boxes(d);
    return product;
  }

  // The keys that a query sees, or the queries that see a key.
  NEARFIELD_HOST_DEVICE Reach reach(int row, bool of_key) const {
    const Place p = place(row / kBoxRows);
    const int in_box[3] = {row % kBoxRows / (side[1] * side[2]), row / side[2] % side[1], row % side[2]};
    Reach out;
    bool inside = true;
    for (int d = 0; d < 3; ++d) {
      const int index = p.first[d] + in_box[d];
      inside &= index < p.axis[d].length;
      if (inside) out.range[d] = of_key ? p.axis[d].queries(index) : p.axis[d].keys(index);
    }
    if (!inside) out = {{{0, 0}, {0, 0}, {0, 0}}};
    return out;
  }

  // Those of all rows of a tile.
  NEARFIELD_HOST_DEVICE Tiles reached(int tile, bool of_keys) const {
    const Place p = place(tile);
    Tiles out;
    out.group = p.group;
    for (int d = 0; d < 3; ++d) {
      const Window& axis = p.axis[d];
      const int first = p.first[d], end = first + side[d], last = (end < axis.length ? end : axis.length) - 1;
      const Range any = first > last ? Range{0, 0}
                        : of_keys    ? axis.any_seen_by(first, last)
                                     : axis.any_sees(first, last);
      out.boxes[d] = boxes(d);
      out.begin[d] = any.begin / side[d];
      out.count[d] = any.begin < any.end ? (any.end + side[d] - 1) / side[d] - out.begin[d] : 0;
    }
    return out;
  }

  // Which rows of a box of the same dilation group are reached: bit r is row r.
  NEARFIELD_HOST_DEVICE uint64_t rows_reached(const Reach& reach, const int (&box)[3]) const {
    uint64_t bits = ~uint64_t{0};
    int width = 1;  // rows of a step of the dimension
    for (int d = 2; d >= 0; --d) {
      const int first = box[d] * side[d];
      const int begin = clamp(reach.range[d].begin - first, side[d]) * width;
      const int end = clamp(reach.range[d].end - first, side[d]) * width;
      uint64_t pattern = end > begin ? ones(end) & ~ones(begin) : 0;
      width *= side[d];
      for (int copied = width; copied < kBoxRows; copied *= 2) pattern |= pattern << copied;
      bits &= pattern;
    }
    return bits;
  }

  NEARFIELD_HOST_DEVICE uint64_t keys_of_tile(int64_t query, int64_t tile) const {
    int box[3], rest = static_cast<int>(tile);
    for (int d = 2; d >= 0; --d) {
      box[d] = rest % boxes(d);
      rest /= boxes(d);
    }
    return rows_reached(reach(static_cast<int>(query), false), box);
  }

 private:
  struct Place {
    int group, first[3];  // of the box, inside the dilation group
    Window axis[3];
  };

  NEARFIELD_HOST_DEVICE Place place(int tile) const {
    Place p;
    for (int d = 2; d >= 0; --d) {
      p.first[d] = tile % boxes(d) * side[d];
      tile /= boxes(d);
    }
    p.group = tile;
    for (int d = 2; d >= 0; --d) {
      p.axis[d] = {group_length(size[d], dilation[d], tile % dilation[d]), window[d], stride[d],
                   causal[d] != 0};
      tile /= dilation[d];
    }
    return p;
  }
  static NEARFIELD_HOST_DEVICE int clamp(int x, int most) { return x < 0 ? 0 : x < most ? x : most; }
  static NEARFIELD_HOST_DEVICE uint64_t ones(int n) {
    return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  }
};

}  // namespace nearfield::lla
