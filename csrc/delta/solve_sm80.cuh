// Z = -(I + Abar diag(beta))^-1 Abar of a chunk, Abar strictly lower: a thread per column in float32, or, for
// 16-bit results, four warps on blocks of 16:
//   Z_JJ by substitution in float32,
//   Z_IJ = -U_II (Abar_IJ T_JJ + sum_{J < M < I} Abar_IM diag(beta) Z_MJ)
// with U = I + Z diag(beta) and T = I + diag(beta) Z, on tensor cores with every factor split into two
// bfloat16. A warp has a block column, transposed, so that its accumulators are the next product's left
// operand (nearfield/triangular.cuh does the same for T alone).
#pragma once

#include "delta/tile_sm80.cuh"
#include "nearfield/triangular.cuh"

namespace nearfield::delta {

template <class Element>
class ChunkSolver {
  static constexpr int kRow = 72;  // floats in a row of Abar: a fragment's loads fall into different banks
  alignas(16) float Abar_[kTile * kRow];
  alignas(16) Element Z_[2][kTileShared<Element>];  // high and low half
  SplitBlock T_[4], U_[4];                          // T_JJ^T and U_JJ^T

  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }

 public:
  __device__ __forceinline__ void set(int i, int j, float a, float) { Abar_[i * kRow + j] = a; }
  __device__ __forceinline__ void set_pair(int i, int j, float2 a, float2) {
    *reinterpret_cast<float2*>(&Abar_[i * kRow + j]) = a;
  }

  // Abar is set and the CTA has met; beta by row. Returns this thread's share of the sum of squares of
  // diag(beta) Z.
  template <class Beta>
  __device__ __forceinline__ float solve(const Beta& beta) {
    const int J = warp();
    float sum = solve_diagonal(beta, J);
    clear_above(J);
    __syncthreads();
    SplitFragment left[3];  // T_JJ^T, then (diag(beta) Z_MJ)^T
    left[0] = T_[J].load<false>();
    CUTE_UNROLL
    for (int d = 1; d < 4; ++d) {
      if (J + d >= 4) continue;
      const int I = J + d;
      float x[2][4] = {}, z[2][4] = {};
      CUTE_UNROLL
      for (int e = 0; e < d; ++e) split_mma(x, left[e], load_Abar(I, J + e));
      split_mma(z, split(x, -1.f), U_[I].load<true>());
      store(z, I, J);
      CUTE_UNROLL
      for (int n = 0; n < 2; ++n) {
        CUTE_UNROLL
        for (int c = 0; c < 4; ++c) {
          z[n][c] *= beta(16 * I + 8 * n + lane() % 4 * 2 + c % 2);
          sum += z[n][c] * z[n][c];
        }
      }
      if (d < 3) left[d] = split(z, 1.f);
    }
    return sum;
  }

  // After the CTA has met again.
  template <bool kLow>
  __device__ __forceinline__ void emit(Element* to) const {
    constexpr int kPiece = 8, kPieces = kTile / kPiece;
    CUTE_UNROLL
    for (int at = 0; at < kTile * kPieces; at += kTileThreads) {
      const int piece = at + static_cast<int>(threadIdx.x);
      *reinterpret_cast<uint4*>(to + piece * kPiece) = *reinterpret_cast<const uint4*>(
          &Z_[kLow][piece / kPieces * kTileRow<Element> + piece % kPieces * kPiece]);
    }
  }

