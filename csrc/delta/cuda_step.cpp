// nearfield::delta_step, delta_verify and delta_commit on CUDA: checks, and the choice of the kernel
// instance.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_DELTA
#include "delta/checks.h"
#include "delta/head_cluster_sm90.h"
#include "delta/sm80.h"
#include "delta/sm90_bwd.h"
#include "delta/step.h"
#include "nearfield/device.h"

namespace nearfield::delta {
namespace {

struct Instance {
  ScalarType pool;
  bool v_first;
  int key_dim;
  int (*run)(const StepArgs&, void*);
};

// What instances.def lists; the kernels of other operators drop out.
struct Instances {
  std::vector<Instance> steps;

  template <class Tag, bool kVFirst, int kKeyDim>
  void add(step_sm80<Tag, kVFirst, kKeyDim>*) {
    const auto pool = std::is_same_v<Tag, bf16> ? ScalarType::BFloat16 : ScalarType::Float;
    steps.push_back({pool, kVFirst, kKeyDim, &step_sm80<Tag, kVFirst, kKeyDim>::run});
  }
  void add(const void*) {}

  Instances() {
#define INSTANCE(kernel, ...) add(static_cast<kernel<__VA_ARGS__>*>(nullptr));
#include "delta/instances.def"
#undef INSTANCE
  }
};
const Instances kInstances;

const Instance& pick(const char* op, const Tensor& state, const Inputs& x, bool v_first) {
  const Instance* best = nullptr;
  int64_t largest = 0;
  for (const auto& i : kInstances.steps) {
    if (i.pool != state.scalar_type() || i.v_first != v_first) continue;
    largest = std::max<int64_t>(largest, i.key_dim);
    if (i.key_dim >= x.K && (best == nullptr || i.key_dim < best->key_dim)) best = &i;
  }
  STD_TORCH_CHECK(best != nullptr && x.K % 4 == 0 && x.V % 4 == 0 && x.V <= 1 << 20, op, ": head dims ", x.K,
                  " of q and k and ", x.V, " of v; supported on CUDA: multiples of 4, keys up to ", largest);
  return *best;
}

Element element_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Element::kFp32;
    case ScalarType::BFloat16:
      return Element::kBf16;
    case ScalarType::Half:
      return Element::kFp16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()),
                      "; supported on CUDA: float32, bfloat16, float16");
  }
}

// [B, T, heads] or [B, T, heads, channels].
Operand operand(const char* op, const char* name, const Tensor& t) {
  const auto stride = t.strides();
  return {t.const_data_ptr(), element_of(op, name, t),           stride[0], stride[1],
          stride[2],          stride.size() == 4 ? stride[3] : 0};
}

// [HV] or [HV * channels].
Operand parameter(const char* op, const char* name, const OptTensor& t, int64_t channels) {
  if (!defined(t)) return {};
  const int64_t stride = t->strides()[0];
  return {t->const_data_ptr(), element_of(op, name, *t), 0, 0, stride * channels, channels == 1 ? 0 : stride};
}

SlotIndex slot_index(const OptTensor& t) {
  if (!defined(t)) return {};
  const auto stride = t->strides();
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Long, stride[0],
          stride.size() == 2 ? stride[1] : 0};
}

// The kernel reads and writes four neighbors at a time.
void check_alignment(const char* op, const Tensor& state) {
  const int64_t bytes = state.scalar_type() == ScalarType::Float ? 16 : 8;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(state.data_ptr()) % bytes == 0 &&
                      (state.sizes()[0] <= 1 || state.strides()[0] % 4 == 0),
                  op, ": state is not aligned; supported on CUDA: a start at a multiple of ", bytes,
                  " bytes and a first stride that is a multiple of 4, got ", state.strides()[0]);
}

