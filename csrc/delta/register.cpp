// The operators of the delta family: schemas, checks, allocation, parameters, dispatch. The only Torch file
// here.
#include <tuple>

#include "delta/delta.h"
#include "tensor_checks.h"

namespace nearfield::delta {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
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
};

Tensor unit_stride(const Tensor& t) {
  const auto strides = t.strides();
  return strides[strides.size() - 1] == 1 ? t : contiguous(t);
}

Tensor dense_as(const Tensor& t, ScalarType dtype) {
  return contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

OptTensor dense_as(const OptTensor& t, ScalarType dtype) {
  return defined(t) ? OptTensor(dense_as(*t, dtype)) : std::nullopt;
}

ScalarType state_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// beta, gates and their parameters: in q's dtype or in the dtype of the state.
void check_small(const char* op, const char* name, const Tensor& t, const Tensor& q,
                 const std::vector<int64_t>& shape) {
  check_shape(op, name, t, shape);
  if (t.scalar_type() != q.scalar_type()) check_dtype(op, name, t, state_dtype(q));
  check_same_device(op, name, t, q);
}

template <class F>
const F* data_or_null(const OptTensor& t) {
  return defined(t) ? static_cast<const F*>(t->const_data_ptr()) : nullptr;
}

void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t tokens) {
  const auto* cu = static_cast<const int64_t*>(cu_seqlens.const_data_ptr());
  const int64_t last = cu_seqlens.sizes()[0] - 1;
  STD_TORCH_CHECK(cu[0] == 0, op, ": cu_seqlens starts with ", cu[0], ", expected 0");
  for (int64_t n = 0; n < last; ++n)
    STD_TORCH_CHECK(cu[n] <= cu[n + 1], op, ": cu_seqlens decreases from ", cu[n], " to ", cu[n + 1],
                    " after sequence ", n);
  STD_TORCH_CHECK(cu[last] <= tokens, op, ": cu_seqlens ends with ", cu[last], ", but there are ", tokens,
                  " tokens");
}

