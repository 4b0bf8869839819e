// Argument checks that the CPU and the CUDA implementation share. They are terse: the sentences for users are
// in op.py.
#pragma once

#include <algorithm>
#include <limits>

#include "gna/bias.h"
#include "gna/gna.h"
#include "tensor_checks.h"

namespace nearfield::gna {

using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

// The sizes of a call, and its heads grouped by their windows. The window parameters have one entry per
// dimension, or that many for every query head.
struct Call {
  Problem whole;  // windows: those of the first head
  std::vector<HeadGroup> groups;
  bool biased = false;  // all heads then have the same window

  // Of all heads, without data.
  template <class T>
  BiasTable<T> bias(T* data = nullptr) const {
    return biased ? bias_table<T>(data, whole) : BiasTable<T>{};
  }
};

// Groups heads whose window parameters are the same: all of them if they lie evenly spaced, else runs of
// neighbors.
inline std::vector<HeadGroup> group_heads(const Problem& whole, const std::vector<Problem>& of_kv_head) {
  const auto same = [](const Problem& a, const Problem& b) {
    for (int d = 0; d < 3; ++d) {
      if (a.window[d] != b.window[d] || a.stride[d] != b.stride[d] || a.dilation[d] != b.dilation[d] ||
          a.causal[d] != b.causal[d])
        return false;
    }
    return true;
  };
  const int64_t heads = static_cast<int64_t>(of_kv_head.size()), shared = whole.heads_per_kv();
  std::vector<HeadGroup> groups;
  std::vector<bool> taken(heads, false);
  for (int64_t first = 0; first < heads; ++first) {
    if (taken[first]) continue;
    std::vector<int64_t> alike;
    for (int64_t h = first; h < heads; ++h)
      if (!taken[h] && same(of_kv_head[first], of_kv_head[h])) alike.push_back(h);
    int64_t step = alike.size() > 1 ? alike[1] - alike[0] : 1;
    for (size_t i = 2; i < alike.size(); ++i)
      if (alike[i] - alike[i - 1] != step) step = 1;
    if (shared > 1) step = 1;  // query heads of every other key/value head are not evenly spaced
    size_t count = 1;
    while (count < alike.size() && alike[count] - alike[count - 1] == step) ++count;
    for (size_t i = 0; i < count; ++i) taken[alike[i]] = true;
    HeadGroup group{of_kv_head[first], first * shared, first, step};
    group.problem.heads_kv = static_cast<int64_t>(count);
    group.problem.heads = group.problem.heads_kv * shared;
    groups.push_back(group);
  }
  return groups;
}

// dtype of lse, of its gradient and of every other statistic.
inline ScalarType statistics_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks every shape, dtype and window parameter of an op.
inline Call check_call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                       const OptionalTensor& additional_k, const OptionalTensor& additional_v,
                       const Ints& kernel_size, const Ints& stride, const Ints& dilation,
                       const Ints& is_causal, const OptionalTensor& bias) {
  const int rank = static_cast<int>(q.dim()) - 3;
  STD_TORCH_CHECK(rank >= 1 && rank <= 3, op, ": q has ", q.dim(), " dimensions, expected 4, 5 or 6");
  STD_TORCH_CHECK(k.dim() == q.dim() && v.dim() == q.dim(), op,
                  ": q, k and v differ in their number of dimensions");
  const auto n = static_cast<size_t>(rank);
  const size_t per_head = n * static_cast<size_t>(q.size(rank + 1));
  const size_t entries = kernel_size.size();
  STD_TORCH_CHECK((entries == n || entries == per_head) && stride.size() == entries &&
                      dilation.size() == entries && is_causal.size() == entries,
                  op, ": kernel_size, stride, dilation and is_causal need ", rank,
                  " entries each, or as many for every query head");

  Problem p{};
  p.rank = rank;
  p.batch = q.size(0);
  p.heads = q.size(rank + 1);
  p.dim = q.size(rank + 2);
  p.heads_kv = k.size(rank + 1);
  p.dim_v = v.size(rank + 2);
  // Sets the windows of the head whose parameters begin at entry `first`.
  const auto set_windows = [&](Problem& p, size_t first) {
    for (int d = 0; d < 3; ++d) {
      const int i = d - (3 - rank);  // the caller's dimension
      p.size[d] = p.window[d] = p.stride[d] = p.dilation[d] = 1;
      p.causal[d] = false;
      if (i < 0) continue;
      const int64_t size = q.size(i + 1);
      const int64_t w = kernel_size[first + i], s = stride[first + i], step = dilation[first + i];
      STD_TORCH_CHECK(size < std::numeric_limits<int>::max() / 2, op, ": dimension ", i, " has size ", size,
                      ", which is too large");
      // Bounded one by one, so that the product below cannot overflow.
      STD_TORCH_CHECK(w >= 1 && w <= size && step >= 1 && step <= size && w * step <= size, op,
                      ": kernel_size ", w, " times dilation ", step, " exceeds size ", size, " of dimension ",
                      i);
      STD_TORCH_CHECK(s >= 1 && s <= w, op, ": stride ", s, " is not in 1..kernel_size (", w,
                      ") of dimension ", i);
      p.size[d] = static_cast<int>(size);
      p.window[d] = static_cast<int>(w);
      p.stride[d] = static_cast<int>(s);
      p.dilation[d] = static_cast<int>(step);
      p.causal[d] = is_causal[first + i] != 0;
    }
  };
  if (entries > 0) set_windows(p, 0);

  std::vector<int64_t> want(q.sizes().data(), q.sizes().data() + rank + 3);
  want[rank + 1] = p.heads_kv;
  check_shape(op, "k", k, want);
  want[rank + 2] = p.dim_v;
  check_shape(op, "v", v, want);
  STD_TORCH_CHECK(p.dim >= 1 && p.dim_v >= 1, op, ": the head dims of q and v must be at least 1");
  STD_TORCH_CHECK(p.heads_kv == 0 ? p.heads == 0 : p.heads >= p.heads_kv && p.heads % p.heads_kv == 0, op,
                  ": ", p.heads, " query heads are not a multiple of ", p.heads_kv, " key/value heads");

  STD_TORCH_CHECK(defined(additional_k) == defined(additional_v), op,
                  ": additional_k and additional_v are given both or not at all");
  if (defined(additional_k)) {
    STD_TORCH_CHECK(additional_k->dim() == 4, op, ": additional_k has ", additional_k->dim(),
                    " dimensions, expected 4");
    p.additional = additional_k->size(1);
    check_shape(op, "additional_k", *additional_k, {p.batch, p.additional, p.heads_kv, p.dim});
    check_shape(op, "additional_v", *additional_v, {p.batch, p.additional, p.heads_kv, p.dim_v});
    for (const Tensor& t : {*additional_k, *additional_v}) {
      check_dtype(op, "additional_k / additional_v", t, q.scalar_type());
      check_same_device(op, "additional_k / additional_v", t, q);
    }
  }
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
  check_same_device(op, "k", k, q);
  check_same_device(op, "v", v, q);

  if (defined(bias)) {
    std::vector<int64_t> table{p.heads};
    int64_t size = 1;
    for (int d = 3 - rank; d < 3; ++d) {
      table.push_back(2 * int64_t{p.window[d]} - 1);
      size *= table.back();
      STD_TORCH_CHECK(size < 1 << 30, op, ": bias has 2^30 or more elements for a head");
    }
    check_shape(op, "bias", *bias, table);
    check_dtype(op, "bias", *bias, statistics_dtype(q));
    check_same_device(op, "bias", *bias, q);
    for (size_t i = n; i < entries; ++i)
      STD_TORCH_CHECK(kernel_size[i] == kernel_size[i % n], op,
                      ": a bias needs the same kernel_size in all heads");
  }

  if (entries == n) return {p, {{p}}, defined(bias)};
  const auto same_entries = [&](const Ints& values, int64_t a, int64_t b) {
    return std::equal(values.begin() + a * n, values.begin() + (a + 1) * n, values.begin() + b * n);
  };
  std::vector<Problem> of_kv_head;
  for (int64_t h = 0; h < p.heads; ++h) {
    const int64_t leader = h - h % p.heads_per_kv();
    if (h == leader) {
      of_kv_head.push_back(p);
      set_windows(of_kv_head.back(), static_cast<size_t>(h) * n);
      continue;
    }
    bool same = true;
    for (const Ints* values : {&kernel_size, &stride, &dilation, &is_causal})
      same &= same_entries(*values, leader, h);
    STD_TORCH_CHECK(same, op, ": query heads ", leader, " and ", h,
                    " share a key/value head, but not their windows");
  }
  return {p, group_heads(p, of_kv_head), defined(bias)};
}

