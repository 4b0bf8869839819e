// nearfield::delta_fwd on CUDA: picks the backend and its kernel instances, allocates scratch, launches
// prepare and state pass.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_DELTA
#include <tuple>

#include "delta/backend.h"
#include "delta/checks.h"
#include "delta/cuda_portable.h"
#include "delta/instances_sm90.h"
#include "delta/sm90.h"
#include "nearfield/device.h"

namespace nearfield::delta {
namespace {

std::tuple<Tensor, Tensor> delta_fwd_cuda(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g,
                                          OptTensor initial_state, OptTensor A_log, OptTensor dt_bias,
                                          OptTensor cu_seqlens, double scale, bool qk_l2norm,
                                          int64_t beta_activation, int64_t gate, double gate_bound,
                                          bool state_v_first, bool output_final_state,
                                          std::optional<std::string> backend) {
  const char* op = "delta_fwd";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Inputs x = check_inputs(op, q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, options);
  const int capability = device_info(q.get_device_index()).capability;
  const bool portable = choose_backend({op, /*backward=*/false, capability, backend}, x).portable;
  Tensor o = token_rows(q, x, {x.B, x.T, x.HV, x.V}, q.scalar_type());
  const std::vector<int64_t> state_shape = x.state_shape(state_v_first);
  if (x.N == 0 || x.T == 0) {
    if (!output_final_state) return {o, new_empty(q, {0}, ScalarType::Float)};
    if (!defined(initial_state)) return {o, new_zeros(q, state_shape, ScalarType::Float)};
    return {o, torch::stable::clone(*x.initial_state)};
  }
  Tensor final_state =
      new_empty(q, output_final_state ? state_shape : std::vector<int64_t>{0}, ScalarType::Float);
  if (portable) {
    portable_forward(op, x, options, o,
                     output_final_state ? static_cast<float*>(final_state.mutable_data_ptr()) : nullptr);
    return {o, final_state};
  }
  const KernelChoice choice = choose_kernels(op, x);
  make_loadable(x);
  const InputsSm90 in = kernel_inputs<void, float>(x, options);
  const Scratch scratch = allocate_scratch(q, in, choice, in.channel_gate);
  void* stream = current_stream(q);
  check_launch(op, choice.prepare({in, scratch.chunks}, stream));
  StatePassArgs pass{in, scratch.chunks};
  pass.o = o.mutable_data_ptr();
  if (output_final_state) pass.final_state = static_cast<float*>(final_state.mutable_data_ptr());
  check_launch(op, choice.state_pass(pass, stream));
  return {o, final_state};
}

}  // namespace
}  // namespace nearfield::delta

STABLE_TORCH_LIBRARY_IMPL(nearfield, CUDA, m) {
  m.impl("delta_fwd", TORCH_BOX(&nearfield::delta::delta_fwd_cuda));
}
#endif
