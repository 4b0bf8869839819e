#include <cuda_runtime_api.h>

#include "nearfield/dtype.h"

namespace nearfield {
const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}  // namespace nearfield
