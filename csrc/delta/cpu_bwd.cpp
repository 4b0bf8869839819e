// Backward on the CPU. Per sequence and value head: a forward state pass keeps the state that enters each
// chunk, then a sweep from the last chunk to the first carries dS, the gradient of the state after the chunk.
// dq and dk are written per value head and summed over the group afterwards, so every element has one owner
// and one order.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <memory>

#include "delta/cpu_chunk.h"

namespace nearfield::delta {
namespace {

template <class F>
void add_to(int64_t n, const F* from, F* to) {
  for (int64_t c = 0; c < n; ++c) to[c] += from[c];
}

template <class F>
class ChunkGradient {
 public:
  std::vector<F> d_o;                    // [n, V]: to be filled before run
  std::vector<F> dq, dk, dv, dbeta, dg;  // [n, K], [n, K], [n, V], [n], [n, GD]: the results

  explicit ChunkGradient(Chunk<F>& chunk) : z_(chunk), K_(chunk.K), V_(chunk.V) {
    const int64_t C = kChunk;
    for (auto* x : {&dq, &dk, &dKt_, &row_term_, &column_term_, &decay_, &scaled_, &sums_}) x->resize(C * K_);
    for (auto* x : {&dv, &d_o, &R_, &V_new_, &Y_}) x->resize(C * V_);
    for (auto* x : {&dA_, &dP_, &E_, &F_}) x->resize(C * C);
    whole_.resize(C / kBlock * K_);
    row_decay_.resize(kBlock * K_);
    reads_.resize(2 * kBlock * K_);
    dbeta.resize(C);
    dg.resize(C * chunk.GD);
  }

  // S enters the chunk; dS is the gradient of the state after the chunk and becomes the gradient of S.
  void run(const F* S, F* dS, F s) {
    const int64_t n = z_.n;
    values(S, dS, s);
    // Through the states: dQh = s dO S^T, dKh = -dR S^T, dKt = V' dS^T, each with the decay of its rows.
    product(n, K_, V_, s, row_major(d_o.data(), V_), row_major(S, V_).transposed(), F(0), dq);
    product(n, K_, V_, F(-1), row_major(dv.data(), V_), row_major(S, V_).transposed(), F(0), dk);
    product(n, K_, V_, F(1), row_major(V_new_.data(), V_), row_major<F>(dS, V_).transposed(), F(0), dKt_);
    scale_rows(n, K_, dq.data(), z_.from_start.data(), z_.GD, dq.data());
    scale_rows(n, K_, dk.data(), z_.from_start.data(), z_.GD, dk.data());
    scale_rows(n, K_, dKt_.data(), z_.to_end.data(), z_.GD, dKt_.data());
    if (z_.GD == 1) {
      head_gate(S, dS);
    } else {
      channel_gate(S, dS);
    }
    // dS <- e^{G_C} . dS + s Qh^T dO - Kh^T dR
    for (int64_t c = 0; c < K_; ++c)
      for (int64_t j = 0; j < V_; ++j) dS[c * V_ + j] *= z_.across[z_.GD == 1 ? 0 : c];
    gemm(K_, V_, n, s, row_major(z_.Qh.data(), K_).transposed(), row_major(d_o.data(), V_), F(1), dS, V_);
    gemm(K_, V_, n, F(-1), row_major(z_.Kh.data(), K_).transposed(), row_major(dv.data(), V_), F(1), dS, V_);
  }

 private:
  Chunk<F>& z_;
  const int64_t K_, V_;
  std::vector<F> R_, V_new_, Y_;           // [n, V]
  std::vector<F> dA_, dP_, E_, F_;         // [n, 64]
  std::vector<F> dKt_;                     // [n, K], times e^{G_C - G}
  std::vector<F> row_term_, column_term_;  // [n, K]: see channel_gate
  std::vector<F> whole_;                   // [4, K]: see channel_gate
  std::vector<F> decay_, scaled_, sums_;   // [n, K] scratch
  std::vector<F> row_decay_;               // [16, K] scratch
  std::vector<F> reads_;                   // [32, K] scratch: what q reads above what k reads

  // out = alpha M N + beta out
  static void product(int64_t m, int64_t n, int64_t k, F alpha, MatrixView<F> M, MatrixView<F> N, F beta,
                      std::vector<F>& out) {
    gemm(m, n, k, alpha, M, N, beta, out.data(), n);
  }

