// The ridge regression of a query, solved directly with its matrix in the registers that summed it.
#pragma once

#include "lla/step_sums.cuh"
#include "nearfield/warp_mma.cuh"

namespace nearfield::lla {

// Columns that are eliminated at once: a chunk of Sums.
constexpr int kPanel = 8;

// Shared memory of solve(). In the panels, row kD is the right-hand side, which by symmetry is a row like the
// others, and row kD + 1 is zero.
template <int kD>
struct System {
  static constexpr int kRow = kPanel + 4;  // floats: every second row of a panel falls into other banks
  static constexpr int kFactor = kPanel * (kPanel - 1) / 2 + kPanel;
  static constexpr int kAhead = 4;           // panels whose rows are read at once, needed or not
  alignas(16) float panel[(kD + 2) * kRow];  // A_P: columns whose turn it is
  // A_P L^-T, where L D L^T is the block of A_P on the diagonal
  alignas(16) float reduced[(kD + kAhead * kPanel) * kRow];
  // Of every panel: L below its diagonal, row by row, and 1 / D.
  alignas(16) float factor[kD / kPanel][kFactor];
  float x[kD];  // right-hand side, then solution
};

__device__ __forceinline__ float approximate_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

template <int kCount>
__device__ __forceinline__ void load_row(float (&x)[kPanel], const float* row) {
#pragma unroll
  for (int at = 0; at < kCount; at += 4) {
    const float4 four = *reinterpret_cast<const float4*>(row + at);
    x[at] = four.x, x[at + 1] = four.y, x[at + 2] = four.z, x[at + 3] = four.w;
  }
}

__device__ __forceinline__ void store_row(float* row, const float (&x)[kPanel]) {
#pragma unroll
  for (int at = 0; at < kPanel; at += 4)
    *reinterpret_cast<float4*>(row + at) = {x[at], x[at + 1], x[at + 2], x[at + 3]};
}

// x = A^-1 x for a symmetric positive definite A, spread over the block like Sums::key_key. Gauss-Jordan
// elimination by blocks, with the matrix in registers: per panel P
//
//   A_PP = L D L^T, by every thread for itself: no messages between its eight pivots
//   A_i -= (A_iP L^-T) D^-1 (L^-1 A_P) for all other rows i, above the panel as well as below
//
// where L^-1 A_P is, by symmetry, the transpose of A_iP L^-T from the rows below the panel. So what is left
// of row i in P at the end is A_PP and its right-hand side: the panels are solved side by side, and there is
// no substitution backwards. The forward error for a positive definite A is that of Cholesky (Higham,
// Accuracy and Stability, section 14.4). The products of a panel are the tensor cores', as three of tf32
// numbers. The chunks of columns move down a place with every panel, so that the loop can stay one: unrolled,
// it would be fetched from memory at about the speed at which it runs. NaN if a pivot is not positive.
template <int kD, int kDv>
__device__ __forceinline__ void solve(Sums<kD, kDv>& a, System<kD>& s) {
  using S = Sums<kD, kDv>;
  using F = Fragments<float>;
  static_assert(kPanel == F::kDepth);
  constexpr int kRow = System<kD>::kRow, kPanels = kD / kPanel, kAhead = System<kD>::kAhead;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row[2] = {S::row(0), S::row(2)};
  // Half of a warp reduces its rows of a panel, the other half the right-hand side, each warp into a row of
  // its own.
  const int own = lane < 16 ? 16 * warp + lane : kD, target = lane < 16 ? own : kD + warp;
  if (threadIdx.x < kPanel) s.panel[(kD + 1) * kRow + threadIdx.x] = 0.f;
  __syncthreads();
  float b[4];  // a chunk of equal columns
#pragma unroll
  for (int e = 0; e < 4; ++e) b[e] = s.x[row[e / 2]];
#pragma unroll 1
  for (int n = 0; n < kPanels; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      *reinterpret_cast<float2*>(s.panel + row[h] * kRow + S::column(0, 0)) = {a.key_key(0)[2 * h],
                                                                               a.key_key(0)[2 * h + 1]};
      if (lane % 4 == 0 && row[h] / kPanel == n) s.panel[kD * kRow + row[h] % kPanel] = b[2 * h];
    }
    __syncthreads();
    float l[kPanel][kPanel], u[kPanel], inverse[kPanel];
#pragma unroll
    for (int i = 0; i < kPanel; ++i) {
      const float* from = s.panel + (n * kPanel + i) * kRow;
      i < 4 ? load_row<4>(l[i], from) : load_row<8>(l[i], from);
    }
    load_row<kPanel>(u, s.panel + (own / kPanel == n ? kD + 1 : own) * kRow);  // the panel's own rows stay
#pragma unroll
    for (int j = 0; j < kPanel; ++j) {
      const float r = approximate_reciprocal(l[j][j]);
      inverse[j] = l[j][j] > 0.f ? r : NAN;
      float share[kPanel];
#pragma unroll
      for (int i = j + 1; i < kPanel; ++i) {
        share[i] = l[i][j] * r;
#pragma unroll
        for (int k = j + 1; k <= i; ++k) l[i][k] -= share[i] * l[k][j];
        u[i] -= u[j] * share[i];
      }
#pragma unroll
      for (int i = j + 1; i < kPanel; ++i) l[i][j] = share[i];
    }
    store_row(s.reduced + target * kRow, u);
    if (threadIdx.x == 0) {
      int at = 0;
#pragma unroll
      for (int i = 0; i < kPanel; ++i) {
        s.factor[n][System<kD>::kFactor - kPanel + i] = inverse[i];
#pragma unroll
        for (int k = 0; k < i; ++k) s.factor[n][at++] = l[i][k];
      }
    }
    __syncthreads();
    // Minus A_iP L^-T D^-1, times L^-1 of the right-hand side and of the columns that are left.
    typename F::A left;
    const float* mine = s.reduced + (16 * warp + lane / 4) * kRow + lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      left.word[i] = mine[i % 2 * 8 * kRow + i / 2 * 4] *
                     -s.factor[n][System<kD>::kFactor - kPanel + lane % 4 + i / 2 * 4];
    typename F::B right[1];
    F::right_transposed(right, s.reduced + kD * kRow, 0);
    F::multiply(b, left, right[0]);
#pragma unroll
    for (int first = 0; first < kPanels; first += kAhead) {
      if (n + first >= kPanels) continue;
#pragma unroll
      for (int c = first > 0 ? first : 1; c < first + kAhead; ++c) {
        F::right_transposed(right, s.reduced + (n + c) * kPanel * kRow, kRow);
#pragma unroll
        for (int e = 0; e < 4; ++e) a.key_key(c - 1)[e] = a.key_key(c)[e];
        F::multiply(a.key_key(c - 1), left, right[0]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (lane % 4 == 0) s.x[row[h]] = b[2 * h];
  __syncthreads();
  if (threadIdx.x < kPanels) {  // x_P = L^-T D^-1 L^-1 b_P
    const float* factor = s.factor[threadIdx.x];
    float x[kPanel];
    load_row<kPanel>(x, s.x + threadIdx.x * kPanel);
#pragma unroll
    for (int i = 1; i < kPanel; ++i) {
#pragma unroll
      for (int k = 0; k < i; ++k) x[i] -= factor[i * (i - 1) / 2 + k] * x[k];
    }
#pragma unroll
    for (int i = kPanel - 1; i >= 0; --i) {
      x[i] *= factor[System<kD>::kFactor - kPanel + i];
#pragma unroll
      for (int k = i + 1; k < kPanel; ++k) x[i] -= factor[k * (k - 1) / 2 + i] * x[k];
    }
    store_row(s.x + threadIdx.x * kPanel, x);
  }
  __syncthreads();
}

}  // namespace nearfield::lla
