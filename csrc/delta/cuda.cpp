// nearfield::delta_fwd on CUDA: picks the backend and its kernel instances, allocates scratch, launches
// prepare and state pass.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_DELTA
#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "delta/backend.h"
#include "delta/checks.h"
#include "delta/cuda_portable.h"
#include "delta/instances_sm90.h"
#include "delta/sm90_bwd.h"
#include "nearfield/device.h"

namespace nearfield::delta {
namespace {

// ---- Plan: from shapes alone ----

// How long the walks take, in microseconds on an H100: each launch, and each chunk of a chain, unless the L2
// cache cannot bring the tiles of all chains in that time.
constexpr double kLaunchUs = 7, kBytesPerUs = 4.2e6;
constexpr double kChunkUs = 1.07, kTransitionUs = 0.87;  // with and without output
constexpr double kComposeUs = 5.5, kSpanUs = 1.5;        // a launch, and a span of it
// Clusters: the launch, those that begin where others have ended, and each chunk.
constexpr double kClusterLaunchUs = 5, kClusterUs = 30, kClusterChunkUs = 1.1;
// With what the backward keeps all of it takes longer, and two kernels at least what memory needs.
constexpr double kKeep = 1.3, kKeepInClusters = 1.25, kKeptChunkUs = 0.07;
// To prepare a chunk, times the SMs that do: before the walk, and beside it, where also the walk is slower.
constexpr double kPrepareUs = 2.4, kPrepareWithoutPUs = 1.9, kPrepareBesideUs = 3.3, kChunkBesideUs = 1.55;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  int64_t span_chunks = 0;                        // 0: sequences are not split
  bool prepare_P = true;                          // else the state pass computes P
  int64_t preparing_sms = 0;                      // beside the state pass; 0: all of them, before it
  std::vector<HeadClusterArgs::Part> parts = {};  // for clusters, which do both; empty: not so
};

// So many rows of so many chunks for so many clusters at once: all chunks in a line, cut into pieces at least
// as long as a row. A cluster first takes what its piece has of a row that goes on in the next one, so that
// the rest of that, which the cluster of the next piece takes last, need not wait. Clusters are free in the
// order of these beginnings, so the longest rests come first.
std::vector<HeadClusterArgs::Part> cut_heads(int64_t rows, int64_t chunks, int64_t clusters) {
  std::vector<HeadClusterArgs::Part> parts, rests;
  const int64_t piece = std::max(chunks, ceil_div(rows * chunks, clusters));
  const auto whole = [](int64_t row, int64_t begin, int64_t end) {
    return HeadClusterArgs::Part{static_cast<int>(row), static_cast<int>(begin), static_cast<int>(end), -1,
                                 -1};
  };
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t cut = ceil_div(row * chunks + 1, piece) * piece - row * chunks;  // of the row, if inside
    if (cut >= chunks) {
      rests.push_back(whole(row, 0, chunks));
      continue;
    }
    const int place = static_cast<int>(parts.size());
    parts.push_back(whole(row, 0, cut)), parts.back().to = place;
    rests.push_back(whole(row, cut, chunks)), rests.back().from = place;
  }
  std::stable_sort(rests.begin(), rests.end(),
                   [](const auto& a, const auto& b) { return a.end - a.begin > b.end - b.begin; });
  parts.insert(parts.end(), rests.begin(), rests.end());
  return parts;
}

// A walk is a chain, so few heads leave SMs idle. Split, every span is walked twice, for its transition and,
// from its true state, for the output. That wins where the SMs would be idle otherwise. Packed sequences are
// taken as equally long. Or the walk takes the SMs that it needs, and the others prepare chunks beside it:
// without split sequences, which need all transitions first. Or clusters do both, where heads have two value
// tiles; `clusters` run at once.
Plan make_plan(const InputsSm90& in, int64_t key_dim, int64_t sms, int64_t clusters, bool keep,
               bool states_on_the_way) {
  const int64_t value_tiles = ceil_div(in.value_dim, kImageColumns), key_tiles = key_dim / kImageColumns;
  const int64_t rows = in.sequences * in.value_heads, walks = rows * value_tiles;
  const int64_t chunks = ceil_div(in.cu_seqlens ? ceil_div(in.tokens, in.sequences) : in.tokens, kChunk);
  const auto walk_us = [&](int64_t ctas, int64_t length, bool output) {
    const int64_t key_images = key_tiles * (1 + in.channel_gate + output), images = key_images + 2 + output;
    const double bytes = static_cast<double>(images * kImage * 2 * std::min(ctas, sms));
    const double chunk_us = std::max(output ? kChunkUs : kTransitionUs, bytes / kBytesPerUs);
    return kLaunchUs + static_cast<double>(ceil_div(ctas, sms) * length) * chunk_us;
  };
  Plan plan;
  double best = walk_us(walks, chunks, true);
  for (int64_t spans = 2; spans <= std::min<int64_t>(chunks, 2 * sms); ++spans) {
    const int64_t length = ceil_div(chunks, spans);
    if (ceil_div(chunks, length) != spans) continue;
    const int64_t transitions = rows * ((spans - 1) * value_tiles + (spans - 2) * key_tiles);
    const double compositions = static_cast<double>((spans - 2) * ceil_div(walks * 8, sms));
    const double us = walk_us(transitions, length, false) + kComposeUs + kSpanUs * compositions +
                      walk_us(rows * spans * value_tiles, length, true);
    if (us < best) best = us, plan.span_chunks = length;
  }
  const auto prepare_us = [&](double us, int64_t on) {
    return us * static_cast<double>(rows * chunks) / static_cast<double>(on);
  };
  // P costs a second read of Q, a write and a read. On a full GPU memory is the limit; on others the chain,
  // which a second warpgroup on the SM slows down.
  plan.prepare_P = in.channel_gate || plan.span_chunks > 0 || keep || walks < sms * 3 / 4;
  best += prepare_us(plan.prepare_P ? kPrepareUs : kPrepareWithoutPUs, sms);
  if (keep) best = std::max(best * kKeep, kKeptChunkUs * static_cast<double>(rows * chunks));
  const bool plain = !in.cu_seqlens && !in.channel_gate && !states_on_the_way;
  if (plain && !keep && walks < sms) {
    const double walk = kLaunchUs + kChunkBesideUs * static_cast<double>(chunks);
    const double us = std::max(walk, prepare_us(kPrepareBesideUs, sms - walks));
    if (us < best) best = us, plan = {0, true, sms - walks};
  }
  if (plain && value_tiles == 2 && clusters > 0 && rows <= HeadClusterArgs::kMostParts) {
    std::vector<HeadClusterArgs::Part> parts = cut_heads(rows, chunks, clusters);
    const auto count = static_cast<int64_t>(parts.size());
    const double turns = static_cast<double>(count) / static_cast<double>(clusters);
    const int64_t piece = std::max(chunks, ceil_div(rows * chunks, clusters));
    const double us = kClusterLaunchUs + std::max(turns - 1, 0.) * kClusterUs +
                      static_cast<double>(piece) * kClusterChunkUs;
    if (us * (keep ? kKeepInClusters : 1) < best && count <= HeadClusterArgs::kMostParts)
      plan = {0, true, 0, std::move(parts)};
  }
  return plan;
}

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
