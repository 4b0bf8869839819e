// Operator schemas, safety checks, allocation and dispatch: the only file of the family that sees tensors.
#include "lla/checks.h"

namespace nearfield::lla {
namespace {

template <class T>
Problem<T> make_problem(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool is_causal,
                        const std::optional<int64_t>& window, const Grid& grid = {}) {
  const auto s = q.sizes();
  const int64_t n = k.sizes()[1];
  return {s[0],          s[1],          n,
          s[2],          k.sizes()[2],  s[3],
          v.sizes()[3],  view_of<T>(q), view_of<T>(k),
          view_of<T>(v), scale,         Visibility::make(s[1], n, window_or_all(window, n), is_causal),
          grid};
}

using Backend = std::optional<std::string>;
void check_no_backend(const char* op, const Backend& backend) {
  STD_TORCH_CHECK(!backend, op, ": backend is \"", *backend, "\", but the CPU has one implementation: None");
}

// Calls run(of) for each packed sequence, where of(t) is its part of a [1, tokens, ...] tensor, a view: every
// sequence is a problem of its own. Without packing, once with all.
template <class Run>
void for_each_sequence(const Packing& packing, Run&& run) {
  if (!packing) return run([](const Tensor& t) { return t; });
  const int64_t* cu = bounds_of(packing);
  for (int64_t s = 0; s + 1 < packing->sizes()[0]; ++s) {
    const int64_t begin = cu[s], length = cu[s + 1] - begin;
    if (length == 0) continue;
    run([&](const Tensor& t) {
      Tensor whole = t;
      return torch::stable::narrow(whole, 1, begin, length);
    });
  }
}

// Tokens behind the last packed sequence get what a query without keys gets.
void blank(const Packing& packing, std::initializer_list<Tensor*> zeros, Tensor* lse) {
  if (!packing) return;
  for (Tensor* t : zeros) torch::stable::zero_(*t);
  if (lse) torch::stable::fill_(*lse, -INFINITY);
}

}  // namespace

using Fwd = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Fwd fwd_cpu(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& lam, Packing cu_seqlens,
            double scale, bool is_causal, std::optional<int64_t> window, bool absolute, double tol,
            int64_t max_iters, Backend backend, std::vector<int64_t> grid_) {
  const char* op = "lla_fwd";
  check_no_backend(op, backend);
  check_inputs(op, q_, k_, v_, window);
  check_lam(op, lam, q_);
  const Packing packing = check_packing(op, cu_seqlens, q_, k_);
  const Grid grid = check_grid(op, grid_, packing, q_, k_);
  const Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_);
  const auto s = q.sizes();
  const int64_t dv = v.sizes()[3];
  Fwd out;
  dispatch_cpu_dtype(op, "q", q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using F = acc_t<T>;
    auto& [o, x, kbar, lse, iterations, ratio] = out;
    o = allocate(q, {s[0], s[1], s[2], dv});
    x = allocate(q, {s[0], s[1], s[2], s[3]}, compute_dtype<T>);
    kbar = allocate(q, {s[0], s[1], s[2], s[3]}, compute_dtype<T>);
    lse = allocate(q, {s[0], s[1], s[2]}, compute_dtype<T>);
    iterations = allocate(q, {s[0], s[1], s[2]}, ScalarType::Int);
    ratio = allocate(q, {s[0], s[1], s[2]}, ScalarType::Float);
    blank(packing, {&o, &x, &kbar, &iterations, &ratio}, &lse);
    for_each_sequence(packing, [&](auto of) {
      run_fwd_cpu<T>({make_problem<T>(of(q), of(k), of(v), scale, is_causal, window, grid),
                      make_ridge<F>(of(lam), absolute),
                      {tol, max_iters},
                      data_of<T>(of(o)),
                      data_of<F>(of(x)),
                      data_of<F>(of(kbar)),
                      data_of<F>(of(lse)),
                      data_of<int32_t>(of(iterations)),
                      data_of<float>(of(ratio))});
    });
  });
  return out;
}

