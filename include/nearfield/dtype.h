// Element types: as tags, so that the Torch side can name a kernel instance without CUDA headers, and as
// values, where a kernel decides at run time.
#pragma once

#include <cstdint>

namespace nearfield {

struct bf16;
struct fp16;
struct fp32;
struct e4m3;

enum class Element : int { kFp32, kBf16, kFp16 };

}  // namespace nearfield
