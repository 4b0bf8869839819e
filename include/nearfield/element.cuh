// Memory of an element type known only at run time, read and written as float32. For the small tensors of
// memory-bound kernels, where a branch per element is cheaper than a template instance per combination.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nearfield/dtype.h"

namespace nearfield {

// Without branches, so that the loads of several elements overlap.
__device__ __forceinline__ float load_element(const void* data, Element type, int64_t i) {
  uint32_t raw;
  if (type == Element::kFp32) {
    raw = static_cast<const uint32_t*>(data)[i];
  } else {
    raw = static_cast<const uint16_t*>(data)[i];
  }
  const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
  return type == Element::kFp16 ? half : __uint_as_float(type == Element::kBf16 ? raw << 16 : raw);
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

// Four neighbors in one access to device memory: 16 bytes of float32 or 8 bytes of bfloat16. They are used
// once, so the L1 cache is passed by.
__device__ __forceinline__ float4 load4(const float* data) {
  return __ldcg(reinterpret_cast<const float4*>(data));
}

__device__ __forceinline__ float4 load4(const __nv_bfloat16* data) {
  const uint2 raw = __ldcg(reinterpret_cast<const uint2*>(data));
  return {__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16),
          __uint_as_float(raw.y & 0xffff0000u)};
}

__device__ __forceinline__ void store4(float* data, float4 x) { __stcg(reinterpret_cast<float4*>(data), x); }

__device__ __forceinline__ void store4(__nv_bfloat16* data, float4 x) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
  __stcg(reinterpret_cast<uint2*>(data),
         uint2{reinterpret_cast<const unsigned&>(low), reinterpret_cast<const unsigned&>(high)});
}

// Starts bringing a line to the L2 cache.
__device__ __forceinline__ void prefetch(const void* data) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(data));
}

}  // namespace nearfield
