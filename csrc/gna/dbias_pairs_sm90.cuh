// The pairs of boxes that the gradient of the bias sums over: a list, of which every CTA walks through a
// share.
#pragma once

#include "gna/dbias_sm90.h"
#include "gna/query_stationary_sm90.cuh"

namespace nearfield::gna {

struct DbiasMaps {
  CUtensorMap q, k, v, dout;
};

struct DbiasParams {
  Problem problem;
  Box q_box, kv_box;
  Cells cells;
  int tiles[3];  // boxes of queries in the longest dilation group
  int outers;    // batch entries times dilation groups
  TokenMap fold_q, fold_k, fold_v, fold_dout;
  float scale_log2;
  int64_t batch_offset;
  Tokens<const RowStats> stats;  // [B, X, H]
  BiasParams bias;
  BiasGradient<float> gradient;

  // A CTA has the same share of every heads_at_once-th head.
  __device__ __forceinline__ int heads_at_once() const { return gridDim.x / gradient.parts; }
  __device__ __forceinline__ int first_head() const { return blockIdx.x % heads_at_once(); }
  __device__ __forceinline__ int part() const { return blockIdx.x / heads_at_once(); }
  __device__ __forceinline__ int first_cell_of(int d) const {
    return d == 0 ? 0 : d == 1 ? cells.count[0] : cells.count[0] + cells.count[1];
  }
};

// A pair of boxes, as the list has it.
struct PairOfBoxes {
  int cell[3];  // from the first one on
  int outer;    // batch entry and dilation group
  int tile[3];  // of the queries
};

// Which boxes of queries have a key in which cell, per dimension; by all threads of a CTA.
template <class Storage>
__device__ void find_tiles_of_cells(Storage& s, const DbiasParams& p, int num_threads) {
  const int total = p.cells.count[0] + p.cells.count[1] + p.cells.count[2];
  for (int i = threadIdx.x; i < total; i += num_threads)
    s.tiles[i] = {p.tiles[0] + p.tiles[1] + p.tiles[2], 0};
  __syncthreads();
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    // Groups differ in length by one.
    for (int shorter = 0; shorter < min(2, p.problem.dilation[d]); ++shorter) {
      const Window window = p.problem.axis(d, shorter * (p.problem.dilation[d] - 1));
      for (int t = threadIdx.x; t < p.tiles[d]; t += num_threads) {
        const int first = t * p.q_box.side[d], last = min(first + p.q_box.side[d], window.length) - 1;
        if (last < first) continue;
        const Range keys = window.any_sees(first, last);
        const int end = p.cells.cell_of(keys.end - 1 - first, d, p.kv_box) - p.cells.first[d];
        for (int c = p.cells.cell_of(keys.begin - first, d, p.kv_box) - p.cells.first[d]; c <= end; ++c) {
          atomicMin(&s.tiles[p.first_cell_of(d) + c].begin, t);
          atomicMax(&s.tiles[p.first_cell_of(d) + c].end, t + 1);
        }
      }
    }
  }
  __syncthreads();
}

// Walks through a CTA's pairs: heads, then cells, then batch entries and groups, then boxes of queries, the
// innermost dimension fastest.
template <class Storage>
class PairWalk {
 public:
  int head, batch, group[3];

  __device__ __forceinline__ PairWalk(const Storage& s, const DbiasParams& p)
      : head(p.first_head()), s(s), p(p) {
    begin_share();
  }

  __device__ __forceinline__ bool more() const { return head < p.problem.heads; }

  // Whether the next pair is in another cell.
  __device__ __forceinline__ bool ends_cell() const {
    return left == 1 || (at.tile[2] + 1 == tiles[2].end && at.tile[1] + 1 == tiles[1].end &&
                         at.tile[0] + 1 == tiles[0].end && at.outer + 1 == p.outers);
  }

  __device__ __forceinline__ void advance() {
    if (--left == 0) {
      head += p.heads_at_once();
      return begin_share();
    }
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      if (++at.tile[d] < tiles[d].end) return;
      at.tile[d] = tiles[d].begin;
    }
    if (p.outers > 1) {
      if (++at.outer == p.outers) at.outer = 0;
      enter_outer();
      if (at.outer > 0) return;
    }
    do {
      next_cell();
    } while (tiles[0].end <= tiles[0].begin || tiles[1].end <= tiles[1].begin ||
             tiles[2].end <= tiles[2].begin);
#pragma unroll
    for (int d = 0; d < 3; ++d) at.tile[d] = tiles[d].begin;
  }

  // First tokens of the two boxes, as indices inside the dilation group.
  __device__ __forceinline__ int query(int d) const { return at.tile[d] * p.q_box.side[d]; }
  __device__ __forceinline__ int distance(int d) const {
    return p.cells.anchor[d] + (p.cells.first[d] + at.cell[d]) * p.kv_box.side[d];
  }

 private:
  __device__ __forceinline__ void begin_share() {
    at = s.first;
    left = s.count;
    enter_cell();
    enter_outer();
  }
  __device__ __forceinline__ void next_cell() {
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      if (++at.cell[d] < p.cells.count[d]) break;
      at.cell[d] = 0;
    }
    enter_cell();
  }
  __device__ __forceinline__ void enter_cell() {
#pragma unroll
    for (int d = 0; d < 3; ++d) tiles[d] = s.tiles[p.first_cell_of(d) + at.cell[d]];
  }
  __device__ __forceinline__ void enter_outer() {
    batch = at.outer / static_cast<int>(p.problem.groups());
    int rest = at.outer;
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      group[d] = rest % p.problem.dilation[d];
      rest /= p.problem.dilation[d];
    }
  }

  PairOfBoxes at;
  int left;  // pairs of the head
  const Storage& s;
  const DbiasParams& p;
  Range tiles[3];  // of the cell
};

// This CTA's share of the list; by one thread.
template <class Storage>
__device__ void find_share(Storage& s, const DbiasParams& p) {
  const auto tiles_in = [&](int d, int cell) {
    const Range tiles = s.tiles[p.first_cell_of(d) + cell];
    return static_cast<int64_t>(max(tiles.end - tiles.begin, 0));
  };
  int64_t of_dim[3] = {0, 0, 0};
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    for (int c = 0; c < p.cells.count[d]; ++c) of_dim[d] += tiles_in(d, c);
  }
  const int64_t total = p.outers * of_dim[0] * of_dim[1] * of_dim[2];
  int64_t at = total * p.part() / p.gradient.parts;
  s.count = static_cast<int>(total * (p.part() + 1) / p.gradient.parts - at);
  if (s.count == 0) return;
  int64_t pairs = total;  // with the cells chosen so far
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    const int64_t of_tile = pairs / of_dim[d];
    int c = 0;
    for (; at >= of_tile * tiles_in(d, c); ++c) at -= of_tile * tiles_in(d, c);
    s.first.cell[d] = c;
    pairs = of_tile * tiles_in(d, c);
  }
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    const int64_t count = tiles_in(d, s.first.cell[d]);
    s.first.tile[d] = s.tiles[p.first_cell_of(d) + s.first.cell[d]].begin + static_cast<int>(at % count);
    at /= count;
  }
  s.first.outer = static_cast<int>(at);
}

}  // namespace nearfield::gna
