// Kernels that begin while the one before them in the stream ends (programmatic dependent launch, Hopper and
// newer). A kernel launched so must not touch what that one, or one before it, writes until
// wait_for_kernel_before; it must call that before it ends, so that who waits for it waits for both.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

namespace nearfield {

// The next kernel may take what room there is on the multiprocessors. Without this it waits for the end.
__device__ __forceinline__ void let_kernel_after_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// All of it is done and its results are in memory. Returns at once in an ordinary launch.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class... Parameters, class... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                             cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute beside{};
  beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &beside, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace nearfield
