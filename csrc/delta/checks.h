// What the CPU and the CUDA operators of the family share: checks, tensors made readable for a kernel, kernel
// inputs. The sentences for users are in op.py.
#pragma once

#include "delta/delta.h"
#include "tensor_checks.h"

namespace nearfield::delta {

using torch::stable::contiguous;
using torch::stable::new_zeros;
using OptTensor = std::optional<Tensor>;

// The options that all three operators share.
struct Options {
  double scale;
  bool qk_l2norm;
  int64_t beta_activation;
  int64_t gate;
  double gate_bound;
  bool state_v_first;
};

// Tensors that stay alive while a kernel runs, in the layout and type it reads.
struct Inputs {
  Tensor q, k, v, beta;
  OptTensor g, A_log, dt_bias, initial_state, cu_seqlens;
  int64_t B, T, H, HV, K, V, N;
  bool channel_gate;

  std::vector<int64_t> state_shape(bool v_first) const {
    return v_first ? std::vector<int64_t>{N, HV, V, K} : std::vector<int64_t>{N, HV, K, V};
  }
  std::vector<int64_t> gate_shape() const {
    return channel_gate ? std::vector<int64_t>{B, T, HV, K} : std::vector<int64_t>{B, T, HV};
  }
  int64_t gate_dim() const { return defined(g) ? (channel_gate ? K : 1) : 0; }  // of pending tokens
};

inline Tensor unit_stride(const Tensor& t) {
  const auto strides = t.strides();
  return strides[strides.size() - 1] == 1 ? t : contiguous(t);
}

inline Tensor dense_as(const Tensor& t, ScalarType dtype) {
  return contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

inline OptTensor dense_as(const OptTensor& t, ScalarType dtype) {
  return defined(t) ? OptTensor(dense_as(*t, dtype)) : std::nullopt;
}

inline ScalarType state_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// beta, gates and their parameters: in q's dtype or in the dtype of the state.
inline void check_small(const char* op, const char* name, const Tensor& t, const Tensor& q,
                        const std::vector<int64_t>& shape) {
  check_shape(op, name, t, shape);
  if (t.scalar_type() != q.scalar_type()) check_dtype(op, name, t, state_dtype(q));
  check_same_device(op, name, t, q);
}

template <class F>
const F* data_or_null(const OptTensor& t) {
  return defined(t) ? static_cast<const F*>(t->const_data_ptr()) : nullptr;
}

// Shapes, types and devices. The tensors are left as they were given, except cu_seqlens.
inline Inputs check_given(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& beta, const OptTensor& g, const OptTensor& initial_state,
                          const OptTensor& A_log, const OptTensor& dt_bias, const OptTensor& cu_seqlens,
                          const Options& options) {
  check_shape(op, "q", q, {-1, -1, -1, -1});
  check_shape(op, "v", v, {-1, -1, -1, -1});
  Inputs x{};
  x.B = q.sizes()[0], x.T = q.sizes()[1], x.H = q.sizes()[2], x.K = q.sizes()[3];
  x.HV = v.sizes()[2], x.V = v.sizes()[3], x.N = x.B;
  check_shape(op, "k", k, {x.B, x.T, x.H, x.K});
  check_shape(op, "v", v, {x.B, x.T, -1, -1});
  STD_TORCH_CHECK(x.H > 0 && x.HV > 0 && x.HV % x.H == 0, op, ": v has ", x.HV,
                  " heads, expected a multiple of q's ", x.H);
  STD_TORCH_CHECK(x.K > 0 && x.V > 0, op, ": q and v need at least one channel, got ", x.K, " and ", x.V);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_dtype(op, name, t, q.scalar_type());
    check_same_device(op, name, t, q);
  }
  check_small(op, "beta", beta, q, {x.B, x.T, x.HV});
  if (defined(g)) {
    x.channel_gate = g->sizes().size() == 4;
    check_small(op, "g", *g, q, x.gate_shape());
  }
  STD_TORCH_CHECK(options.gate == 0 || defined(g), op, ": gate ", options.gate, " needs g");
  STD_TORCH_CHECK(options.gate != 1 || defined(A_log), op, ": the softplus gate needs A_log");
  STD_TORCH_CHECK(options.gate >= 0 && options.gate <= 2, op, ": gate is ", options.gate,
                  ", expected 0, 1 or 2");
  STD_TORCH_CHECK(options.beta_activation >= 0 && options.beta_activation <= 2, op, ": beta_activation is ",
                  options.beta_activation, ", expected 0, 1 or 2");
  if (defined(A_log)) check_small(op, "A_log", *A_log, q, {x.HV});
  if (defined(dt_bias)) check_small(op, "dt_bias", *dt_bias, q, {x.channel_gate ? x.HV * x.K : x.HV});
  if (defined(cu_seqlens)) {
    check_shape(op, "cu_seqlens", *cu_seqlens, {-1});
    check_same_device(op, "cu_seqlens", *cu_seqlens, q);
    const auto dtype = cu_seqlens->scalar_type();
    if (dtype != ScalarType::Int) check_dtype(op, "cu_seqlens", *cu_seqlens, ScalarType::Long);
    STD_TORCH_CHECK(x.B == 1, op, ": cu_seqlens needs a batch of 1, got ", x.B);
    x.N = cu_seqlens->sizes()[0] - 1;
    STD_TORCH_CHECK(x.N >= 0, op, ": cu_seqlens is empty, expected at least one entry");
    x.cu_seqlens = dense_as(*cu_seqlens, ScalarType::Long);
    if (!q.is_cuda()) check_cu_seqlens(op, *x.cu_seqlens, x.T);
  }
  if (defined(initial_state)) {
    check_shape(op, "initial_state", *initial_state, x.state_shape(options.state_v_first));
    check_dtype(op, "initial_state", *initial_state, state_dtype(q));
    check_same_device(op, "initial_state", *initial_state, q);
  }
  x.q = q, x.k = k, x.v = v, x.beta = beta;
  x.g = g, x.A_log = A_log, x.dt_bias = dt_bias, x.initial_state = initial_state;
  return x;
}

// The same, and every tensor in the layout and type that a kernel reads.
inline Inputs check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& beta, const OptTensor& g, const OptTensor& initial_state,
                           const OptTensor& A_log, const OptTensor& dt_bias, const OptTensor& cu_seqlens,
                           const Options& options) {
  Inputs x = check_given(op, q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, options);
  const ScalarType dtype = state_dtype(q);
  x.q = unit_stride(q), x.k = unit_stride(k), x.v = unit_stride(v);
  x.beta = dense_as(beta, dtype), x.g = dense_as(g, dtype), x.A_log = dense_as(A_log, dtype);
  x.dt_bias = dense_as(dt_bias, dtype), x.initial_state = dense_as(initial_state, dtype);
  return x;
}