Inputs check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                    const OptTensor& g, const OptTensor& initial_state, const OptTensor& A_log,
                    const OptTensor& dt_bias, const OptTensor& cu_seqlens, const Options& options) {
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
Tensor token_rows(const Tensor& like, const Inputs& x, const std::vector<int64_t>& shape, ScalarType dtype) {
  return defined(x.cu_seqlens) ? new_zeros(like, shape, dtype) : new_empty(like, shape, dtype);
}

std::tuple<Tensor, Tensor> delta_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g,
                                         OptTensor initial_state, OptTensor A_log, OptTensor dt_bias,
                                         OptTensor cu_seqlens, double scale, bool qk_l2norm,
                                         int64_t beta_activation, int64_t gate, double gate_bound,
                                         bool state_v_first, bool output_final_state) {
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  const Inputs x =
      check_inputs("delta_fwd", q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, options);
  const ScalarType dtype = state_dtype(q);
  Tensor o = token_rows(q, x, {x.B, x.T, x.HV, x.V}, q.scalar_type());
  Tensor final_state =
      new_empty(q, output_final_state ? x.state_shape(state_v_first) : std::vector<int64_t>{0}, dtype);
  dispatch_cpu_dtype("delta_fwd", "q", q.scalar_type(), [&](auto element) {
    using In = decltype(element);
    using F = compute_t<In>;
    run_delta_fwd_cpu(DeltaFwdParams<In, F>{
        kernel_inputs<In, F>(x, options), static_cast<In*>(o.mutable_data_ptr()),
        output_final_state ? static_cast<F*>(final_state.mutable_data_ptr()) : nullptr});
  });
  return {o, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> delta_bwd_cpu(
    OptTensor d_o, OptTensor d_final, Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g,
    OptTensor initial_state, OptTensor A_log, OptTensor dt_bias, OptTensor cu_seqlens, double scale,
    bool qk_l2norm, int64_t beta_activation, int64_t gate, double gate_bound, bool state_v_first) {
  const char* op = "delta_bwd";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  const Inputs x = check_inputs(op, q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, options);
  const ScalarType dtype = state_dtype(q);
  if (defined(d_o)) {
    check_shape(op, "d_o", *d_o, {x.B, x.T, x.HV, x.V});
    check_dtype(op, "d_o", *d_o, q.scalar_type());
    check_same_device(op, "d_o", *d_o, q);
    d_o = unit_stride(*d_o);
  }
  if (defined(d_final)) {
    check_shape(op, "d_final", *d_final, x.state_shape(state_v_first));
    check_dtype(op, "d_final", *d_final, dtype);
    check_same_device(op, "d_final", *d_final, q);
    d_final = contiguous(*d_final);
  }
  const auto absent_or = [&](bool present, const std::vector<int64_t>& shape) {
    return new_empty(q, present ? shape : std::vector<int64_t>{0}, dtype);
  };
  Tensor dq = token_rows(q, x, {x.B, x.T, x.H, x.K}, q.scalar_type());
  Tensor dk = token_rows(q, x, {x.B, x.T, x.H, x.K}, q.scalar_type());
  Tensor dv = token_rows(q, x, {x.B, x.T, x.HV, x.V}, q.scalar_type());
  Tensor dbeta = token_rows(q, x, {x.B, x.T, x.HV}, dtype);
  Tensor dg = defined(g) ? token_rows(q, x, x.gate_shape(), dtype) : absent_or(false, {});
  Tensor d_initial = absent_or(defined(initial_state), x.state_shape(state_v_first));
  Tensor dA_log = absent_or(defined(A_log), {x.HV});
  Tensor ddt_bias = absent_or(defined(dt_bias), {x.channel_gate ? x.HV * x.K : x.HV});
  const Tensor dq_heads = new_empty(q, {x.B, x.T, x.HV, x.K}, dtype);
  const Tensor dk_heads = new_empty(q, {x.B, x.T, x.HV, x.K}, dtype);
  const Tensor A_parts = new_empty(q, {x.N, x.HV}, ScalarType::Double);
  const Tensor dt_parts = new_empty(q, {x.N, x.HV, x.channel_gate ? x.K : 1}, ScalarType::Double);
  dispatch_cpu_dtype(op, "q", q.scalar_type(), [&](auto element) {
    using In = decltype(element);
    using F = compute_t<In>;
    const auto in_type = [](const Tensor& t) { return static_cast<In*>(t.mutable_data_ptr()); };
    const auto compute_type = [](const Tensor& t) { return static_cast<F*>(t.mutable_data_ptr()); };
    DeltaBwdParams<In, F> p{};
    p.in = kernel_inputs<In, F>(x, options);
    if (defined(d_o)) p.d_o = rows<In>(*d_o);
    p.d_final = data_or_null<F>(d_final);
    p.dq = in_type(dq), p.dk = in_type(dk), p.dv = in_type(dv);
    p.dbeta = compute_type(dbeta);
    p.dg = defined(g) ? compute_type(dg) : nullptr;
    p.d_initial = defined(initial_state) ? compute_type(d_initial) : nullptr;
    p.dA_log = defined(A_log) ? compute_type(dA_log) : nullptr;
    p.ddt_bias = defined(dt_bias) ? compute_type(ddt_bias) : nullptr;
    p.dq_heads = compute_type(dq_heads), p.dk_heads = compute_type(dk_heads);
    p.dA_log_parts = static_cast<double*>(A_parts.mutable_data_ptr());
    p.ddt_parts = static_cast<double*>(dt_parts.mutable_data_ptr());
    run_delta_bwd_cpu(p);
  });
  const auto like = [](const Tensor& grad, const Tensor& input) {
    return grad.scalar_type() == input.scalar_type() ? grad : torch::stable::to(grad, input.scalar_type());
  };
  return {dq,
          dk,
          dv,
          like(dbeta, beta),
          defined(g) ? like(dg, *g) : dg,
          d_initial,
          defined(A_log) ? like(dA_log, *A_log) : dA_log,
          defined(dt_bias) ? like(ddt_bias, *dt_bias) : ddt_bias};
}

// An index per row of the batch (or, with T > 0, per row and token); absent: row b uses slot b.
std::vector<int64_t> slot_indices(const char* op, const char* name, const OptTensor& index, int64_t B,
                                  int64_t T, int64_t slots) {
  std::vector<int64_t> out;
  if (!defined(index)) {
    for (int64_t b = 0; b < B; ++b) out.push_back(b);
  } else {
    const bool per_token = T > 0 && index->sizes().size() == 2;
    check_shape(op, name, *index, per_token ? std::vector<int64_t>{B, T} : std::vector<int64_t>{B});
    if (index->scalar_type() != ScalarType::Int) check_dtype(op, name, *index, ScalarType::Long);
    const Tensor dense = dense_as(*index, ScalarType::Long);
    const auto* data = static_cast<const int64_t*>(dense.const_data_ptr());
    out.assign(data, data + dense.numel());
  }
  for (const int64_t slot : out)
    STD_TORCH_CHECK(slot < slots, op, ": ", name, " has slot ", slot, ", but the pool has ", slots, " slots");
  return out;
}

Tensor delta_step_cpu(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g, Tensor state,
                      OptTensor read_idx, OptTensor write_idx, OptTensor A_log, OptTensor dt_bias,
                      double scale, bool qk_l2norm, int64_t beta_activation, int64_t gate, double gate_bound,
                      bool state_v_first) {
  const char* op = "delta_step";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  const Inputs x = check_inputs(op, q, k, v, beta, g, std::nullopt, A_log, dt_bias, std::nullopt, options);
  STD_TORCH_CHECK(x.T >= 1 && x.T <= kMaxStep, op, ": q has ", x.T, " tokens, expected 1 to ", kMaxStep);
  auto pool_shape = x.state_shape(state_v_first);
  pool_shape[0] = -1;
  check_shape(op, "state", state, pool_shape);
  check_same_device(op, "state", state, q);
  if (state.scalar_type() != ScalarType::BFloat16 || q.scalar_type() == ScalarType::Double)
    check_dtype(op, "state", state, state_dtype(q));
  const auto strides = state.strides();
  const int64_t slots = state.sizes()[0];
  int64_t dense = 1;  // strides of dimensions of size 1 do not matter
  for (int64_t d = 3; d >= 1; dense *= pool_shape[d--])
    STD_TORCH_CHECK(pool_shape[d] == 1 || strides[d] == dense, op, ": state has strides ",
                    shape_text(strides.data(), 4), "; only the first may be padded");
  STD_TORCH_CHECK(slots <= 1 || strides[0] >= dense, op, ": state has overlapping slots, strides ",
                  shape_text(strides.data(), 4));
  const auto read = slot_indices(op, "read_idx", read_idx, x.B, 0, slots);
  const auto write = defined(write_idx) ? slot_indices(op, "write_idx", write_idx, x.B, x.T, slots) : read;
  Tensor o = new_empty(q, {x.B, x.T, x.HV, x.V}, q.scalar_type());
  const bool per_token = defined(write_idx) && write_idx->sizes().size() == 2;
  dispatch_cpu_dtype(op, "q", q.scalar_type(), [&](auto element) {
    using In = decltype(element);
    using F = compute_t<In>;
    const auto run = [&](auto pool_element) {
      using Pool = decltype(pool_element);
      run_delta_step_cpu(DeltaStepParams<In, F, Pool>{
          kernel_inputs<In, F>(x, options), static_cast<Pool*>(state.mutable_data_ptr()), strides[0],
          read.data(), write.data(), per_token, static_cast<In*>(o.mutable_data_ptr())});
    };
    if constexpr (std::is_same_v<F, float>) {
      if (state.scalar_type() == ScalarType::BFloat16) return run(torch::headeronly::BFloat16{});
    }
    run(F{});
  });
  return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nearfield, m) {
  // beta_activation: 0 none, 1 sigmoid, 2 twice sigmoid. gate: 0 log decay, 1 softplus, 2 bounded.
  // final_state has no elements unless output_final_state.
  m.def(
      "delta_fwd(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial_state, Tensor? A_log, "
      "Tensor? dt_bias, Tensor? cu_seqlens, float scale, bool qk_l2norm, int beta_activation, int gate, "
      "float gate_bound, bool state_v_first, bool output_final_state) -> (Tensor o, Tensor final_state)");
  // The gradient of an absent input has no elements.
  m.def(
      "delta_bwd(Tensor? d_o, Tensor? d_final, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, "
      "Tensor? initial_state, Tensor? A_log, Tensor? dt_bias, Tensor? cu_seqlens, float scale, bool "
      "qk_l2norm, "
      "int beta_activation, int gate, float gate_bound, bool state_v_first) -> (Tensor dq, Tensor dk, Tensor "
      "dv, "
      "Tensor dbeta, Tensor dg, Tensor d_initial, Tensor dA_log, Tensor ddt_bias)");
  m.def(
      "delta_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor(a!) state, Tensor? read_idx, "
      "Tensor? write_idx, Tensor? A_log, Tensor? dt_bias, float scale, bool qk_l2norm, int beta_activation, "
      "int gate, "
      "float gate_bound, bool state_v_first) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nearfield, CPU, m) {
  m.impl("delta_fwd", TORCH_BOX(&delta_fwd_cpu));
  m.impl("delta_bwd", TORCH_BOX(&delta_bwd_cpu));
  m.impl("delta_step", TORCH_BOX(&delta_step_cpu));
}

}  // namespace nearfield::delta
