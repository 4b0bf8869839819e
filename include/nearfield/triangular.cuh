// N = T - I for T = (I + A)^-1, A strictly lower 64 x 64, by four warps. The diagonal 16 x 16 blocks are
// inverted by forward substitution in float32; the blocks below follow column by column,
//   T_IJ = -T_II sum_{J <= M < I} A_IM T_MJ,
// on tensor cores with every factor split into two bfloat16 (high and low half), which keeps 16 bits of
// mantissa. A warp computes a block column transposed, Y_I = T_IJ^T = -(sum_M Y_M A_IM^T) T_II^T: its
// accumulators are then the left operand of the next product and never leave the registers.
#pragma once

#include <cutlass/bfloat16.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/config.hpp>

namespace nearfield {

struct SplitFragment {
  uint32_t high[4], low[4];
};

__device__ __forceinline__ void split_pair(float a, float b, uint32_t& high, uint32_t& low) {
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(b), "f"(a));
  const float a_low = a - __uint_as_float(high << 16), b_low = b - __uint_as_float(high & 0xffff0000u);
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(b_low), "f"(a_low));
}

// Where a 16 x 16 block of 16-bit elements has a piece of eight of a row: rows 4 to 7 and 12 to 15 hold the
// second first, so that eight rows of a piece are in different banks.
__device__ __forceinline__ int block_piece_at(int row, int piece) {
  return row * 16 + (piece ^ (row / 4 % 2)) * 8;
}

// A 16 x 16 block in halves, as a factor of such products. Eight rows of a piece are in different banks by
// padding, with which the portable kernels spill less, or, kCompact, by the order of the pieces.
template <bool kCompact>
struct SplitBlockOf {
  static constexpr int kRow = kCompact ? 16 : 24;
  alignas(16) cutlass::bfloat16_t half[2][16 * kRow];  // high, low

  static __device__ __forceinline__ int piece_at(int row, int piece) {
    return kCompact ? block_piece_at(row, piece) : row * kRow + 8 * piece;
  }

  // Entries 2 i and 2 i + 1 of a row are in word i.
  __device__ __forceinline__ void store_row(int row, const uint32_t (&high)[8], const uint32_t (&low)[8]) {
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int at = piece_at(row, i);
      *reinterpret_cast<uint4*>(&half[0][at]) = {high[4 * i], high[4 * i + 1], high[4 * i + 2],
                                                 high[4 * i + 3]};
      *reinterpret_cast<uint4*>(&half[1][at]) = {low[4 * i], low[4 * i + 1], low[4 * i + 2], low[4 * i + 3]};
    }
  }

  // As the left operand, or as the right one.
  template <bool kRight>
  __device__ __forceinline__ SplitFragment load() const {
    const int lane = threadIdx.x % 32;
    const int at = piece_at(8 * (lane / 8 % 2) + lane % 8, lane / 16);
    SplitFragment f;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t (&r)[4] = i == 0 ? f.high : f.low;
      const auto& source = *reinterpret_cast<const cute::uint128_t*>(&half[i][at]);
      if constexpr (kRight) {
        cute::SM75_U16x8_LDSM_T::copy(source, r[0], r[1], r[2], r[3]);
      } else {
        cute::SM75_U32x4_LDSM_N::copy(source, r[0], r[1], r[2], r[3]);
      }
    }
    return f;
  }
};

using SplitBlock = SplitBlockOf<false>;

struct TriangularScratch {
  static constexpr int kBlock = 16, kBlocks = 4;
  static constexpr int kColumn =
      20;  // floats in a column of a diagonal block: rows of a quad in different banks
  alignas(16) float diagonal[kBlocks][kBlock][kColumn];  // [block][column][row] of A
  SplitBlockOf<true> inverse[kBlocks];                   // T_II^T
};

// The 16 x 16 blocks of A below the diagonal, in halves.
struct SplitBlocks {
  static constexpr int kBlocks = 6, kElements = 16 * 16;
  alignas(16) uint16_t high[kBlocks][kElements], low[kBlocks][kElements];  // bits of bfloat16

