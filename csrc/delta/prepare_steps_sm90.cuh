// What both kernels that prepare chunks share: which chunk, write strengths, N = T - I from A.
#pragma once

#include "delta/chunk_sm90.cuh"
#include "nearfield/triangular.cuh"

namespace nearfield::delta {

// ---- Which chunk ----

struct ChunkPlace {
  int64_t batch, token, head, index;  // the first token; [slot][value head]
  int head_k, valid;

  __device__ __forceinline__ bool find(const InputsSm90& in) {
    const int64_t slot = blockIdx.x / in.value_heads;
    head = blockIdx.x % in.value_heads;
    const Sequence sequence = sequence_of(in, sequence_at_slot(in, slot));
    const int64_t first = (slot - sequence.first_slot) * kRows;
    batch = sequence.batch;
    token = sequence.begin + first;
    index = slot * in.value_heads + head;
    head_k = static_cast<int>(head / (in.value_heads / in.heads));
    valid = static_cast<int>(min(static_cast<int64_t>(kRows), sequence.length - first));
    return first >= 0 && first < sequence.length;
  }
  // Index of a token of the chunk in [B, T, HV].
  __device__ __forceinline__ int64_t token_head(const InputsSm90& in, int row) const {
    return (batch * in.tokens + token + row) * in.value_heads + head;
  }
};

// ---- N = T - I from A ----

// Takes a pair A_ij, A_i(j+1) of the accumulator of warp i / 16; j = 8 n + 2 (lane % 4). Zero on and above
// the diagonal.
__device__ __forceinline__ void put_pair(cutlass::bfloat16_t (&a)[2][kImage], TriangularScratch& triangular,
                                         int i, int n, float a0, float a1) {
  const int warp = i / 16, column = 2 * (threadIdx.x % 4);
  if (n / 2 < warp) {
    uint32_t high, low;
    split_pair(a0, a1, high, low);
    *reinterpret_cast<uint32_t*>(image_piece(a[0], i, n) + column) = high;
    *reinterpret_cast<uint32_t*>(image_piece(a[1], i, n) + column) = low;
  } else if (n / 2 == warp) {
    triangular.diagonal[warp][n % 2 * 8 + column][i % 16] = a0;
    triangular.diagonal[warp][n % 2 * 8 + column + 1][i % 16] = a1;
  }
}

// The first four warps of a CTA, after put_pair of the whole lower triangle; the others are not waited for.
template <class Element>
__device__ __forceinline__ void invert(cutlass::bfloat16_t (&a)[2][kImage], TriangularScratch& triangular,
                                       Element* image) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncwarp();
  float column[16];
  invert_diagonal_block(triangular, warp, column);
  if (lane < 16) {
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      image_piece(image, 16 * warp + i, 2 * warp + lane / 8)[lane % 8] =
          static_cast<Element>(i > lane ? column[i] : 0.f);
    }
  }
  cutlass::arch::NamedBarrier::sync(128, 1);
  if (warp < 3) {
    const auto load_a = [&](int I, int M) {
      SplitFragment f;
      SM75_U32x4_LDSM_N::copy(matrices_at<false>(a[0], 16 * I, 2 * M), f.high[0], f.high[1], f.high[2],
                              f.high[3]);
      SM75_U32x4_LDSM_N::copy(matrices_at<false>(a[1], 16 * I, 2 * M), f.low[0], f.low[1], f.low[2],
                              f.low[3]);
      return f;
    };
    const auto store = [&](int I, const float (&y)[2][4]) {
      SM90_U16x8_STSM_T::copy(pack<Element>(y[0][0], y[0][1]), pack<Element>(y[0][2], y[0][3]),
                              pack<Element>(y[1][0], y[1][1]), pack<Element>(y[1][2], y[1][3]),
                              matrices_at<false>(image, 16 * I, 2 * warp));
    };
    solve_block_column(triangular, warp, load_a, store);
  } else {
    for (int x = lane; x < 3 * kRows * 2; x += 32) {  // blocks above the diagonal
      const int row = x / 2 % kRows, piece = 2 * (x / (2 * kRows) + 1) + x % 2;
      if (piece / 2 > row / 16) *reinterpret_cast<uint4*>(image_piece(image, row, piece)) = uint4{0, 0, 0, 0};
    }
  }
}

// ---- Write strengths ----

// One warp.
__device__ __forceinline__ void load_betas(const InputsSm90& in, ChunkRows& rows, const ChunkPlace& place) {
  for (int i = threadIdx.x % 32; i < kRows; i += 32) {
    const int64_t at = place.token_head(in, i);
    rows.beta[i] = i < place.valid ? activated_beta(in, in.beta[at]) : 0.f;
  }
}

}  // namespace nearfield::delta
