// Decoding on the CPU: few queries against a key-value cache, by the covariance and a Cholesky factorisation.
//
// C_i costs d^2 operations per key, everything else a few d, so the three passes over the keys (statistics,
// covariance, readout) cost no more than one, and centring before multiplying keeps the covariance free of
// cancellation.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "lla/cpu_tile.h"
#include "lla/lla.h"

namespace nearfield::lla {
namespace {

// Solves A x = b in place of b; A [d, d] is overwritten. NaN if A is not positive definite: lam was too small
// for the precision of C, and the caller should see it. In double, because it costs nothing beside the
// covariance.
inline void cholesky_solve(int64_t d, double* a, double* b) {
  for (int64_t j = 0; j < d; ++j) {
    const double pivot = a[j * d + j] - dot(a + j * d, a + j * d, j);
    a[j * d + j] = std::sqrt(pivot > 0 ? pivot : std::numeric_limits<double>::quiet_NaN());
    for (int64_t i = j + 1; i < d; ++i)
      a[i * d + j] = (a[i * d + j] - dot(a + i * d, a + j * d, j)) / a[j * d + j];
  }
  for (int64_t i = 0; i < d; ++i) b[i] = (b[i] - dot(a + i * d, b, i)) / a[i * d + i];
  for (int64_t i = d - 1; i >= 0; --i) {
    double rest = b[i];
    for (int64_t j = i + 1; j < d; ++j) rest -= a[j * d + i] * b[j];
    b[i] = rest / a[i * d + i];
  }
}

template <class T>
void step(const StepParams<T>& params, int64_t b, int64_t h, int64_t i) {
  using F = acc_t<T>;
  const Problem<T>& problem = params.problem;
  const int64_t d = problem.d, dv = problem.dv, kv_head = problem.kv_head(h);
  const Range seen = Visibility::make(problem.m, params.lengths[b], params.window, true).keys(i);
  const int64_t count = seen.end - seen.begin;
  T* out = params.o + problem.row_index(b, i, h) * dv;
  if (count == 0) {
    std::fill(out, out + dv, static_cast<T>(0.0f));
    return;
  }

  std::vector<F> q(d), kbar(d, F(0)), p(count), keys(kKeys * d), weighted(kKeys * d), scratch;
  load_rows(problem.q, b, i, 1, h, d, static_cast<const F*>(nullptr), q.data());
  const auto for_each_tile = [&](auto&& visit) {  // visit(offset into p, first key, number of keys)
    for (int64_t c = 0; c < count; c += kKeys) visit(c, seen.begin + c, std::min(kKeys, count - c));
  };

  for_each_tile([&](int64_t c, int64_t j0, int64_t cols) {
    const MatrixView<F> k = rows_as<F>(problem.k, b, j0, cols, kv_head, d, scratch);
    gemm(1, cols, d, static_cast<F>(problem.scale), row_major<F>(q.data(), d), k.transposed(), F(0), &p[c],
         cols);
  });
  const F top = *std::max_element(p.begin(), p.end());
  const F omega = cpu::exp_sum(p.data(), count, top);
  for (F& w : p) w /= omega;
  for_each_tile([&](int64_t c, int64_t j0, int64_t cols) {
    const MatrixView<F> k = rows_as<F>(problem.k, b, j0, cols, kv_head, d, scratch);
    gemm(1, d, cols, F(1), row_major<F>(&p[c], cols), k, F(1), kbar.data(), d);
  });

  // C = sum_j p_j (k_j - kbar)(k_j - kbar)^T
  std::vector<F> covariance(d * d, F(0));
  for_each_tile([&](int64_t c, int64_t j0, int64_t cols) {
    load_rows(problem.k, b, j0, cols, kv_head, d, kbar.data(), keys.data());
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t e = 0; e < d; ++e) weighted[j * d + e] = p[c + j] * keys[j * d + e];
    gemm(d, d, cols, F(1), row_major<F>(weighted.data(), d).transposed(), row_major<F>(keys.data(), d), F(1),
         covariance.data(), d);
  });

  const Ridge<F>& ridge = params.ridge;
  const F* lam = ridge.data + b * ridge.stride[0] + i * ridge.stride[1] + h * ridge.stride[2];
  const double lse = static_cast<double>(top) + std::log(static_cast<double>(omega));
  const double factor =
      ridge.absolute ? std::exp(std::min(-lse, 460.0)) : 1.0;  // 460: 1e200, as good as infinite
  std::vector<double> a(covariance.begin(), covariance.end()), solution(d);
  for (int64_t c = 0; c < d; ++c) {
    a[c * d + c] += factor * lam[ridge.channels == 1 ? 0 : c * ridge.stride[3]];
    solution[c] = static_cast<double>(q[c]) - kbar[c];
  }
  cholesky_solve(d, a.data(), solution.data());

  // o = sum_j p_j (1 + (k_j - kbar).x) v_j
  const std::vector<F> x(solution.begin(), solution.end());
  std::vector<F> o(dv, F(0));
  for_each_tile([&](int64_t c, int64_t j0, int64_t cols) {
    load_rows(problem.k, b, j0, cols, kv_head, d, kbar.data(), keys.data());
    for (int64_t j = 0; j < cols; ++j) p[c + j] *= F(1) + dot(&keys[j * d], x.data(), d);
    const MatrixView<F> v = rows_as<F>(problem.v, b, j0, cols, kv_head, dv, scratch);
    gemm(1, dv, cols, F(1), row_major<F>(&p[c], cols), v, F(1), o.data(), dv);
  });
  for (int64_t c = 0; c < dv; ++c) out[c] = static_cast<T>(o[c]);
}

}  // namespace

template <class T>
void run_step_cpu(const StepParams<T>& params) {
  const Problem<T>& problem = params.problem;
  const int64_t queries = problem.heads * problem.m;
  torch::stable::parallel_for(0, problem.batch * queries, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      step(params, task / queries, task / problem.m % problem.heads, task % problem.m);
  });
}

template void run_step_cpu(const StepParams<float>&);
template void run_step_cpu(const StepParams<double>&);
template void run_step_cpu(const StepParams<torch::headeronly::Half>&);
template void run_step_cpu(const StepParams<torch::headeronly::BFloat16>&);

}  // namespace nearfield::lla
