// Backward on the CPU, in two sweeps. The first keeps a query tile resident: h, the solve for y, dq, dlam,
// and the row scalars Gbar and D. The second keeps a key tile resident and recomputes the pair terms: dk and
// dv. Every output element belongs to one task, so the result does not depend on the number of threads.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "lla/cpu_tile.h"
#include "lla/lla.h"

namespace nearfield::lla {
namespace {

// What a pair (i, j) needs beyond p: a_ij = 1 + (k_j - kbar_i).x_i and r_ij = Gam_ij - Gbar_i - (k_j -
// kbar_i).y_i. dS_ij = p_ij (a_ij r_ij - D_i). All tiles have ld = kKeys.

template <class T>
void query_sweep(const BwdParams<T>& params, QueryTile<T>& tile) {
  using F = acc_t<T>;
  const Problem<T>& problem = params.problem;
  const int64_t d = problem.d, dv = problem.dv, rows = tile.rows;
  const int64_t first = problem.row_index(tile.b, tile.i0, tile.h);
  const auto row_of = [&](int64_t r) { return first + r * problem.heads; };

  std::vector<F> x(rows * d), y(rows * d), h(rows * d), dq(rows * d), lam, d_o_copy;
  load_rows(params.x, tile.b, tile.i0, rows, tile.h, d, static_cast<const F*>(nullptr), x.data());
  const MatrixView<F> d_o = rows_as<F>(params.d_o, tile.b, tile.i0, rows, tile.h, dv, d_o_copy);
  const auto gammas = [&](const KeyTile<F>& keys, F* gam) {  // Gam_ij = dO_i . v_j
    gemm(rows, keys.cols, dv, F(1), d_o, tile.values(keys).transposed(), F(0), gam, kKeys);
  };

  // Gbar_i = sum_j p_ij Gam_ij. A pass of its own: h from raw moments, sum p Gam k - Gbar kbar, would cancel.
  F gbar[kQueries] = {};
  tile.for_each_key_tile([&](const KeyTile<F>& keys) {
    F gam[kQueries * kKeys];
    gammas(keys, gam);
    for (int64_t r = 0; r < rows; ++r) gbar[r] += dot(gam + r * kKeys, keys.p + r * kKeys, keys.cols);
  });

  // h_i = sum_j p_ij (Gam_ij - Gbar_i) (k_j - kbar_i)
  tile.centred_sum(
      [&](const KeyTile<F>& keys, F* e) {
        gammas(keys, e);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < keys.cols; ++c)
            e[r * kKeys + c] = keys.p[r * kKeys + c] * (e[r * kKeys + c] - gbar[r]);
      },
      h.data());

  F row_sum[kQueries];     // D_i = sum_j p_ij a_ij r_ij, so that the rows of dS sum to 0 ...
  F d_lse[kQueries] = {};  // ... or to this, with the absolute ridge lam exp(-lse)
  if (params.solve) {
    // h is as small or large as the incoming gradient: solve for h over a power of two near its largest
    // element.
    F unit[kQueries];
    for (int64_t r = 0; r < rows; ++r) {
      F largest = 0;
      for (int64_t c = 0; c < d; ++c) largest = std::max(largest, std::abs(h[r * d + c]));
      unit[r] = largest > F(0) && std::isfinite(largest) ? std::ldexp(F(1), std::ilogb(largest)) : F(1);
      for (int64_t c = 0; c < d; ++c) h[r * d + c] /= unit[r];
    }
    tile.load_ridge(params.ridge, lam);
    ConjugateGradient<F> cg;
    cg.solve(
        rows, d, h.data(), params.solver, F(0), [&](const F* p, F* ap) { tile.apply(lam.data(), p, ap); },
        y.data(), nullptr, nullptr);
    for (int64_t r = 0; r < rows; ++r) {
      F ridge_term = 0;
      for (int64_t c = 0; c < d; ++c) {
        y[r * d + c] *= unit[r];
        ridge_term += lam[r * d + c] * x[r * d + c] * y[r * d + c];
      }
      if (params.ridge.absolute) d_lse[r] = ridge_term;
      // x.e, e = h - A y, keeps D the exact row sum when the solve was cut short.
      row_sum[r] = ridge_term + unit[r] * dot(&x[r * d], cg.residual() + r * d, d) - d_lse[r];
    }
  } else {
    std::fill(y.begin(), y.end(), F(0));
    for (int64_t r = 0; r < rows; ++r) row_sum[r] = dot(&x[r * d], &h[r * d], d);
  }

