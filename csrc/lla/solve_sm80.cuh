// Conjugate gradients for the 16 rows of a warp, each row a system of its own (README.md, cpu_solve.h). As on
// Hopper the direction *is* what the matrix product sees, rounded over a power of two per row; it lies in
// shared memory as a left operand. r, x and kbar lie in scratch memory, which stays in the L2 cache.
#pragma once

#include "lla/sweep_sm80.cuh"

namespace nearfield::lla {

// The ridge of a thread's two rows, in operand units. A row that sees nothing has 1.
struct RowRidgeSm80 {
  const float* row[2] = {nullptr, nullptr};  // per channel
  int64_t channel_stride = 0;
  bool per_channel = false;
  float factor[2] = {0.f, 0.f}, value[2] = {1.f, 1.f};
  int channels = 0;

  RowRidgeSm80() = default;
  template <class Rows>
  __device__ __forceinline__ RowRidgeSm80(const Rows& rows, const Ridge<float>& ridge, const float (&lse)[2],
                                          float key_unit) {
    constexpr float kLargest = 1e25f;  // exp(-lse) may overflow; a ridge this large is softmax attention
    per_channel = ridge.channels > 1, channel_stride = ridge.stride[3], channels = rows.p.d;
    const float inverse = 1.f / key_unit;
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (!rows.inside[i] || lse[i] == -INFINITY) continue;
      row[i] = ridge.data + rows.batch * ridge.stride[0] + rows.row[i] * ridge.stride[1] +
               rows.head % rows.p.heads * ridge.stride[2];
      const float of_lse = ridge.absolute ? expf(-lse[i]) : 1.f;
      factor[i] = fminf(of_lse, kLargest) * inverse * inverse;
      if (!per_channel) value[i] = fminf(kLargest, *row[i] * of_lse) * inverse * inverse;
    }
  }
  __device__ __forceinline__ float at(int i, int column) const {
    if (!per_channel) return value[i];
    return row[i] != nullptr && column < channels ? row[i][column * channel_stride] * factor[i] : 1.f;
  }
};

__device__ __forceinline__ float& value_of(float4& v, int c) {
  return c == 0 ? v.x : c == 1 ? v.y : c == 2 ? v.z : v.w;
}
__device__ __forceinline__ float value_of(const float4& v, int c) {
  return c == 0 ? v.x : c == 1 ? v.y : c == 2 ? v.z : v.w;
}

// kQ, kDirection: residents that hold Q and the direction.
template <class Traits, int kQ, int kDirection>
struct ConjugateGradientSm80 {
  using Rows = QueryRows<Traits>;
  using Vector = typename Traits::Vector;
  using Element = typename Traits::Element;
  static constexpr int kD = Traits::kD, kQuads = Traits::kQuads;
  static constexpr float kExhausted = 1.1754944e-38f / 1.1920929e-7f;

  Rows& rows;
  const RowRidgeSm80& ridge;
  float4 *r, *x;
  const float4* kbar;
  float inverse_omega[2];  // 1 / sum of the weights of a row
  float unit_of_acc;       // 1: error relative to the size of the weights, 0: to x itself

  float unit[2], pbar[2], rp[2], rz[2], acc[2], ratio[2];
  int iterations[2];
  bool live[2];

  // `v` is the right-hand side and is lost.
  __device__ __forceinline__ void solve(Vector& v, float tol, int max_iters) {
    start(v);
    typename Traits::Scores scores, slopes;
    const Element* const lefts[2] = {rows.resident(kQ), rows.resident(kDirection)};
    for (int it = 0; it < max_iters; ++it) {
      if (!__syncthreads_or(live[0] || live[1])) break;
      float row_sum[2] = {0.f, 0.f};
      v.clear();
      rows.template walk<1>({&rows.p.k}, [&](int, int t, const Element* keys) {
        scores.clear();
        slopes.clear();
        multiply_together<kD, Traits::kMoving>(lefts, keys,
                                               [&](int l) -> auto& { return l == 0 ? scores : slopes; });
        rows.exponentials(scores, t);
        for_each_value(scores, [&](int j, int c, int i, float& e) { e *= slopes.tile[0][j][c] - pbar[i]; });
        rows.round(scores, row_sum);
        multiply<kD>(v, scores, keys);
      });
      add_over_row(row_sum);
      step(v, row_sum, tol * tol);
    }
  }