  //   dV' = s P^T dO + Kt dS,  Y = T^T dV',  dV = dR = diag(beta) Y
  //   dA = -tril(Y V'^T, -1),  dP = s tril(dO V'^T),  dbeta_i = Y_i . R_i + sum_j dA_ij Abar_ij
  void values(const F* S, const F* dS, F s) {
    const int64_t n = z_.n, C = kChunk;
    z_.corrected_values(S, V_, 0, V_, R_.data(), V_new_.data());
    product(n, V_, n, s, row_major(z_.P.data(), C).transposed(), row_major(d_o.data(), V_), F(0), Y_);
    product(n, V_, K_, F(1), row_major(z_.Kt.data(), K_), row_major(dS, V_), F(1), Y_);
    z_.solve_transposed(Y_.data(), V_);
    const auto V_new_t = row_major(V_new_.data(), V_).transposed();
    gemm(n, n, V_, F(-1), row_major(Y_.data(), V_), V_new_t, F(0), dA_.data(), C);
    gemm(n, n, V_, s, row_major(d_o.data(), V_), V_new_t, F(0), dP_.data(), C);
    for (int64_t i = 0; i < n; ++i) {
      std::fill(&dA_[i * C] + i, &dA_[i * C] + n, F(0));
      std::fill(&dP_[i * C] + i + 1, &dP_[i * C] + n, F(0));
      dbeta[i] = dot(&Y_[i * V_], &R_[i * V_], V_) + dot(&dA_[i * C], &z_.Abar[i * C], i);
      for (int64_t j = 0; j < V_; ++j) dv[i * V_ + j] = z_.beta[i] * Y_[i * V_ + j];
    }
  }

  // A gate of token t acts on every pair (reader i >= t, source j < t), where the entering state is a source
  // before the chunk and the leaving state a reader after it. dg_t is summed over exactly those pairs. The
  // shorter reverse cumsum of q.dq + k.(dk_row - dk_col) is equal, but a strong gate leaves only the rounding
  // of terms that cancel.
  void head_gate(const F* S, const F* dS) {
    const int64_t n = z_.n, C = kChunk;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        E_[i * C + j] = z_.beta[i] * dA_[i * C + j] * z_.D[i * C + j];
        F_[i * C + j] = dP_[i * C + j] * z_.D[i * C + j];
      }
    for (int64_t i = 0; i < n; ++i)
      for (auto* x : {&E_, &F_}) std::fill(x->data() + i * C + i + 1, x->data() + i * C + n, F(0));
    if (z_.gated) {
      F through = 0;
      for (int64_t c = 0; c < K_; ++c) through += dot(S + c * V_, dS + c * V_, V_);
      through *= z_.across[0];
      std::fill(dg.begin(), dg.begin() + n, through);
      F leave = 0;  // sources j < t read by the leaving state
      for (int64_t t = 1; t < n; ++t) dg[t] += leave += dot(&z_.k[(t - 1) * K_], &dKt_[(t - 1) * K_], K_);
      F enter = 0;  // the entering state read by i >= t
      for (int64_t t = n - 1; t >= 0; --t)
        dg[t] += enter += dot(&z_.q[t * K_], &dq[t * K_], K_) + dot(&z_.k[t * K_], &dk[t * K_], K_);
      for (int64_t i = 1; i < n; ++i) {
        F pairs = 0;
        for (int64_t t = 1; t <= i; ++t) {
          const int64_t at = i * C + t - 1;
          pairs += z_.beta[i] * dA_[at] * z_.Abar[at] + dP_[at] * z_.P[at];
          dg[t] += pairs;
        }
      }
    }
    //   dq += F K,  dk += E K + E^T K + F^T Q + dKt e^{G_C - G}
    const auto k = row_major(z_.k.data(), K_), q = row_major(z_.q.data(), K_);
    const auto E = row_major(E_.data(), C), Fm = row_major(F_.data(), C);
    product(n, K_, n, F(1), Fm, k, F(1), dq);
    product(n, K_, n, F(1), E, k, F(1), dk);
    product(n, K_, n, F(1), E.transposed(), k, F(1), dk);
    product(n, K_, n, F(1), Fm.transposed(), q, F(1), dk);
    for (int64_t x = 0; x < n * K_; ++x) dk[x] += dKt_[x];
  }

