// The contract between register.cpp (tensors) and the kernels (pointers) of the delta family.
// Symbols and formulas: README.md. B batch, T tokens, H query/key heads, HV value heads, K key dim,
// V value dim, N sequences (N = B unless packed), G = 1 for a gate per head, K for a gate per channel.
#pragma once

#include <cstdint>

namespace nearfield::delta {

constexpr int64_t kChunk = 64;     // tokens that one chunk treats together
constexpr int64_t kMaxStep = 8;    // tokens of one decode step
constexpr double kNormEps = 1e-6;  // added to the sum of squares of a normalised row

enum class BetaActivation : int64_t { kNone = 0, kSigmoid = 1, kSigmoid2 = 2 };
enum class Gate : int64_t { kLog = 0, kSoftplus = 1, kBounded = 2 };

// Rows of a [B, T, heads, D] tensor whose last stride is 1.
template <class In>
struct Rows {
  const In* data;
  int64_t batch, token, head;  // strides
  const In* at(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

// In is the element type of q, k and v; F the type in which the kernel computes (float, or double for
// double).
template <class In, class F>
struct DeltaInputs {
  int64_t batch, tokens, heads, value_heads, key_dim, value_dim, sequences;
  Rows<In> q;                 // [B, T, H, K]
  Rows<In> k;                 // [B, T, H, K]
  Rows<In> v;                 // [B, T, HV, V]
  const F* beta;              // [B, T, HV] contiguous
  const F* g;                 // [B, T, HV, G] contiguous, or null: no decay
  const F* A_log;             // [HV] or null
  const F* dt_bias;           // [HV, G] or null
  const F* initial_state;     // [N, HV, K, V] ([N, HV, V, K] if state_v_first) or null: zero
  const int64_t* cu_seqlens;  // [N + 1] or null: not packed
  double scale;
  double gate_bound;
  BetaActivation beta_activation;
  Gate gate;
  bool gated;  // not the same as g != null: a tensor without elements has no address
  bool channel_gate;
  bool qk_l2norm;
  bool state_v_first;

  constexpr int64_t gate_dim() const { return channel_gate ? key_dim : 1; }
  constexpr int64_t state_size() const { return key_dim * value_dim; }
};

// One sequence of the token axis.
struct Span {
  int64_t b, begin, length;
};
template <class In, class F>
Span span_of(const DeltaInputs<In, F>& in, int64_t n) {
  if (in.cu_seqlens) return {0, in.cu_seqlens[n], in.cu_seqlens[n + 1] - in.cu_seqlens[n]};
  return {n, 0, in.tokens};
}

template <class In, class F>
struct DeltaFwdParams {
  DeltaInputs<In, F> in;
  In* o;           // [B, T, HV, V]; rows past the last sequence are not written
  F* final_state;  // like initial_state, or null
  // [B, T / 64 / every, HV, ..] like initial_state, or null: the states after every so many whole chunks.
  // Packed sequence n begins with row cu_seqlens[n] / 64 / every.
  F* states;
  int64_t states_every;  // chunks
};

template <class In, class F>
struct DeltaBwdParams {
  DeltaInputs<In, F> in;
  Rows<In> d_o;          // [B, T, HV, V]; data null: zero
  const F* d_final;      // like final_state, or null: zero
  In* dq;                // [B, T, H, K]; rows past the last sequence are not written, here and below
  In* dk;                // [B, T, H, K]
  In* dv;                // [B, T, HV, V]
  F* dbeta;              // [B, T, HV]
  F* dg;                 // [B, T, HV, G] or null
  F* d_initial;          // like initial_state, or null
  F* dA_log;             // [HV] or null
  F* ddt_bias;           // [HV, G] or null
  F* dq_heads;           // [B, T, HV, K] scratch: dq before the sum over the value heads of a group
  F* dk_heads;           // [B, T, HV, K] scratch
  double* dA_log_parts;  // [N, HV] scratch
  double* ddt_parts;     // [N, HV, G] scratch
};

// Tokens whose effect on the state is known but not yet in the pool. e^g S + k u^T replays one. Contiguous.
template <class F>
struct Pending {
  int64_t tokens;  // P, 0 to kMaxStep
  F* k;            // [B, P, H, K], normalised if the step normalises
  F* u;            // [B, P, HV, V], beta (v - S'^T k)
  F* g;            // [B, P, HV, G], log decay; G = 0 without a gate
};

// Decode: row b of the batch reads slot read_idx[b] of the pool, runs its T <= kMaxStep tokens, writes slot
// write_idx[b] (or, with per-token states, slot write_idx[b, t] after each token t). A negative read_idx
// makes the row inactive; a negative write_idx skips that write. Between reading and running come the first
// accepted[b] tokens of `pending`; the new tokens are also kept in `next`, if it has room.
template <class In, class F, class Pool>
struct DeltaStepParams {
  DeltaInputs<In, F> in;
  Pool* state;               // [slots, HV, K, V] ([slots, HV, V, K] if state_v_first)
  int64_t slot_stride;       // elements from one slot to the next
  const int64_t* read_idx;   // [B]
  const int64_t* write_idx;  // [B] or [B, T]
  bool state_per_token;
  In* o;  // [B, T, HV, V]
  Pending<F> pending;
  const int64_t* accepted;  // [B], or null without pending tokens
  bool write_replayed,
      write_tokens;  // which state goes to write_idx: before the T tokens, after (each of) them
  Pending<F> next;   // tokens: 0 or T
};

// Instantiated for (In, F) = (float, float), (double, double), (Half, float), (BFloat16, float);
// the step for pools of float (double with double) and BFloat16.
template <class In, class F>
void run_delta_fwd_cpu(const DeltaFwdParams<In, F>& p);
template <class In, class F>
void run_delta_bwd_cpu(const DeltaBwdParams<In, F>& p);
template <class In, class F, class Pool>
void run_delta_step_cpu(const DeltaStepParams<In, F, Pool>& p);

}  // namespace nearfield::delta
