// Forward on the CPU: every tile of queries against the box of its keys, with an online softmax over blocks
// of keys.
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "gna/cpu_tiles.h"

namespace nearfield::gna {
namespace {

using cpu::gemm;
using cpu::row_major;

// Scratch of one thread. A state is one tile of queries of one query head.
template <class C>
struct FwdScratch {
  int64_t dim, dim_v;
  cpu::Scratch<C> q_, o_, stats_, k_, v_, s_, row_;

  C* q(int64_t states) { return q_.get(states * dim * kLanes<C>); }        // [state, D, lane]
  C* o(int64_t states) { return o_.get(states * dim_v * kLanes<C>); }      // [state, Dv, lane]
  C* stats(int64_t states) { return stats_.get(states * 2 * kLanes<C>); }  // [state, max and sum, lane]
  C* k() { return k_.get(kBlockRows * dim); }                              // [row, D]
  C* v() { return v_.get(kBlockRows * dim_v); }                            // [row, Dv]
  C* s() { return s_.get(kBlockRows * kLanes<C>); }                        // [row, lane]
  C* row() { return row_.get(std::max(dim, dim_v)); }
};

template <class T, class C>
void run_work(const FwdParams<T, C>& p, const BiasTable<const C>& bias, const Work<C>& work, int axis,
              FwdScratch<C>& scratch) {
  constexpr int lanes = kLanes<C>;
  const Problem& problem = p.problem;
  const int64_t dim = problem.dim, dim_v = problem.dim_v, heads = problem.heads_per_kv();
  const int64_t states = work.tiles * heads, b = work.b, kv = work.kv_head;
  C *q = scratch.q(states), *o = scratch.o(states), *stats = scratch.stats(states);
  C *k = scratch.k(), *v = scratch.v(), *s = scratch.s();

  for (int64_t i = 0; i < states; ++i)
    load_lanes(p.q, b, kv * heads + i % heads, work.group, work.tile[i / heads], dim, scratch.row(),
               q + i * dim * lanes);
  std::fill_n(o, states * dim_v * lanes, C(0));
  for (int64_t i = 0; i < states; ++i) {
    std::fill_n(stats + i * 2 * lanes, lanes, -std::numeric_limits<C>::infinity());
    std::fill_n(stats + i * 2 * lanes + lanes, lanes, C(0));
  }

  // n rows of k and v from `first` on, for state i; rows == nullptr: every lane sees all of them.
  const auto attend = [&](int64_t i, int64_t first, int64_t n, const Rows* rows) {
    alignas(cpu::kPanel) C rescale[lanes];
    C *max = stats + i * 2 * lanes, *sum = max + lanes;
    // S = scale K Q^T
    gemm(n, lanes, dim, static_cast<C>(p.scale), row_major(k + first * dim, dim),
         row_major(q + i * dim * lanes, lanes), C(0), s, lanes);
    if (rows) {
      add_bias(bias, kv * heads + i % heads, Lanes::queries, work.tile[i / heads], *rows, s);
      work.tile[i / heads].mask(s, *rows);
    }
    online_softmax(s, n, max, sum, rescale);
    // O^T = O^T diag(rescale) + V^T P
    scale_lanes(o + i * dim_v * lanes, dim_v, rescale);
    gemm(dim_v, lanes, n, C(1), row_major(v + first * dim_v, dim_v).transposed(), row_major(s, lanes), C(1),
         o + i * dim_v * lanes, lanes);
  };

  for_each_block(work.box, [&](const Rows& block) {
    load_rows(p.k, b, kv, work.group, block, dim, k);
    load_rows(p.v, b, kv, work.group, block, dim_v, v);
    for (int t = 0; t < work.tiles; ++t) {
      int64_t first;
      const Rows part = work.tile[t].part_of(block, axis, first);
      if (part.count() == 0) continue;
      for (int64_t h = 0; h < heads; ++h) attend(t * heads + h, first, part.count(), &part);
    }
  });
  for (int64_t m = 0; m < problem.additional; m += kBlockRows) {
    const int64_t n = std::min<int64_t>(kBlockRows, problem.additional - m);
    load_additional(p.add_k, b, kv, m, n, dim, k);
    load_additional(p.add_v, b, kv, m, n, dim_v, v);
    for (int64_t i = 0; i < states; ++i) attend(i, 0, n, nullptr);
  }

  for (int64_t i = 0; i < states; ++i) {
    const LaneTile<C>& tile = work.tile[i / heads];
    const int64_t h = kv * heads + i % heads;
    const C *max = stats + i * 2 * lanes, *sum = max + lanes;
    C inverse[lanes];
    for (int lane = 0; lane < tile.lanes; ++lane) {
      inverse[lane] = C(1) / sum[lane];
      p.lse.at(b,
               h)[work.group.offset(p.lse, tile.index[0][lane], tile.index[1][lane], tile.index[2][lane])] =
          max[lane] + std::log(sum[lane]);
    }
    store_lanes(p.out, b, h, work.group, tile, dim_v, o + i * dim_v * lanes, inverse);
  }
}

}  // namespace

template <class T, class C>
void run_fwd_cpu(const FwdParams<T, C>& params, const BiasTable<const C>& bias) {
  const Problem& p = params.problem;
  if (p.batch * p.heads * p.tokens() == 0) return;
  // Query heads that share a key/value head share its rows too: fewer tiles are needed to repay the copy.
  const int macro_tiles = static_cast<int>(std::max<int64_t>(1, kMacroTiles / p.heads_per_kv()));
  const Tiling tiling = make_tiling(p, Lanes::queries, kLanes<C>, macro_tiles);
  torch::stable::parallel_for(0, Work<C>::count(p, tiling), 1, [&](int64_t begin, int64_t end) {
    FwdScratch<C> scratch{p.dim, p.dim_v, {}, {}, {}, {}, {}, {}, {}};
    for (int64_t task = begin; task < end; ++task) {
      const Work<C> work(p, tiling, Lanes::queries, task);
      if (work.tiles) run_work(params, bias, work, tiling.axis, scratch);
    }
  });
}

template void run_fwd_cpu(const FwdParams<float, float>&, const BiasTable<const float>&);
template void run_fwd_cpu(const FwdParams<double, double>&, const BiasTable<const double>&);
template void run_fwd_cpu(const FwdParams<torch::headeronly::Half, float>&, const BiasTable<const float>&);
template void run_fwd_cpu(const FwdParams<torch::headeronly::BFloat16, float>&,
                          const BiasTable<const float>&);

}  // namespace nearfield::gna