template <class In>
Rows<In> rows(const Tensor& t) {
  const auto s = t.strides();
  return {static_cast<const In*>(t.const_data_ptr()), s[0], s[1], s[2]};
}

template <class In, class F>
DeltaInputs<In, F> kernel_inputs(const Inputs& x, const Options& options) {
  DeltaInputs<In, F> in{};
  in.batch = x.B, in.tokens = x.T, in.heads = x.H, in.value_heads = x.HV;
  in.key_dim = x.K, in.value_dim = x.V, in.sequences = x.N;
  in.q = rows<In>(x.q), in.k = rows<In>(x.k), in.v = rows<In>(x.v);
  in.beta = static_cast<const F*>(x.beta.const_data_ptr());
  in.g = data_or_null<F>(x.g), in.A_log = data_or_null<F>(x.A_log), in.dt_bias = data_or_null<F>(x.dt_bias);
  in.initial_state = data_or_null<F>(x.initial_state);
  in.cu_seqlens = data_or_null<int64_t>(x.cu_seqlens);
  in.scale = options.scale, in.gate_bound = options.gate_bound;
  in.beta_activation = static_cast<BetaActivation>(options.beta_activation);
  in.gate = static_cast<Gate>(options.gate);
  in.gated = defined(x.g), in.channel_gate = x.channel_gate;
  in.qk_l2norm = options.qk_l2norm, in.state_v_first = options.state_v_first;
  return in;
}