  // The same pairs per channel. With blocks of 16 rows, the pairs around a token t of block b are: readers in
  // b from t on with sources before b (row_term), readers after b with sources in b before t (column_term),
  // readers after b with sources before b (whole), and both in b (summed in diagonal_block).
  void channel_gate(const F* S, const F* dS) {
    const int64_t n = z_.n, C = kChunk, K = K_, blocks = (n + kBlock - 1) / kBlock;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < i; ++j) E_[i * C + j] = z_.beta[i] * dA_[i * C + j];
    for (int64_t x = 0; x < n * K; ++x) {
      row_term_[x] = z_.q[x] * dq[x] + z_.k[x] * dk[x];
      column_term_[x] = z_.k[x] * dKt_[x];
      dk[x] += dKt_[x];
    }
    for (int64_t c = 0; c < K; ++c) whole_[c] = z_.across[c] * dot(S + c * V_, dS + c * V_, V_);
    for (int64_t b = 1; b < blocks; ++b) std::copy(whole_.begin(), whole_.begin() + K, &whole_[b * K]);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t b = 0; b < i / kBlock; ++b) add_to(K, &row_term_[i * K], &whole_[b * K]);
      for (int64_t b = i / kBlock + 1; b < blocks; ++b) add_to(K, &column_term_[i * K], &whole_[b * K]);
    }
    std::fill(dg.begin(), dg.begin() + n * K, F(0));
    for (int64_t o = 0; o < n; o += kBlock) {
      const int64_t m = std::min(kBlock, n - o);
      if (o > 0) earlier_blocks(o, m);
      diagonal_block(o, m);
    }
    for (int64_t o = 0; o < n; o += kBlock) {
      const int64_t end = std::min(o + kBlock, n);
      for (int64_t t = end - 2; t >= o; --t) add_to(K, &row_term_[(t + 1) * K], &row_term_[t * K]);
      for (int64_t t = o + 1; t < end; ++t) {
        add_to(K, &column_term_[(t - 1) * K], &dg[t * K]);
        add_to(K, &column_term_[(t - 1) * K], &column_term_[t * K]);
      }
      for (int64_t t = o; t < end; ++t) {
        add_to(K, &row_term_[t * K], &dg[t * K]);
        add_to(K, &whole_[o / kBlock * K], &dg[t * K]);
      }
    }
  }

  // Readers in the m rows from o on, sources in all rows before o; both anchored at row o.
  void earlier_blocks(int64_t o, int64_t m) {
    const int64_t C = kChunk, K = K_, block = o / kBlock;
    const F *q = &z_.q[o * K], *k = &z_.k[o * K];
    z_.column_decays(o, decay_.data());
    for (int64_t x = 0; x < o * K; ++x) scaled_[x] = z_.k[x] * decay_[x];
    const auto dP = row_major(&dP_[o * C], C), E = row_major(&E_[o * C], C);
    gemm(m, K, o, F(1), dP, row_major(scaled_.data(), K), F(0), reads_.data(), K);
    gemm(m, K, o, F(1), E, row_major(scaled_.data(), K), F(0), reads_.data() + kBlock * K, K);
    z_.row_decays(o, m, row_decay_.data());
    for (int64_t x = 0; x < m * K; ++x) {
      const F to_q = reads_[x] * row_decay_[x], to_k = reads_[kBlock * K + x] * row_decay_[x];
      dq[o * K + x] += to_q;
      dk[o * K + x] += to_k;
      row_term_[o * K + x] += q[x] * to_q + k[x] * to_k;
      reads_[x] = q[x] * row_decay_[x];
      reads_[kBlock * K + x] = k[x] * row_decay_[x];
    }
    gemm(o, K, m, F(1), dP.transposed(), row_major(reads_.data(), K), F(0), sums_.data(), K);
    gemm(o, K, m, F(1), E.transposed(), row_major(reads_.data() + kBlock * K, K), F(1), sums_.data(), K);
    for (int64_t x = 0; x < o * K; ++x) {
      sums_[x] *= decay_[x];
      dk[x] += sums_[x];
      sums_[x] *= z_.k[x];
      column_term_[x] += sums_[x];
    }
    for (int64_t j = 0; j < o; ++j)
      for (int64_t b = j / kBlock + 1; b < block; ++b) add_to(K, &sums_[j * K], &whole_[b * K]);
  }

  void diagonal_block(int64_t o, int64_t m) {
    const int64_t C = kChunk, K = K_;
    for (int64_t i = o; i < o + m; ++i) {
      const F *q = &z_.q[i * K], *k_i = &z_.k[i * K];
      const F P_ii = dP_[i * C + i];
      for (int64_t c = 0; c < K; ++c) {
        dq[i * K + c] += P_ii * k_i[c];
        dk[i * K + c] += P_ii * q[c];
      }
      F* pairs = sums_.data();  // sources before t, read by i
      std::fill(pairs, pairs + K, F(0));
      for (int64_t j = o; j < i; ++j) {
        const F dP = dP_[i * C + j], E = E_[i * C + j];
        const F* k_j = &z_.k[j * K];
        F* e = decay_.data();
        z_.decay_between(i, j, e);
        F *dq_i = &dq[i * K], *dk_i = &dk[i * K], *dk_j = &dk[j * K], *dg_t = &dg[(j + 1) * K];
        for (int64_t c = 0; c < K; ++c) {
          const F source = e[c] * k_j[c], reader = dP * q[c] + E * k_i[c];
          dq_i[c] += dP * source;
          dk_i[c] += E * source;
          dk_j[c] += reader * e[c];
          pairs[c] += reader * source;
          dg_t[c] += pairs[c];
        }
      }
    }
  }
};