// One step over the pool: of delta_step, of delta_verify (`next` given) and of delta_commit (no tokens).
// Returns o.
Tensor run_step(const char* op, const Inputs& x, const Options& options, const Tensor& state,
                const OptTensor& read_idx, const OptTensor& write_idx, const PendingTensors& pending,
                const PendingTensors* next) {
  check_pool(op, state, x, options.state_v_first);
  check_slots(op, "read_idx", read_idx, x, 0);
  check_slots(op, "write_idx", write_idx, x, next ? 0 : x.T);
  torch::stable::accelerator::DeviceGuard guard(x.q.get_device_index());
  StepArgs args{};
  args.out_type = element_of(op, "q", x.q);
  const Instance& instance = pick(op, state, x, options.state_v_first);
  Tensor o = allocate(x.q, {x.B, x.T, x.HV, x.V}, x.q.scalar_type());
  if (x.B == 0) return o;
  STD_TORCH_CHECK(defined(read_idx) || state.sizes()[0] >= x.B, op, ": state has ", state.sizes()[0],
                  " slots, but without read_idx ", x.B, " rows need ", x.B);
  check_alignment(op, state);

  args.batch = x.B, args.tokens = static_cast<int>(x.T);
  args.heads = static_cast<int>(x.H), args.value_heads = static_cast<int>(x.HV);
  args.key_dim = static_cast<int>(x.K), args.value_dim = static_cast<int>(x.V);
  args.gate_dim = static_cast<int>(x.gate_dim());
  if (x.T > 0) {
    args.q = operand(op, "q", x.q), args.k = operand(op, "k", x.k), args.v = operand(op, "v", x.v);
    args.beta = operand(op, "beta", x.beta);
    args.g = defined(x.g) ? operand(op, "g", *x.g) : Operand{args.beta.data, args.beta.type, 0, 0, 0, 0};
    args.A_log = parameter(op, "A_log", x.A_log, 1);
    args.dt_bias = parameter(op, "dt_bias", x.dt_bias, x.channel_gate ? x.K : 1);
  }
  args.o = o.mutable_data_ptr();
  args.scale = static_cast<float>(options.scale), args.gate_bound = static_cast<float>(options.gate_bound);
  args.beta_activation = static_cast<BetaActivation>(options.beta_activation);
  args.gate = static_cast<Gate>(options.gate);
  args.qk_l2norm = options.qk_l2norm;
  args.state = state.mutable_data_ptr();
  args.slots = state.sizes()[0], args.slot_stride = state.strides()[0];
  args.read = slot_index(read_idx);
  args.write = defined(write_idx) ? slot_index(write_idx) : args.read;
  args.state_per_token = is_per_token(write_idx);
  args.pending = pending.view<float>();
  if (pending.tokens > 0) args.accepted = slot_index(pending.accepted);
  args.write_replayed = pending.tokens > 0, args.write_tokens = !next;
  if (next) args.next = next->view<float>();
  args.num_sms = device_info(x.q.get_device_index()).num_sms;
  const int error = instance.run(args, current_stream(x.q));
  STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error));
  return o;
}

Tensor delta_step_cuda(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g, Tensor state,
                       OptTensor read_idx, OptTensor write_idx, OptTensor A_log, OptTensor dt_bias,
                       double scale, bool qk_l2norm, int64_t beta_activation, int64_t gate, double gate_bound,
                       bool state_v_first) {
  const char* op = "delta_step";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  const Inputs x = check_given(op, q, k, v, beta, g, std::nullopt, A_log, dt_bias, std::nullopt, options);
  check_step_tokens(op, x);
  return run_step(op, x, options, state, read_idx, write_idx, {}, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> delta_verify_cuda(
    Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g, Tensor state, OptTensor read_idx,
    OptTensor write_idx, OptTensor pending_k, OptTensor pending_u, OptTensor pending_g, OptTensor accepted,
    OptTensor A_log, OptTensor dt_bias, double scale, bool qk_l2norm, int64_t beta_activation, int64_t gate,
    double gate_bound, bool state_v_first) {
  const char* op = "delta_verify";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  const Inputs x = check_given(op, q, k, v, beta, g, std::nullopt, A_log, dt_bias, std::nullopt, options);
  check_step_tokens(op, x);
  const PendingTensors pending = check_pending(op, pending_k, pending_u, pending_g, accepted, x);
  const PendingTensors next = new_pending(x);
  Tensor o = run_step(op, x, options, state, read_idx, write_idx, pending, &next);
  return {o, next.k, next.u, next.g};
}

void delta_commit_cuda(Tensor state, Tensor pending_k, Tensor pending_u, Tensor pending_g, Tensor accepted,
                       OptTensor read_idx, OptTensor write_idx, bool state_v_first) {
  const char* op = "delta_commit";
  const Inputs x = commit_inputs(op, pending_k, pending_u, pending_g);
  const PendingTensors pending = check_pending(op, pending_k, pending_u, pending_g, accepted, x);
  run_step(op, x, Options{1, false, 0, 0, 0, state_v_first}, state, read_idx, write_idx, pending, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearfield, CUDA, m) {
  m.impl("delta_step", TORCH_BOX(&delta_step_cuda));
  m.impl("delta_verify", TORCH_BOX(&delta_verify_cuda));
  m.impl("delta_commit", TORCH_BOX(&delta_commit_cuda));
}

}  // namespace nearfield::delta
#endif