// 8-bit inputs: their type, the type of the output, and the factors [B, Hkv] of q, k and v.
inline void check_8bit(const char* op, const Call& call, const Tensor& q, const OptionalTensor& q_descale,
                       const OptionalTensor& k_descale, const OptionalTensor& v_descale,
                       ScalarType out_dtype) {
  check_dtype(op, "q", q, ScalarType::Float8_e4m3fn);
  STD_TORCH_CHECK(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half, op, ": out_dtype is ",
                  torch::headeronly::toString(out_dtype), "; supported: bfloat16, float16");
  const auto check = [&](const char* name, const OptionalTensor& t) {
    if (!defined(t)) return;
    check_shape(op, name, *t, {call.whole.batch, call.whole.heads_kv});
    check_dtype(op, name, *t, ScalarType::Float);
    check_same_device(op, name, *t, q);
  };
  check("q_descale", q_descale);
  check("k_descale", k_descale);
  check("v_descale", v_descale);
}

// What the forward saved and what arrives from behind, on top of check_problem.
inline void check_gradients(const char* op, const Problem& p, const Tensor& q, const Tensor& dout,
                            const OptionalTensor& dlse, const Tensor& out, const Tensor& lse) {
  std::vector<int64_t> want(q.sizes().data(), q.sizes().data() + p.rank + 3);
  want[p.rank + 2] = p.dim_v;
  check_shape(op, "out", out, want);
  check_shape(op, "dout", dout, want);
  want.pop_back();
  check_shape(op, "lse", lse, want);
  check_dtype(op, "out", out, q.scalar_type());
  check_dtype(op, "dout", dout, q.scalar_type());
  check_dtype(op, "lse", lse, statistics_dtype(q));
  check_same_device(op, "out", out, q);
  check_same_device(op, "dout", dout, q);
  check_same_device(op, "lse", lse, q);
  if (defined(dlse)) {
    check_shape(op, "dlse", *dlse, want);
    check_dtype(op, "dlse", *dlse, statistics_dtype(q));
    check_same_device(op, "dlse", *dlse, q);
  }
}

inline bool is_readable(const Tensor& t) { return t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1; }

// The tensor itself if its innermost stride is 1, else a contiguous copy.
inline Tensor readable(const Tensor& t) { return is_readable(t) ? t : torch::stable::contiguous(t); }

// Pointer and strides of factors [B, Hkv].
inline Tokens<const float> descale_of(const OptionalTensor& t) {
  if (!defined(t)) return {};
  return {static_cast<const float*>(t->data_ptr()), t->stride(0), {}, t->stride(1)};
}

// Pointer and strides of [B, X.., H, features], or of a statistic [B, X.., H] (features = false).
template <class T>
Tokens<T> tokens_of(const Tensor& t, int rank, bool features = true) {
  Tokens<T> view;
  view.data = static_cast<T*>(t.data_ptr());
  view.batch = t.stride(0);
  for (int i = 0; i < rank; ++i) view.x[3 - rank + i] = t.stride(i + 1);
  view.head = t.stride(rank + 1);
  STD_TORCH_CHECK(t.dim() == rank + 2 + (features ? 1 : 0), "tokens_of: wrong rank");
  return view;
}

}  // namespace nearfield::gna
