// nearfield::delta_fwd on CUDA: picks the backend and its kernel instances, allocates scratch, launches
// prepare and state pass.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_DELTA
#include <algorithm>
#include <tuple>
#include <vector>

#include "delta/backend.h"
#include "delta/checks.h"
#include "delta/cuda_portable.h"
#include "delta/instances_sm90.h"
#include "delta/plan_sm90.h"
#include "delta/sm90_bwd.h"
#include "nearfield/device.h"

namespace nearfield::delta {
namespace {

// ---- Operator ----

struct Results {
  Tensor o, final_state;
  Tensor states;  // with states_every
  Tensor kept;    // for the backward
};

Results forward(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g, OptTensor initial_state,
                OptTensor A_log, OptTensor dt_bias, OptTensor cu_seqlens, double scale, bool qk_l2norm,
                int64_t beta_activation, int64_t gate, double gate_bound, bool state_v_first,
                bool output_final_state, std::optional<std::string> backend, int64_t states_every,
                bool keep) {
  const char* op = "delta_fwd";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Inputs x = check_inputs(op, q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, options);
  const int capability = device_info(q.get_device_index()).capability;
  const Request request{op, /*backward=*/false, capability, backend};
  const bool portable = choose_backend(request, x).portable;
  keep = keep && keeps_for_backward(request, x);
  Tensor states = kept_states(op, x, state_v_first, states_every);
  Tensor kept = allocate(q, {0}, ScalarType::Byte);
  Tensor o = token_rows(q, x, {x.B, x.T, x.HV, x.V}, q.scalar_type());
  const std::vector<int64_t> state_shape = x.state_shape(state_v_first);
  if (x.N == 0 || x.T == 0) {
    if (!output_final_state) return {o, allocate(q, {0}, ScalarType::Float), states, kept};
    if (!defined(initial_state)) return {o, new_zeros(q, state_shape, ScalarType::Float), states, kept};
    return {o, torch::stable::clone(*x.initial_state), states, kept};
  }
  Tensor final_state =
      allocate(q, output_final_state ? state_shape : std::vector<int64_t>{0}, ScalarType::Float);
  if (portable) {
    const auto floats = [](bool wanted, const Tensor& t) {
      return wanted ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
    };
    portable_forward(op, x, options, o, floats(output_final_state, final_state),
                     floats(states_every > 0, states), states_every);
    return {o, final_state, states, kept};
  }
  const KernelChoice choice = choose_kernels(op, x, keep ? kBackwardKeyDim : 0);
  make_loadable(x);
  const InputsSm90 in = kernel_inputs<void, float>(x, options);
  const int64_t sms = device_info(q.get_device_index()).num_sms;
  const int64_t clusters = choice.head_cluster.at_once != nullptr ? choice.head_cluster.at_once() : 0;
  const Plan plan = make_plan(in, choice.key.key_dim, sms, clusters, keep, states_every > 0);

  Scratch scratch;
  void *entering = nullptr, *v_new = nullptr;
  if (keep) {
    kept = allocate(q, {KeptSm90(in, nullptr).bytes}, ScalarType::Byte);
    const KeptSm90 parts(in, kept.mutable_data_ptr());
    scratch.chunks = parts.chunks, entering = parts.states, v_new = parts.v_new;
  } else if (plan.parts.empty()) {
    scratch = allocate_scratch(q, in, choice, plan.prepare_P);
  }
  allocate_low_halves(scratch, q, in, choice, plan.prepare_P);
  void* stream = current_stream(q);
  int* ready = nullptr;
  const int64_t slots = ChunkSlots(in).total;
  if (plan.preparing_sms > 0) {
    scratch.memory.push_back(new_zeros(q, {slots * x.HV}, ScalarType::Int));
    ready = static_cast<int*>(scratch.memory.back().mutable_data_ptr());
  }
  const auto preparing = static_cast<int>(plan.preparing_sms > 0 ? plan.preparing_sms : sms);
  if (plan.parts.empty())
    check_launch(op, choice.prepare({in, scratch.chunks, slots, preparing, ready}, stream));
  StatePassArgs pass{in, scratch.chunks, ready, slots};
  if (const int64_t span = plan.span_chunks) {
    pass.span_chunks = span;
    const int64_t values = ceil_div(x.V, kImageColumns) * kImageColumns;
    const int64_t rows = Spans(in, span).total * x.HV, key_dim = choice.key.key_dim;
    const auto floats = [&](int64_t n) { return static_cast<float*>(scratch.bytes(q, n * 4)); };
    float* states = floats(rows * values * key_dim);
    pass.transitions = floats(rows * (values + key_dim) * key_dim);
    check_launch(op, choice.state_pass(pass, stream));
    check_launch(op, choice.compose_spans({in, span, pass.transitions, states}, stream));
    pass.transitions = nullptr;
    pass.span_states = states;
  }
  pass.o = o.mutable_data_ptr();
  pass.states = entering, pass.v_new = v_new;
  if (output_final_state) pass.final_state = static_cast<float*>(final_state.mutable_data_ptr());
  if (states_every > 0) {
    pass.boundary_states = static_cast<float*>(states.mutable_data_ptr());
    pass.boundary_chunks = states_every;
  }
  if (!plan.parts.empty()) {
    HeadClusterArgs args{pass};
    std::copy(plan.parts.begin(), plan.parts.end(), args.parts);
    args.num_parts = static_cast<int>(plan.parts.size());
    const int64_t handed = std::count_if(plan.parts.begin(), plan.parts.end(),
                                         [](const HeadClusterArgs::Part& p) { return p.to >= 0; });
    if (handed > 0) {
      const int64_t tiles = ceil_div(x.V, kImageColumns);
      args.handed_states =
          static_cast<float*>(scratch.bytes(q, handed * tiles * kImageColumns * choice.key.key_dim * 4));
      scratch.memory.push_back(new_zeros(q, {handed * tiles}, ScalarType::Int));
      args.handed = static_cast<int*>(scratch.memory.back().mutable_data_ptr());
    }
    check_launch(op, choice.head_cluster.run(args, stream));
  } else {
    check_launch(op, choice.state_pass(pass, stream));
  }
  return {o, final_state, states, kept};
}

std::tuple<Tensor, Tensor, Tensor> delta_fwd_states_cuda(
    Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g, OptTensor initial_state, OptTensor A_log,
    OptTensor dt_bias, OptTensor cu_seqlens, double scale, bool qk_l2norm, int64_t beta_activation,
    int64_t gate, double gate_bound, bool state_v_first, bool output_final_state, int64_t states_every,
    std::optional<std::string> backend) {
  const Results r =
      forward(q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, scale, qk_l2norm, beta_activation,
              gate, gate_bound, state_v_first, output_final_state, backend, states_every, false);
  return {r.o, r.final_state, r.states};
}

std::tuple<Tensor, Tensor, Tensor> delta_fwd_kept_cuda(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g,
                                                       OptTensor initial_state, OptTensor A_log,
                                                       OptTensor dt_bias, OptTensor cu_seqlens, double scale,
                                                       bool qk_l2norm, int64_t beta_activation, int64_t gate,
                                                       double gate_bound, bool state_v_first,
                                                       bool output_final_state,
                                                       std::optional<std::string> backend) {
  const Results r =
      forward(q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, scale, qk_l2norm, beta_activation,
              gate, gate_bound, state_v_first, output_final_state, backend, 0, true);
  return {r.o, r.final_state, r.kept};
}

std::tuple<Tensor, Tensor> delta_fwd_cuda(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g,
                                          OptTensor initial_state, OptTensor A_log, OptTensor dt_bias,
                                          OptTensor cu_seqlens, double scale, bool qk_l2norm,
                                          int64_t beta_activation, int64_t gate, double gate_bound,
                                          bool state_v_first, bool output_final_state,
                                          std::optional<std::string> backend) {
  const Results r =
      forward(q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, scale, qk_l2norm, beta_activation,
              gate, gate_bound, state_v_first, output_final_state, backend, 0, false);
  return {r.o, r.final_state};
}

}  // namespace
}  // namespace nearfield::delta

STABLE_TORCH_LIBRARY_IMPL(nearfield, CUDA, m) {
  m.impl("delta_fwd", TORCH_BOX(&nearfield::delta::delta_fwd_cuda));
  m.impl("delta_fwd_kept", TORCH_BOX(&nearfield::delta::delta_fwd_kept_cuda));
  m.impl("delta_fwd_states", TORCH_BOX(&nearfield::delta::delta_fwd_states_cuda));
}
#endif
