// Online softmax over the columns of an accumulator tile, rows spread over groups of four threads.
#pragma once

#include <cmath>
#include <cute/tensor.hpp>

namespace nearfield {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// kLift: numerators are 2^kLift times what they are called, so that an 8-bit type has room for small ones.
template <int kRows, int kLift = 0>
struct OnlineSoftmax {
  float scale_log2;  // scale * log2(e): exp2 with the factor folded in is one fused multiply-add and one ex2
  float row_max[kRows];
  float row_sum[kRows];  // this thread's columns only, until finish()

  __device__ __forceinline__ explicit OnlineSoftmax(float scale_log2_) : scale_log2(scale_log2_) {
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      row_max[i] = -INFINITY;
      row_sum[i] = 0.f;
    }
  }

  // Replaces logits by exp2(scale * (logit - max) + kLift); returns the factor for what came before.
  template <class Tensor>
  __device__ __forceinline__ void step(Tensor& scores, float (&rescale)[kRows]) {
    using namespace cute;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float m = row_max[i];
      CUTE_UNROLL
      for (int j = 0; j < size<1>(scores); ++j) m = fmaxf(m, scores(i, j));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
      // A row whose columns are all masked so far has max -inf; -inf - -inf would be NaN.
      // Both products are rounded before they are subtracted: fused, an unchanged maximum would leave the
      // rounding of one, and every tile multiply the sum by 1 + 1e-7.
      const float shift = m == -INFINITY ? 0.f : __fmul_rn(m, scale_log2) - kLift;
      rescale[i] = exp2_approx(__fmul_rn(row_max[i], scale_log2) - kLift - shift);
      row_max[i] = m;
      float sum = 0.f;
      CUTE_UNROLL
      for (int j = 0; j < size<1>(scores); ++j) {
        scores(i, j) = exp2_approx(scores(i, j) * scale_log2 - shift);
        sum += scores(i, j);
      }
      row_sum[i] = row_sum[i] * rescale[i] + sum;
    }
  }

  // 1 / row sum in `inverse`; log-sum-exp in natural units in `lse`.
  __device__ __forceinline__ void finish(float (&inverse)[kRows], float (&lse)[kRows]) {
    constexpr float kLn2 = 0.693147180559945309f;
    CUTE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float s = row_sum[i];
      s += __shfl_xor_sync(0xffffffffu, s, 1);
      s += __shfl_xor_sync(0xffffffffu, s, 2);
      inverse[i] = 1.f / s;
      lse[i] = (__fmul_rn(row_max[i], scale_log2) - kLift) * kLn2 + logf(s);
    }
  }
};

template <int kRows, class Tensor>
__device__ __forceinline__ void scale_rows(Tensor& t, const float (&factor)[kRows]) {
  using namespace cute;
  CUTE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    CUTE_UNROLL
    for (int j = 0; j < size<1>(t); ++j) t(i, j) *= factor[i];
  }
}

}  // namespace nearfield
