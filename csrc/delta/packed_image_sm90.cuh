// N and P of a chunk in one image (ChunkScratch::NP), taken apart by a warp of a walk.
#pragma once

#include "delta/chunk_sm90.cuh"

namespace nearfield::delta {

// One warp. An image with N below its diagonal and P^T on and above it becomes N, in the same place, and P,
// without its blocks above the diagonal, which are zero from the beginning. Without P: N only.
template <bool kWithP = true, class Element>
__device__ __forceinline__ void unpack_image(Element* n, Element* p) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = 2 * (lane % 4);  // in 8 x 8 matrices
  const uint32_t strictly = (column < row ? 0xffffu : 0) | (column + 1 < row ? 0xffff0000u : 0);
  const uint32_t lower = (column <= row ? 0xffffu : 0) | (column < row ? 0xffff0000u : 0);
  // Words of a block of 16 x 16: word 2 a + b has rows 8 b and columns 8 a.
  uint32_t diagonal[4][4], blocks[4][4][4];
  CUTE_UNROLL
  for (int I = 0; I < 4; ++I) {
    auto& d = diagonal[I];
    SM75_U32x4_LDSM_N::copy(matrices_at<true>(n, 16 * I, 2 * I), d[0], d[1], d[2], d[3]);
    CUTE_UNROLL
    for (int J = 0; J <= I; ++J) {
      if (!kWithP) break;
      auto& b = blocks[I][J];
      SM75_U16x8_LDSM_T::copy(matrices_at<false>(n, 16 * J, 2 * I), b[0], b[1], b[2], b[3]);
    }
  }
  __syncwarp();
  CUTE_UNROLL
  for (int I = 0; I < 4; ++I) {
    CUTE_UNROLL
    for (int J = 0; J <= I; ++J) {
      auto& b = blocks[I][J];
      if constexpr (kWithP) {
        if (J == I) b[0] &= lower, b[2] = 0, b[3] &= lower;
        SM90_U32x4_STSM_N::copy(b[0], b[1], b[2], b[3], matrices_at<true>(p, 16 * I, 2 * J));
      }
      auto& d = diagonal[I];
      if (J == I) {
        d[0] &= strictly, d[2] = 0, d[3] &= strictly;
        SM90_U32x4_STSM_N::copy(d[0], d[1], d[2], d[3], matrices_at<true>(n, 16 * I, 2 * I));
      } else {
        SM90_U32x4_STSM_N::copy(0, 0, 0, 0, matrices_at<true>(n, 16 * J, 2 * I));
      }
    }
  }
}

// One warp: the blocks of 16 x 16 above the diagonal.
template <class Element>
__device__ __forceinline__ void clear_upper_blocks(Element* image) {
  CUTE_UNROLL
  for (int I = 1; I < 4; ++I) {
    CUTE_UNROLL
    for (int J = 0; J < I; ++J) SM90_U32x4_STSM_N::copy(0, 0, 0, 0, matrices_at<true>(image, 16 * J, 2 * I));
  }
}

}  // namespace nearfield::delta
