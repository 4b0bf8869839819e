// Forward on the CPU: chunk after chunk of one sequence and value head, in the error form
//   R = V - Kh S,  V' = T diag(beta) R,  O = s (Qh S + P V'),  S <- e^{G_C} . S + Kt^T V'.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "delta/cpu_chunk.h"

namespace nearfield::delta {

template <class In, class F>
void run_delta_fwd_cpu(const DeltaFwdParams<In, F>& p) {
  const auto& in = p.in;
  const int64_t K = in.key_dim, V = in.value_dim, HV = in.value_heads;
  const int64_t chains = in.sequences * HV;
  // Columns of the state are independent. With too few chains for the threads, split V; each tile repeats the
  // V-free work. Tiles are whole vector registers, so the result does not depend on the split.
  const int64_t tile = chains < static_cast<int64_t>(torch::stable::get_num_threads()) && V > 64 ? 64 : V;
  const int64_t tiles = (V + tile - 1) / tile;
  torch::stable::parallel_for(0, chains * tiles, 1, [&](int64_t first, int64_t last) {
    Chunk<F> chunk(in);
    std::vector<F> state(K * V), R(kChunk * tile), V_new(kChunk * tile), O(kChunk * tile);
    for (int64_t task = first; task < last; ++task) {
      const int64_t chain = task / tiles, n = chain / HV, hv = chain % HV;
      const int64_t j0 = task % tiles * tile, width = std::min(tile, V - j0);
      const Span span = span_of(in, n);
      const F* h0 = in.initial_state ? in.initial_state + chain * K * V : nullptr;
      load_state(h0, in.state_v_first, K, V, state.data());
      F* S = state.data() + j0;
      const auto store = [&](F* states, int64_t row) {
        F* to = states + (row * HV + hv) * K * V;
        for (int64_t c = 0; c < K; ++c)
          for (int64_t j = 0; j < width; ++j)
            to[in.state_v_first ? (j0 + j) * K + c : c * V + j0 + j] = S[c * V + j];
      };
      const int64_t kept_tokens = p.states ? p.states_every * kChunk : 1;
      const int64_t first_row = in.cu_seqlens ? span.begin / kept_tokens : n * (in.tokens / kept_tokens);
      for (int64_t t = 0; t < span.length; t += kChunk) {
        chunk.load(in, span.b, span.begin + t, std::min(kChunk, span.length - t), hv);
        chunk.prepare(/*with_output=*/true);
        chunk.corrected_values(S, V, j0, width, R.data(), V_new.data());
        const F s = static_cast<F>(in.scale);
        gemm(chunk.n, width, K, s, row_major(chunk.Qh.data(), K), row_major<F>(S, V), F(0), O.data(), width);
        gemm(chunk.n, width, chunk.n, s, row_major(chunk.P.data(), kChunk), row_major(V_new.data(), width),
             F(1), O.data(), width);
        for (int64_t i = 0; i < chunk.n; ++i) {
          In* o = p.o + ((span.b * in.tokens + span.begin + t + i) * HV + hv) * V + j0;
          for (int64_t j = 0; j < width; ++j) o[j] = static_cast<In>(O[i * width + j]);
        }
        chunk.advance_state(S, V, V_new.data(), width);
        const int64_t after = t / kChunk + 1;
        if (p.states && chunk.n == kChunk && after % p.states_every == 0)
          store(p.states, first_row + after / p.states_every - 1);
      }
      if (p.final_state) store(p.final_state, n);
    }
  });
}

template void run_delta_fwd_cpu(const DeltaFwdParams<float, float>&);
template void run_delta_fwd_cpu(const DeltaFwdParams<double, double>&);
template void run_delta_fwd_cpu(const DeltaFwdParams<torch::headeronly::Half, float>&);
template void run_delta_fwd_cpu(const DeltaFwdParams<torch::headeronly::BFloat16, float>&);

}  // namespace nearfield::delta
