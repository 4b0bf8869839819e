// One chunk on the CPU: loading and preprocessing its rows, the decays, the matrices Abar, T and P.
// Forward, backward and the decode step all start here, so that a gate means the same everywhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/linalg.h"
#include "delta/delta.h"

namespace nearfield::delta {

using cpu::gemm;
using cpu::MatrixView;
using cpu::row_major;

constexpr int64_t kBlock =
    16;  // rows that share one anchor of a channel gate; diagonal blocks of the inverse

// exp of anything below is 0 in F, so that -inf can be replaced by a number: differences of cumulative gates
// would be NaN otherwise.
template <class F>
constexpr F kGateFloor = std::is_same_v<F, double> ? F(-800) : F(-128);

// Sixteen partial sums: shorter chains than one running sum, and an order that does not depend on the
// machine.
template <class F>
F dot(const F* a, const F* b, int64_t n) {
  F lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int64_t l = 0; l < 16; ++l) lanes[l] += a[i + l] * b[i + l];
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] += a[i] * b[i];
  for (int64_t half = 8; half; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <class F>
void exp_row(F* x, int64_t n) {
  cpu::exp_sum(x, n, F(0));
}

template <class F>
F sigmoid(F x) {
  return F(1) / (F(1) + std::exp(-x));
}

template <class F>
F softplus(F x) {
  return std::max(x, F(0)) + std::log1p(std::exp(-std::abs(x)));
}

// out[i, :] = x[i, :] * e[i, :], where e has one column or as many as x.
template <class F>
void scale_rows(int64_t n, int64_t width, const F* x, const F* e, int64_t gate_dim, F* out) {
  for (int64_t i = 0; i < n; ++i) {
    const F* row = x + i * width;
    F* to = out + i * width;
    if (gate_dim == 1) {
      for (int64_t c = 0; c < width; ++c) to[c] = row[c] * e[i];
    } else {
      for (int64_t c = 0; c < width; ++c) to[c] = row[c] * e[i * width + c];
    }
  }
}

// [K, V] working copy of a state in memory, which may be stored [V, K].
template <class F, class Stored>
void load_state(const Stored* from, bool v_first, int64_t K, int64_t V, F* S) {
  if (!from) return std::fill(S, S + K * V, F(0));
  for (int64_t c = 0; c < K; ++c)
    for (int64_t j = 0; j < V; ++j)
      S[c * V + j] = static_cast<F>(v_first ? from[j * K + c] : from[c * V + j]);
}
template <class F, class Stored>
void store_state(const F* S, bool v_first, int64_t K, int64_t V, Stored* to) {
  for (int64_t c = 0; c < K; ++c)
    for (int64_t j = 0; j < V; ++j) to[v_first ? j * K + c : c * V + j] = static_cast<Stored>(S[c * V + j]);
}

template <class F>
class Chunk {
 public:
  int64_t n = 0;           // rows; the last chunk of a sequence may be short
  const int64_t K, V, GD;  // GD: 1, or K with a gate per channel
  const bool gated;
  std::vector<F> q, k, v, beta;   // [n, K], [n, K], [n, V], [n]: as the recurrence sees them
  std::vector<F> q_rstd, k_rstd;  // [n] of the L2 norm
  std::vector<F> g;               // [n, GD] log decay, not below kGateFloor
  std::vector<double> G;          // [n, GD] inclusive sum; double, or mild gates drown behind one strong gate
  std::vector<F> from_start, to_end;  // [n, GD] e^G, e^{G_C - G}
  std::vector<F> across;              // [GD] e^{G_C}
  std::vector<F> Qh, Kh, Kt;          // [n, K]
  std::vector<F> D;                   // [n, 64] e^{G_i - G_j}, i >= j: gate per head only
  std::vector<F> Abar, A, P;          // [n, 64] lower triangles, zero above

  template <class In>
  explicit Chunk(const DeltaInputs<In, F>& in)
      : K(in.key_dim), V(in.value_dim), GD(in.gate_dim()), gated(in.gated) {
    const int64_t C = kChunk;
    for (auto* x : {&q, &k, &Qh, &Kh, &Kt}) x->resize(C * K);
    for (auto* x : {&beta, &q_rstd, &k_rstd}) x->resize(C);
    for (auto* x : {&g, &from_start, &to_end}) x->resize(C * GD);
    for (auto* x : {&D, &Abar, &A, &P}) x->resize(C * C);
    v.resize(C * V);
    G.resize(C * GD);
    across.resize(GD);
    T_.resize(C * kBlock);
    rows_.resize(2 * kBlock * std::max(K, C));
    cols_.resize(C * K);
    decay_.resize(K);
  }

  // Rows t .. t + count of value head hv: converted, normalised, activated.
  template <class In>
  void load(const DeltaInputs<In, F>& in, int64_t b, int64_t t, int64_t count, int64_t hv) {
    n = count;
    const int64_t h = hv / (in.value_heads / in.heads);
    for (int64_t i = 0; i < n; ++i) {
      load_row(in.q.at(b, t + i, h), K, in.qk_l2norm, &q[i * K], &q_rstd[i]);
      load_row(in.k.at(b, t + i, h), K, in.qk_l2norm, &k[i * K], &k_rstd[i]);
      load_row(in.v.at(b, t + i, hv), V, false, &v[i * V], nullptr);
      const int64_t row = (b * in.tokens + t + i) * in.value_heads + hv;
      beta[i] = in.beta[row];
      if (in.beta_activation != BetaActivation::kNone)
        beta[i] = (in.beta_activation == BetaActivation::kSigmoid2 ? F(2) : F(1)) * sigmoid(beta[i]);
      for (int64_t c = 0; c < GD; ++c) {
        const F gate = gated ? gate_value(in, in.g[row * GD + c], hv, c) : F(0);
        g[i * GD + c] = gate < kGateFloor<F> ? kGateFloor<F> : gate;  // NaN stays NaN
      }
    }
  }

  // Everything that does not depend on the state. P, Qh: only where an output is wanted.
  void prepare(bool with_output) {
    accumulate_gates();
    scale_rows(n, K, k.data(), from_start.data(), GD, Kh.data());
    scale_rows(n, K, k.data(), to_end.data(), GD, Kt.data());
    if (with_output) scale_rows(n, K, q.data(), from_start.data(), GD, Qh.data());
    if (GD == 1) {
      products_head_gate(with_output);
    } else {
      products_channel_gate(with_output);
    }
    invert_blocks();
  }

  // S <- e^{G_C} . S + Kt^T V' on columns of a state of leading dimension ld.
  void advance_state(F* S, int64_t ld, const F* V_new, int64_t width) const {
    for (int64_t c = 0; c < K; ++c) {
      const F e = across[GD == 1 ? 0 : c];
      for (int64_t j = 0; j < width; ++j) S[c * ld + j] *= e;
    }
    gemm(K, width, n, F(1), row_major(Kt.data(), K).transposed(), row_major(V_new, width), F(1), S, ld);
  }

  // R = V - Kh S and V' = T diag(beta) R for columns [j0, j0 + width) of V.
  void corrected_values(const F* S, int64_t ld, int64_t j0, int64_t width, F* R, F* V_new) {
    for (int64_t i = 0; i < n; ++i) std::memcpy(R + i * width, &v[i * V + j0], width * sizeof(F));
    gemm(n, width, K, F(-1), row_major(Kh.data(), K), row_major(S, ld), F(1), R, width);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < width; ++j) V_new[i * width + j] = beta[i] * R[i * width + j];
    solve(V_new, width);
  }

  // X <- T X = (I + A)^-1 X, block by block: X_I <- T_II (X_I - A_I: X). As cheap as a product with the whole
  // inverse and more accurate where its entries cancel (keys that repeat, beta near 2).
  void solve(F* X, int64_t width) {
    for (int64_t o = 0; o < n; o += kBlock) {
      const int64_t m = std::min(kBlock, n - o);
      gemm(m, width, o, F(-1), row_major<F>(&A[o * kChunk], kChunk), row_major<F>(X, width), F(1),
           X + o * width, width);
      apply_block(row_major<F>(&T_[o * kBlock], kBlock), m, X + o * width, width);
    }
  }

  // X <- T^T X, from the last block to the first.
  void solve_transposed(F* X, int64_t width) {
    for (int64_t o = (n - 1) / kBlock * kBlock; o >= 0; o -= kBlock) {
      const int64_t m = std::min(kBlock, n - o), after = o + m;
      gemm(m, width, n - after, F(-1), row_major<F>(&A[after * kChunk + o], kChunk).transposed(),
           row_major<F>(X + after * width, width), F(1), X + o * width, width);
      apply_block(row_major<F>(&T_[o * kBlock], kBlock).transposed(), m, X + o * width, width);
    }
  }

 private:
  std::vector<F> T_;                            // [n, 16] diagonal blocks of T = (I + A)^-1
  std::vector<F> rows_, cols_, decay_, block_;  // scratch

  // X <- M X for a block of m rows.
  void apply_block(MatrixView<F> M, int64_t m, F* X, int64_t width) {
    block_.resize(kBlock * width);
    gemm(m, width, m, F(1), M, row_major<F>(X, width), F(0), block_.data(), width);
    std::copy(block_.begin(), block_.begin() + m * width, X);
  }

  template <class In>
  static void load_row(const In* from, int64_t width, bool l2norm, F* to, F* rstd) {
    for (int64_t c = 0; c < width; ++c) to[c] = static_cast<F>(from[c]);
    if (!l2norm) return;
    *rstd = F(1) / std::sqrt(dot(to, to, width) + F(kNormEps));
    for (int64_t c = 0; c < width; ++c) to[c] *= *rstd;
  }

  template <class In>
  static F gate_value(const DeltaInputs<In, F>& in, F raw, int64_t hv, int64_t c) {
    if (in.gate == Gate::kLog) return raw;
    const F rate = in.A_log ? std::exp(in.A_log[hv]) : F(1);
    const F x = raw + (in.dt_bias ? in.dt_bias[hv * in.gate_dim() + c] : F(0));
    return in.gate == Gate::kSoftplus ? -rate * softplus(x)
                                      : static_cast<F>(in.gate_bound) * sigmoid(rate * x);
  }

  void accumulate_gates() {
    if (!gated) {
      std::fill(G.begin(), G.end(), 0.0);
      for (auto* e : {&from_start, &to_end, &across}) std::fill(e->begin(), e->end(), F(1));
      return;
    }
    for (int64_t c = 0; c < GD; ++c) G[c] = g[c];
    for (int64_t i = 1; i < n; ++i)
      for (int64_t c = 0; c < GD; ++c) G[i * GD + c] = G[(i - 1) * GD + c] + g[i * GD + c];
    const double* last = &G[(n - 1) * GD];
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < GD; ++c) {
        from_start[i * GD + c] = static_cast<F>(G[i * GD + c]);
        to_end[i * GD + c] = static_cast<F>(last[c] - G[i * GD + c]);
      }
    for (int64_t c = 0; c < GD; ++c) across[c] = static_cast<F>(last[c]);
    exp_row(from_start.data(), n * GD);
    exp_row(to_end.data(), n * GD);
    exp_row(across.data(), GD);
  }

  // The gate comes out of the sum over channels: Abar = (K K^T) . D, P = (Q K^T) . D.
  void products_head_gate(bool with_output) {
    const int64_t C = kChunk;
    gemm(n, n, K, F(1), row_major(k.data(), K), row_major(k.data(), K).transposed(), F(0), Abar.data(), C);
    if (with_output)
      gemm(n, n, K, F(1), row_major(q.data(), K), row_major(k.data(), K).transposed(), F(0), P.data(), C);
    for (int64_t i = 0; i < n; ++i) {
      F *D_i = &D[i * C], *A_i = &Abar[i * C], *P_i = &P[i * C];
      for (int64_t j = 0; j <= i; ++j) D_i[j] = static_cast<F>(G[i] - G[j]);
      exp_row(D_i, i + 1);
      for (int64_t j = 0; j < i; ++j) A_i[j] *= D_i[j];
      std::fill(A_i + i, A_i + n, F(0));
      if (!with_output) continue;
      for (int64_t j = 0; j <= i; ++j) P_i[j] *= D_i[j];
      std::fill(P_i + i + 1, P_i + n, F(0));
    }
  }

  // The gate stays inside the sum. Rows of block I against all earlier columns are anchored at the first row
  // of I, so that both exponents are <= 0; the diagonal block is done pair by pair, which no gate can
  // overflow.
  void products_channel_gate(bool with_output) {
    const int64_t C = kChunk;
    std::fill(Abar.begin(), Abar.begin() + n * C, F(0));
    std::fill(P.begin(), P.begin() + n * C, F(0));
    std::vector<F>& e = decay_;
    for (int64_t o = 0; o < n; o += kBlock) {
      const int64_t m = std::min(kBlock, n - o);
      if (o > 0) {
        anchored_rows(o, m, rows_.data());
        anchored_columns(o, cols_.data());
        gemm(m, o, K, F(1), row_major(rows_.data(), K), row_major(cols_.data(), K).transposed(), F(0),
             &Abar[o * C], C);
        if (with_output)
          gemm(m, o, K, F(1), row_major(rows_.data() + kBlock * K, K),
               row_major(cols_.data(), K).transposed(), F(0), &P[o * C], C);
      }
      for (int64_t i = o; i < o + m; ++i) {
        for (int64_t j = o; j < i; ++j) {
          decay_between(i, j, e.data());
          for (int64_t c = 0; c < K; ++c) e[c] *= k[j * K + c];
          Abar[i * C + j] = dot(&k[i * K], e.data(), K);
          if (with_output) P[i * C + j] = dot(&q[i * K], e.data(), K);
        }
        if (with_output) P[i * C + i] = dot(&q[i * K], &k[i * K], K);
      }
    }
  }

 public:
  // e^{G_i - G_j} per channel.
  void decay_between(int64_t i, int64_t j, F* e) const {
    for (int64_t c = 0; c < K; ++c) e[c] = static_cast<F>(G[i * K + c] - G[j * K + c]);
    exp_row(e, K);
  }
  // e^{G_i - G_o} for the m rows of the block that starts at row o.
  void row_decays(int64_t o, int64_t m, F* e) const {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < K; ++c) e[i * K + c] = static_cast<F>(G[(o + i) * K + c] - G[o * K + c]);
    exp_row(e, m * K);
  }
  // e^{G_o - G_j} for all rows j before the block that starts at row o.
  void column_decays(int64_t o, F* e) const {
    for (int64_t j = 0; j < o; ++j)
      for (int64_t c = 0; c < K; ++c) e[j * K + c] = static_cast<F>(G[o * K + c] - G[j * K + c]);
    exp_row(e, o * K);
  }

 private:
  // rows[0:m] = k_i e^{G_i - G_o}, rows[16:16+m] = q_i e^{G_i - G_o}
  void anchored_rows(int64_t o, int64_t m, F* rows) {
    row_decays(o, m, rows);
    F* q_rows = rows + kBlock * K;
    for (int64_t x = 0; x < m * K; ++x) q_rows[x] = rows[x] * q[o * K + x];
    for (int64_t x = 0; x < m * K; ++x) rows[x] *= k[o * K + x];
  }
  void anchored_columns(int64_t o, F* cols) {
    column_decays(o, cols);
    for (int64_t x = 0; x < o * K; ++x) cols[x] *= k[x];
  }

  // The 16 x 16 diagonal blocks of (I + A)^-1 by forward substitution.
  // The product (I - A)(I + A^2)(I + A^4).. is shorter, but its powers explode on repeated keys while the
  // inverse stays bounded.
  void invert_blocks() {
    const int64_t C = kChunk;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) A[i * C + j] = beta[i] * Abar[i * C + j];
    std::fill(T_.begin(), T_.begin() + n * kBlock, F(0));
    for (int64_t o = 0; o < n; o += kBlock)
      for (int64_t i = o; i < std::min(o + kBlock, n); ++i) {
        F* row = &T_[i * kBlock];
        row[i - o] = F(1);
        for (int64_t p = o; p < i; ++p) {
          const F a = A[i * C + p];
          for (int64_t j = 0; j < kBlock; ++j) row[j] -= a * T_[p * kBlock + j];
        }
      }
  }
};

}  // namespace nearfield::delta