// Turns dbeta and dg of one chunk into the gradients of what the caller gave, and adds to the sums over
// tokens.
template <class In, class F>
void through_activations(const DeltaBwdParams<In, F>& p, const Chunk<F>& z, const ChunkGradient<F>& d,
                         int64_t row, int64_t hv, double* dA_log, double* ddt_bias) {
  const auto& in = p.in;
  const F top = in.beta_activation == BetaActivation::kSigmoid2 ? F(2) : F(1);
  const F rate = in.A_log ? std::exp(in.A_log[hv]) : F(1);
  for (int64_t i = 0; i < z.n; ++i, row += in.value_heads) {
    const F beta = z.beta[i];
    p.dbeta[row] =
        in.beta_activation == BetaActivation::kNone ? d.dbeta[i] : d.dbeta[i] * beta * (F(1) - beta / top);
    if (!p.dg) continue;
    for (int64_t c = 0; c < z.GD; ++c) {
      const F dg = d.dg[i * z.GD + c];
      F da = dg;
      if (in.gate != Gate::kLog) {
        const F bias = in.dt_bias ? in.dt_bias[hv * z.GD + c] : F(0);
        const F x = in.g[row * z.GD + c] + bias;
        if (in.gate == Gate::kSoftplus) {
          da = -dg * rate * sigmoid(x);
          *dA_log += static_cast<double>(dg) * z.g[i * z.GD + c];
        } else {
          const F open = sigmoid(rate * x);
          da = dg * static_cast<F>(in.gate_bound) * open * (F(1) - open) * rate;
          *dA_log += static_cast<double>(da) * x;
        }
        ddt_bias[c] += da;
      }
      p.dg[row * z.GD + c] = da;
    }
  }
}

// Sums a row over the value heads of its group and goes back through the L2 norm: dx = rstd (dy - y (y .
// dy)).
template <class In, class F>
void finish_row(const F* parts, int64_t group, int64_t K, bool l2norm, const In* x, F* dy, F* y, In* out) {
  std::copy(parts, parts + K, dy);
  for (int64_t r = 1; r < group; ++r) add_to(K, parts + r * K, dy);
  if (l2norm) {
    for (int64_t c = 0; c < K; ++c) y[c] = static_cast<F>(x[c]);
    const F rstd = F(1) / std::sqrt(dot(y, y, K) + F(kNormEps));
    for (int64_t c = 0; c < K; ++c) y[c] *= rstd;
    const F along = dot(y, dy, K);
    for (int64_t c = 0; c < K; ++c) dy[c] = rstd * (dy[c] - y[c] * along);
  }
  for (int64_t c = 0; c < K; ++c) out[c] = static_cast<In>(dy[c]);
}

