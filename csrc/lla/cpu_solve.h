// Conjugate gradients for a tile of rows: each row is a linear system of its own, A_i x_i = b_i, and the rows
// share nothing but the call that applies A. A row that has met its stopping rule freezes; the tile stops
// with its last row.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/linalg.h"
#include "lla/lla.h"

namespace nearfield::lla {

// Eight partial sums, so that the compiler may vectorise without being allowed to reorder.
template <class F>
F dot(const F* a, const F* b, int64_t n) {
  F part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; ++l) part[l] += a[i + l] * b[i + l];
  F rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7])) + rest;
}

template <class F>
F sum(const F* a, int64_t n) {
  F part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; ++l) part[l] += a[i + l];
  F rest = 0;
  for (; i < n; ++i) rest += a[i];
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7])) + rest;
}

template <class F>
class ConjugateGradient {
 public:
  // x = A^-1 b for `rows` systems of size d. apply(p, ap) computes ap = A p for all rows.
  //
  // A step removes alpha rz from the squared A-norm of the error, and acc, the sum so far, estimates x.A.x. A
  // row stops when sqrt(alpha rz / (unit + acc)) <= tol: unit = 1 measures the error against the size of the
  // readout's weights (forward), unit = 0 against x itself (backward, where b scales with the incoming
  // gradient). `iterations` and `ratio`, the last such quotient (infinite if no step was possible), may be
  // null.
  template <class Apply>
  void solve(int64_t rows, int64_t d, const F* b, const Solver& options, F unit, Apply&& apply, F* x,
             int32_t* iterations, float* ratio) {
    r_.assign(b, b + rows * d);
    p_.assign(b, b + rows * d);
    ap_.resize(rows * d);
    std::vector<F> rz(rows), acc(rows, F(0));
    std::vector<char> live(rows);
    const F tol2 = static_cast<F>(options.tol) * static_cast<F>(options.tol);
    // Below this a sum of squares has lost digits to underflow; going on (tol = 0) would amplify the noise.
    constexpr F exhausted = std::numeric_limits<F>::min() / std::numeric_limits<F>::epsilon();
    std::fill(x, x + rows * d, F(0));
    int64_t alive = 0;
    for (int64_t i = 0; i < rows; ++i) {
      rz[i] = dot(b + i * d, b + i * d, d);
      live[i] = !(rz[i] < exhausted);  // a NaN lives on, and shows in the result
      alive += live[i];
      if (iterations) iterations[i] = 0;
      if (ratio) ratio[i] = live[i] ? std::numeric_limits<float>::infinity() : 0.0f;
    }
    for (int64_t it = 0; it < options.max_iters && alive > 0; ++it) {
      apply(p_.data(), ap_.data());
      for (int64_t i = 0; i < rows; ++i) {
        if (!live[i]) continue;
        F *p = &p_[i * d], *r = &r_[i * d];
        const F *ap = &ap_[i * d], pap = dot(p, ap, d);
        F rz_new = F(0);
        if (pap < std::numeric_limits<F>::min()) {  // not positive: possible through rounding only
          live[i] = false;
        } else {
          const F alpha = rz[i] / pap, step = alpha * rz[i];
          for (int64_t c = 0; c < d; ++c) x[i * d + c] += alpha * p[c];
          for (int64_t c = 0; c < d; ++c) r[c] -= alpha * ap[c];
          acc[i] += step;
          rz_new = dot(r, r, d);
          const F remaining = step / (unit + acc[i]);
          const bool exact = rz_new < exhausted;
          if (iterations) iterations[i] = static_cast<int32_t>(it + 1);
          if (ratio) ratio[i] = exact ? 0.0f : static_cast<float>(std::sqrt(remaining));
          if (exact || remaining <= tol2) live[i] = false;
        }
        const F beta = live[i] ? rz_new / rz[i] : F(0);
        for (int64_t c = 0; c < d; ++c) p[c] = live[i] ? r[c] + beta * p[c] : F(0);
        rz[i] = rz_new;
        alive -= !live[i];
      }
    }
  }

  // What the recursion holds for b - A x after solve().
  const F* residual() const { return r_.data(); }

 private:
  std::vector<F> r_, p_, ap_;  // [rows, d]
};

}  // namespace nearfield::lla
