// Forward on the CPU: statistics, solve, readout; one task per (batch, head, query tile).
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "lla/cpu_tile.h"
#include "lla/lla.h"

namespace nearfield::lla {
namespace {

// o_i = sum_j p_ij (1 + (k_j - kbar_i) . x_i) v_j
template <class T, class F = acc_t<T>>
void readout(QueryTile<T>& tile, const F* x, std::vector<F>& o) {
  const int64_t dv = tile.problem.dv;
  o.assign(tile.rows * dv, F(0));
  F xbar[kQueries];
  tile.means(x, xbar);
  tile.for_each_key_tile([&](const KeyTile<F>& keys) {
    F weight[kQueries * kKeys];
    tile.slopes(keys, x, xbar, weight);
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t c = 0; c < keys.cols; ++c)
        weight[r * kKeys + c] = keys.p[r * kKeys + c] * (F(1) + weight[r * kKeys + c]);
    gemm(tile.rows, dv, keys.cols, F(1), row_major<F>(weight, kKeys), tile.values(keys), F(1), o.data(), dv);
  });
}

template <class T, class F = acc_t<T>>
void store_statistics(const QueryTile<T>& tile, F* kbar, F* lse) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t row = tile.problem.row_index(tile.b, tile.i0 + r, tile.h);
    std::copy_n(&tile.kbar[r * tile.d], tile.d, kbar + row * tile.d);
    lse[row] = tile.lse[r];
  }
}

template <class T, class F = acc_t<T>>
void store_output(const QueryTile<T>& tile, const std::vector<F>& o, T* out) {
  const int64_t dv = tile.problem.dv;
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* row = out + tile.problem.row_index(tile.b, tile.i0 + r, tile.h) * dv;
    for (int64_t c = 0; c < dv; ++c) row[c] = static_cast<T>(o[r * dv + c]);
  }
}

}  // namespace

template <class T>
void run_fwd_cpu(const FwdParams<T>& params) {
  using F = acc_t<T>;
  const int64_t d = params.problem.d;
  parallel_over_query_tiles(params.problem, [&](QueryTile<T>& tile) {
    tile.compute_statistics();
    std::vector<F> lam, g(tile.rows * d), x(tile.rows * d), o;
    tile.load_ridge(params.ridge, lam);
    for (int64_t r = 0; r < tile.rows; ++r)
      for (int64_t c = 0; c < d; ++c)
        g[r * d + c] = tile.sees_a_key(r) ? tile.q[r * d + c] - tile.kbar[r * d + c] : F(0);

    int32_t iterations[kQueries];
    float ratio[kQueries];
    ConjugateGradient<F> cg;
    cg.solve(
        tile.rows, d, g.data(), params.solver, F(1),
        [&](const F* p, F* ap) { tile.apply(lam.data(), p, ap); }, x.data(), iterations, ratio);
    readout(tile, x.data(), o);

    store_statistics(tile, params.kbar, params.lse);
    store_output(tile, o, params.o);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t row = params.problem.row_index(tile.b, tile.i0 + r, tile.h);
      std::copy_n(&x[r * d], d, params.x + row * d);
      params.iterations[row] = iterations[r];
      params.ratio[row] = ratio[r];
    }
  });
}

template <class T>
void run_probe_fwd_cpu(const ProbeFwdParams<T>& params) {
  using F = acc_t<T>;
  const int64_t d = params.problem.d;
  parallel_over_query_tiles(params.problem, [&](QueryTile<T>& tile) {
    tile.compute_statistics();
    std::vector<F> x(tile.rows * d), o;
    load_rows(params.x, tile.b, tile.i0, tile.rows, tile.h, d, static_cast<const F*>(nullptr), x.data());
    readout(tile, x.data(), o);
    store_statistics(tile, params.kbar, params.lse);
    store_output(tile, o, params.o);
  });
}

#define NEARFIELD_INSTANCE(T)                     \
  template void run_fwd_cpu(const FwdParams<T>&); \
  template void run_probe_fwd_cpu(const ProbeFwdParams<T>&);
NEARFIELD_INSTANCE(float)
NEARFIELD_INSTANCE(double)
NEARFIELD_INSTANCE(torch::headeronly::Half)
NEARFIELD_INSTANCE(torch::headeronly::BFloat16)
#undef NEARFIELD_INSTANCE

}  // namespace nearfield::lla
