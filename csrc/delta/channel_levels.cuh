// Pairs inside a block of 16 rows with a gate per channel, grouped by the highest bit l in which i and j
// differ: between them lies a row m, the first with this bit set, and both e^{G_i - G_m} and e^{G_m - G_j}
// are at most 1, however strong the gate. A level has as many rows with the bit as without, so it is one
// product of 8 rows, as k and as q, with 8 rows. On tensor cores, in tf32 for its exponents.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/config.hpp>

namespace nearfield::delta {

constexpr int kLevelBlock = 16, kLevels = 4;
// Rows of a level: k with the bit, q with it, k without it.
constexpr int kStageRows = 3 * kLevelBlock / 2;

__device__ __forceinline__ float2 operator*(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }

// Row number x (0 to 7) of those of a block that have not bit l, and the number of a row.
__device__ __forceinline__ int without_bit(int level, int x) {
  const int below = (1 << level) - 1;
  return (x & ~below) << 1 | (x & below);
}
template <int kLevel>
constexpr int number_of(int row) {
  return row >> (kLevel + 1) << kLevel | (row & ((1 << kLevel) - 1));
}

// The rows of level l of a block, for two channels of which decay[row] is e^g of the row after: first(m) for
// a row between, with(row, e) for the others that have the bit and without(row, e) for those that have not,
// with the decay e between them and m.
template <int kLevel, class First, class With, class Without>
__device__ __forceinline__ void for_rows_of_level(const float2 (&decay)[kLevelBlock], const First& first,
                                                  const With& with, const Without& without) {
  constexpr int kStep = 1 << kLevel;
  CUTE_UNROLL
  for (int m = kStep; m < kLevelBlock; m += 2 * kStep) {
    first(m);
    float2 e = decay[m];
    CUTE_UNROLL
    for (int i = m + 1; i < m + kStep; ++i) {
      with(i, e);
      e = e * decay[i];
    }
    e = decay[m - 1];
    CUTE_UNROLL
    for (int i = m - 1; i >= m - kStep; --i) {
      without(i, e);
      if (i > m - kStep) e = e * decay[i - 1];
    }
  }
}

// The tensor cores drop the low 13 bits; this makes it rounding.
__device__ __forceinline__ float to_tf32(float x) { return __uint_as_float(__float_as_uint(x) + 0x1000u); }

// Level l of a block over the 64 channels of a warp, of which a lane owns two: own.k_of(row) and q_of(row) as
// float2, own.decay[row] = e^g of the row after. `stage`: kStageRows * 64 floats of the warp's own. Lane (r,
// t), r = lane / 4, gets two of A, of row number r with the bit and row numbers 2 t and the next without it,
// then two of P; of use where both agree above the bit (for_level). No factors of norm or beta yet.
template <int kLevel, class Own>
__device__ __forceinline__ float4 diagonal_level(float* stage, const Own& own) {
  using Mma = cute::SM80_16x8x8_F32TF32TF32F32_TN;
  const int lane = threadIdx.x % 32;
  // [32 channels][rows][32], the 16-byte pieces of a row swizzled as in an image.
  const auto piece_at = [&](int part, int row, int piece) {
    return stage + part * kStageRows * 32 + row * 32 + (piece ^ (row & 7)) * 4;
  };
  const auto put = [&](int row, float2 x) {
    *reinterpret_cast<float2*>(piece_at(lane / 16, row, lane % 16 / 2) + lane % 2 * 2) = x;
  };
  const auto put_scaled = [&](int row, float2 x, float2 e) {
    x = x * e;
    put(row, {to_tf32(x.x), to_tf32(x.y)});
  };
  __syncwarp();
  for_rows_of_level<kLevel>(
      own.decay,
      [&](int m) {
        put(number_of<kLevel>(m), own.k_of(m));
        put(8 + number_of<kLevel>(m), own.q_of(m));
      },
      [&](int i, float2 e) {
        put_scaled(number_of<kLevel>(i), own.k_of(i), e);
        put_scaled(8 + number_of<kLevel>(i), own.q_of(i), e);
      },
      [&](int i, float2 e) { put_scaled(16 + number_of<kLevel>(i), own.k_of(i), e); });
  __syncwarp();
  float sums[2][4] = {};  // a product waits for the last of the same sum
  const auto load = [](float* from, uint32_t (&to)[4]) {
    cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(from), to[0], to[1], to[2],
                                  to[3]);
  };
  CUTE_UNROLL
  for (int j = 0; j < 4; ++j) {  // 16 channels
    uint32_t below[4];
    load(piece_at(j / 2, 16 + lane % 8, 4 * (j % 2) + lane / 8), below);
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      uint32_t with[4];
      load(piece_at(j / 2, lane % 16, 4 * (j % 2) + 2 * h + lane / 16), with);
      float (&c)[4] = sums[h];
      Mma::fma(c[0], c[1], c[2], c[3], with[0], with[1], with[2], with[3], below[2 * h], below[2 * h + 1],
               c[0], c[1], c[2], c[3]);
    }
  }
  return {sums[0][0] + sums[1][0], sums[0][1] + sums[1][1], sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]};
}

// f(row, column, A, P) for the pairs of a level that this lane holds, rows of the block.
template <class F>
__device__ __forceinline__ void for_level(int level, float4 pairs, const F& f) {
  const int lane = threadIdx.x % 32, x = lane / 4;
  const float a[2] = {pairs.x, pairs.y}, p[2] = {pairs.z, pairs.w};
  CUTE_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int y = lane % 4 * 2 + e;
    if (x >> level == y >> level) f(without_bit(level, x) | 1 << level, without_bit(level, y), a[e], p[e]);
  }
}

}  // namespace nearfield::delta