template <class In, class F>
void run_chain(const DeltaBwdParams<In, F>& p, int64_t n, int64_t hv, Chunk<F>& chunk, ChunkGradient<F>& d,
               std::vector<F>& states) {
  const auto& in = p.in;
  const int64_t K = in.key_dim, V = in.value_dim, HV = in.value_heads, GD = chunk.GD, size = K * V;
  const int64_t chain = n * HV + hv;
  const Span span = span_of(in, n);
  const int64_t chunks = (span.length + kChunk - 1) / kChunk;
  const auto rows_in = [&](int64_t i) { return std::min(kChunk, span.length - i * kChunk); };

  if (static_cast<int64_t>(states.size()) < (chunks + 2) * size) states.resize((chunks + 2) * size);
  F* S = states.data();
  load_state(in.initial_state ? in.initial_state + chain * size : nullptr, in.state_v_first, K, V, S);
  std::vector<F> R(kChunk * V), V_new(kChunk * V);
  for (int64_t i = 0; i + 1 < chunks; ++i, S += size) {
    chunk.load(in, span.b, span.begin + i * kChunk, rows_in(i), hv);
    chunk.prepare(/*with_output=*/false);
    chunk.corrected_values(S, V, 0, V, R.data(), V_new.data());
    std::copy(S, S + size, S + size);
    chunk.advance_state(S + size, V, V_new.data(), V);
  }

  F* dS = states.data() + (chunks + 1) * size;
  load_state(p.d_final ? p.d_final + chain * size : nullptr, in.state_v_first, K, V, dS);
  double* dA_log = p.dA_log_parts + chain;
  double* ddt_bias = p.ddt_parts + chain * GD;
  *dA_log = 0;
  std::fill(ddt_bias, ddt_bias + GD, 0.0);
  for (int64_t i = chunks - 1; i >= 0; --i, S -= size) {
    const int64_t t = span.begin + i * kChunk;
    chunk.load(in, span.b, t, rows_in(i), hv);
    chunk.prepare(/*with_output=*/true);
    for (int64_t r = 0; r < chunk.n; ++r) {
      F* to = &d.d_o[r * V];
      if (!p.d_o.data) {
        std::fill(to, to + V, F(0));
        continue;
      }
      const In* from = p.d_o.at(span.b, t + r, hv);
      for (int64_t j = 0; j < V; ++j) to[j] = static_cast<F>(from[j]);
    }
    d.run(S, dS, static_cast<F>(in.scale));
    const int64_t row = (span.b * in.tokens + t) * HV + hv;
    for (int64_t r = 0; r < chunk.n; ++r) {
      const int64_t at = row + r * HV;
      std::copy(&d.dq[r * K], &d.dq[r * K] + K, p.dq_heads + at * K);
      std::copy(&d.dk[r * K], &d.dk[r * K] + K, p.dk_heads + at * K);
      for (int64_t j = 0; j < V; ++j) p.dv[at * V + j] = static_cast<In>(d.dv[r * V + j]);
    }
    through_activations(p, chunk, d, row, hv, dA_log, ddt_bias);
  }
  if (p.d_initial) store_state(dS, in.state_v_first, K, V, p.d_initial + chain * size);
}

}  // namespace

template <class In, class F>
void run_delta_bwd_cpu(const DeltaBwdParams<In, F>& p) {
  const auto& in = p.in;
  const int64_t K = in.key_dim, H = in.heads, HV = in.value_heads, group = HV / H;
  torch::stable::parallel_for(0, in.sequences * HV, 1, [&](int64_t first, int64_t last) {
    Chunk<F> chunk(in);
    ChunkGradient<F> gradient(chunk);
    std::vector<F> states;
    for (int64_t chain = first; chain < last; ++chain)
      run_chain(p, chain / HV, chain % HV, chunk, gradient, states);
  });

  const int64_t tokens = in.cu_seqlens ? in.cu_seqlens[in.sequences] : in.batch * in.tokens;
  torch::stable::parallel_for(0, tokens * H, 256, [&](int64_t first, int64_t last) {
    std::vector<F> dy(K), y(K);
    for (int64_t row = first; row < last; ++row) {
      const int64_t token = row / H, h = row % H, b = token / in.tokens, t = token % in.tokens;
      const int64_t parts = (token * HV + h * group) * K;
      finish_row(p.dq_heads + parts, group, K, in.qk_l2norm, in.q.at(b, t, h), dy.data(), y.data(),
                 p.dq + row * K);
      finish_row(p.dk_heads + parts, group, K, in.qk_l2norm, in.k.at(b, t, h), dy.data(), y.data(),
                 p.dk + row * K);
    }
  });

  // The second stage of the sums over tokens: over the sequences, in order.
  const int64_t GD = in.gate_dim();
  const auto sum_parts = [&](const double* parts, int64_t width, F* out) {
    if (!out) return;
    for (int64_t x = 0; x < width; ++x) {
      double sum = 0;
      for (int64_t n = 0; n < in.sequences; ++n) sum += parts[n * width + x];
      out[x] = static_cast<F>(sum);
    }
  };
  sum_parts(p.dA_log_parts, HV, p.dA_log);
  sum_parts(p.ddt_parts, HV * GD, p.ddt_bias);
}

template void run_delta_bwd_cpu(const DeltaBwdParams<float, float>&);
template void run_delta_bwd_cpu(const DeltaBwdParams<double, double>&);
template void run_delta_bwd_cpu(const DeltaBwdParams<torch::headeronly::Half, float>&);
template void run_delta_bwd_cpu(const DeltaBwdParams<torch::headeronly::BFloat16, float>&);

}  // namespace nearfield::delta
