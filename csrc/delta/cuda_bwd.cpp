// nearfield::delta_bwd on CUDA: picks the kernel instances, allocates scratch, launches.
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
#include "delta/sm90_bwd.h"
#include "nearfield/device.h"

namespace nearfield::delta {
namespace {

// ---- Instances: what instances.def lists for the backward ----

constexpr int64_t kKeyDim = kBackwardKeyDim;

struct BackwardInstances {
  using Key = InstancesSm90::Key;
  template <class Args>
  using Entry = InstancesSm90::Entry<Args>;
  std::vector<Entry<ReversePassArgs>> reverse;
  std::vector<Entry<ChunkGradientArgs>> gradient;
  std::vector<Entry<FinishGradientArgs>> finish;

  template <class Tag, int kKeys, bool kChannelGate>
  void add(reverse_pass_sm90<Tag, kKeys, kChannelGate>*) {
    using Kernel = reverse_pass_sm90<Tag, kKeys, kChannelGate>;
    reverse.push_back({{std::is_same_v<Tag, bf16>, kKeys, kChannelGate}, &Kernel::run});
  }
  template <class Tag, int kKeys>
  void add(chunk_gradient_sm90<Tag, kKeys>*) {
    gradient.push_back({{std::is_same_v<Tag, bf16>, kKeys, false}, &chunk_gradient_sm90<Tag, kKeys>::run});
  }
  template <class Tag, int kKeys>
  void add(chunk_gradient_channel_sm90<Tag, kKeys>*) {
    using Kernel = chunk_gradient_channel_sm90<Tag, kKeys>;
    gradient.push_back({{std::is_same_v<Tag, bf16>, kKeys, true}, &Kernel::run});
  }
  template <class Tag>
  void add(finish_gradient_sm90<Tag>*) {
    finish.push_back({{std::is_same_v<Tag, bf16>, 0, false}, &finish_gradient_sm90<Tag>::run});
  }
  void add(const void*) {}

