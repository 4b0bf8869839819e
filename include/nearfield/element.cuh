// Memory of an element type known only at run time, read and written as float32. For the small tensors of
// memory-bound kernels, where a branch per element is cheaper than a template instance per combination.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nearfield/dtype.h"

namespace nearfield {

__device__ __forceinline__ float load_element(const void* data, Element type, int64_t i) {
  switch (type) {
    case Element::kBf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case Element::kFp16:
      return __half2float(static_cast<const __half*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}

__device__ __forceinline__ void store_element(void* data, Element type, int64_t i, float x) {
  switch (type) {
    case Element::kBf16:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
      return;
    case Element::kFp16:
      static_cast<__half*>(data)[i] = __float2half_rn(x);
      return;
    default:
      static_cast<float*>(data)[i] = x;
  }
}

// Four neighbors in one access: 16 bytes of float32 or 8 bytes of bfloat16.
__device__ __forceinline__ float4 load4(const float* data) { return *reinterpret_cast<const float4*>(data); }

__device__ __forceinline__ float4 load4(const __nv_bfloat16* data) {
  const uint2 raw = *reinterpret_cast<const uint2*>(data);
  return {__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16),
          __uint_as_float(raw.y & 0xffff0000u)};
}

__device__ __forceinline__ void store4(float* data, float4 x) { *reinterpret_cast<float4*>(data) = x; }

__device__ __forceinline__ void store4(__nv_bfloat16* data, float4 x) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
  uint2 raw;
  raw.x = reinterpret_cast<const unsigned&>(low);
  raw.y = reinterpret_cast<const unsigned&>(high);
  *reinterpret_cast<uint2*>(data) = raw;
}

}  // namespace nearfield
