// Host side of the bulk tensor copy engine: describes an n-dimensional tensor in global memory and the box
// that one instruction copies. No link against libcuda: the encoder is looked up in the driver at run time.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace nearfield {

// The rank-5 view of a tensor that the kernels use for every problem; mode 0 is contiguous. Unused modes have
// size 1.
struct TmaTensor {
  const void* data;
  CUtensorMapDataType type;
  int element_bytes;
  uint64_t size[5];
  int64_t stride[5];  // elements; stride[0] is 1
  uint32_t box[5];    // elements that one copy brings, after stepping
  uint32_t step[5];   // every step-th element only (dilation), 1 to 8
  CUtensorMapSwizzle swizzle;

  // Every element.
  void lay_out(const int64_t (&sizes)[5], const int64_t (&strides)[5], const uint32_t (&boxes)[5]) {
    for (int i = 0; i < 5; ++i) {
      size[i] = static_cast<uint64_t>(sizes[i]);
      stride[i] = strides[i];
      box[i] = boxes[i];
      step[i] = 1;
    }
  }
};

inline cudaError_t encode_tma(CUtensorMap* map, const TmaTensor& t) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode encode = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(symbol) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  // The encoder is a driver call: it needs a current context, which a thread of its own (autograd's) may not
  // have before its first runtime call.
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  if (const cudaError_t e = cudaSetDevice(device)) return e;

  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5], steps[5];
  for (int i = 0; i < 5; ++i) {
    sizes[i] = t.size[i];
    steps[i] = t.size[i] == 1 ? 1 : t.step[i];
    box[i] = (t.box[i] - 1) * steps[i] + 1;  // the engine wants the span that the stepped box covers
    // A mode of size 1 is never stepped along; give it any stride the engine accepts.
    if (i > 0) strides[i - 1] = t.size[i] == 1 ? 16 : static_cast<cuuint64_t>(t.stride[i]) * t.element_bytes;
  }
  const CUresult result = encode(map, t.type, 5, const_cast<void*>(t.data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, t.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace nearfield
