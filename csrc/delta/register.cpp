// The operators of the delta family: schemas, and their CPU implementation: allocation, parameters, dispatch.
#include <tuple>

#include "delta/checks.h"

namespace nearfield::delta {
namespace {

void check_no_backend(const char* op, const std::optional<std::string>& backend) {
  STD_TORCH_CHECK(!backend, op, ": backend is \"", *backend,
                  "\", but q is on the CPU; supported there: none");
}

std::tuple<Tensor, Tensor, Tensor> delta_fwd_states_cpu(Tensor q, Tensor k, Tensor v, Tensor beta,
                                                        OptTensor g, OptTensor initial_state, OptTensor A_log,
                                                        OptTensor dt_bias, OptTensor cu_seqlens, double scale,
                                                        bool qk_l2norm, int64_t beta_activation, int64_t gate,
                                                        double gate_bound, bool state_v_first,
                                                        bool output_final_state, int64_t states_every,
                                                        std::optional<std::string> backend) {
  check_no_backend("delta_fwd", backend);
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  const Inputs x =
      check_inputs("delta_fwd", q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, options);
  Tensor states = kept_states("delta_fwd", x, state_v_first, states_every);
  const ScalarType dtype = state_dtype(q);
  Tensor o = token_rows(q, x, {x.B, x.T, x.HV, x.V}, q.scalar_type());
  Tensor final_state =
      allocate(q, output_final_state ? x.state_shape(state_v_first) : std::vector<int64_t>{0}, dtype);
  dispatch_cpu_dtype("delta_fwd", "q", q.scalar_type(), [&](auto element) {
    using In = decltype(element);
    using F = compute_t<In>;
    run_delta_fwd_cpu(DeltaFwdParams<In, F>{
        kernel_inputs<In, F>(x, options), static_cast<In*>(o.mutable_data_ptr()),
        output_final_state ? static_cast<F*>(final_state.mutable_data_ptr()) : nullptr,
        states_every > 0 ? static_cast<F*>(states.mutable_data_ptr()) : nullptr, states_every});
  });
  return {o, final_state, states};
}

std::tuple<Tensor, Tensor> delta_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g,
                                         OptTensor initial_state, OptTensor A_log, OptTensor dt_bias,
                                         OptTensor cu_seqlens, double scale, bool qk_l2norm,
                                         int64_t beta_activation, int64_t gate, double gate_bound,
                                         bool state_v_first, bool output_final_state,
                                         std::optional<std::string> backend) {
  const auto [o, final_state, states] =
      delta_fwd_states_cpu(q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, scale, qk_l2norm,
                           beta_activation, gate, gate_bound, state_v_first, output_final_state, 0, backend);
  return {o, final_state};
}

// The gradient on the CPU computes again what it needs.
std::tuple<Tensor, Tensor, Tensor> delta_fwd_kept_cpu(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g,
                                                      OptTensor initial_state, OptTensor A_log,
                                                      OptTensor dt_bias, OptTensor cu_seqlens, double scale,
                                                      bool qk_l2norm, int64_t beta_activation, int64_t gate,
                                                      double gate_bound, bool state_v_first,
                                                      bool output_final_state,
                                                      std::optional<std::string> backend) {
  const auto [o, final_state] =
      delta_fwd_cpu(q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, scale, qk_l2norm,
                    beta_activation, gate, gate_bound, state_v_first, output_final_state, backend);
  return {o, final_state, allocate(q, {0}, ScalarType::Byte)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> delta_bwd_cpu(
    OptTensor d_o, OptTensor d_final, Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g,
    OptTensor initial_state, OptTensor A_log, OptTensor dt_bias, OptTensor cu_seqlens, double scale,
    bool qk_l2norm, int64_t beta_activation, int64_t gate, double gate_bound, bool state_v_first,
    std::optional<std::string> backend, OptTensor kept) {
  const char* op = "delta_bwd";
  check_no_backend(op, backend);
  if (defined(kept)) check_kept(op, *kept, q, 0);
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  const Inputs x = check_inputs(op, q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, options);
  const ScalarType dtype = state_dtype(q);
  check_output_gradients(op, x, options, d_o, d_final);
  const auto absent_or = [&](bool present, const std::vector<int64_t>& shape) {
    return allocate(q, present ? shape : std::vector<int64_t>{0}, dtype);
  };
  Tensor dq = token_rows(q, x, {x.B, x.T, x.H, x.K}, q.scalar_type());
  Tensor dk = token_rows(q, x, {x.B, x.T, x.H, x.K}, q.scalar_type());
  Tensor dv = token_rows(q, x, {x.B, x.T, x.HV, x.V}, q.scalar_type());
  Tensor dbeta = token_rows(q, x, {x.B, x.T, x.HV}, dtype);
  Tensor dg = defined(g) ? token_rows(q, x, x.gate_shape(), dtype) : absent_or(false, {});
  Tensor d_initial = absent_or(defined(initial_state), x.state_shape(state_v_first));
  Tensor dA_log = absent_or(defined(A_log), {x.HV});
  Tensor ddt_bias = absent_or(defined(dt_bias), {x.channel_gate ? x.HV * x.K : x.HV});
  const Tensor dq_heads = allocate(q, {x.B, x.T, x.HV, x.K}, dtype);
  const Tensor dk_heads = allocate(q, {x.B, x.T, x.HV, x.K}, dtype);
  const Tensor A_parts = allocate(q, {x.N, x.HV}, ScalarType::Double);
  const Tensor dt_parts = allocate(q, {x.N, x.HV, x.channel_gate ? x.K : 1}, ScalarType::Double);
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

// The slots that an index names; absent: row b uses slot b.
std::vector<int64_t> slot_indices(const char* op, const char* name, const OptTensor& index, int64_t B,
                                  int64_t slots) {
  std::vector<int64_t> out;
  if (!defined(index)) {
    for (int64_t b = 0; b < B; ++b) out.push_back(b);
  } else {
    const Tensor dense = dense_as(*index, ScalarType::Long);
    const auto* data = static_cast<const int64_t*>(dense.const_data_ptr());
    out.assign(data, data + dense.numel());
  }
  for (const int64_t slot : out)
    STD_TORCH_CHECK(slot < slots, op, ": ", name, " has slot ", slot, ", but the pool has ", slots, " slots");
  return out;
}

// One step over the pool: of delta_step, of delta_verify (`next` given) and of delta_commit (no tokens).
// Returns o.
Tensor run_step(const char* op, const Inputs& x, const Options& options, const Tensor& state,
                const OptTensor& read_idx, const OptTensor& write_idx, const PendingTensors& pending,
                const PendingTensors* next) {
  check_pool(op, state, x, options.state_v_first);
  check_slots(op, "read_idx", read_idx, x, 0);
  check_slots(op, "write_idx", write_idx, x, next ? 0 : x.T);
  const int64_t slots = state.sizes()[0];
  const auto read = slot_indices(op, "read_idx", read_idx, x.B, slots);
  const auto write = defined(write_idx) ? slot_indices(op, "write_idx", write_idx, x.B, slots) : read;
  std::vector<int64_t> accepted;
  if (pending.tokens > 0) {
    const Tensor dense = dense_as(pending.accepted, ScalarType::Long);
    const auto* data = static_cast<const int64_t*>(dense.const_data_ptr());
    accepted.assign(data, data + x.B);
    for (const int64_t a : accepted)
      STD_TORCH_CHECK(0 <= a && a <= pending.tokens, op, ": accepted has ", a, ", but there are ",
                      pending.tokens, " pending tokens");
  }
  Tensor o = allocate(x.q, {x.B, x.T, x.HV, x.V}, x.q.scalar_type());
  dispatch_cpu_dtype(op, "q", x.q.scalar_type(), [&](auto element) {
    using In = decltype(element);
    using F = compute_t<In>;
    const auto run = [&](auto pool_element) {
      using Pool = decltype(pool_element);
      DeltaStepParams<In, F, Pool> p{};
      p.in = kernel_inputs<In, F>(x, options);
      p.state = static_cast<Pool*>(state.mutable_data_ptr()), p.slot_stride = state.strides()[0];
      p.read_idx = read.data(), p.write_idx = write.data();
      p.state_per_token = is_per_token(write_idx);
      p.o = static_cast<In*>(o.mutable_data_ptr());
      p.pending = pending.view<F>(), p.accepted = pending.tokens > 0 ? accepted.data() : nullptr;
      p.write_replayed = pending.tokens > 0, p.write_tokens = !next;
      if (next) p.next = next->view<F>();
      run_delta_step_cpu(p);
    };
    if constexpr (std::is_same_v<F, float>) {
      if (state.scalar_type() == ScalarType::BFloat16) return run(torch::headeronly::BFloat16{});
    }
    run(F{});
  });
  return o;
}

Tensor delta_step_cpu(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g, Tensor state,
                      OptTensor read_idx, OptTensor write_idx, OptTensor A_log, OptTensor dt_bias,
                      double scale, bool qk_l2norm, int64_t beta_activation, int64_t gate, double gate_bound,
                      bool state_v_first) {
  const char* op = "delta_step";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  const Inputs x = check_inputs(op, q, k, v, beta, g, std::nullopt, A_log, dt_bias, std::nullopt, options);
  check_step_tokens(op, x);
  return run_step(op, x, options, state, read_idx, write_idx, {}, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> delta_verify_cpu(
    Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g, Tensor state, OptTensor read_idx,
    OptTensor write_idx, OptTensor pending_k, OptTensor pending_u, OptTensor pending_g, OptTensor accepted,
    OptTensor A_log, OptTensor dt_bias, double scale, bool qk_l2norm, int64_t beta_activation, int64_t gate,
    double gate_bound, bool state_v_first) {
  const char* op = "delta_verify";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  const Inputs x = check_inputs(op, q, k, v, beta, g, std::nullopt, A_log, dt_bias, std::nullopt, options);
  check_step_tokens(op, x);
  const PendingTensors pending = check_pending(op, pending_k, pending_u, pending_g, accepted, x);
  const PendingTensors next = new_pending(x);
  Tensor o = run_step(op, x, options, state, read_idx, write_idx, pending, &next);
  return {o, next.k, next.u, next.g};
}

void delta_commit_cpu(Tensor state, Tensor pending_k, Tensor pending_u, Tensor pending_g, Tensor accepted,
                      OptTensor read_idx, OptTensor write_idx, bool state_v_first) {
  const char* op = "delta_commit";
  const Inputs x = commit_inputs(op, pending_k, pending_u, pending_g);
  const PendingTensors pending = check_pending(op, pending_k, pending_u, pending_g, accepted, x);
  run_step(op, x, Options{1, false, 0, 0, 0, state_v_first}, state, read_idx, write_idx, pending, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nearfield, m) {
  // beta_activation: 0 none, 1 sigmoid, 2 twice sigmoid. gate: 0 log decay, 1 softplus, 2 bounded.
  // final_state has no elements unless output_final_state.
  m.def(
      "delta_fwd(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial_state, Tensor? A_log, "
      "Tensor? dt_bias, Tensor? cu_seqlens, float scale, bool qk_l2norm, int beta_activation, int gate, "
      "float gate_bound, bool state_v_first, bool output_final_state, str? backend=None) -> (Tensor o, "
      "Tensor "
      "final_state)");
  // The same, and the states after every so many whole chunks of 64 tokens; 0: none. No gradient.
  m.def(
      "delta_fwd_states(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial_state, Tensor? "
      "A_log, Tensor? dt_bias, Tensor? cu_seqlens, float scale, bool qk_l2norm, int beta_activation, int "
      "gate, "
      "float gate_bound, bool state_v_first, bool output_final_state, int states_every, str? backend=None) "
      "-> (Tensor o, Tensor "
      "final_state, Tensor states)");
  // The same as delta_fwd, and what the gradient starts from if it need not compute it again: bytes whose
  // meaning is the kernels' own. None of them where the gradient computes it again anyway.
  m.def(
      "delta_fwd_kept(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? initial_state, Tensor? "
      "A_log, Tensor? dt_bias, Tensor? cu_seqlens, float scale, bool qk_l2norm, int beta_activation, int "
      "gate, float gate_bound, bool state_v_first, bool output_final_state, str? backend=None) -> (Tensor o, "
      "Tensor final_state, Tensor kept)");
  // The gradient of an absent input has no elements. kept: of delta_fwd_kept with the same inputs.
  m.def(
      "delta_bwd(Tensor? d_o, Tensor? d_final, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, "
      "Tensor? initial_state, Tensor? A_log, Tensor? dt_bias, Tensor? cu_seqlens, float scale, bool "
      "qk_l2norm, "
      "int beta_activation, int gate, float gate_bound, bool state_v_first, str? backend=None, Tensor? "
      "kept=None) -> (Tensor dq, "
      "Tensor dk, Tensor dv, "
      "Tensor dbeta, Tensor dg, Tensor d_initial, Tensor dA_log, Tensor ddt_bias)");
  m.def(
      "delta_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor(a!) state, Tensor? read_idx, "
      "Tensor? write_idx, Tensor? A_log, Tensor? dt_bias, float scale, bool qk_l2norm, int beta_activation, "
      "int gate, "
      "float gate_bound, bool state_v_first) -> Tensor");
  // The tokens are run but not written; pending k, u, g (of an earlier call, with accepted) are written
  // first.
  m.def(
      "delta_verify(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor(a!) state, Tensor? "
      "read_idx, "
      "Tensor? write_idx, Tensor? pending_k, Tensor? pending_u, Tensor? pending_g, Tensor? accepted, Tensor? "
      "A_log, Tensor? dt_bias, float scale, bool qk_l2norm, int beta_activation, int gate, float gate_bound, "
      "bool state_v_first) -> (Tensor o, Tensor k, Tensor u, Tensor g)");
  m.def(
      "delta_commit(Tensor(a!) state, Tensor pending_k, Tensor pending_u, Tensor pending_g, Tensor accepted, "
      "Tensor? read_idx, Tensor? write_idx, bool state_v_first) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nearfield, CPU, m) {
  m.impl("delta_fwd", TORCH_BOX(&delta_fwd_cpu));
  m.impl("delta_fwd_states", TORCH_BOX(&delta_fwd_states_cpu));
  m.impl("delta_fwd_kept", TORCH_BOX(&delta_fwd_kept_cpu));
  m.impl("delta_bwd", TORCH_BOX(&delta_bwd_cpu));
  m.impl("delta_step", TORCH_BOX(&delta_step_cpu));
  m.impl("delta_verify", TORCH_BOX(&delta_verify_cpu));
  m.impl("delta_commit", TORCH_BOX(&delta_commit_cpu));
}

}  // namespace nearfield::delta
