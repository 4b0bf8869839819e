// Element types as tags, so that the Torch side can name a kernel instance without CUDA headers.
#pragma once

namespace nearfield {
struct bf16;
struct fp16;
struct fp32;
}  // namespace nearfield
