// Schemas of nearfield::gna_fwd and nearfield::gna_bwd, and their CPU implementation: checks, allocation,
// parameters. CUDA registers its own implementation of the same schemas in a file of its own.
#include "gna/checks.h"

namespace nearfield::gna {
namespace {

// Parts of the tiles whose shares in the gradient of the bias are summed separately.
constexpr int kCpuBiasParts = 32;

void check_no_backend(const char* op, const std::optional<std::string>& backend) {
  STD_TORCH_CHECK(!backend, op, ": backend is \"", *backend, "\", but the CPU has one implementation: None");
}

std::tuple<Tensor, Tensor> fwd_cpu(Tensor q, Tensor k, Tensor v, OptionalTensor additional_k,
                                   OptionalTensor additional_v, Ints kernel_size, Ints stride, Ints dilation,
                                   Ints is_causal, double scale, std::optional<std::string> backend,
                                   OptionalTensor bias) {
  const char* op = "gna_fwd";
  check_no_backend(op, backend);
  const Call call =
      check_call(op, q, k, v, additional_k, additional_v, kernel_size, stride, dilation, is_causal, bias);
  const Problem& p = call.whole;
  auto shape = shape_of(q);
  shape.back() = p.dim_v;
  Tensor out = allocate(q, shape);
  shape.pop_back();
  Tensor lse = allocate(q, shape, statistics_dtype(q));
  dispatch_cpu_dtype(op, "q", q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    q = readable(q), k = readable(k), v = readable(v);
    FwdParams<T, compute_t<T>> params{};
    params.scale = scale;
    params.q = tokens_of<const T>(q, p.rank);
    params.k = tokens_of<const T>(k, p.rank);
    params.v = tokens_of<const T>(v, p.rank);
    if (defined(additional_k)) {
      additional_k = readable(*additional_k), additional_v = readable(*additional_v);
      params.add_k = tokens_of<const T>(*additional_k, 1);
      params.add_v = tokens_of<const T>(*additional_v, 1);
    }
    params.out = tokens_of<T>(out, p.rank);
    params.lse = tokens_of<compute_t<T>>(lse, p.rank, false);
    using C = compute_t<T>;
    if (call.biased) bias = torch::stable::contiguous(*bias);
    const auto table = call.bias(call.biased ? static_cast<const C*>(bias->data_ptr()) : nullptr);
    for (const HeadGroup& group : call.groups) run_fwd_cpu(params.heads(group), table.heads(group));
  });
  return {out, lse};
}

// The tensor [B, X.., H, features] of a type in which the CPU computes, times its factors.
Tensor dequantized(const Tensor& t, const OptionalTensor& descale) {
  Tensor wide = allocate(t, shape_of(t), ScalarType::Float);
  torch::stable::copy_(wide, t);
  if (!defined(descale)) return wide;
  const Tokens<const float> factor = descale_of(descale);
  const int64_t heads = t.size(t.dim() - 2), features = t.size(t.dim() - 1),
                shared = heads / descale->size(1);
  const int64_t rows = wide.numel() / features, rows_per_batch = rows / t.size(0);
  float* data = static_cast<float*>(wide.data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    const float f = *factor.at(row / rows_per_batch, row % heads / shared);
    for (int64_t i = 0; i < features; ++i) data[row * features + i] *= f;
  }
  return wide;
}

std::tuple<Tensor, Tensor> fwd_8bit_cpu(Tensor q, Tensor k, Tensor v, OptionalTensor q_descale,
                                        OptionalTensor k_descale, OptionalTensor v_descale, Ints kernel_size,
                                        Ints stride, Ints dilation, Ints is_causal, double scale,
                                        ScalarType out_dtype) {
  const char* op = "gna_fwd_8bit";
  const Call call = check_call(op, q, k, v, {}, {}, kernel_size, stride, dilation, is_causal, {});
  check_8bit(op, call, q, q_descale, k_descale, v_descale, out_dtype);
  auto shape = shape_of(q);
  shape.back() = call.whole.dim_v;
  Tensor out = allocate(q, shape, out_dtype);
  if (out.numel() == 0) {
    shape.pop_back();
    return {out, allocate(q, shape, ScalarType::Float)};
  }
  const auto [wide, lse] =
      fwd_cpu(dequantized(q, q_descale), dequantized(k, k_descale), dequantized(v, v_descale), {}, {},
              kernel_size, stride, dilation, is_causal, scale, {}, {});
  torch::stable::copy_(out, wide);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd_cpu(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor additional_k, OptionalTensor additional_v, Ints kernel_size, Ints stride, Ints dilation,
    Ints is_causal, double scale, bool /*deterministic: always*/, std::optional<std::string> backend,
    OptionalTensor bias, bool bias_gradient) {
  const char* op = "gna_bwd";
  check_no_backend(op, backend);
  const Call call =
      check_call(op, q, k, v, additional_k, additional_v, kernel_size, stride, dilation, is_causal, bias);
  const Problem& p = call.whole;
  check_gradients(op, p, q, dout, dlse, out, lse);
  const bool with_additional = defined(additional_k);
  Tensor dq = allocate(q, shape_of(q));
  Tensor dk = allocate(q, shape_of(k));
  Tensor dv = allocate(q, shape_of(v));
  Tensor add_dk = allocate(q, with_additional ? shape_of(*additional_k) : Ints{0});
  Tensor add_dv = allocate(q, with_additional ? shape_of(*additional_v) : Ints{0});
  const BwdWorkspace workspace = bwd_cpu_workspace(p, call.groups);
  const auto stat = statistics_dtype(q);
  Tensor delta = allocate(q, shape_of(lse), stat);
  Tensor partial = allocate(q, {workspace.partial}, stat);
  bias_gradient &= call.biased;
  const int64_t elements = bias_gradient ? bias->numel() : 0;
  const int parts = bias_parts(elements, kCpuBiasParts);
  Tensor dbias = allocate(q, bias_gradient ? shape_of(*bias) : Ints{0}, stat);
  Tensor dbias_parts = torch::stable::new_zeros(q, {parts, elements}, stat);
  dispatch_cpu_dtype(op, "q", q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using C = compute_t<T>;
    q = readable(q), k = readable(k), v = readable(v), out = readable(out), dout = readable(dout);
    BwdParams<T, C> params{};
    params.scale = scale;
    params.q = tokens_of<const T>(q, p.rank);
    params.k = tokens_of<const T>(k, p.rank);
    params.v = tokens_of<const T>(v, p.rank);
    params.out = tokens_of<const T>(out, p.rank);
    params.dout = tokens_of<const T>(dout, p.rank);
    params.lse = tokens_of<const C>(lse, p.rank, false);
    if (defined(dlse)) params.dlse = tokens_of<const C>(*dlse, p.rank, false);
    params.dq = tokens_of<T>(dq, p.rank);
    params.dk = tokens_of<T>(dk, p.rank);
    params.dv = tokens_of<T>(dv, p.rank);
    if (with_additional) {
      additional_k = readable(*additional_k), additional_v = readable(*additional_v);
      params.add_k = tokens_of<const T>(*additional_k, 1);
      params.add_v = tokens_of<const T>(*additional_v, 1);
      params.add_dk = tokens_of<T>(add_dk, 1);
      params.add_dv = tokens_of<T>(add_dv, 1);
    }
    params.delta = tokens_of<C>(delta, p.rank, false);
    params.partial = static_cast<C*>(partial.data_ptr());
    if (call.biased) bias = torch::stable::contiguous(*bias);
    const auto table = call.bias(call.biased ? static_cast<const C*>(bias->data_ptr()) : nullptr);
    C* sums = bias_gradient ? static_cast<C*>(dbias_parts.data_ptr()) : nullptr;
    for (const HeadGroup& group : call.groups) {
      run_bwd_cpu(params.heads(group), table.heads(group),
                  BiasGradient<C>{call.bias(sums).heads(group), elements, parts});
    }
    C* sum = static_cast<C*>(dbias.data_ptr());
    for (int64_t i = 0; i < elements; ++i) {
      sum[i] = sums[i];
      for (int part = 1; part < parts; ++part) sum[i] += sums[part * elements + i];
    }
  });
  return {dq, dk, dv, add_dk, add_dv, dbias};
}

}  // namespace
}  // namespace nearfield::gna