  BackwardInstances() {
#ifdef NEARFIELD_DELTA_SM90
#define INSTANCE(kernel, ...) add(static_cast<kernel<__VA_ARGS__>*>(nullptr));
#include "delta/instances.def"
#undef INSTANCE
#endif
  }
};

struct BackwardChoice {
  KernelChoice prepare;
  int (*reverse)(const ReversePassArgs&, void*);
  int (*gradient)(const ChunkGradientArgs&, void*);
  int (*finish)(const FinishGradientArgs&, void*);
};

BackwardChoice choose_backward(const char* op, const Inputs& x) {
  choose_kernels(op, x);  // what the forward supports
  STD_TORCH_CHECK(x.K <= kKeyDim && x.V <= kMostBackwardValues, op, ": q has ", x.K, " and v ", x.V,
                  " channels; supported on CUDA: up to ", kKeyDim, " and ", kMostBackwardValues);
  static const BackwardInstances instances;
  const bool is_bf16 = x.q.scalar_type() == ScalarType::BFloat16;
  const InstancesSm90::Key key{is_bf16, kKeyDim, x.channel_gate};
  BackwardChoice choice{{key, InstancesSm90::find(InstancesSm90::all().prepare, key),
                         InstancesSm90::find(InstancesSm90::all().state_pass, key)},
                        InstancesSm90::find(instances.reverse, key),
                        InstancesSm90::find(instances.gradient, key),
                        InstancesSm90::find(instances.finish, {is_bf16, 0, false})};
  STD_TORCH_CHECK(choice.prepare.prepare && choice.prepare.state_pass && choice.reverse && choice.gradient &&
                      choice.finish,
                  op, ": this build lacks a kernel for it");
  return choice;
}

// ---- Plan ----

// On an H100, in microseconds: a chunk of the walk, and what a chunk of the gradient beside it costs an SM,
// memory that it takes from the walk included.
constexpr double kWalkUs = 1.7, kGradientUs = 11, kChannelGradientUs = 28;

// How many of 16 pairs of chunks the SMs that the walk leaves free take meanwhile: all, where they nearly
// can.
uint32_t early_pairs(const InputsSm90& in, int64_t sms) {
  const int64_t tiles = (in.value_dim + kImageColumns - 1) / kImageColumns;
  const int64_t heads = in.sequences * in.value_heads, free = std::max<int64_t>(0, sms - heads * tiles);
  const double us = in.channel_gate ? kChannelGradientUs : kGradientUs;
  const double share =
      static_cast<double>(free) * kWalkUs / (us * static_cast<double>(heads * value_blocks(in)));
  return share > 0.6 ? 16 : static_cast<uint32_t>(16 * share);
}

// ---- Operator ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> delta_bwd_cuda(
    OptTensor d_o, OptTensor d_final, Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g,
    OptTensor initial_state, OptTensor A_log, OptTensor dt_bias, OptTensor cu_seqlens, double scale,
    bool qk_l2norm, int64_t beta_activation, int64_t gate, double gate_bound, bool state_v_first,
    std::optional<std::string> backend, OptTensor kept) {
  const char* op = "delta_bwd";
  const Options options{scale, qk_l2norm, beta_activation, gate, gate_bound, state_v_first};
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Inputs x = check_inputs(op, q, k, v, beta, g, initial_state, A_log, dt_bias, cu_seqlens, options);
  check_output_gradients(op, x, options, d_o, d_final);
  const int capability = device_info(q.get_device_index()).capability;
  const bool portable = choose_backend({op, /*backward=*/true, capability, backend}, x).portable;

  const ScalarType type = q.scalar_type(), wide = ScalarType::Float;
  const bool empty = x.N == 0 || x.T == 0;
  const auto absent_or = [&](bool present, const std::vector<int64_t>& shape) {
    if (!present) return allocate(q, {0}, wide);
    return empty ? new_zeros(q, shape, wide) : allocate(q, shape, wide);
  };
  Tensor dq = token_rows(q, x, {x.B, x.T, x.H, x.K}, type);
  Tensor dk = token_rows(q, x, {x.B, x.T, x.H, x.K}, type);
  Tensor dv = token_rows(q, x, {x.B, x.T, x.HV, x.V}, type);
  Tensor dbeta = token_rows(q, x, {x.B, x.T, x.HV}, wide);
  Tensor dg = defined(g) ? token_rows(q, x, x.gate_shape(), wide) : absent_or(false, {});
  Tensor d_initial = absent_or(defined(initial_state), x.state_shape(state_v_first));
  Tensor dA_log = absent_or(defined(A_log), {x.HV});
  Tensor ddt_bias = absent_or(defined(dt_bias), {x.channel_gate ? x.HV * x.K : x.HV});
  if (empty && defined(initial_state) && defined(d_final)) d_initial = torch::stable::clone(*d_final);
  const auto float_or_null = [](bool present, const Tensor& t) {
    return present ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
  };
  STD_TORCH_CHECK(!portable || !defined(kept) || kept->numel() == 0, op,
                  ": kept belongs to the other backend");
  if (!empty && portable) {
    portable_backward(op, x, options, d_o, d_final,
                      {dq, dk, dv, static_cast<float*>(dbeta.mutable_data_ptr()),
                       float_or_null(defined(g), dg), float_or_null(defined(initial_state), d_initial),
                       float_or_null(defined(A_log), dA_log), float_or_null(defined(dt_bias), ddt_bias)});
  } else if (!empty) {
    const BackwardChoice choice = choose_backward(op, x);
    make_loadable(x);
    d_o = defined(d_o) ? loadable(*d_o) : new_zeros(q, {x.B, x.T, x.HV, x.V}, type);
    const InputsSm90 in = kernel_inputs<void, float>(x, options);
    Scratch scratch;
    const bool given = defined(kept) && kept->numel() > 0;
    const int64_t kept_bytes = KeptSm90(in, nullptr).bytes;
    if (given) check_kept(op, *kept, q, kept_bytes);
    KeptSm90 start(in, given ? kept->mutable_data_ptr() : scratch.bytes(q, kept_bytes));
    void* stream = current_stream(q);
    const int64_t sms = device_info(q.get_device_index()).num_sms;
    if (!given) {
      if (!in.channel_gate) {
        allocate_apart(scratch, q, in, false);
        start.chunks.N = scratch.chunks.N;
      }
      const int64_t slots = ChunkSlots(in).total;
      check_launch(op, choice.prepare.prepare({in, start.chunks, slots, static_cast<int>(sms)}, stream));
      StatePassArgs pass{in, start.chunks};
      pass.states = start.states, pass.v_new = start.v_new;
      check_launch(op, choice.prepare.state_pass(pass, stream));
    }

    const int64_t chunks = ChunkSlots(in).total * x.HV;
    const int64_t value_bytes = chunks * ((x.V + kImageColumns - 1) / kImageColumns) * kImage * 2;
    ReversePassArgs pass{in, start.chunks};
    pass.d_o = rows<void>(*d_o);
    pass.d_final = data_or_null<float>(d_final);
    pass.d_states = scratch.bytes(q, value_bytes * (kKeyDim / kImageColumns));
    pass.y = scratch.bytes(q, value_bytes);
    pass.dv = dv.mutable_data_ptr();
    pass.d_initial = float_or_null(defined(initial_state), d_initial);
    scratch.memory.push_back(new_zeros(q, {value_bytes / (kImage * 2)}, ScalarType::Int));
    pass.announced = static_cast<int*>(scratch.memory.back().mutable_data_ptr());
    check_launch(op, choice.reverse(pass, stream));

    ChunkGradientArgs gradient{in, start.chunks.rows, start.chunks.G};
    gradient.d_o = pass.d_o, gradient.dv = rows<void>(dv);
    gradient.y = pass.y, gradient.v_new = start.v_new;
    gradient.announced = pass.announced;
    gradient.early = early_pairs(in, sms);
    gradient.states = start.states, gradient.d_states = pass.d_states;
    gradient.dq = dq.mutable_data_ptr(), gradient.dk = dk.mutable_data_ptr();
    const int64_t blocks = value_blocks(in), rows_of_blocks = x.B * x.T * x.HV * blocks;
    if (x.HV != x.H || blocks > 1) {
      const int64_t bytes = rows_of_blocks * x.K * 4;
      gradient.dq_heads = static_cast<float*>(scratch.bytes(q, bytes));
      gradient.dk_heads = static_cast<float*>(scratch.bytes(q, bytes));
    }
    FinishGradientArgs finish{in};
    finish.dbeta = gradient.dbeta = static_cast<float*>(dbeta.mutable_data_ptr());
    finish.dg = gradient.dg = float_or_null(defined(g), dg);
    if (blocks > 1) {
      const auto rows_of = [&](int64_t width) {
        return static_cast<float*>(scratch.bytes(q, rows_of_blocks * width * 4));
      };
      finish.dbeta_blocks = gradient.dbeta = rows_of(1);
      if (defined(g)) finish.dg_blocks = gradient.dg = rows_of(in.gate_dim());
    }
    if (defined(A_log) || defined(dt_bias)) {
      const auto parts = [&](int64_t n) {
        return static_cast<float*>(scratch.bytes(q, chunks * blocks * n * 4));
      };
      gradient.rate_parts = parts(rate_parts_of(x.channel_gate));
      gradient.bias_parts = parts(bias_parts_of(x.channel_gate) * in.gate_dim());
    }
    check_launch(op, choice.gradient(gradient, stream));

    finish.dq_heads = gradient.dq_heads, finish.dk_heads = gradient.dk_heads;
    finish.dq = gradient.dq, finish.dk = gradient.dk;
    finish.rate_parts = gradient.rate_parts, finish.bias_parts = gradient.bias_parts;
    finish.dA_log = float_or_null(defined(A_log), dA_log);
    finish.ddt_bias = float_or_null(defined(dt_bias), ddt_bias);
    check_launch(op, choice.finish(finish, stream));
  }
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

}  // namespace
}  // namespace nearfield::delta

STABLE_TORCH_LIBRARY_IMPL(nearfield, CUDA, m) {
  m.impl("delta_bwd", TORCH_BOX(&nearfield::delta::delta_bwd_cuda));
}
#endif