// Rows past the last packed sequence are not written by the kernels; they must be zero.
inline Tensor token_rows(const Tensor& like, const Inputs& x, const std::vector<int64_t>& shape,
                         ScalarType dtype) {
  return defined(x.cu_seqlens) ? new_zeros(like, shape, dtype) : allocate(like, shape, dtype);
}

// The states after every so many whole chunks, to be written by a kernel; rows without a chunk stay zero.
inline Tensor kept_states(const char* op, const Inputs& x, bool v_first, int64_t every) {
  STD_TORCH_CHECK(every >= 0, op, ": states_every is ", every, " chunks, expected at least 0");
  auto shape = x.state_shape(v_first);
  if (every == 0) return allocate(x.q, {0}, state_dtype(x.q));
  shape[0] = x.T / (every * kChunk);
  shape.insert(shape.begin(), x.B);
  return defined(x.cu_seqlens) ? new_zeros(x.q, shape, state_dtype(x.q))
                               : allocate(x.q, shape, state_dtype(x.q));
}

// What delta_fwd_kept left for this call, not empty.
inline void check_kept(const char* op, const Tensor& kept, const Tensor& q, int64_t bytes) {
  check_shape(op, "kept", kept, {bytes});
  check_dtype(op, "kept", kept, ScalarType::Byte);
  check_same_device(op, "kept", kept, q);
}

// The pool of states of a decode step: dense but for its first stride.
inline void check_pool(const char* op, const Tensor& state, const Inputs& x, bool state_v_first) {
  auto shape = x.state_shape(state_v_first);
  shape[0] = -1;
  check_shape(op, "state", state, shape);
  check_same_device(op, "state", state, x.q);
  if (state.scalar_type() != ScalarType::BFloat16 || x.q.scalar_type() == ScalarType::Double)
    check_dtype(op, "state", state, state_dtype(x.q));
  const auto strides = state.strides();
  int64_t dense = 1;  // strides of dimensions of size 1 do not matter
  for (int64_t d = 3; d >= 1; dense *= shape[d--])
    STD_TORCH_CHECK(shape[d] == 1 || strides[d] == dense, op, ": state has strides ",
                    shape_text(strides.data(), 4), "; only the first may be padded");
  STD_TORCH_CHECK(state.sizes()[0] <= 1 || strides[0] >= dense, op, ": state has overlapping slots, strides ",
                  shape_text(strides.data(), 4));
}

inline bool is_per_token(const OptTensor& index) { return defined(index) && index->sizes().size() == 2; }

// An index per row of the batch or, with T > 0, per row and token.
inline void check_slots(const char* op, const char* name, const OptTensor& index, const Inputs& x,
                        int64_t T) {
  if (!defined(index)) return;
  const bool per_token = T > 0 && is_per_token(index);
  check_shape(op, name, *index, per_token ? std::vector<int64_t>{x.B, T} : std::vector<int64_t>{x.B});
  if (index->scalar_type() != ScalarType::Int) check_dtype(op, name, *index, ScalarType::Long);
  check_same_device(op, name, *index, x.q);
}

// The pending tokens of delta_verify and delta_commit, dense.
struct PendingTensors {
  Tensor k, u, g, accepted;
  int64_t tokens = 0;

  template <class F>
  Pending<F> view() const {
    if (tokens == 0) return {};
    const auto data = [](const Tensor& t) { return static_cast<F*>(t.mutable_data_ptr()); };
    return {tokens, data(k), data(u), data(g)};
  }
};

