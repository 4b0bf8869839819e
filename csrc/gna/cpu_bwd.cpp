// Backward on the CPU. Scores are recomputed from the saved lse, once with queries in the lanes (dQ) and once
// with keys in the lanes (dK, dV), so that every gradient element is owned by one task and no sum depends on
// the thread count.
#include <torch/csrc/stable/ops.h>

#include "gna/cpu_tiles.h"

namespace nearfield::gna {
namespace {

using cpu::gemm;
using cpu::row_major;

// delta = rowsum(dO * O) - dLSE, which is all that the softmax and lse gradients need besides P and dP.
template <class T, class C>
void compute_delta(const BwdParams<T, C>& p) {
  const Problem& problem = p.problem;
  const int64_t tokens = problem.tokens(), dim_v = problem.dim_v;
  const auto at = [&](const auto& t, int64_t b, int64_t token) {
    const int64_t x2 = token % problem.size[2], x1 = token / problem.size[2] % problem.size[1];
    const int64_t x0 = token / problem.size[2] / problem.size[1];
    return t.data + b * t.batch + x0 * t.x[0] + x1 * t.x[1] + x2 * t.x[2];
  };
  torch::stable::parallel_for(0, problem.batch * tokens, 64, [&](int64_t begin, int64_t end) {
    cpu::Scratch<C> scratch_o, scratch_do;
    C *o = scratch_o.get(dim_v), *d_o = scratch_do.get(dim_v);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, token = i % tokens;
      for (int64_t h = 0; h < problem.heads; ++h) {
        copy_rows(at(p.out, b, token) + h * p.out.head, 0, 1, dim_v, o);
        copy_rows(at(p.dout, b, token) + h * p.dout.head, 0, 1, dim_v, d_o);
        C sum = 0;
        for (int64_t f = 0; f < dim_v; ++f) sum += o[f] * d_o[f];
        if (p.dlse.data) sum -= at(p.dlse, b, token)[h * p.dlse.head];
        at(p.delta, b, token)[h * p.delta.head] = sum;
      }
    }
  });
}

// Scratch of one thread: rows of a block, and what is kept per state (one tile of one head).
template <class C>
struct BwdScratch {
  int64_t dim, dim_v;
  cpu::Scratch<C> rows_, rows_v_, row_stats_, lanes_, lanes_v_, lane_stats_, grads_, grads_v_, p_, dp_, row_;

