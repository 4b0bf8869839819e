// Element types as tags, so that the Torch side can name a kernel instance without CUDA headers.
#pragma once

namespace nearfield {
struct bf16;
struct fp16;

// Text of a cudaError_t returned by a kernel launcher (built only with CUDA).
const char* cuda_error_string(int error);
}  // namespace nearfield
