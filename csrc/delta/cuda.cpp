// nearfield::delta_fwd on CUDA: picks the backend and its kernel instances, allocates scratch, launches
// prepare and state pass.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_DELTA
#include <algorithm>
#include <tuple>

#include "delta/backend.h"
#include "delta/checks.h"
#include "delta/cuda_portable.h"
#include "delta/instances_sm90.h"
#include "delta/sm90.h"
#include "nearfield/device.h"

namespace nearfield::delta {
namespace {

// ---- Splitting sequences ----

// Microseconds, as measured on an H100: a chunk of the walk with and without output, a span of the
// composition (while every CTA has an SM), what two more launches cost.
constexpr double kWalkUs = 1.05, kTransitionUs = 0.85, kComposeUs = 1.0, kLaunchesUs = 8;

// The chunks of a span, or 0 if the walks are shorter unsplit. A walk is a chain, so few heads leave SMs
// idle. Split, every span is walked twice, for its transition and, from its true state, for the output: that
// wins where the SMs would be idle otherwise. From shapes alone: packed sequences are taken as equally long.
int64_t choose_span_chunks(const InputsSm90& in, int64_t key_tiles, int64_t sms) {
  if (in.sequences == 0) return 0;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t value_tiles = ceil_div(in.value_dim, kImageColumns);
  const int64_t rows = in.sequences * in.value_heads;
  const int64_t chunks = ceil_div(in.cu_seqlens ? ceil_div(in.tokens, in.sequences) : in.tokens, kChunk);
  const auto waves = [&](int64_t ctas) { return static_cast<double>(ceil_div(ctas, sms)); };
  double best = waves(rows * value_tiles) * static_cast<double>(chunks) * kWalkUs;
  int64_t choice = 0;
  for (int64_t spans = 2; spans <= std::min<int64_t>(chunks, 2 * sms); ++spans) {
    const int64_t length = ceil_div(chunks, spans), parts = ceil_div(chunks, length);
    if (parts != spans) continue;
    const int64_t first_pass = rows * ((spans - 1) * value_tiles + (spans - 2) * key_tiles);
    const double us = static_cast<double>(length) *
                          (waves(first_pass) * kTransitionUs + waves(rows * spans * value_tiles) * kWalkUs) +
                      static_cast<double>(spans - 2) * waves(rows * value_tiles * 8) * kComposeUs +
                      kLaunchesUs;
    if (us < best) best = us, choice = length;
  }
  return choice;
}

// ---- Operator ----

std::tuple<Tensor, Tensor, Tensor> delta_fwd_states_cuda(
    Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g, OptTensor initial_state, OptTensor A_log,
    OptTensor dt_bias, OptTensor cu_seqlens, double scale, bool qk_l2norm, int64_t beta_activation,
    int64_t gate, double gate_bound, bool state_v_first, bool output_final_state, int64_t states_every,
    std::optional<std::string> backend) {
  const char* op = "delta_fwd";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Inputs x = check_inputs(op, q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, options);
  const int capability = device_info(q.get_device_index()).capability;
  const bool portable = choose_backend({op, /*backward=*/false, capability, backend}, x).portable;
  Tensor states = kept_states(op, x, state_v_first, states_every);
  Tensor o = token_rows(q, x, {x.B, x.T, x.HV, x.V}, q.scalar_type());
  const std::vector<int64_t> state_shape = x.state_shape(state_v_first);
  if (x.N == 0 || x.T == 0) {
    if (!output_final_state) return {o, new_empty(q, {0}, ScalarType::Float), states};
    if (!defined(initial_state)) return {o, new_zeros(q, state_shape, ScalarType::Float), states};
    return {o, torch::stable::clone(*x.initial_state), states};
  }
  Tensor final_state =
      new_empty(q, output_final_state ? state_shape : std::vector<int64_t>{0}, ScalarType::Float);
  if (portable) {
    const auto floats = [](bool wanted, const Tensor& t) {
      return wanted ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
    };
    portable_forward(op, x, options, o, floats(output_final_state, final_state),
                     floats(states_every > 0, states), states_every);
    return {o, final_state, states};
  }
  const KernelChoice choice = choose_kernels(op, x);
  make_loadable(x);
  const InputsSm90 in = kernel_inputs<void, float>(x, options);
  Scratch scratch = allocate_scratch(q, in, choice, true);
  void* stream = current_stream(q);
  check_launch(op, choice.prepare({in, scratch.chunks}, stream));
  StatePassArgs pass{in, scratch.chunks};
  if (const int64_t span = choose_span_chunks(in, choice.key.key_dim / kImageColumns,
                                              device_info(q.get_device_index()).num_sms)) {
    pass.span_chunks = span;
    const int64_t values = (x.V + kImageColumns - 1) / kImageColumns * kImageColumns;
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
  if (output_final_state) pass.final_state = static_cast<float*>(final_state.mutable_data_ptr());
  if (states_every > 0) {
    pass.boundary_states = static_cast<float*>(states.mutable_data_ptr());
    pass.boundary_chunks = states_every;
  }
  check_launch(op, choice.state_pass(pass, stream));
  return {o, final_state, states};
}

std::tuple<Tensor, Tensor> delta_fwd_cuda(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g,
                                          OptTensor initial_state, OptTensor A_log, OptTensor dt_bias,
                                          OptTensor cu_seqlens, double scale, bool qk_l2norm,
                                          int64_t beta_activation, int64_t gate, double gate_bound,
                                          bool state_v_first, bool output_final_state,
                                          std::optional<std::string> backend) {
  const auto [o, final_state, states] =
      delta_fwd_states_cuda(q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, scale, qk_l2norm,
                            beta_activation, gate, gate_bound, state_v_first, output_final_state, 0, backend);
  return {o, final_state};
}

}  // namespace
}  // namespace nearfield::delta

STABLE_TORCH_LIBRARY_IMPL(nearfield, CUDA, m) {
  m.impl("delta_fwd", TORCH_BOX(&nearfield::delta::delta_fwd_cuda));
  m.impl("delta_fwd_states", TORCH_BOX(&nearfield::delta::delta_fwd_states_cuda));
}
#endif
