// nearfield::delta_fwd on CUDA: picks the backend and its kernel instances, allocates scratch, launches
// prepare and state pass.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_DELTA
#include <algorithm>
#include <optional>
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

// ---- Some value heads of one sequence ----

// The last `count` value heads of the last sequence, as a whole by themselves: views of the same memory. Not
// packed, a gate per head, elements of 16 bit, whole groups of value heads.
struct LastHeads {
  const InputsSm90& all;
  int64_t count, head, sequence;
  int64_t token, chunk;  // the first, among [B, T, HV] and [slot][value head]

  LastHeads(const InputsSm90& in, int64_t count)
      : all(in), count(count), head(in.value_heads - count), sequence(in.sequences - 1) {
    token = sequence * in.tokens * in.value_heads + head;
    chunk = sequence * ChunkSlots(in).per_sequence * in.value_heads + head;
  }

  ForwardInputsSm90 inputs() const {
    ForwardInputsSm90 in = all;
    const int64_t group = all.value_heads / all.heads;
    const auto from = [&](Rows<void>& rows, int64_t first_head) {
      rows.data = static_cast<const uint16_t*>(rows.data) + sequence * rows.batch + first_head * rows.head;
    };
    in.batch = in.sequences = 1, in.value_heads = count, in.heads = count / group;
    from(in.q, head / group), from(in.k, head / group), from(in.v, head);
    in.beta += token;
    if (in.g != nullptr) in.g += token;
    if (in.A_log != nullptr) in.A_log += head;
    if (in.dt_bias != nullptr) in.dt_bias += head;
    in.initial_state = state(in.initial_state);
    return in;
  }
  template <class T>
  T* state(T* states) const {
    return states == nullptr ? nullptr : states + (sequence * all.value_heads + head) * all.state_size();
  }
  void* output(void* o) const { return static_cast<uint16_t*>(o) + token * all.value_dim; }
  void* images(void* of_chunks, int64_t per_chunk) const {
    return of_chunks == nullptr ? nullptr : static_cast<uint16_t*>(of_chunks) + chunk * per_chunk * kImage;
  }
  ChunkScratch scratch(ChunkScratch s) const {
    s.rows += chunk;
    for (void** image : {&s.N, &s.P, &s.NP, &s.N_low, &s.P_low}) *image = images(*image, 1);
    if (s.hard != nullptr) s.hard += chunk;
    return s;
  }
};

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

  Scratch scratch, own;  // own: of the heads that are not for clusters
  void *entering = nullptr, *v_new = nullptr;
  if (keep) {
    kept = allocate(q, {KeptSm90(in, nullptr).bytes}, ScalarType::Byte);
    const KeptSm90 parts(in, kept.mutable_data_ptr());
    scratch.chunks = parts.chunks, entering = parts.states, v_new = parts.v_new;
    // For the last heads, too, which have their places among all.
    if (!in.channel_gate && (plan.clusters.empty() || plan.rest > 0)) allocate_apart(scratch, q, in, true);
  } else if (plan.clusters.empty()) {
    scratch = allocate_scratch(q, in, choice, plan.prepare_P);
  }
  allocate_low_halves(scratch, q, in, choice, plan.prepare_P);
  void* stream = current_stream(q);
  const auto zeros = [&](int64_t n) {
    scratch.memory.push_back(new_zeros(q, {n}, ScalarType::Int));
    return static_cast<int*>(scratch.memory.back().mutable_data_ptr());
  };
  std::optional<SideStream> beside;  // of the clusters
  StatePassArgs pass{in, scratch.chunks};
  pass.o = o.mutable_data_ptr();
  pass.states = entering, pass.v_new = v_new;
  if (output_final_state) pass.final_state = static_cast<float*>(final_state.mutable_data_ptr());
  if (states_every > 0) {
    pass.boundary_states = static_cast<float*>(states.mutable_data_ptr());
    pass.boundary_chunks = states_every;
  }
  if (!plan.clusters.empty()) {
    HeadClusterArgs args{pass};
    int64_t handed = 0;
    int count = 0;
    for (const auto& parts : plan.clusters) {
      args.first_part[args.clusters++] = count;
      for (const HeadClusterArgs::Part& part : parts) args.parts[count++] = part, handed += part.to >= 0;
    }
    args.first_part[args.clusters] = count;
    if (handed > 0) {
      const int64_t tiles = ceil_div(x.V, kImageColumns);
      args.handed_states =
          static_cast<float*>(scratch.bytes(q, handed * tiles * kImageColumns * choice.key.key_dim * 4));
      args.handed = zeros(handed * tiles);
    }
    if (plan.rest > 0) {
      const LastHeads rest(in, plan.rest);
      pass.in = rest.inputs();
      pass.o = rest.output(pass.o), pass.final_state = rest.state(pass.final_state);
      if (keep) {
        const int64_t tiles = ceil_div(x.V, kImageColumns);
        pass.scratch = rest.scratch(scratch.chunks);
        pass.states = rest.images(entering, tiles * (choice.key.key_dim / kImageColumns));
        pass.v_new = rest.images(v_new, tiles);
      } else {
        own = allocate_scratch(q, pass.in, choice, plan.prepare_P);
        allocate_low_halves(own, q, pass.in, choice, plan.prepare_P);
        pass.scratch = own.chunks, pass.in.slot_heads = plan.rest;
      }
      beside.emplace(stream);
    }
    check_launch(op, choice.head_cluster.run(args, stream, beside ? beside->event() : nullptr));
    if (!beside) return {o, final_state, states, kept};
    check_launch(op, beside->wait());
    stream = beside->stream();
  }

  PrepareArgs prepare{pass.in, pass.scratch, ChunkSlots(pass.in).total};
  prepare.ctas = static_cast<int>(plan.preparing_sms > 0 ? plan.preparing_sms : sms);
  if (plan.preparing_sms > 0 && !beside) prepare.ready = zeros(prepare.slots * x.HV);
  check_launch(op, choice.prepare(prepare, stream));
  pass.ready = prepare.ready, pass.slots = prepare.slots;
  if (const int64_t span = pass.span_chunks = plan.span_chunks) {
    const int64_t values = ceil_div(x.V, kImageColumns) * kImageColumns;
    const int64_t rows = Spans(pass.in, span).total * pass.in.value_heads, key_dim = choice.key.key_dim;
    const auto floats = [&](int64_t n) { return static_cast<float*>(scratch.bytes(q, n * 4)); };
    StatePassArgs transitions{pass.in, pass.scratch};
    transitions.span_chunks = span;
    transitions.transitions = floats(rows * (values + key_dim) * key_dim);
    float* states = floats(rows * values * key_dim);
    check_launch(op, choice.state_pass(transitions, stream));
    check_launch(op, choice.compose_spans({pass.in, span, transitions.transitions, states}, stream));
    pass.span_states = states;
  }
  check_launch(op, choice.state_pass(pass, stream));
  if (beside) check_launch(op, beside->join());
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
