// nearfield::delta_bwd on CUDA: picks the kernel instances, allocates scratch, launches.
#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#endif
#ifdef NEARFIELD_DELTA
#include <tuple>

#include "delta/checks.h"
#include "delta/instances_sm90.h"
#include "delta/sm90_bwd.h"
#include "nearfield/device.h"

namespace nearfield::delta {
namespace {

// ---- Instances ----

constexpr int64_t kKeyDim = 128, kMostValues = 128;

struct BackwardKernels {
  int (*passes)(const BackwardPassesArgs&, void*) = nullptr;
  int (*gradient)(const ChunkGradientArgs&, void*) = nullptr;
  int (*finish)(const FinishGradientArgs&, void*) = nullptr;
};

BackwardKernels choose_backward(const char* op, const Inputs& x, int64_t tiles) {
  STD_TORCH_CHECK(!x.channel_gate, op, ": g has one gate per channel; supported on CUDA: one per head");
  STD_TORCH_CHECK(x.K <= kKeyDim && x.V <= kMostValues, op, ": q has ", x.K, " and v ", x.V,
                  " channels; supported on CUDA: up to ", kKeyDim, " and ", kMostValues);
  const bool is_bf16 = x.q.scalar_type() == ScalarType::BFloat16;
  BackwardKernels kernels;
  const auto add = [&]<class Kernel>(auto& entry, bool wanted) {
    if (wanted) entry = &Kernel::run;
  };
  (void)add;
#ifdef NEARFIELD_DELTA_SM90
  const auto pick = [&](auto tag) {
    using Tag = decltype(tag);
    kernels.passes = tiles == 2 ? &backward_passes_sm90<Tag, 128, 2, false>::run
                                : &backward_passes_sm90<Tag, 128, 1, false>::run;
    kernels.gradient = &chunk_gradient_sm90<Tag, 128>::run;
    kernels.finish = &finish_gradient_sm90<Tag>::run;
  };
  if (is_bf16) {
    pick(bf16{});
  } else {
    pick(fp16{});
  }
#endif
  return kernels;
}
