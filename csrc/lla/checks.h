// What both devices ask of the operators' tensors, and views of them for the kernels.
#pragma once

#include "lla/lla.h"
#include "tensor_checks.h"

namespace nearfield::lla {

// The kernels read any strides, as long as the last dimension is dense.
inline Tensor dense_rows(const Tensor& t) {
  return t.sizes().back() > 1 && t.strides().back() != 1 ? torch::stable::contiguous(t) : t;
}

template <class T>
View<const T> view_of(const Tensor& t) {
  const auto stride = t.strides();
  return {static_cast<const T*>(t.const_data_ptr()), stride[0], stride[1], stride[2]};
}

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline void check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<int64_t>& window) {
  check_shape(op, "q", q, {-1, -1, -1, -1});
  check_shape(op, "k", k, {q.sizes()[0], -1, -1, q.sizes()[3]});
  check_shape(op, "v", v, {q.sizes()[0], k.sizes()[1], k.sizes()[2], -1});
  const int64_t heads = q.sizes()[2], kv_heads = k.sizes()[2];
  STD_TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, op, ": q has ", heads,
                  " heads, not a multiple of the ", kv_heads, " heads of k and v");
  STD_TORCH_CHECK(q.sizes()[1] < INT32_MAX / 2 && k.sizes()[1] < INT32_MAX / 2, op,
                  ": sequences are limited to 2^30");
  STD_TORCH_CHECK(!window || *window >= 1, op, ": window is ", window.value_or(0), ", expected at least 1");
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_dtype(op, name, t, q.scalar_type());
    check_same_device(op, name, t, q);
  }
}

