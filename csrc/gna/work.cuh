// From a work index to a query tile: batch, head, dilation group, position, and the key tiles it visits.
#pragma once

#include "gna/sm90.h"
#include "nearfield/tile_plan.h"

namespace nearfield::gna {

// One query tile of one (batch, head, dilation group).
struct QueryTile {
  int batch, head;
  int group[3];   // position inside the dilation step
  int first[3];   // first query, as index inside the group
  Window window[3];
  TileRun keys[3];  // key tiles visited per dimension

  // Groups differ in length by one, so the last tile of a shorter group can be empty.
  __device__ __forceinline__ bool empty() const {
    return first[0] >= window[0].length || first[1] >= window[1].length || first[2] >= window[2].length;
  }
  __device__ __forceinline__ int num_key_tiles() const { return keys[0].count * keys[1].count * keys[2].count; }
};

struct Schedule {
  int tiles[3];     // query tiles per dimension of the longest dilation group
  int64_t total;    // work items

  Schedule() = default;
  Schedule(const Problem& p, const Box& q_box) {
    total = p.batch * p.heads * p.groups();
    for (int d = 0; d < 3; ++d) {
      tiles[d] = (group_length(p.size[d], p.dilation[d], 0) + q_box.side[d] - 1) / q_box.side[d];
      total *= tiles[d];
    }
  }

  // All tiles of one head come before those of the next, so that the CTAs that run together share K and V in the L2
  // cache. Within a head the order is reversed: under a causal mask the last tiles have the longest rows of keys.
  __device__ __forceinline__ QueryTile decode(const Problem& p, const Box& q_box, const Box& kv_box,
                                              int64_t work) const {
    QueryTile tile;
    const int per_head = tiles[0] * tiles[1] * tiles[2];
    const int64_t outer = work / per_head;
    int inner = per_head - 1 - static_cast<int>(work - outer * per_head);
    const int groups = p.dilation[0] * p.dilation[1] * p.dilation[2];
    const int64_t bh = outer / groups;
    int group = static_cast<int>(outer - bh * groups);
    tile.batch = static_cast<int>(bh / p.heads);
    tile.head = static_cast<int>(bh - tile.batch * p.heads);
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      tile.first[d] = inner % tiles[d] * q_box.side[d];
      inner /= tiles[d];
      tile.group[d] = group % p.dilation[d];
      group /= p.dilation[d];
      tile.window[d] = p.axis(d, tile.group[d]);
      const int last = min(tile.first[d] + q_box.side[d], tile.window[d].length) - 1;
      tile.keys[d] = key_tiles(tile.window[d], min(tile.first[d], last), last, kv_box.side[d], Placement::kSpan);
    }
    return tile;
  }
};

// Counts through the key tiles of a query tile, innermost dimension fastest.
struct KeyTileCounter {
  int n[3] = {0, 0, 0};

  __device__ __forceinline__ void advance(const QueryTile& tile) {
    if (++n[2] < tile.keys[2].count) return;
    n[2] = 0;
    if (++n[1] < tile.keys[1].count) return;
    n[1] = 0;
    ++n[0];
  }
};

}  // namespace nearfield::gna