  __device__ __forceinline__ void start(Vector& v) {
    rz[0] = rz[1] = 0.f;
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      r[32 * j] = float4{v.tile[0][j][0], v.tile[0][j][1], v.tile[0][j][2], v.tile[0][j][3]};
      x[32 * j] = float4{0.f, 0.f, 0.f, 0.f};
    }
    for_each_value(v, [&](int, int, int i, float a) { rz[i] += a * a; });
    add_over_row(rz);
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      live[i] = !(rz[i] < kExhausted);  // a NaN lives on, and shows in the result
      acc[i] = 0.f;
      iterations[i] = 0;
      ratio[i] = live[i] ? INFINITY : 0.f;
    }
    for_each_value(v, [&](int, int, int i, float& a) { a = live[i] ? a : 0.f; });
    round_direction(v);
  }

 private:
  // v = sum_j E_ij k_j of the direction, row_sum = sum_j E_ij: takes the step and forms the next direction.
  __device__ __forceinline__ void step(Vector& v, const float (&row_sum)[2], float tol2) {
    float pap[2] = {0.f, 0.f}, alpha[2];
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      const float4 mean = kbar[32 * j];
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float2 p = load_operand_pair(rows.pair_at(kDirection, j, i));
        CUTE_UNROLL
        for (int c = 2 * i; c < 2 * i + 2; ++c) {
          const float pc = c % 2 == 0 ? p.x : p.y;
          float& a = v.tile[0][j][c];
          a = (a - row_sum[i] * value_of(mean, c)) * inverse_omega[i] +
              ridge.at(i, rows.column_of(j, c)) * pc;
          pap[i] += pc * a;
        }
      }
    }
    add_over_row(pap);
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (pap[i] < 1.1754944e-38f) live[i] = false;  // not positive: possible through rounding only
      alpha[i] = live[i] ? rp[i] / pap[i] : 0.f;
    }
    float rz_new[2] = {0.f, 0.f}, beta[2];
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      float4 xj = x[32 * j], rj = r[32 * j];
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float2 p = load_operand_pair(rows.pair_at(kDirection, j, i));
        CUTE_UNROLL
        for (int c = 2 * i; c < 2 * i + 2; ++c) {
          float& a = v.tile[0][j][c];
          a = value_of(rj, c) - alpha[i] * a;
          rz_new[i] += a * a;
          value_of(rj, c) = a;
          value_of(xj, c) += alpha[i] * (c % 2 == 0 ? p.x : p.y);
        }
      }
      x[32 * j] = xj;
      r[32 * j] = rj;
    }
    add_over_row(rz_new);
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (live[i]) {
        const float removed = alpha[i] * rp[i];
        acc[i] += removed;
        const float remaining = removed / (unit_of_acc + acc[i]);
        const bool exact = rz_new[i] < kExhausted;
        ++iterations[i];
        ratio[i] = exact ? 0.f : sqrtf(remaining);
        if (exact || remaining <= tol2) live[i] = false;
      }
      beta[i] = live[i] ? rz_new[i] / rz[i] * unit[i] : 0.f;
      rz[i] = rz_new[i];
    }
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float2 p = load_operand_pair(rows.pair_at(kDirection, j, i));
        float* a = &v.tile[0][j][2 * i];
        a[0] = live[i] ? a[0] + beta[i] * p.x : 0.f;
        a[1] = live[i] ? a[1] + beta[i] * p.y : 0.f;
      }
    }
    round_direction(v);
  }

  __device__ __forceinline__ void round_direction(Vector& v) {
    const auto rounded = rows.round_to_resident(v, kDirection, -1, [&](int j) { return kbar[32 * j]; });
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      unit[i] = rounded.unit[i];
      pbar[i] = rounded.mean[i];
      rp[i] = 0.f;
    }
    CUTE_UNROLL
    for (int j = 0; j < kQuads; ++j) {
      const float4 residual = r[32 * j];
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float2 p = load_operand_pair(rows.pair_at(kDirection, j, i));
        rp[i] += p.x * value_of(residual, 2 * i) + p.y * value_of(residual, 2 * i + 1);
      }
    }
    add_over_row(rp);
  }
};

}  // namespace nearfield::lla
