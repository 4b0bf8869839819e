// The layout of one operand tile, 64 rows x kHeadDim fp16: chunks of 64 features, each [64 rows][one swizzle
// span]. Inside a span pieces of 16 bytes are permuted by the row. It is what WGMMA reads as K-major
// rows, or transposed.
#pragma once

#include <cuda_fp16.h>

#include "lla/sm90.h"

namespace nearfield::lla {

constexpr int tile_elements(int head_dim) { return kTileRows * head_dim; }

// Offset, in elements, of feature `column` (a multiple of 8, or inside such a piece) of `row`.
template <int kHeadDim>
__device__ __forceinline__ int tile_offset(int row, int column) {
  static_assert(kHeadDim % 64 == 0);
  constexpr int kChunk = 64;
  const int permuted = column % kChunk / 8 ^ (row & 7);
  return (column / kChunk * kTileRows + row) * kChunk + permuted * 8 + column % 8;
}

// A power of two just above `largest`, so that values over it are below one, and those near it above a half.
__device__ __forceinline__ float operand_unit(float largest) {
  const unsigned exponent = __float_as_uint(largest) & 0x7f800000u;
  return exponent == 0 || exponent >= 0x7f000000u ? 1.f : 2.f * __uint_as_float(exponent);
}

__device__ __forceinline__ float operand_unit(const Operand& operand, int head) {
  return fmaxf(operand_unit(operand.largest[head]), operand.least_unit);
}

}  // namespace nearfield::lla