  static __device__ __forceinline__ int index(int I, int M) { return I * (I - 1) / 2 + M; }
};

// acc (16 x 16 as two 16 x 8) += A B, without the product of the low halves.
__device__ __forceinline__ void split_mma(float (&acc)[2][4], const SplitFragment& a,
                                          const SplitFragment& b) {
  using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;
  const auto product = [](float (&c)[4], const uint32_t (&x)[4], uint32_t y0, uint32_t y1) {
    Mma::fma(c[0], c[1], c[2], c[3], x[0], x[1], x[2], x[3], y0, y1, c[0], c[1], c[2], c[3]);
  };
  CUTE_UNROLL
  for (int n = 0; n < 2; ++n) product(acc[n], a.low, b.high[2 * n], b.high[2 * n + 1]);
  CUTE_UNROLL
  for (int n = 0; n < 2; ++n) product(acc[n], a.high, b.low[2 * n], b.low[2 * n + 1]);
  CUTE_UNROLL
  for (int n = 0; n < 2; ++n) product(acc[n], a.high, b.high[2 * n], b.high[2 * n + 1]);
}

// An accumulator, negated or not, as the left operand of the next product.
__device__ __forceinline__ SplitFragment split(const float (&acc)[2][4], float sign) {
  SplitFragment f;
  CUTE_UNROLL
  for (int n = 0; n < 2; ++n) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h)
      split_pair(sign * acc[n][2 * h], sign * acc[n][2 * h + 1], f.high[2 * n + h], f.low[2 * n + h]);
  }
  return f;
}

// One warp inverts diagonal block w, whose A is in scratch.diagonal: lane j ends with column j % 16 of T_ww
// in x, and scratch.inverse holds T_ww^T.
__device__ __forceinline__ void invert_diagonal_block(TriangularScratch& scratch, int w, float (&x)[16]) {
  const int lane = threadIdx.x % 32;
  CUTE_UNROLL
  for (int i = 0; i < 16; ++i) x[i] = i == lane % 16 ? 1.f : 0.f;
  CUTE_UNROLL
  for (int m = 0; m < 15; ++m) {
    CUTE_UNROLL
    for (int i4 = (m + 1) / 4; i4 < 4; ++i4) {
      const float4 a = *reinterpret_cast<const float4*>(&scratch.diagonal[w][m][4 * i4]);
      const float column[4] = {a.x, a.y, a.z, a.w};
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i)
        if (4 * i4 + i > m) x[4 * i4 + i] -= column[i] * x[m];
    }
  }
  if (lane >= 16) return;
  uint32_t high[8], low[8];
  CUTE_UNROLL
  for (int i = 0; i < 8; ++i) split_pair(x[2 * i], x[2 * i + 1], high[i], low[i]);
  scratch.inverse[w].store_row(lane, high, low);
}

// One warp computes the blocks below the diagonal of block column J. load_a(I, M) returns A_IM^T as a right
// operand; store(I, y) receives T_IJ^T as an accumulator. A column has fewer than three: with kLeave a warp
// leaves behind the last one, else it skips each of the others. Which is faster depends on what registers the
// kernel has left (csrc/delta/README.md).
template <bool kLeave, class LoadA, class Store>
__device__ __forceinline__ void solve_block_column(TriangularScratch& scratch, int J, const LoadA& load_a,
                                                   const Store& store) {
  SplitFragment Y[3];
  Y[0] = scratch.inverse[J].load<false>();
  CUTE_UNROLL
  for (int d = 1; d < 4; ++d) {
    if constexpr (kLeave) {
      if (J + d == 4) break;
    } else {
      if (J + d >= 4) continue;
    }
    float z[2][4] = {};
    CUTE_UNROLL
    for (int e = 0; e < d; ++e) split_mma(z, Y[e], load_a(J + d, J + e));
    float y[2][4] = {};
    split_mma(y, split(z, -1.f), scratch.inverse[J + d].load<true>());
    store(J + d, y);
    if (d < 3) Y[d] = split(y, 1.f);
  }
}

}  // namespace nearfield