 private:
  // Both halves of the warp compute the same columns; one stores T_JJ^T and high halves, the other U_JJ^T and
  // low halves.
  template <class Beta>
  __device__ __forceinline__ float solve_diagonal(const Beta& beta, int J) {
    const int j = lane() % 16, first = 16 * J;
    const bool second = lane() >= 16;
    float z[16], w[16], sum = 0.f;
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i) {
      const float* row = &Abar_[(first + i) * kRow + first];
      float even = -row[j], odd = 0.f;
      CUTE_UNROLL
      for (int m4 = 0; m4 < i; m4 += 4) {
        const float4 a = *reinterpret_cast<const float4*>(row + m4);
        even -= a.x * w[m4];
        if (m4 + 1 < i) odd -= a.y * w[m4 + 1];
        if (m4 + 2 < i) even -= a.z * w[m4 + 2];
        if (m4 + 3 < i) odd -= a.w * w[m4 + 3];
      }
      z[i] = even + odd;
      w[i] = beta(first + i) * z[i];
      sum += w[i] * w[i];
    }
    const float own = beta(first + j);
    SplitBlock& factor = second ? U_[J] : T_[J];
    uint32_t high[8], low[8];
    CUTE_UNROLL
    for (int i = 0; i < 16; i += 2) {
      const auto entry = [&](int m) { return (second ? z[m] * own : w[m]) + (m == j ? 1.f : 0.f); };
      split_pair(entry(i), entry(i + 1), high[i / 2], low[i / 2]);
    }
    factor.store_row(j, high, low);
    Element* to = &Z_[second][first * kTileRow<Element> + first + j];
    CUTE_UNROLL
    for (int i = 0; i < 16; ++i)
      to[i * kTileRow<Element>] = second ? half_of<true, Element>(z[i]) : half_of<false, Element>(z[i]);
    return second ? 0.f : sum;
  }

  // The blocks above the diagonal in block column J.
  __device__ __forceinline__ void clear_above(int J) {
    for (int row = lane() / 2; row < 16 * J; row += 16) {
      const int at = row * kTileRow<Element> + 16 * J + lane() % 2 * 8;
      *reinterpret_cast<uint4*>(&Z_[0][at]) = *reinterpret_cast<uint4*>(&Z_[1][at]) = uint4{};
    }
  }

  // Abar_IM^T as the right operand.
  __device__ __forceinline__ SplitFragment load_Abar(int I, int M) const {
    SplitFragment f;
    CUTE_UNROLL
    for (int n = 0; n < 2; ++n) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float2 two = *reinterpret_cast<const float2*>(
            &Abar_[(16 * I + 8 * n + lane() / 4) * kRow + 16 * M + 8 * h + lane() % 4 * 2]);
        split_pair(two.x, two.y, f.high[2 * n + h], f.low[2 * n + h]);
      }
    }
    return f;
  }
  // Z_IJ from its transpose.
  __device__ __forceinline__ void store(const float (&z)[2][4], int I, int J) {
    CUTE_UNROLL
    for (int n = 0; n < 2; ++n) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float x = z[n][2 * h], y = z[n][2 * h + 1];
        const uint32_t high = pack<Element>(x, y);
        const int at = (16 * I + 8 * n + lane() / 4) * kTileRow<Element> + 16 * J + 8 * h + lane() % 4 * 2;
        *reinterpret_cast<uint32_t*>(&Z_[0][at]) = transposed(high);
        *reinterpret_cast<uint32_t*>(&Z_[1][at]) = transposed(pack_low<Element>(x, y, high));
      }
    }
  }
};

// Thread j has column j: z_i = -Abar_ij - sum_{m < i} Abar_im beta_m z_m.
template <>
class ChunkSolver<float> {
  static constexpr int kColumn = 68;      // floats in a column of A: a warp's stores in different banks
  alignas(16) float A_[kTile * kColumn];  // [j][i]: Abar_ij beta_j
  float Z_[kTile * kTile];                // [i][j]: Abar, then Z

 public:
  __device__ __forceinline__ void set(int i, int j, float a, float beta_j) {
    Z_[i * kTile + j] = a;
    A_[j * kColumn + i] = a * beta_j;
  }
  __device__ __forceinline__ void set_pair(int i, int j, float2 a, float2 beta) {
    set(i, j, a.x, beta.x), set(i, j + 1, a.y, beta.y);
  }

  template <class Beta>
  __device__ __forceinline__ float solve(const Beta& beta) {
    const int j = static_cast<int>(threadIdx.x);
    float sum = 0.f;
    if (j >= kTile) return sum;
#pragma unroll 1
    for (int first = 0; first < kTile; first += 16) {
      float z[16];
      CUTE_UNROLL
      for (int i = 0; i < 16; ++i) z[i] = first + i > j ? -Z_[(first + i) * kTile + j] : 0.f;
      const auto subtract = [&](int m, float zm, int from) {
        CUTE_UNROLL
        for (int i4 = 0; i4 < 16; i4 += 4) {
          if (i4 + 3 < from) continue;
          const float4 a = *reinterpret_cast<const float4*>(&A_[m * kColumn + first + i4]);
          const float column[4] = {a.x, a.y, a.z, a.w};
          CUTE_UNROLL
          for (int i = 0; i < 4; ++i)
            if (i4 + i >= from) z[i4 + i] -= column[i] * zm;
        }
      };
#pragma unroll 4
      for (int m = 0; m < first; ++m) subtract(m, Z_[m * kTile + j], 0);
      CUTE_UNROLL
      for (int m = 0; m < 16; ++m) subtract(first + m, z[m], m + 1);
      CUTE_UNROLL
      for (int i = 0; i < 16; ++i) {
        Z_[(first + i) * kTile + j] = z[i];
        const float n = beta(first + i) * z[i];
        sum += n * n;
      }
    }
    return sum;
  }

  template <bool kLow>
  __device__ __forceinline__ void emit(float* to) const {
    static_assert(!kLow);
    for (int at = 4 * static_cast<int>(threadIdx.x); at < kTile * kTile; at += 4 * kTileThreads)
      *reinterpret_cast<float4*>(to + at) = *reinterpret_cast<const float4*>(&Z_[at]);
  }
};

}  // namespace nearfield::delta