// A float tensor of the computation, of the given shape.
inline void check_statistic(const char* op, const char* name, const Tensor& t, const Tensor& q,
                            const std::vector<int64_t>& shape) {
  check_shape(op, name, t, shape);
  check_dtype(op, name, t, q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  check_same_device(op, name, t, q);
}

// The slope: a float tensor of the computation, or one of the dtype of q.
inline void check_slope(const char* op, const Tensor& x, const Tensor& q) {
  const auto s = q.sizes();
  if (x.scalar_type() != q.scalar_type()) return check_statistic(op, "x", x, q, {s[0], s[1], s[2], s[3]});
  check_shape(op, "x", x, {s[0], s[1], s[2], s[3]});
  check_same_device(op, "x", x, q);
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}
// In the dtype of the computation.
inline Tensor widened(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? t : as_dtype(t, ScalarType::Float);
}

inline void check_lam(const char* op, const Tensor& lam, const Tensor& q) {
  const auto s = q.sizes();
  check_statistic(op, "lam", lam, q, {s[0], s[1], s[2], -1});
  STD_TORCH_CHECK(lam.sizes()[3] == 1 || lam.sizes()[3] == s[3], op, ": lam has ", lam.sizes()[3],
                  " channels, expected 1 or ", s[3]);
}

inline int64_t window_or_all(const std::optional<int64_t>& window, int64_t n) { return window ? *window : n; }

template <class F>
Ridge<F> make_ridge(const Tensor& lam, bool absolute) {
  const auto st = lam.strides();
  return {
      static_cast<const F*>(lam.const_data_ptr()), {st[0], st[1], st[2], st[3]}, lam.sizes()[3], absolute};
}

// What the backwards get besides the inputs of the forward.
inline void check_saved(const char* op, const Tensor& q, const Tensor& v, const Tensor& d_o, const Tensor& x,
                        const Tensor& kbar, const Tensor& lse) {
  const auto s = q.sizes();
  check_shape(op, "d_o", d_o, {s[0], s[1], s[2], v.sizes()[3]});
  check_dtype(op, "d_o", d_o, q.scalar_type());
  check_same_device(op, "d_o", d_o, q);
  check_slope(op, x, q);
  check_statistic(op, "kbar", kbar, q, {s[0], s[1], s[2], s[3]});
  check_statistic(op, "lse", lse, q, {s[0], s[1], s[2]});
}

// Packed sequences: where each starts, and where the last ends; null if there is one per batch.
using Packing = std::optional<Tensor>;

// The same as int64, dense. What it holds is checked where that needs no waiting for a device.
inline Packing check_packing(const char* op, const Packing& cu_seqlens, const Tensor& q, const Tensor& k) {
  if (!defined(cu_seqlens)) return std::nullopt;
  check_shape(op, "cu_seqlens", *cu_seqlens, {-1});
  check_same_device(op, "cu_seqlens", *cu_seqlens, q);
  if (cu_seqlens->scalar_type() != ScalarType::Int)
    check_dtype(op, "cu_seqlens", *cu_seqlens, ScalarType::Long);
  const int64_t tokens = q.sizes()[1];
  STD_TORCH_CHECK(cu_seqlens->sizes()[0] > 0, op, ": cu_seqlens is empty, expected at least one entry");
  STD_TORCH_CHECK(q.sizes()[0] == 1, op, ": cu_seqlens needs a batch of 1, got ", q.sizes()[0]);
  STD_TORCH_CHECK(k.sizes()[1] == tokens, op, ": cu_seqlens needs as many keys as queries, got ",
                  k.sizes()[1], " and ", tokens);
  Tensor wide = torch::stable::contiguous(torch::stable::to(*cu_seqlens, ScalarType::Long));
  if (!q.is_cuda()) check_cu_seqlens(op, wide, tokens);
  return wide;
}

inline const int64_t* bounds_of(const Packing& packing) {
  return static_cast<const int64_t*>(packing->const_data_ptr());
}

// An operator's argument `grid`: sizes, windows, strides, dilations, causal, sides of a box, three of each;
// empty: none.
inline Grid grid_of(const char* op, const std::vector<int64_t>& given) {
  Grid g{};
  if (given.empty()) return g;
  STD_TORCH_CHECK(given.size() == 18, op, ": grid has ", given.size(), " entries, expected 0 or 18");
  int* const fields[6] = {g.size, g.window, g.stride, g.dilation, g.causal, g.side};
  for (int i = 0; i < 18; ++i) {
    STD_TORCH_CHECK(given[i] >= (i / 3 == 4 ? 0 : 1) && given[i] < INT32_MAX / 2, op, ": grid[", i, "] is ",
                    given[i]);
    fields[i / 3][i % 3] = static_cast<int>(given[i]);
  }
  return g;
}

// The same, checked against the tensors, whose rows are in the order of boxes.
inline Grid check_grid(const char* op, const std::vector<int64_t>& given, const Packing& packing,
                       const Tensor& q, const Tensor& k) {
  const Grid g = grid_of(op, given);
  if (!g.given()) return g;
  STD_TORCH_CHECK(!packing, op, ": cu_seqlens and grid exclude each other");
  for (int d = 0; d < 3; ++d)
    STD_TORCH_CHECK((g.side[d] & (g.side[d] - 1)) == 0 && g.stride[d] <= g.window[d] &&
                        given[3 + d] * given[9 + d] <= given[d],
                    op, ": dimension ", d, " of grid does not hold its window, stride or box");
  STD_TORCH_CHECK(given[15] * given[16] * given[17] == kBoxRows, op, ": the box of grid does not hold ",
                  kBoxRows, " tokens");
  STD_TORCH_CHECK(q.sizes()[1] == g.rows() && k.sizes()[1] == g.rows(), op, ": q and k have ", q.sizes()[1],
                  " and ", k.sizes()[1], " tokens, the boxes of grid ", g.rows());
  return g;
}

// The filled length of each sequence of a cache.
inline void check_lengths(const char* op, const std::optional<Tensor>& cache_seqlens, const Tensor& q) {
  if (!defined(cache_seqlens)) return;
  check_shape(op, "cache_seqlens", *cache_seqlens, {q.sizes()[0]});
  if (cache_seqlens->scalar_type() != ScalarType::Int)
    check_dtype(op, "cache_seqlens", *cache_seqlens, ScalarType::Long);
  check_same_device(op, "cache_seqlens", *cache_seqlens, q);
}

}  // namespace nearfield::lla