using ProbeFwd = std::tuple<Tensor, Tensor, Tensor>;
ProbeFwd probe_fwd_cpu(const Tensor& q_, const Tensor& x_, const Tensor& k_, const Tensor& v_,
                       Packing cu_seqlens, double scale, bool is_causal, std::optional<int64_t> window,
                       Backend backend, std::vector<int64_t> grid_) {
  const char* op = "lla_probe_fwd";
  check_no_backend(op, backend);
  check_inputs(op, q_, k_, v_, window);
  const Packing packing = check_packing(op, cu_seqlens, q_, k_);
  const Grid grid = check_grid(op, grid_, packing, q_, k_);
  check_slope(op, x_, q_);
  const Tensor q = dense_rows(q_), x = dense_rows(widened(x_)), k = dense_rows(k_), v = dense_rows(v_);
  const auto s = q.sizes();
  ProbeFwd out;
  dispatch_cpu_dtype(op, "q", q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using F = acc_t<T>;
    auto& [o, kbar, lse] = out;
    o = allocate(q, {s[0], s[1], s[2], v.sizes()[3]});
    kbar = allocate(q, {s[0], s[1], s[2], s[3]}, compute_dtype<T>);
    lse = allocate(q, {s[0], s[1], s[2]}, compute_dtype<T>);
    blank(packing, {&o, &kbar}, &lse);
    for_each_sequence(packing, [&](auto of) {
      run_probe_fwd_cpu<T>({make_problem<T>(of(q), of(k), of(v), scale, is_causal, window, grid),
                            view_of<F>(of(x)), data_of<T>(of(o)), data_of<F>(of(kbar)), data_of<F>(of(lse))});
    });
  });
  return out;
}

namespace {

// Both backwards; lam is null for the probe alone. Returns dq, y or dx, dk, dv, dlam.
std::array<Tensor, 5> backward(const char* op, const Tensor& d_o_, const Tensor& q_, const Tensor& k_,
                               const Tensor& v_, const Tensor* lam, const Tensor& x_, const Tensor& kbar_,
                               const Tensor& lse_, const Packing& cu_seqlens, double scale, bool is_causal,
                               std::optional<int64_t> window, bool absolute, Solver solver,
                               const std::vector<int64_t>& grid_) {
  check_inputs(op, q_, k_, v_, window);
  const Packing packing = check_packing(op, cu_seqlens, q_, k_);
  const Grid grid = check_grid(op, grid_, packing, q_, k_);
  const Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_), d_o = dense_rows(d_o_),
               x = dense_rows(widened(x_));
  const Tensor kbar = torch::stable::contiguous(kbar_), lse = torch::stable::contiguous(lse_);
  const auto s = q.sizes();
  const int64_t n = k.sizes()[1], kv_heads = k.sizes()[2], dv = v.sizes()[3];
  check_saved(op, q, v, d_o, x_, kbar, lse);
  if (lam) check_lam(op, *lam, q);
  std::array<Tensor, 5> out;
  dispatch_cpu_dtype(op, "q", q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using F = acc_t<T>;
    auto& [dq, y, dk, dvalue, dlam] = out;
    dq = allocate(q, {s[0], s[1], s[2], s[3]});
    y = allocate(q, {s[0], s[1], s[2], s[3]}, compute_dtype<T>);
    dk = allocate(q, {s[0], n, kv_heads, s[3]});
    dvalue = allocate(q, {s[0], n, kv_heads, dv});
    dlam = allocate(q, {s[0], s[1], s[2], lam ? lam->sizes()[3] : 0}, compute_dtype<T>);
    const Tensor gbar = allocate(q, {s[0], s[1], s[2]}, compute_dtype<T>);
    const Tensor factor = allocate(q, {s[0], s[1], s[2]}, compute_dtype<T>);
    const Tensor row_sum = allocate(q, {s[0], s[1], s[2]}, compute_dtype<T>);
    blank(packing, {&dq, &y, &dk, &dvalue, &dlam}, nullptr);
    for_each_sequence(packing, [&](auto of) {
      run_bwd_cpu<T>({make_problem<T>(of(q), of(k), of(v), scale, is_causal, window, grid), lam != nullptr,
                      lam ? make_ridge<F>(of(*lam), absolute) : Ridge<F>{}, solver, view_of<T>(of(d_o)),
                      view_of<F>(of(x)), data_of<F>(of(kbar)), data_of<F>(of(lse)), data_of<F>(of(y)),
                      data_of<F>(of(gbar)), data_of<F>(of(factor)), data_of<F>(of(row_sum)),
                      data_of<T>(of(dq)), data_of<T>(of(dk)), data_of<T>(of(dvalue)), data_of<F>(of(dlam))});
    });
  });
  return out;
}

}  // namespace

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;
Grads bwd_cpu(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lam,
              const Tensor& x, const Tensor& kbar, const Tensor& lse, Packing cu_seqlens, double scale,
              bool is_causal, std::optional<int64_t> window, bool absolute, double tol, int64_t max_iters,
              Backend backend, std::vector<int64_t> grid) {
  check_no_backend("lla_bwd", backend);
  auto [dq, y, dk, dv, dlam] = backward("lla_bwd", d_o, q, k, v, &lam, x, kbar, lse, cu_seqlens, scale,
                                        is_causal, window, absolute, {tol, max_iters}, grid);
  return {dq, dk, dv, dlam};
}