STABLE_TORCH_LIBRARY_FRAGMENT(nearfield, m) {
  m.def(
      "gna_fwd(Tensor q, Tensor k, Tensor v, Tensor? additional_k, Tensor? additional_v, int[] kernel_size, "
      "int[] stride, int[] dilation, int[] is_causal, float scale, str? backend=None, Tensor? bias=None) "
      "-> (Tensor, Tensor)");
  // The forward of float8_e4m3fn; descales are float32 [B, Hkv].
  m.def(
      "gna_fwd_8bit(Tensor q, Tensor k, Tensor v, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
      "int[] kernel_size, int[] stride, int[] dilation, int[] is_causal, float scale, ScalarType out_dtype) "
      "-> (Tensor, Tensor)");
  m.def(
      "gna_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? additional_k, Tensor? additional_v, int[] kernel_size, int[] stride, int[] dilation, "
      "int[] is_causal, float scale, bool deterministic, str? backend=None, Tensor? bias=None, "
      "bool bias_gradient=True) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // What would run, as JSON. capability: 10 * major + minor of a GPU; 0: the CPU.
  m.def(
      "gna_plan(Tensor q, Tensor k, Tensor v, Tensor? additional_k, Tensor? additional_v, int[] kernel_size, "
      "int[] stride, int[] dilation, int[] is_causal, int capability, bool backward, bool deterministic, "
      "str? backend=None, Tensor? bias=None) -> str");
  // Why a Hopper GPU leaves its own kernels aside; empty if it does not.
  m.def("gna_slower_because(int capability, ScalarType dtype, int dim, int dim_v) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(nearfield, CPU, m) {
  m.impl("gna_fwd", TORCH_BOX(&nearfield::gna::fwd_cpu));
  m.impl("gna_fwd_8bit", TORCH_BOX(&nearfield::gna::fwd_8bit_cpu));
  m.impl("gna_bwd", TORCH_BOX(&nearfield::gna::bwd_cpu));
}
