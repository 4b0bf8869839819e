// nearfield::delta_step on CUDA: checks, and the choice of the kernel instance.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_DELTA
#include "delta/checks.h"
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

template <class Tag>
constexpr ScalarType kPoolType = std::is_same_v<Tag, bf16> ? ScalarType::BFloat16 : ScalarType::Float;

const std::vector<Instance> kSteps = {
#define INSTANCE(kernel, ...) USE_##kernel(__VA_ARGS__)
#define USE_step_sm80(pool, v_first, dim) \
  {kPoolType<pool>, v_first, dim, &step_sm80<pool, v_first, dim>::run},
#include "delta/instances.def"
#undef INSTANCE
#undef USE_step_sm80
};

const Instance& pick(const char* op, const Tensor& state, const Inputs& x, bool v_first) {
  const Instance* best = nullptr;
  int64_t largest = 0;
  for (const auto& i : kSteps) {
    if (i.pool != state.scalar_type() || i.v_first != v_first) continue;
    largest = std::max<int64_t>(largest, i.key_dim);
    if (i.key_dim >= x.K && (best == nullptr || i.key_dim < best->key_dim)) best = &i;
  }
  STD_TORCH_CHECK(best != nullptr && x.K % 4 == 0 && x.V % 4 == 0, op, ": head dims ", x.K,
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

Tensor delta_step_cuda(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g, Tensor state,
                       OptTensor read_idx, OptTensor write_idx, OptTensor A_log, OptTensor dt_bias,
                       double scale, bool qk_l2norm, int64_t beta_activation, int64_t gate, double gate_bound,
                       bool state_v_first) {
  const char* op = "delta_step";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  const Inputs x = check_given(op, q, k, v, beta, g, std::nullopt, A_log, dt_bias, std::nullopt, options);
  STD_TORCH_CHECK(x.T >= 1 && x.T <= kMaxStep, op, ": q has ", x.T, " tokens, expected 1 to ", kMaxStep);
  check_pool(op, state, x, state_v_first);
  check_slots(op, "read_idx", read_idx, x, 0);
  check_slots(op, "write_idx", write_idx, x, x.T);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Element type = element_of(op, "q", q);
  const Instance& instance = pick(op, state, x, state_v_first);
  Tensor o = new_empty(q, {x.B, x.T, x.HV, x.V}, q.scalar_type());
  if (x.B == 0) return o;
  STD_TORCH_CHECK(defined(read_idx) || state.sizes()[0] >= x.B, op, ": state has ", state.sizes()[0],
                  " slots, but without read_idx ", x.B, " rows need ", x.B);
  check_alignment(op, state);

  StepArgs args{};
  args.batch = x.B, args.tokens = static_cast<int>(x.T);
  args.heads = static_cast<int>(x.H), args.value_heads = static_cast<int>(x.HV);
  args.key_dim = static_cast<int>(x.K), args.value_dim = static_cast<int>(x.V);
  args.gate_dim = defined(g) ? (x.channel_gate ? args.key_dim : 1) : 0;
  args.q = operand(op, "q", q), args.k = operand(op, "k", k), args.v = operand(op, "v", v);
  args.beta = operand(op, "beta", beta);
  if (defined(g)) args.g = operand(op, "g", *g);
  args.A_log = parameter(op, "A_log", A_log, 1);
  args.dt_bias = parameter(op, "dt_bias", dt_bias, x.channel_gate ? x.K : 1);
  args.out_type = type;
  args.o = o.mutable_data_ptr();
  args.scale = static_cast<float>(scale), args.gate_bound = static_cast<float>(gate_bound);
  args.beta_activation = static_cast<BetaActivation>(beta_activation);
  args.gate = static_cast<Gate>(gate);
  args.qk_l2norm = qk_l2norm;
  args.state = state.mutable_data_ptr();
  args.slots = state.sizes()[0], args.slot_stride = state.strides()[0];
  args.read = slot_index(read_idx);
  args.write = defined(write_idx) ? slot_index(write_idx) : args.read;
  args.state_per_token = is_per_token(write_idx);
  args.num_sms = device_info(q.get_device_index()).num_sms;
  const int error = instance.run(args, current_stream(q));
  STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error));
  return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nearfield, CUDA, m) { m.impl("delta_step", TORCH_BOX(&delta_step_cuda)); }

}  // namespace nearfield::delta
#endif
