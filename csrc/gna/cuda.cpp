// nearfield::gna_fwd and gna_bwd on CUDA: checks, allocation, and the steps of the plan one after the other.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_GNA
#include <algorithm>
#include <utility>

#include "gna/dbias_sm90.h"
#include "gna/plan.h"
#include "nearfield/device.h"

namespace nearfield::gna {
namespace {

// Multiprocessors that sum statistics while the others multiply: each reads about 70 GB/s.
int stats_ctas(int num_sms) { return std::max(1, num_sms / 33); }

// ---- Instances: what instances.def lists ----

template <class Args>
struct Instance {
  bool portable;
  ScalarType dtype;
  int head_dim;
  int (*run)(const Args&, void*);
};

#ifdef NEARFIELD_GNA_SM90
#define HOPPER(kernel, element, dim) \
  {false, dtype_of<element>, dim,    \
   [](const auto& args, void* stream) { return kernel<element, dim>::run(args, stream); }},
#else
#define HOPPER(kernel, element, dim)
#endif
#define PORTABLE(kernel, element, dim) {true, dtype_of<element>, dim, &portable_sm80<element, dim>::kernel},

// The list is read once per kernel; each reading drops the lines of the others.
#define INSTANCE(kernel, ...) USE_##kernel(__VA_ARGS__)
#define USE_bwd_ends_sm80(element)
#define USE_bwd_sm90(element, dim)
#define USE_bwd_dq_sm90(element, dim)
#define USE_bwd_dbias_sm90(element, dim)

#define USE_fwd_sm90(element, dim) HOPPER(fwd_sm90, element, dim)
#define USE_portable_sm80(element, dim) PORTABLE(fwd, element, dim)
const std::vector<Instance<FwdSm90Args>> kForward = {
#include "gna/instances.def"
};
#undef USE_fwd_sm90
#undef USE_portable_sm80
#define USE_fwd_sm90(element, dim)

#undef USE_bwd_sm90
#define USE_bwd_sm90(element, dim) HOPPER(bwd_sm90, element, dim)
#define USE_portable_sm80(element, dim) PORTABLE(bwd_dkv, element, dim)
const std::vector<Instance<BwdSm80Args>> kKeys = {
#include "gna/instances.def"
};
#undef USE_bwd_sm90
#undef USE_portable_sm80
#define USE_bwd_sm90(element, dim)

#undef USE_bwd_dq_sm90
#define USE_bwd_dq_sm90(element, dim) HOPPER(bwd_dq_sm90, element, dim)
#define USE_portable_sm80(element, dim) PORTABLE(bwd_dq, element, dim)
const std::vector<Instance<BwdSm80Args>> kQueries = {
#include "gna/instances.def"
};
#undef USE_bwd_dq_sm90
#undef USE_portable_sm80
#define USE_bwd_dq_sm90(element, dim)

#undef USE_bwd_dbias_sm90
#define USE_bwd_dbias_sm90(element, dim) HOPPER(bwd_dbias_sm90, element, dim)
#define USE_portable_sm80(element, dim) PORTABLE(bwd_dbias, element, dim)
const std::vector<Instance<BwdSm80Args>> kBias = {
#include "gna/instances.def"
};
#undef INSTANCE
#undef HOPPER
#undef PORTABLE

// Runs the instance that a step names.
template <class Args>
int run(const std::vector<Instance<Args>>& instances, const Step& step, ScalarType dtype, const Args& args,
        void* stream) {
  for (const auto& i : instances) {
    if (i.portable == step.portable && i.dtype == dtype && i.head_dim == step.head_dim) {
      return i.run(args, stream);
    }
  }
  STD_TORCH_CHECK(false, "the plan names an instance that is not in instances.def");
}

// Calls f with the bwd_ends_sm80 of a type.
template <class F>
int with_ends(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) return f(bwd_ends_sm80<bf16>{});
  if (dtype == ScalarType::Half) return f(bwd_ends_sm80<fp16>{});
  return f(bwd_ends_sm80<fp32>{});
}

// ---- Tensors ----

// The tensor itself if the copy engine can read it, else a copy.
Tensor loadable(const Tensor& t) {
  if (is_loadable(t)) return t;
  Tensor copy = allocate(t, shape_of(t));
  return torch::stable::copy_(copy, t);
}

template <class T>
Tokens<const void> untyped(const Tokens<T>& t) {
  return {t.data, t.batch, {t.x[0], t.x[1], t.x[2]}, t.head};
}

template <class T>
void move(Tokens<T>& t, int64_t elements, int element_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  t.data = reinterpret_cast<T*>(reinterpret_cast<Byte*>(t.data) + elements * element_bytes);
}

// Moves a view to the heads of a step: first, first + step, .. This is all for additional tokens: they lie on
// a line of their own, outside the dilation groups.
template <class T>
void enter_heads(const Step& step, Tokens<T>& t, int64_t first, int element_bytes) {
  move(t, first * t.head, element_bytes);
  t.head *= step.heads.step;
}

// Moves a view of the grid to the heads and the dilation group of a step.
template <class T>
void enter(const Step& step, Tokens<T>& t, int64_t first_head, int element_bytes) {
  enter_heads(step, t, first_head, element_bytes);
  for (int d = 0; d < 3; ++d) {
    move(t, step.first[d] * t.x[d], element_bytes);
    t.x[d] *= step.distance[d];
  }
}

// ---- Forward ----

// Of inputs that fit together.
std::tuple<Tensor, Tensor> forward(const char* op, const Call& call, Tensor q, Tensor k, Tensor v,
                                   OptionalTensor additional_k, OptionalTensor additional_v, double scale,
                                   const std::optional<std::string>& backend, OptionalTensor bias,
                                   const Descales& descale, ScalarType out_dtype) {
  const Problem& p = call.whole;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const DeviceInfo device = device_info(q.get_device_index());
  STD_TORCH_CHECK(scale > 0, op, ": scale is ", scale, ", expected a positive number on CUDA");
  const ScalarType dtype = q.scalar_type();
  const Plan plan = plan_forward({op, dtype, device.capability, backend}, call);

  auto shape = shape_of(q);
  shape.back() = p.dim_v;
  Tensor out = allocate(q, shape, out_dtype);
  shape.pop_back();
  Tensor lse = allocate(q, shape, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};

  const auto input = plan.portable ? readable : loadable;
  q = input(q), k = input(k), v = input(v);
  FwdSm90Args args{};
  args.scale = static_cast<float>(scale);
  args.q = untyped(tokens_of<const char>(q, p.rank));
  args.k = untyped(tokens_of<const char>(k, p.rank));
  args.v = untyped(tokens_of<const char>(v, p.rank));
  if (p.additional > 0) {
    additional_k = input(*additional_k), additional_v = input(*additional_v);
    args.add_k = untyped(tokens_of<const char>(*additional_k, 1));
    args.add_v = untyped(tokens_of<const char>(*additional_v, 1));
  }
  if (call.biased) {
    bias = torch::stable::contiguous(*bias);
    args.bias = call.bias(static_cast<const float*>(bias->data_ptr()));
  }
  args.out = tokens_of<void>(out, p.rank);
  args.lse = tokens_of<float>(lse, p.rank, false);
  args.descale = descale;
  args.out_is_fp16 = out_dtype == ScalarType::Half;
  Tensor next_work = allocate(q, {1}, ScalarType::Int);
  args.next_work = static_cast<int*>(next_work.data_ptr());
  args.num_sms = device.num_sms;
  void* stream = current_stream(q);

  for (const Step& step : plan.steps) {
    FwdSm90Args launch = args;
    launch.problem = step.problem;
    launch.q_box = step.tiles.q;
    launch.kv_box = step.tiles.kv;
    launch.wide = step.wide;
    const int64_t head = step.heads.first, head_kv = step.heads.first_kv;
    const int bytes = element_bytes(dtype);
    enter(step, launch.q, head, bytes);
    for (auto* t : {&launch.k, &launch.v}) enter(step, *t, head_kv, bytes);
    for (auto* t : {&launch.add_k, &launch.add_v}) enter_heads(step, *t, head_kv, bytes);
    for (auto* t : {&launch.descale.q, &launch.descale.k, &launch.descale.v})
      enter_heads(step, *t, head_kv, sizeof(float));
    enter(step, launch.out, head, element_bytes(out_dtype));
    enter(step, launch.lse, head, sizeof(float));
    launch.bias = args.bias.heads(step.heads);
    const int error = run(kForward, step, dtype, launch, stream);
    STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error));
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor> fwd_cuda(Tensor q, Tensor k, Tensor v, OptionalTensor additional_k,
                                    OptionalTensor additional_v, Ints kernel_size, Ints stride, Ints dilation,
                                    Ints is_causal, double scale, std::optional<std::string> backend,
                                    OptionalTensor bias) {
  const char* op = "gna_fwd";
  const Call call =
      check_call(op, q, k, v, additional_k, additional_v, kernel_size, stride, dilation, is_causal, bias);
  STD_TORCH_CHECK(q.scalar_type() != ScalarType::Float8_e4m3fn, op,
                  ": q has dtype Float8_e4m3fn; supported by gna_fwd_8bit");
  return forward(op, call, q, k, v, additional_k, additional_v, scale, backend, bias, {}, q.scalar_type());
}

std::tuple<Tensor, Tensor> fwd_8bit_cuda(Tensor q, Tensor k, Tensor v, OptionalTensor q_descale,
                                         OptionalTensor k_descale, OptionalTensor v_descale, Ints kernel_size,
                                         Ints stride, Ints dilation, Ints is_causal, double scale,
                                         ScalarType out_dtype) {
  const char* op = "gna_fwd_8bit";
  const Call call = check_call(op, q, k, v, {}, {}, kernel_size, stride, dilation, is_causal, {});
  check_8bit(op, call, q, q_descale, k_descale, v_descale, out_dtype);
  const Descales descale{descale_of(q_descale), descale_of(k_descale), descale_of(v_descale)};
  return forward(op, call, q, k, v, {}, {}, scale, {}, {}, descale, out_dtype);
}

// ---- Backward ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd_cuda(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor additional_k, OptionalTensor additional_v, Ints kernel_size, Ints stride, Ints dilation,
    Ints is_causal, double scale, bool deterministic, std::optional<std::string> backend, OptionalTensor bias,
    bool bias_gradient) {
  const char* op = "gna_bwd";
  const Call call =
      check_call(op, q, k, v, additional_k, additional_v, kernel_size, stride, dilation, is_causal, bias);
  const Problem& p = call.whole;
  check_gradients(op, p, q, dout, dlse, out, lse);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const DeviceInfo device = device_info(q.get_device_index());
  STD_TORCH_CHECK(scale > 0, op, ": scale is ", scale, ", expected a positive number on CUDA");
  const ScalarType dtype = q.scalar_type();
  const Plan plan =
      plan_backward({op, dtype, device.capability, backend}, call, deterministic, bias_gradient);
  const bool with_additional = p.additional > 0;

  Tensor dq = allocate(q, shape_of(q)), dk = allocate(q, shape_of(k));
  Tensor dv = allocate(q, shape_of(v));
  Tensor add_dk = allocate(q, with_additional ? shape_of(*additional_k) : Ints{0});
  Tensor add_dv = allocate(q, with_additional ? shape_of(*additional_v) : Ints{0});
  Tensor dbias;
  if (plan.bias_parts > 0)
    dbias = torch::stable::new_zeros(q, {plan.bias_parts, plan.bias_elements}, ScalarType::Float);
  const auto summed_bias = [&] {
    if (plan.bias_parts == 0) return allocate(q, {0}, ScalarType::Float);
    return torch::stable::reshape(torch::stable::sum(dbias, Ints{0}), shape_of(*bias));
  };
  if (lse.numel() == 0) return {dq, dk, dv, add_dk, add_dv, summed_bias()};

  void* stream = current_stream(q);
  const auto check = [&](int error) { STD_TORCH_CHECK(error == 0, op, ": ", cuda_error_string(error)); };

  const auto input = plan.portable ? readable : loadable;
  q = input(q), k = input(k), v = input(v);
  dout = input(torch::stable::contiguous(dout));
  lse = torch::stable::contiguous(lse);
  if (defined(dlse)) dlse = torch::stable::contiguous(*dlse);
  Tensor stats = allocate(q, {plan.stats_rows * 2}, ScalarType::Float);

  BwdSm80Args args{};
  args.scale = static_cast<float>(scale);
  args.q = untyped(tokens_of<const char>(q, p.rank));
  args.k = untyped(tokens_of<const char>(k, p.rank));
  args.v = untyped(tokens_of<const char>(v, p.rank));
  args.dout = untyped(tokens_of<const char>(dout, p.rank));
  args.stats = tokens_of<const RowStats>(lse, p.rank, false);  // one pair per row of lse
  args.stats.data = static_cast<const RowStats*>(stats.data_ptr());
  StatsArgs rows{dout.data_ptr(),
                 out.data_ptr(),
                 static_cast<const float*>(lse.data_ptr()),
                 defined(dlse) ? static_cast<const float*>(dlse->data_ptr()) : nullptr,
                 p.tokens(),
                 p.heads,
                 p.heads_kv,
                 p.dim_v,
                 static_cast<RowStats*>(stats.data_ptr()),
                 plan.stats_beside && reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0};
  const int64_t units = p.batch * p.heads_kv;
  int64_t first_units = units;  // whose statistics come before the products
  if (rows.by_head) {
    args.stats.head = stats_of_head(p.tokens()), args.stats.batch = p.heads * args.stats.head;
    for (int64_t d = 2, step = 1; d >= 0; step *= p.size[d--]) args.stats.x[d] = step;
    for (const Step& step : plan.steps) {
      if (step.kernel == Kernel::kKeys) first_units = units_of_first_tiles(step, device.num_sms);
    }
    if (first_units < units)
      args.stats_units = static_cast<int>(first_units), args.stats_ctas = stats_ctas(device.num_sms);
  }
  args.dk = tokens_of<void>(dk, p.rank);
  args.dv = tokens_of<void>(dv, p.rank);
  args.dq_out = tokens_of<void>(dq, p.rank);
  Tensor next_work = allocate(q, {plan.counters}, ScalarType::Int);
  args.next_work = static_cast<int*>(next_work.data_ptr());
  args.num_sms = device.num_sms;
  if (with_additional) {
    additional_k = input(*additional_k), additional_v = input(*additional_v);
    args.add_k = untyped(tokens_of<const char>(*additional_k, 1));
    args.add_v = untyped(tokens_of<const char>(*additional_v, 1));
  }
  if (call.biased) {
    bias = torch::stable::contiguous(*bias);
    args.bias = call.bias(static_cast<const float*>(bias->data_ptr()));
    if (plan.bias_parts > 0)
      args.dbias = {call.bias(static_cast<float*>(dbias.data_ptr())), plan.bias_elements, plan.bias_parts};
  }
  Tensor buffer;
  if (plan.dq_elements > 0) {
    buffer = allocate(q, {plan.dq_elements}, ScalarType::Float);
    args.dq = static_cast<float*>(buffer.data_ptr());
  }

  bool counters_cleared = false;  // for the next launch
  for (const Step& step : plan.steps) {
    BwdSm80Args launch = args;
    launch.problem = step.problem;
    launch.q_box = step.tiles.q;
    launch.kv_box = step.tiles.kv;
    launch.to_additional = step.additional;
    launch.beside = step.beside, launch.cleared = units_cleared_before(step, device.num_sms);
    if (step.additional && step.kernel == Kernel::kKeys) {
      launch.dk = tokens_of<void>(add_dk, 1);
      launch.dv = tokens_of<void>(add_dv, 1);
    }
    const int64_t head = step.heads.first, head_kv = step.heads.first_kv;
    const int bytes = element_bytes(dtype);
    for (auto* t : {&launch.q, &launch.dout}) enter(step, *t, head, bytes);
    for (auto* t : {&launch.k, &launch.v}) enter(step, *t, head_kv, bytes);
    for (auto* t : {&launch.add_k, &launch.add_v}) enter_heads(step, *t, head_kv, bytes);
    for (auto* t : {&launch.dk, &launch.dv}) enter(step, *t, head_kv, bytes);
    enter(step, launch.dq_out, head, bytes);
    enter(step, launch.stats, head, sizeof(RowStats));
    launch.bias = args.bias.heads(step.heads);
    launch.dbias.table = args.dbias.table.heads(step.heads);
    switch (step.kernel) {
      case Kernel::kStats:
        check(with_ends(dtype, [&](auto ends) { return ends.prepare(rows, first_units, stream); }));
        break;
      case Kernel::kClearDq:
        check(with_ends(dtype, [&](auto ends) {
          const int64_t units_of_step = step.problem.batch * step.problem.heads_kv;
          return ends.clear(launch.dq, DqBuffer(step.problem).elements / units_of_step * launch.cleared,
                            launch.next_work, plan.counters, stream);
        }));
        counters_cleared = true;
        if (launch.stats_ctas > 0) {
          const DqCounters counters(step.problem, true, launch.next_work + 1);
          check(with_ends(dtype, [&](auto ends) {
            return ends.prepare_rest(rows, first_units, counters, launch.stats_ctas, stream);
          }));
        }
        break;
      case Kernel::kKeys:
        launch.counters_cleared = std::exchange(counters_cleared, false);
        check(run(kKeys, step, dtype, launch, stream));
        break;
      case Kernel::kQueries:
        check(run(kQueries, step, dtype, launch, stream));
        break;
      case Kernel::kBias:
        check(run(kBias, step, dtype, launch, stream));
        break;
      case Kernel::kRoundDq:
        check(with_ends(dtype, [&](auto ends) {
          if (step.beside) {
            return ends.finish_rest(launch.problem, step.head_dim, launch.scale, launch.dq, launch.dq_out,
                                    launch.next_work, stream);
          }
          return ends.finish(launch.problem, launch.scale, launch.dq, launch.dq_out, step.accumulate, stream);
        }));
        break;
      case Kernel::kForward:
        break;
    }
  }
  return {dq, dk, dv, add_dk, add_dv, summed_bias()};
}

}  // namespace
}  // namespace nearfield::gna

STABLE_TORCH_LIBRARY_IMPL(nearfield, CUDA, m) {
  m.impl("gna_fwd", TORCH_BOX(&nearfield::gna::fwd_cuda));
  m.impl("gna_fwd_8bit", TORCH_BOX(&nearfield::gna::fwd_8bit_cuda));
  m.impl("gna_bwd", TORCH_BOX(&nearfield::gna::bwd_cuda));
}
#endif