  C* rows() { return rows_.get(kBlockRows * dim); }                          // [row, D]: K, or Q
  C* rows_v() { return rows_v_.get(kBlockRows * dim_v); }                    // [row, Dv]: V, or dO
  C* row_stats() { return row_stats_.get(2 * kBlockRows); }                  // lse [row], delta [row]
  C* lanes(int64_t states) { return lanes_.get(states * dim * kLanes<C>); }  // [state, D, lane]: Q, or K
  C* lanes_v(int64_t states) {
    return lanes_v_.get(states * dim_v * kLanes<C>);
  }  // [state, Dv, lane]: dO, or V
  C* lane_stats(int64_t states) {
    return lane_stats_.get(states * 2 * kLanes<C>);
  }  // lse [lane], delta [lane]
  C* grads(int64_t states) { return grads_.get(states * dim * kLanes<C>); }  // [state, D, lane]: dQ, or dK
  C* grads_v(int64_t states) { return grads_v_.get(states * dim_v * kLanes<C>); }  // [state, Dv, lane]: dV
  C* p() { return p_.get(kBlockRows * kLanes<C>); }                                // [row, lane]
  C* dp() { return dp_.get(kBlockRows * kLanes<C>); }                              // [row, lane]
  C* row() { return row_.get(std::max(dim, dim_v)); }
};

template <class T, class C>
void query_gradients(const BwdParams<T, C>& p, const BiasTable<const C>& bias, const BiasTable<C>& dbias,
                     const Work<C>& work, int axis, BwdScratch<C>& scratch) {
  constexpr int lanes = kLanes<C>;
  const Problem& problem = p.problem;
  const int64_t dim = problem.dim, dim_v = problem.dim_v, heads = problem.heads_per_kv();
  const int64_t states = work.tiles * heads, b = work.b, kv = work.kv_head;
  C *q = scratch.lanes(states), *d_o = scratch.lanes_v(states), *stats = scratch.lane_stats(states);
  C *k = scratch.rows(), *v = scratch.rows_v(), *dq = scratch.grads(states);
  C *prob = scratch.p(), *ds = scratch.dp();

  for (int64_t i = 0; i < states; ++i) {
    const LaneTile<C>& tile = work.tile[i / heads];
    const int64_t h = kv * heads + i % heads;
    load_lanes(p.q, b, h, work.group, tile, dim, scratch.row(), q + i * dim * lanes);
    load_lanes(p.dout, b, h, work.group, tile, dim_v, scratch.row(), d_o + i * dim_v * lanes);
    load_lane_stats(p.lse, b, h, work.group, tile, stats + i * 2 * lanes);
    load_lane_stats(p.delta, b, h, work.group, tile, stats + i * 2 * lanes + lanes);
  }
  std::fill_n(dq, states * dim * lanes, C(0));

  const auto attend = [&](int64_t i, int64_t first, int64_t n, const Rows* rows) {
    const C *lse = stats + i * 2 * lanes, *delta = lse + lanes;
    const C scale = static_cast<C>(p.scale);
    // P = exp(scale K Q^T - lse)
    gemm(n, lanes, dim, scale, row_major(k + first * dim, dim), row_major(q + i * dim * lanes, lanes), C(0),
         prob, lanes);
    if (rows) {
      add_bias(bias, kv * heads + i % heads, Lanes::queries, work.tile[i / heads], *rows, prob);
      work.tile[i / heads].mask(prob, *rows);
    }
    cpu::exp_panel(prob, n, lse, nullptr, nullptr);
    // dS = P * (V dO^T - delta)
    gemm(n, lanes, dim_v, C(1), row_major(v + first * dim_v, dim_v),
         row_major(d_o + i * dim_v * lanes, lanes), C(0), ds, lanes);
    softmax_gradient(ds, prob, n, delta, nullptr);
    if (rows && dbias.data != nullptr) {
      C* table = dbias.data + (kv * heads + i % heads) * dbias.head;
      for_each_place(dbias, Lanes::queries, work.tile[i / heads], *rows,
                     [&](int64_t row, int lane, int64_t place) {
                       // Where nothing is seen there is no place either.
                       if (prob[row * lanes + lane] != C(0)) table[place] += ds[row * lanes + lane];
                     });
    }
    // dQ^T += scale K^T dS
    gemm(dim, lanes, n, scale, row_major(k + first * dim, dim).transposed(), row_major(ds, lanes), C(1),
         dq + i * dim * lanes, lanes);
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
  for (int64_t i = 0; i < states; ++i)
    store_lanes(p.dq, b, kv * heads + i % heads, work.group, work.tile[i / heads], dim, dq + i * dim * lanes,
                static_cast<const C*>(nullptr));
}

// The part of the dK, dV pass that spatial and additional keys share: one block of queries against one tile
// of keys.
template <class C>
struct KeyGradients {
  static constexpr int lanes = kLanes<C>;
  int64_t dim, dim_v;
  C scale;
  BwdScratch<C>& scratch;
  C *q, *d_o, *lse, *delta;  // the block of queries
  C *k, *v, *dk, *dv;        // the states
  C *prob, *ds;

  KeyGradients(const Problem& p, double scale_, BwdScratch<C>& scratch_, int64_t states)
      : dim(p.dim),
        dim_v(p.dim_v),
        scale(static_cast<C>(scale_)),
        scratch(scratch_),
        q(scratch.rows()),
        d_o(scratch.rows_v()),
        lse(scratch.row_stats()),
        delta(lse + kBlockRows),
        k(scratch.lanes(states)),
        v(scratch.lanes_v(states)),
        dk(scratch.grads(states)),
        dv(scratch.grads_v(states)),
        prob(scratch.p()),
        ds(scratch.dp()) {
    std::fill_n(dk, states * dim * lanes, C(0));
    std::fill_n(dv, states * dim_v * lanes, C(0));
  }

  template <class T>
  void load_keys(int64_t i, const Tokens<const T>& tk, const Tokens<const T>& tv, int64_t b, int64_t kv,
                 const Group& group, const LaneTile<C>& tile) {
    load_lanes(tk, b, kv, group, tile, dim, scratch.row(), k + i * dim * lanes);
    load_lanes(tv, b, kv, group, tile, dim_v, scratch.row(), v + i * dim_v * lanes);
  }

  template <class T>
  void load_queries(const BwdParams<T, C>& p, int64_t b, int64_t h, const Group& group, const Rows& block) {
    load_rows(p.q, b, h, group, block, dim, q);
    load_rows(p.dout, b, h, group, block, dim_v, d_o);
    load_row_stats(p.lse, b, h, group, block, lse);
    load_row_stats(p.delta, b, h, group, block, delta);
  }

  void attend(int64_t i, int64_t first, int64_t n, const LaneTile<C>& tile, const Rows* rows,
              const BiasTable<const C>& bias = {}, int64_t h = 0) {
    alignas(cpu::kPanel) const C zero[lanes] = {};
    // P = exp(scale Q K^T - lse)
    gemm(n, lanes, dim, scale, row_major(q + first * dim, dim), row_major(k + i * dim * lanes, lanes), C(0),
         prob, lanes);
    if (rows) {
      add_bias(bias, h, Lanes::keys, tile, *rows, prob);
      tile.mask(prob, *rows);
    }
    cpu::exp_panel(prob, n, zero, lse + first, nullptr);
    // dV^T += dO^T P
    gemm(dim_v, lanes, n, C(1), row_major(d_o + first * dim_v, dim_v).transposed(), row_major(prob, lanes),
         C(1), dv + i * dim_v * lanes, lanes);
    // dS = P * (dO V^T - delta)
    gemm(n, lanes, dim_v, C(1), row_major(d_o + first * dim_v, dim_v),
         row_major(v + i * dim_v * lanes, lanes), C(0), ds, lanes);
    softmax_gradient(ds, prob, n, zero, delta + first);
    // dK^T += scale Q^T dS
    gemm(dim, lanes, n, scale, row_major(q + first * dim, dim).transposed(), row_major(ds, lanes), C(1),
         dk + i * dim * lanes, lanes);
  }
};

template <class T, class C>
void key_gradients(const BwdParams<T, C>& p, const BiasTable<const C>& bias, const Work<C>& work, int axis,
                   BwdScratch<C>& scratch) {
  const Problem& problem = p.problem;
  const int64_t heads = problem.heads_per_kv(), b = work.b, kv = work.kv_head;
  KeyGradients<C> grads(problem, p.scale, scratch, work.tiles);
  for (int t = 0; t < work.tiles; ++t) grads.load_keys(t, p.k, p.v, b, kv, work.group, work.tile[t]);
  for (int64_t h = kv * heads; h < (kv + 1) * heads; ++h)
    for_each_block(work.box, [&](const Rows& block) {
      grads.load_queries(p, b, h, work.group, block);
      for (int t = 0; t < work.tiles; ++t) {
        int64_t first;
        const Rows part = work.tile[t].part_of(block, axis, first);
        if (part.count()) grads.attend(t, first, part.count(), work.tile[t], &part, bias, h);
      }
    });
  for (int t = 0; t < work.tiles; ++t) {
    const C* one = nullptr;
    store_lanes(p.dk, b, kv, work.group, work.tile[t], problem.dim, grads.dk + t * problem.dim * kLanes<C>,
                one);
    store_lanes(p.dv, b, kv, work.group, work.tile[t], problem.dim_v,
                grads.dv + t * problem.dim_v * kLanes<C>, one);
  }
}

// A grid without dilation in which everything sees everything.
Problem dense(const Problem& p, int x0, int x1, int x2) {
  Problem all = p;
  const int size[3] = {x0, x1, x2};
  for (int d = 0; d < 3; ++d) {
    all.size[d] = all.window[d] = size[d];
    all.stride[d] = all.dilation[d] = 1;
    all.causal[d] = false;
  }
  return all;
}

// Every query sees the additional tokens: their gradients are summed over chunks of queries, then over the
// chunks.
template <class T, class C>
void additional_gradients(const BwdParams<T, C>& p) {
  constexpr int lanes = kLanes<C>;
  const Problem& problem = p.problem;
  const int64_t M = problem.additional, heads = problem.heads_per_kv(), width = problem.dim + problem.dim_v;
  const int64_t states = (M + lanes - 1) / lanes, chunks = additional_chunks(problem);
  const Problem queries = dense(problem, problem.size[0], problem.size[1], problem.size[2]);
  const Problem tokens = dense(problem, 1, 1, static_cast<int>(M));
  int64_t blocks = 0;
  const Group query_group(queries, 0, Lanes::keys), token_group(tokens, 0, Lanes::queries);
  const Range box[3] = {{0, queries.size[0]}, {0, queries.size[1]}, {0, queries.size[2]}};
  for_each_block(box, [&](const Rows&) { ++blocks; });

  // partial: [B, Hkv, chunks, M, D + Dv]
  torch::stable::parallel_for(
      0, problem.batch * problem.heads_kv * chunks, 1, [&](int64_t begin, int64_t end) {
        BwdScratch<C> scratch{problem.dim, problem.dim_v, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
        std::vector<LaneTile<C>> tile(states);
        for (int64_t i = 0; i < states; ++i)
          tile[i].set(token_group, {0, 0, static_cast<int>(i * lanes)},
                      {0, 0, static_cast<int>(std::min<int64_t>((i + 1) * lanes, M)) - 1});
        for (int64_t task = begin; task < end; ++task) {
          const int64_t chunk = task % chunks, kv = task / chunks % problem.heads_kv;
          const int64_t b = task / chunks / problem.heads_kv;
          const int64_t first = chunk * blocks / chunks, last = (chunk + 1) * blocks / chunks;
          KeyGradients<C> grads(problem, p.scale, scratch, states);
          for (int64_t i = 0; i < states; ++i)
            grads.load_keys(i, p.add_k, p.add_v, b, kv, token_group, tile[i]);
          for (int64_t h = kv * heads; h < (kv + 1) * heads; ++h) {
            int64_t index = 0;
            for_each_block(box, [&](const Rows& block) {
              if (index++ < first || index > last) return;
              grads.load_queries(p, b, h, query_group, block);
              for (int64_t i = 0; i < states; ++i) grads.attend(i, 0, block.count(), tile[i], nullptr);
            });
          }
          const Tokens<C> to_dk{p.partial + task * M * width, 0, {0, 0, width}, 0};
          const Tokens<C> to_dv{to_dk.data + problem.dim, 0, {0, 0, width}, 0};
          for (int64_t i = 0; i < states; ++i) {
            const C* one = nullptr;
            store_lanes(to_dk, 0, 0, token_group, tile[i], problem.dim, grads.dk + i * problem.dim * lanes,
                        one);
            store_lanes(to_dv, 0, 0, token_group, tile[i], problem.dim_v,
                        grads.dv + i * problem.dim_v * lanes, one);
          }
        }
      });
  torch::stable::parallel_for(0, problem.batch * problem.heads_kv * M, 16, [&](int64_t begin, int64_t end) {
    cpu::Scratch<C> scratch;
    C* sum = scratch.get(width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i % M, kv = i / M % problem.heads_kv, b = i / M / problem.heads_kv;
      std::fill_n(sum, width, C(0));
      for (int64_t c = 0; c < chunks; ++c) {
        const C* part = p.partial + ((i / M * chunks + c) * M + m) * width;
        for (int64_t f = 0; f < width; ++f) sum[f] += part[f];
      }
      T *dk = p.add_dk.at(b, kv) + m * p.add_dk.x[2], *dv = p.add_dv.at(b, kv) + m * p.add_dv.x[2];
      for (int64_t f = 0; f < problem.dim; ++f) dk[f] = static_cast<T>(sum[f]);
      for (int64_t f = 0; f < problem.dim_v; ++f) dv[f] = static_cast<T>(sum[problem.dim + f]);
    }
  });
}

// Calls f(work, axis, scratch, part). The work of a part (0: every work is one) is done in order.
template <class C, class F>
void for_each_work(const Problem& p, Lanes lanes, int macro_tiles, int64_t parts, F&& f) {
  const Tiling tiling = make_tiling(p, lanes, kLanes<C>, macro_tiles);
  const int64_t works = Work<C>::count(p, tiling);
  if (parts == 0) parts = works;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    BwdScratch<C> scratch{p.dim, p.dim_v, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    for (int64_t part = begin; part < end; ++part)
      for (int64_t task = part * works / parts; task < (part + 1) * works / parts; ++task) {
        const Work<C> work(p, tiling, lanes, task);
        if (work.tiles) f(work, tiling.axis, scratch, part);
      }
  });
}

}  // namespace

int64_t additional_chunks(const Problem& p) {
  const int64_t tasks = std::max<int64_t>(1, p.batch * p.heads_kv);
  return std::clamp<int64_t>(64 / tasks, 1, std::max<int64_t>(1, p.tokens() / 1024));
}

BwdWorkspace bwd_cpu_workspace(const Problem& whole, const std::vector<HeadGroup>& groups) {
  BwdWorkspace workspace{whole.batch * whole.tokens() * whole.heads, 0};
  for (const HeadGroup& group : groups) {
    const Problem& p = group.problem;
    workspace.partial = std::max(
        workspace.partial, p.batch * p.heads_kv * additional_chunks(p) * p.additional * (p.dim + p.dim_v));
  }
  return workspace;
}

template <class T, class C>
void run_bwd_cpu(const BwdParams<T, C>& params, const BiasTable<const C>& bias,
                 const BiasGradient<C>& gradient) {
  const Problem& p = params.problem;
  // Without query heads there are no key heads either, so nothing is left to write.
  if (p.batch * p.heads * p.tokens() == 0) return;
  compute_delta(params);
  const int macro_tiles = static_cast<int>(std::max<int64_t>(1, kMacroTiles / p.heads_per_kv()));
  const bool with_bias_gradient = gradient.table.data != nullptr;
  for_each_work<C>(p, Lanes::queries, macro_tiles, with_bias_gradient ? gradient.parts : 0,
                   [&](const Work<C>& work, int axis, BwdScratch<C>& scratch, int64_t part) {
                     BiasTable<C> dbias = gradient.table;
                     if (with_bias_gradient) dbias.data += part * gradient.part;
                     query_gradients(params, bias, dbias, work, axis, scratch);
                   });
  for_each_work<C>(p, Lanes::keys, kMacroTiles, 0,
                   [&](const Work<C>& work, int axis, BwdScratch<C>& scratch, int64_t) {
                     key_gradients(params, bias, work, axis, scratch);
                   });
  if (p.additional) additional_gradients(params);
}

template void run_bwd_cpu(const BwdParams<float, float>&, const BiasTable<const float>&,
                          const BiasGradient<float>&);
template void run_bwd_cpu(const BwdParams<double, double>&, const BiasTable<const double>&,
                          const BiasGradient<double>&);
template void run_bwd_cpu(const BwdParams<torch::headeronly::Half, float>&, const BiasTable<const float>&,
                          const BiasGradient<float>&);
template void run_bwd_cpu(const BwdParams<torch::headeronly::BFloat16, float>&, const BiasTable<const float>&,
                          const BiasGradient<float>&);

}  // namespace nearfield::gna