Grads probe_bwd_cpu(const Tensor& d_o, const Tensor& q, const Tensor& x, const Tensor& k, const Tensor& v,
                    const Tensor& kbar, const Tensor& lse, Packing cu_seqlens, double scale, bool is_causal,
                    std::optional<int64_t> window, Backend backend, std::vector<int64_t> grid) {
  check_no_backend("lla_probe_bwd", backend);
  auto [dq, dx, dk, dv, none] = backward("lla_probe_bwd", d_o, q, k, v, nullptr, x, kbar, lse, cu_seqlens,
                                         scale, is_causal, window, false, {}, grid);
  return {dq, as_dtype(dx, x.scalar_type()), dk, dv};
}

Tensor step_cpu(const Tensor& q_, const Tensor& k_, const Tensor& v_, std::optional<Tensor> cache_seqlens,
                const Tensor& lam, double scale, std::optional<int64_t> window, bool absolute) {
  const char* op = "lla_step";
  check_inputs(op, q_, k_, v_, window);
  check_lam(op, lam, q_);
  check_lengths(op, cache_seqlens, q_);
  const Tensor q = dense_rows(q_), k = dense_rows(k_), v = dense_rows(v_);
  const int64_t batch = q.sizes()[0], size = k.sizes()[1];
  std::vector<int64_t> length(batch, size);
  if (defined(cache_seqlens)) {
    const Tensor wide = torch::stable::contiguous(torch::stable::to(*cache_seqlens, ScalarType::Long));
    std::copy_n(static_cast<const int64_t*>(wide.const_data_ptr()), batch, length.begin());
  }
  for (int64_t b = 0; b < batch; ++b)
    STD_TORCH_CHECK(0 <= length[b] && length[b] <= size, op, ": cache_seqlens[", b, "] is ", length[b],
                    ", expected 0 to ", size, ", the size of the cache");
  const Tensor o = allocate(q, {q.sizes()[0], q.sizes()[1], q.sizes()[2], v.sizes()[3]});
  dispatch_cpu_dtype(op, "q", q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    run_step_cpu<T>({make_problem<T>(q, k, v, scale, true, window), make_ridge<acc_t<T>>(lam, absolute),
                     length.data(), window_or_all(window, k.sizes()[1]), data_of<T>(o)});
  });
  return o;
}

STABLE_TORCH_LIBRARY_FRAGMENT(nearfield, m) {
  m.def(
      "lla_fwd(Tensor q, Tensor k, Tensor v, Tensor lam, Tensor? cu_seqlens, float scale, bool is_causal, "
      "int? window, bool absolute, float tol, int max_iters, str? backend=None, int[] grid=[]) -> (Tensor o, "
      "Tensor x, "
      "Tensor kbar, Tensor lse, Tensor iterations, Tensor ratio)");
  m.def(
      "lla_bwd(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor lam, Tensor x, Tensor kbar, Tensor lse, "
      "Tensor? cu_seqlens, float scale, bool is_causal, int? window, bool absolute, float tol, int "
      "max_iters, "
      "str? backend=None, int[] grid=[]) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dlam)");
  m.def(
      "lla_probe_fwd(Tensor q, Tensor x, Tensor k, Tensor v, Tensor? cu_seqlens, float scale, bool "
      "is_causal, "
      "int? window, str? backend=None, int[] grid=[]) -> "
      "(Tensor o, Tensor kbar, Tensor lse)");
  m.def(
      "lla_probe_bwd(Tensor d_o, Tensor q, Tensor x, Tensor k, Tensor v, Tensor kbar, Tensor lse, "
      "Tensor? cu_seqlens, float scale, bool is_causal, int? window, str? backend=None, int[] grid=[]) -> "
      "(Tensor dq, "
      "Tensor dx, Tensor dk, Tensor dv)");
  m.def(
      "lla_step(Tensor q, Tensor k, Tensor v, Tensor? cache_seqlens, Tensor lam, float scale, int? window, "
      "bool absolute) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nearfield, CPU, m) {
  m.impl("lla_fwd", TORCH_BOX(&fwd_cpu));
  m.impl("lla_bwd", TORCH_BOX(&bwd_cpu));
  m.impl("lla_probe_fwd", TORCH_BOX(&probe_fwd_cpu));
  m.impl("lla_probe_bwd", TORCH_BOX(&probe_bwd_cpu));
  m.impl("lla_step", TORCH_BOX(&step_cpu));
}

}  // namespace nearfield::lla