  // dq_i = scale sum_j dS_ij k_j + y_i, and sum_j dS_ij k_j = sum_j dS_ij (k_j - kbar_i) + d_lse_i kbar_i
  F xbar[kQueries], ybar[kQueries];
  tile.means(x.data(), xbar);
  tile.means(y.data(), ybar);
  tile.centred_sum(
      [&](const KeyTile<F>& keys, F* ds) {
        F slope_x[kQueries * kKeys], slope_y[kQueries * kKeys];
        gammas(keys, ds);
        tile.slopes(keys, x.data(), xbar, slope_x);
        if (params.solve) tile.slopes(keys, y.data(), ybar, slope_y);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = r * kKeys; c < r * kKeys + keys.cols; ++c) {
            const F residual = ds[c] - gbar[r] - (params.solve ? slope_y[c] : F(0));
            ds[c] = keys.p[c] * ((F(1) + slope_x[c]) * residual - row_sum[r]);
          }
      },
      dq.data());

  const F* second = params.solve ? y.data() : h.data();
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = row_of(r);
    for (int64_t c = 0; c < d; ++c)
      params.dq[row * d + c] = static_cast<T>(
          static_cast<F>(problem.scale) * (dq[r * d + c] + d_lse[r] * tile.kbar[r * d + c]) + y[r * d + c]);
    std::copy_n(second + r * d, d, params.y + row * d);
    params.gbar[row] = gbar[r];
    params.row_sum[row] = row_sum[r];
    params.factor[row] = tile.factor[r];
    if (!params.solve) continue;
    const F factor = !tile.sees_a_key(r) ? F(0) : params.ridge.absolute ? std::exp(-tile.lse[r]) : F(1);
    if (params.ridge.channels == 1) params.dlam[row] = -factor * dot(&x[r * d], &y[r * d], d);
    else
      for (int64_t c = 0; c < d; ++c) params.dlam[row * d + c] = -factor * x[r * d + c] * y[r * d + c];
  }
}

