// Decode on the CPU: at most eight tokens per row, so the plain recurrence. The state is read once, kept in F
// over the tokens, and rounded to the pool's type only where it is written.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "delta/cpu_chunk.h"

namespace nearfield::delta {
namespace {

struct DeltaStepDims {
  int64_t H, HV, K, V, G;
};

// S <- alpha . S;  r = v - S^T k;  S <- S + beta k r^T;  o = s S^T q
template <class F>
void recurrence(const Chunk<F>& rows, int64_t t, F scale, F* S, F* r, F* o) {
  const int64_t K = rows.K, V = rows.V;
  const F *q = &rows.q[t * K], *k = &rows.k[t * K], *g = &rows.g[t * rows.GD];
  std::memcpy(r, &rows.v[t * V], V * sizeof(F));
  for (int64_t c = 0; c < K; ++c) {
    const F alpha = std::exp(g[rows.GD == 1 ? 0 : c]);
    for (int64_t j = 0; j < V; ++j) {
      S[c * V + j] *= alpha;
      r[j] -= S[c * V + j] * k[c];
    }
  }
  std::fill(o, o + V, F(0));
  for (int64_t j = 0; j < V; ++j) r[j] *= rows.beta[t];
  for (int64_t c = 0; c < K; ++c)
    for (int64_t j = 0; j < V; ++j) {
      S[c * V + j] += k[c] * r[j];
      o[j] += scale * q[c] * S[c * V + j];
    }
}

// S <- e^g S + k u^T, what `recurrence` did to the state.
template <class F>
void replay(const Pending<F>& from, int64_t row, const DeltaStepDims& dims, int64_t hv, F* S) {
  const auto [H, HV, K, V, G] = dims;
  const F *k = from.k + (row * H + hv / (HV / H)) * K, *u = from.u + (row * HV + hv) * V;
  for (int64_t c = 0; c < K; ++c) {
    const F alpha = G > 0 ? std::exp(from.g[(row * HV + hv) * G + (G == 1 ? 0 : c)]) : F(1);
    for (int64_t j = 0; j < V; ++j) {
      S[c * V + j] *= alpha;
      S[c * V + j] += k[c] * u[j];
    }
  }
}

// Keeps token t of `rows` (row `row` of the pending tensors); u null: an inactive row, of which a replay is
// harmless.
template <class F>
void keep(const Pending<F>& to, int64_t row, const DeltaStepDims& dims, int64_t hv, const Chunk<F>& rows,
          int64_t t, const F* u) {
  const auto [H, HV, K, V, G] = dims;
  for (int64_t c = 0; c < K && hv % (HV / H) == 0; ++c)
    to.k[(row * H + hv / (HV / H)) * K + c] = u ? rows.k[t * K + c] : F(0);
  for (int64_t j = 0; j < V; ++j) to.u[(row * HV + hv) * V + j] = u ? u[j] : F(0);
  for (int64_t c = 0; c < G; ++c) to.g[(row * HV + hv) * G + c] = u ? rows.g[t * G + c] : F(0);
}

}  // namespace

template <class In, class F, class Pool>
void run_delta_step_cpu(const DeltaStepParams<In, F, Pool>& p) {
  const auto& in = p.in;
  const int64_t K = in.key_dim, V = in.value_dim, HV = in.value_heads, T = in.tokens;
  const DeltaStepDims dims{in.heads, HV, K, V, in.gated ? in.gate_dim() : 0};
  torch::stable::parallel_for(0, in.batch * HV, 1, [&](int64_t first, int64_t last) {
    Chunk<F> rows(in);
    std::vector<F> S(K * V), r(V), o(V);
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / HV, hv = task % HV;
      In* out = p.o + (b * T * HV + hv) * V;
      if (p.read_idx[b] < 0) {
        for (int64_t t = 0; t < T; ++t) {
          std::fill(out + t * HV * V, out + t * HV * V + V, static_cast<In>(0.0f));
          if (p.next.tokens > 0) keep(p.next, b * T + t, dims, hv, rows, t, static_cast<const F*>(nullptr));
        }
        continue;
      }
      if (T > 0) rows.load(in, b, 0, T, hv);
      load_state(p.state + p.read_idx[b] * p.slot_stride + hv * K * V, in.state_v_first, K, V, S.data());
      const auto save = [&](int64_t slot) {
        if (slot >= 0)
          store_state(S.data(), in.state_v_first, K, V, p.state + slot * p.slot_stride + hv * K * V);
      };
      for (int64_t t = 0; p.accepted && t < p.accepted[b]; ++t)
        replay(p.pending, b * p.pending.tokens + t, dims, hv, S.data());
      if (p.write_replayed) {
        save(p.write_idx[b]);
        // To what the pool can hold: the new tokens will be replayed on that.
        for (F& x : S) x = static_cast<F>(static_cast<Pool>(x));
      }
      for (int64_t t = 0; t < T; ++t) {
        recurrence(rows, t, static_cast<F>(in.scale), S.data(), r.data(), o.data());
        for (int64_t j = 0; j < V; ++j) out[t * HV * V + j] = static_cast<In>(o[j]);
        if (p.next.tokens > 0) keep(p.next, b * T + t, dims, hv, rows, t, r.data());
        if (!p.write_tokens || (!p.state_per_token && t + 1 < T)) continue;
        save(p.state_per_token ? p.write_idx[b * T + t] : p.write_idx[b]);
      }
    }
  });
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
template void run_delta_step_cpu(const DeltaStepParams<float, float, float>&);
template void run_delta_step_cpu(const DeltaStepParams<float, float, BFloat16>&);
template void run_delta_step_cpu(const DeltaStepParams<double, double, double>&);
template void run_delta_step_cpu(const DeltaStepParams<Half, float, float>&);
template void run_delta_step_cpu(const DeltaStepParams<Half, float, BFloat16>&);
template void run_delta_step_cpu(const DeltaStepParams<BFloat16, float, float>&);
template void run_delta_step_cpu(const DeltaStepParams<BFloat16, float, BFloat16>&);

}  // namespace nearfield::delta
