// What every register.cpp needs from Torch: shape checks that name the argument, strided views, memory,
// dispatch on the element type, and the current CUDA stream. The user-facing checks (ValueError) are in
// each family's op.py; these keep a direct call of torch.ops.nearfield.* from touching foreign memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

// Defined by libtorch_cuda only, hence weak: one binary serves CPU-only and CUDA torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace nearfield {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const int64_t* sizes, size_t n) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < n; ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  return {t.sizes().data(), t.sizes().data() + t.dim()};
}

// Memory on the device of `like`, dense and not filled, by default in its dtype. torch::stable::new_empty
// looks its operator up by name and boxes the arguments, which a call on a GPU with a dozen results and
// buffers feels; the short way does not fill memory on the CPU where torch.utils.deterministic asks for it.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& shape,
                       std::optional<ScalarType> dtype = {}) {
  if (!like.is_cuda()) return torch::stable::new_empty(like, shape, dtype);
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  const ScalarType type = dtype.value_or(like.scalar_type());
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle memory;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                               device_type, like.get_device_index(), &memory));
  return Tensor(memory);
}

// Checks the shape of `t`; -1 accepts any size in that place.
inline void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& want) {
  const auto sizes = t.sizes();
  bool same = sizes.size() == want.size();
  for (size_t i = 0; same && i < want.size(); ++i) same = want[i] < 0 || want[i] == sizes[i];
  STD_TORCH_CHECK(same, op, ": ", name, " has shape ", shape_text(sizes.data(), sizes.size()), ", expected ",
                  shape_text(want.data(), want.size()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType want) {
  STD_TORCH_CHECK(t.scalar_type() == want, op, ": ", name, " has dtype ",
                  torch::headeronly::toString(t.scalar_type()), ", expected ",
                  torch::headeronly::toString(want));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ",
                  name, " is on another device than the first argument");
}

inline bool defined(const std::optional<Tensor>& t) { return t.has_value() && t->defined(); }

// The type in which a CPU kernel computes: 16-bit types are widened.
template <class T>
struct compute_type {
  using type = float;
};
template <>
struct compute_type<double> {
  using type = double;
};
template <class T>
using compute_t = typename compute_type<T>::type;
template <class T>
constexpr ScalarType compute_dtype =
    std::is_same_v<compute_t<T>, double> ? ScalarType::Double : ScalarType::Float;

// Calls f(T{}) with the C++ element type of a CPU tensor.
template <class F>
void dispatch_cpu_dtype(const char* op, const char* name, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " has dtype ", torch::headeronly::toString(dtype),
                      "; supported on CPU: float32, float64, bfloat16, float16");
  }
}

inline void* current_stream(const Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch build has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

// Boundaries of packed sequences, int64 on the CPU: from 0, not decreasing, inside the tokens.
inline void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t tokens) {
  const auto* cu = static_cast<const int64_t*>(cu_seqlens.const_data_ptr());
  const int64_t last = cu_seqlens.sizes()[0] - 1;
  STD_TORCH_CHECK(cu[0] == 0, op, ": cu_seqlens starts with ", cu[0], ", expected 0");
  for (int64_t n = 0; n < last; ++n)
    STD_TORCH_CHECK(cu[n] <= cu[n + 1], op, ": cu_seqlens decreases from ", cu[n], " to ", cu[n + 1],
                    " after sequence ", n);
  STD_TORCH_CHECK(cu[last] <= tokens, op, ": cu_seqlens ends with ", cu[last], ", but there are ", tokens,
                  " tokens");
}

}  // namespace nearfield