inline PendingTensors check_pending(const char* op, const OptTensor& k, const OptTensor& u,
                                    const OptTensor& g, const OptTensor& accepted, const Inputs& x) {
  const bool given = defined(k);
  STD_TORCH_CHECK(defined(u) == given && defined(g) == given && defined(accepted) == given, op,
                  ": pending k, u and g and accepted belong together, but some are absent");
  if (!given) return {};
  check_shape(op, "pending k", *k, {x.B, -1, x.H, x.K});
  const int64_t tokens = k->sizes()[1];
  STD_TORCH_CHECK(tokens >= 1 && tokens <= kMaxStep, op, ": pending has ", tokens, " tokens, expected 1 to ",
                  kMaxStep);
  check_shape(op, "pending u", *u, {x.B, tokens, x.HV, x.V});
  check_shape(op, "pending g", *g, {x.B, tokens, x.HV, x.gate_dim()});
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>{"pending k", *k}, {"pending u", *u}, {"pending g", *g}}) {
    check_dtype(op, name, t, state_dtype(x.q));
    check_same_device(op, name, t, x.q);
  }
  check_slots(op, "accepted", accepted, x, 0);
  return {contiguous(*k), contiguous(*u), contiguous(*g), *accepted, tokens};
}

// The problem of delta_commit, as far as the pending tokens tell it: no tokens to run.
inline Inputs commit_inputs(const char* op, const Tensor& k, const Tensor& u, const Tensor& g) {
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>{"pending k", k}, {"pending u", u}, {"pending g", g}})
    check_shape(op, name, t, {-1, -1, -1, -1});
  Inputs x{};
  x.q = x.k = k, x.v = x.beta = u;
  x.B = x.N = k.sizes()[0], x.H = k.sizes()[2], x.K = k.sizes()[3];
  x.HV = u.sizes()[2], x.V = u.sizes()[3];
  STD_TORCH_CHECK(x.H > 0 && x.HV > 0 && x.HV % x.H == 0 && x.K > 0 && x.V > 0, op, ": pending k has ", x.H,
                  " heads of ", x.K, " channels and pending u ", x.HV, " heads of ", x.V,
                  ", expected at least one channel and a multiple of k's heads");
  const int64_t gate_dim = g.sizes()[3];
  STD_TORCH_CHECK(gate_dim == 0 || gate_dim == 1 || gate_dim == x.K, op, ": pending g has ", gate_dim,
                  " channels, expected 0, 1 or ", x.K);
  if (gate_dim > 0) x.g = g;
  x.channel_gate = gate_dim == x.K;
  return x;
}

// The new tokens of delta_verify, to be written by a kernel.
inline PendingTensors new_pending(const Inputs& x) {
  const ScalarType dtype = state_dtype(x.q);
  PendingTensors p;
  p.k = allocate(x.q, {x.B, x.T, x.H, x.K}, dtype);
  p.u = allocate(x.q, {x.B, x.T, x.HV, x.V}, dtype);
  p.g = allocate(x.q, {x.B, x.T, x.HV, x.gate_dim()}, dtype);
  p.tokens = x.T;
  return p;
}

inline void check_step_tokens(const char* op, const Inputs& x) {
  STD_TORCH_CHECK(x.T >= 1 && x.T <= kMaxStep, op, ": q has ", x.T, " tokens, expected 1 to ", kMaxStep);
}

// The gradients that arrive from behind, made readable.
inline void check_output_gradients(const char* op, const Inputs& x, const Options& options, OptTensor& d_o,
                                   OptTensor& d_final) {
  if (defined(d_o)) {
    check_shape(op, "d_o", *d_o, {x.B, x.T, x.HV, x.V});
    check_dtype(op, "d_o", *d_o, x.q.scalar_type());
    check_same_device(op, "d_o", *d_o, x.q);
    d_o = unit_stride(*d_o);
  }
  if (defined(d_final)) {
    check_shape(op, "d_final", *d_final, x.state_shape(options.state_v_first));
    check_dtype(op, "d_final", *d_final, state_dtype(x.q));
    check_same_device(op, "d_final", *d_final, x.q);
    d_final = contiguous(*d_final);
  }
}

}  // namespace nearfield::delta