// dk_j = sum_i scale dS_ij q_i + p_ij r_ij x_i - p_ij a_ij y_i,  dv_j = sum_i p_ij a_ij dO_i
template <class T>
void key_sweep(const BwdParams<T>& params, int64_t b, int64_t kv_head, int64_t j0) {
  using F = acc_t<T>;
  const Problem<T>& problem = params.problem;
  const int64_t d = problem.d, dv = problem.dv, cols = std::min(kKeys, problem.n - j0);
  const int64_t group = problem.heads / problem.kv_heads;
  const std::vector<Rows> seen_by = query_tiles_of(problem, j0, cols);

  std::vector<F> raw_keys, centred(cols * d), value_copy, q_copy, d_o_copy;
  const MatrixView<F> k = rows_as<F>(problem.k, b, j0, cols, kv_head, d, raw_keys);
  const MatrixView<F> v = rows_as<F>(problem.v, b, j0, cols, kv_head, dv, value_copy);
  std::vector<F> reference(d, F(0));  // as in QueryTile: any vector near these keys
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t e = 0; e < d; ++e) reference[e] += k.data[c * k.rs + e] / static_cast<F>(cols);
  load_rows(problem.k, b, j0, cols, kv_head, d, reference.data(), centred.data());
  const MatrixView<F> keys = row_major<F>(centred.data(), d);

  std::vector<F> dk(cols * d, F(0)), dvalue(cols * dv, F(0)), kbar(kQueries * d), x(kQueries * d),
      y(kQueries * d);
  std::vector<F> p(kQueries * kKeys), gam(kQueries * kKeys), slope_x(kQueries * kKeys),
      slope_y(kQueries * kKeys);
  F lse[kQueries], factor[kQueries], gbar[kQueries], row_sum[kQueries], xbar[kQueries], ybar[kQueries] = {};

  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    for (const auto [i0, rows] : seen_by) {
      load_rows(params.x, b, i0, rows, h, d, static_cast<const F*>(nullptr), x.data());
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = problem.row_index(b, i0 + r, h);
        for (int64_t c = 0; c < d; ++c) kbar[r * d + c] = params.kbar[row * d + c] - reference[c];
        if (params.solve) std::copy_n(params.y + row * d, d, &y[r * d]);
        lse[r] = params.lse[row], factor[r] = params.factor[row], gbar[r] = params.gbar[row],
        row_sum[r] = params.row_sum[row];
      }
      const MatrixView<F> q = rows_as<F>(problem.q, b, i0, rows, h, d, q_copy);
      const MatrixView<F> d_o = rows_as<F>(params.d_o, b, i0, rows, h, dv, d_o_copy);

      masked_scores(problem, i0, rows, j0, cols, q, k, p.data());
      scores_to_probabilities(rows, cols, lse, factor, p.data());
      gemm(rows, cols, dv, F(1), d_o, v.transposed(), F(0), gam.data(), kKeys);
      gemm(rows, cols, d, F(1), row_major<F>(x.data(), d), keys.transposed(), F(0), slope_x.data(), kKeys);
      row_dots(rows, d, x.data(), kbar.data(), xbar);
      if (params.solve) {
        gemm(rows, cols, d, F(1), row_major<F>(y.data(), d), keys.transposed(), F(0), slope_y.data(), kKeys);
        row_dots(rows, d, y.data(), kbar.data(), ybar);
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = r * kKeys; c < r * kKeys + cols; ++c) {
          const F a = F(1) + (slope_x[c] - xbar[r]);
          const F residual = gam[c] - gbar[r] - (params.solve ? slope_y[c] - ybar[r] : F(0));
          gam[c] = p[c] * (a * residual - row_sum[r]);  // dS
          slope_x[c] = p[c] * a;
          slope_y[c] = p[c] * residual;
        }
      const auto transposed = [](const std::vector<F>& tile) {
        return row_major<F>(tile.data(), kKeys).transposed();
      };
      gemm(cols, dv, rows, F(1), transposed(slope_x), d_o, F(1), dvalue.data(), dv);
      gemm(cols, d, rows, static_cast<F>(problem.scale), transposed(gam), q, F(1), dk.data(), d);
      gemm(cols, d, rows, F(1), transposed(slope_y), row_major<F>(x.data(), d), F(1), dk.data(), d);
      if (params.solve)
        gemm(cols, d, rows, F(-1), transposed(slope_x), row_major<F>(y.data(), d), F(1), dk.data(), d);
    }
  }
  for (int64_t c = 0; c < cols; ++c) {
    const int64_t row = (b * problem.n + j0 + c) * problem.kv_heads + kv_head;
    for (int64_t e = 0; e < d; ++e) params.dk[row * d + e] = static_cast<T>(dk[c * d + e]);
    for (int64_t e = 0; e < dv; ++e) params.dv[row * dv + e] = static_cast<T>(dvalue[c * dv + e]);
  }
}

}  // namespace

template <class T>
void run_bwd_cpu(const BwdParams<T>& params) {
  const Problem<T>& problem = params.problem;
  parallel_over_query_tiles(problem, [&](QueryTile<T>& tile) {
    tile.load_statistics(params.kbar, params.lse);
    query_sweep(params, tile);
  });
  const int64_t tiles = (problem.n + kKeys - 1) / kKeys;
  torch::stable::parallel_for(0, problem.batch * problem.kv_heads * tiles, 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t task = begin; task < end; ++task)
                                  key_sweep(params, task / (problem.kv_heads * tiles),
                                            task / tiles % problem.kv_heads, task % tiles * kKeys);
                              });
}

template void run_bwd_cpu(const BwdParams<float>&);
template void run_bwd_cpu(const BwdParams<double>&);
template void run_bwd_cpu(const BwdParams<torch::headeronly::Half>&);
template void run_bwd_cpu(const BwdParams<torch::headeronly::BFloat16>&);

}  // namespace nearfield::lla
