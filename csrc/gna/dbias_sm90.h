// The contract between cuda.cpp and Hopper's kernel for the gradient of the bias.
#pragma once

#include "gna/sm80.h"

namespace nearfield::gna {

struct DbiasTile {
  int kBlockM, kBlockN;  // queries and keys of a pair
  int kSlots;            // buffers for a block of each: Q and K, then dO and V, then the next pair's
};

// 192 KB. At D = 256 128 keys would leave one buffer, and V would wait for what reads K.
constexpr DbiasTile dbias_tile(int head_dim) {
  if (head_dim <= 32) return {128, 128, 12};
  if (head_dim <= 64) return {128, 128, 6};
  if (head_dim <= 128) return {128, 128, 3};
  return {128, 64, 2};
}

// In a dimension, the boxes of keys lie at distance anchor + n * side from the box of queries, side being
// theirs. Where windows are not moved at a border the first of them begins where the window of the first
// query does.
struct Cells {
  int anchor[3];  // distance of cell 0
  int first[3];   // the cells that pairs can be in
  int count[3];

  Cells() = default;
  Cells(const Problem& p, const Box& q, const Box& kv) {
    for (int d = 0; d < 3; ++d) {
      const int reach = p.window[d] - 1;  // no pair is farther apart
      anchor[d] = p.causal[d] ? p.stride[d] - p.window[d] : p.stride[d] / 2 - p.window[d] / 2;
      first[d] = cell_of(-reach, d, kv);
      count[d] = cell_of(reach + q.side[d] - 1, d, kv) - first[d] + 1;
    }
  }
  int total() const { return count[0] + count[1] + count[2]; }
  // Of a key at a distance from the first query.
  NEARFIELD_HOST_DEVICE int cell_of(int distance, int d, const Box& kv) const {
    const int from_anchor = distance - anchor[d], side = kv.side[d];
    return from_anchor >= 0 ? from_anchor / side : -((side - 1 - from_anchor) / side);
  }
};

// Cells, of all dimensions together, for which the kernel has room; beyond, the portable kernel runs.
constexpr int kMostCells = 256;

template <class Element, int kHeadDim>
struct bwd_dbias_sm90 {
  static int run(const BwdSm80Args& args, void* stream);
};

}  // namespace nearfield::gna
