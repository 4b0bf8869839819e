// Dynamic shared memory of a kernel.
#pragma once

#include <cuda_runtime_api.h>

namespace nearfield {

// More than 48 KB have to be asked for. The permission belongs to the kernel on the current device, so a
// process with several GPUs needs it on each; asking again is cheap and nothing is remembered.
template <class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace nearfield
