// The table of backends, and nearfield::delta_plan, which tells it.
#include "delta/backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "architectures.h"
#include "delta/head_cluster_sm90.h"
#include "delta/sm80.h"
#include "delta/sm90_bwd.h"

namespace nearfield::delta {
namespace {

// ---- What instances.def lists ----

struct Built {
  const char *kernel, *arguments;
};
const std::vector<Built> kBuilt = {
#define INSTANCE(kernel, ...) {#kernel, #__VA_ARGS__},
#include "delta/instances.def"
#undef INSTANCE
};

const char* tag_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? "bf16" : dtype == ScalarType::Half ? "fp16" : "fp32";
}

// The largest key dim of a kernel with arguments (type, key dim, ..); 0: not built.
int64_t largest_key_dim(const char* kernel, ScalarType dtype) {
  int64_t largest = 0;
  for (const Built& b : kBuilt) {
    if (std::strcmp(b.kernel, kernel) != 0 || std::strncmp(b.arguments, tag_of(dtype), 4) != 0) continue;
    const char* comma = std::strchr(b.arguments, ',');
    if (comma != nullptr) largest = std::max<int64_t>(largest, std::atoi(comma + 1));
  }
  return largest;
}

bool has_portable_gradient(ScalarType dtype, bool channel_gate) {
  const std::string arguments = std::string(tag_of(dtype)) + (channel_gate ? ", true" : ", false");
  return std::any_of(kBuilt.begin(), kBuilt.end(), [&](const Built& b) {
    return std::strcmp(b.kernel, "gradient_sm80") == 0 && arguments == b.arguments;
  });
}

// ---- Hopper's kernels ----

#ifdef NEARFIELD_DELTA
constexpr const char* kBuiltFor = kArchitectures;
#else
constexpr const char* kBuiltFor = "";  // this family's kernels are not in the build
#endif

// Why Hopper's kernels do not run a call; empty: they do.
std::string hopper_refuses(const Request& r, const Inputs& x) {
  std::ostringstream why;
  const ScalarType dtype = x.q.scalar_type();
#ifdef NEARFIELD_DELTA_SM90
  const bool built = true;
#else
  const bool built = false;
#endif
  const char* kernel = !r.backward      ? "prepare_sm90"
                       : x.channel_gate ? "chunk_gradient_channel_sm90"
                                        : "chunk_gradient_sm90";
  const int64_t keys = largest_key_dim(kernel, dtype);
  if (r.capability != 90 || !built) {
    why << "the GPU has compute capability " << capability_text(r.capability)
        << ", Hopper's kernels need 9.0 and a build for 90a (this one is for " << kBuiltFor << ")";
  } else if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
    why << "q has dtype " << torch::headeronly::toString(dtype)
        << ", Hopper's kernels take bfloat16, float16";
  } else if (keys == 0) {
    why << "g has one gate per channel, Hopper's gradient takes one per head";
  } else if (x.K % 8 != 0 || x.V % 8 != 0 || x.K > keys || (r.backward && x.V > kMostBackwardValues)) {
    why << "q has " << x.K << " and v " << x.V << " channels, Hopper's "
        << (r.backward ? "gradient takes" : "kernels take") << " multiples of 8 up to " << keys;
    if (r.backward) why << " and " << kMostBackwardValues;
  }
  return why.str();
}

std::string delta_plan(Tensor q, Tensor k, Tensor v, Tensor beta, OptTensor g, int64_t capability,
                       bool backward, std::optional<std::string> backend) {
  const char* op = backward ? "delta_bwd" : "delta_fwd";
  const OptTensor none;
  const Inputs x = check_given(op, q, k, v, beta, g, none, none, none, none, Options{});
  const Backend chosen = choose_backend({op, backward, static_cast<int>(capability), backend}, x);
  return (chosen.portable ? "portable" : "hopper") + std::string("|") + chosen.because;
}

}  // namespace

bool keeps_for_backward(Request r, const Inputs& x) {
  const auto serves = [&](bool backward) {
    r.backward = backward;
    return hopper_refuses(r, x).empty();
  };
  return (!r.name || *r.name == "hopper") && serves(false) && serves(true);
}

Backend choose_backend(const Request& r, const Inputs& x) {
  Backend backend{};
  STD_TORCH_CHECK(!r.name || *r.name == "hopper" || *r.name == "portable", r.op, ": backend is \"", *r.name,
                  "\"; known: \"hopper\", \"portable\"");
  STD_TORCH_CHECK(*kBuiltFor != '\0', r.op, ": this build has no kernel for compute capability ",
                  capability_text(r.capability), "; it was built without CUDA kernels");
  STD_TORCH_CHECK(is_built_for(kBuiltFor, r.capability), r.op, ": the GPU has compute capability ",
                  capability_text(r.capability), "; this build is for ", kBuiltFor);
  if (!r.name || *r.name == "hopper") {
    backend.because = hopper_refuses(r, x);
    if (backend.because.empty()) return backend;
    STD_TORCH_CHECK(!r.name, r.op, ": backend \"hopper\" was asked for, but ", backend.because);
  }
  backend.portable = true;
  const ScalarType dtype = x.q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float,
                  r.op, ": q has dtype ", torch::headeronly::toString(dtype),
                  "; supported on CUDA: bfloat16, float16, float32");
  STD_TORCH_CHECK(x.K <= kMostFeaturesSm80, r.op, ": q has ", x.K, " channels; supported on CUDA: up to ",
                  kMostFeaturesSm80);
  STD_TORCH_CHECK(!r.backward || has_portable_gradient(dtype, x.channel_gate), r.op,
                  ": g has one gate per channel; supported by the portable gradient: one per head");
  return backend;
}

}  // namespace nearfield::delta

STABLE_TORCH_LIBRARY_FRAGMENT(nearfield, m) {
  // "hopper" or "portable", then "|" and why not hopper. Tensors on the meta device will do.
  m.def(
      "delta_plan(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, int capability, bool backward, str? "
      "backend) -> str");
}
STABLE_TORCH_LIBRARY_IMPL(nearfield, Meta, m) {
  m.impl("delta_plan", TORCH_BOX(&nearfield::delta::delta_plan));
}
