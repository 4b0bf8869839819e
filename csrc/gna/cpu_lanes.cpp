#include "gna/cpu_lanes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// Each function is written once as a template over the vector type and instantiated inside its clones (see
// linalg.h).
#define NEARFIELD_INLINE __attribute__((always_inline)) inline

namespace nearfield::gna {
namespace {

using cpu::f32x16;
using cpu::f64x8;
using cpu::kPanel;

template <class V, class T>
NEARFIELD_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, kPanel);
  return v;
}
template <class V, class T>
NEARFIELD_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, kPanel);
}

template <class V, class T>
NEARFIELD_INLINE void mask_line_impl(T* s, int64_t n, const T* first, const T* last, const T* hidden) {
  const V lo = load<V>(first) + load<V>(hidden), hi = load<V>(last);
  const V minus_inf = V{} - std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    const V x = V{} + static_cast<T>(i), above = x - lo, below = hi - x;
    const V inside = above < below ? above : below;
    store(s + i * kLanes<T>, inside < T(0) ? minus_inf : load<V>(s + i * kLanes<T>));
  }
}

template <class V, class T>
NEARFIELD_INLINE void column_max_impl(const T* s, int64_t n, T* max) {
  // Four chains, because one would wait for the latency of every single maximum.
  V m[4];
  for (V& chain : m) chain = load<V>(max);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int c = 0; c < 4; ++c) {
      const V x = load<V>(s + (i + c) * kLanes<T>);
      m[c] = x > m[c] ? x : m[c];
    }
  for (; i < n; ++i) {
    const V x = load<V>(s + i * kLanes<T>);
    m[0] = x > m[0] ? x : m[0];
  }
  m[0] = m[1] > m[0] ? m[1] : m[0];
  m[2] = m[3] > m[2] ? m[3] : m[2];
  store(max, m[2] > m[0] ? m[2] : m[0]);
}

template <class V, class T>
NEARFIELD_INLINE void scale_lanes_impl(T* x, int64_t n, const T* factor) {
  const V f = load<V>(factor);
  for (int64_t i = 0; i < n; ++i) store(x + i * kLanes<T>, load<V>(x + i * kLanes<T>) * f);
}

template <class V, class T>
NEARFIELD_INLINE void softmax_gradient_impl(T* dp, const T* p, int64_t n, const T* delta,
                                            const T* row_delta) {
  const V d = load<V>(delta);
  for (int64_t i = 0; i < n; ++i) {
    const V shift = row_delta ? d + row_delta[i] : d;
    store(dp + i * kLanes<T>, load<V>(p + i * kLanes<T>) * (load<V>(dp + i * kLanes<T>) - shift));
  }
}

NEARFIELD_CLONES void mask_line_f32(float* s, int64_t n, const float* first, const float* last,
                                    const float* hidden) {
  mask_line_impl<f32x16>(s, n, first, last, hidden);
}
NEARFIELD_CLONES void mask_line_f64(double* s, int64_t n, const double* first, const double* last,
                                    const double* hidden) {
  mask_line_impl<f64x8>(s, n, first, last, hidden);
}
NEARFIELD_CLONES void column_max_f32(const float* s, int64_t n, float* max) {
  column_max_impl<f32x16>(s, n, max);
}
NEARFIELD_CLONES void column_max_f64(const double* s, int64_t n, double* max) {
  column_max_impl<f64x8>(s, n, max);
}
NEARFIELD_CLONES void scale_lanes_f32(float* x, int64_t n, const float* factor) {
  scale_lanes_impl<f32x16>(x, n, factor);
}
NEARFIELD_CLONES void scale_lanes_f64(double* x, int64_t n, const double* factor) {
  scale_lanes_impl<f64x8>(x, n, factor);
}
NEARFIELD_CLONES void softmax_gradient_f32(float* dp, const float* p, int64_t n, const float* delta,
                                           const float* row_delta) {
  softmax_gradient_impl<f32x16>(dp, p, n, delta, row_delta);
}
NEARFIELD_CLONES void softmax_gradient_f64(double* dp, const double* p, int64_t n, const double* delta,
                                           const double* row_delta) {
  softmax_gradient_impl<f64x8>(dp, p, n, delta, row_delta);
}

// Whole registers first: for rows of a few hundred bytes, a library call each would cost more than the copy.
template <class V, class T>
NEARFIELD_INLINE void copy_rows_impl(const T* src, int64_t step, int64_t n, int64_t features, T* dst) {
  for (int64_t i = 0; i < n; ++i, src += step, dst += features) {
    int64_t f = 0;
    for (; f + kLanes<T> <= features; f += kLanes<T>) store(dst + f, load<V>(src + f));
    for (; f < features; ++f) dst[f] = src[f];
  }
}
NEARFIELD_CLONES void copy_rows_f32(const float* src, int64_t step, int64_t n, int64_t features, float* dst) {
  copy_rows_impl<f32x16>(src, step, n, features, dst);
}
NEARFIELD_CLONES void copy_rows_f64(const double* src, int64_t step, int64_t n, int64_t features,
                                    double* dst) {
  copy_rows_impl<f64x8>(src, step, n, features, dst);
}
// A half's exponent and mantissa, moved to a float's place, are the value times 2^-112; the product is exact,
// also for subnormal halves. Exponent 31 (infinity and NaN) has to become the float's 255.
NEARFIELD_CLONES void copy_rows_half(const uint16_t* src, int64_t step, int64_t n, int64_t features,
                                     float* dst) {
  for (int64_t i = 0; i < n; ++i, src += step, dst += features)
    for (int64_t f = 0; f < features; ++f) {
      const uint32_t bits = src[f];
      const uint32_t magnitude = (bits & 0x7fffu) << 13;
      float value;
      std::memcpy(&value, &magnitude, sizeof(value));
      value *= 0x1p112f;
      uint32_t wide;
      std::memcpy(&wide, &value, sizeof(wide));
      wide |= (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | (bits & 0x8000u) << 16;
      std::memcpy(dst + f, &wide, sizeof(wide));
    }
}
NEARFIELD_CLONES void copy_rows_bfloat16(const uint16_t* src, int64_t step, int64_t n, int64_t features,
                                         float* dst) {
  for (int64_t i = 0; i < n; ++i, src += step, dst += features)
    for (int64_t f = 0; f < features; ++f) {
      const uint32_t wide = static_cast<uint32_t>(src[f]) << 16;
      std::memcpy(dst + f, &wide, sizeof(wide));
    }
}

void column_max(const float* s, int64_t n, float* max) { column_max_f32(s, n, max); }
void column_max(const double* s, int64_t n, double* max) { column_max_f64(s, n, max); }

template <class T>
void online_softmax_impl(T* s, int64_t n, T* max, T* sum, T* rescale) {
  alignas(kPanel) T shift[kLanes<T>], block_sum[kLanes<T>];
  std::memcpy(rescale, max, kPanel);
  column_max(s, n, max);
  // A lane that has seen no key yet has maximum -inf; shifting by it would give -inf - -inf = NaN.
  for (int lane = 0; lane < kLanes<T>; ++lane)
    shift[lane] = max[lane] == -std::numeric_limits<T>::infinity() ? T(0) : max[lane];
  cpu::exp_panel(rescale, 1, shift, nullptr, nullptr);
  cpu::exp_panel(s, n, shift, nullptr, block_sum);
  for (int lane = 0; lane < kLanes<T>; ++lane) sum[lane] = sum[lane] * rescale[lane] + block_sum[lane];
}

}  // namespace

void mask_line(float* s, int64_t n, const float* first, const float* last, const float* hidden) {
  mask_line_f32(s, n, first, last, hidden);
}
void mask_line(double* s, int64_t n, const double* first, const double* last, const double* hidden) {
  mask_line_f64(s, n, first, last, hidden);
}
void online_softmax(float* s, int64_t n, float* max, float* sum, float* rescale) {
  online_softmax_impl(s, n, max, sum, rescale);
}
void online_softmax(double* s, int64_t n, double* max, double* sum, double* rescale) {
  online_softmax_impl(s, n, max, sum, rescale);
}
void scale_lanes(float* x, int64_t n, const float* factor) { scale_lanes_f32(x, n, factor); }
void scale_lanes(double* x, int64_t n, const double* factor) { scale_lanes_f64(x, n, factor); }
void softmax_gradient(float* dp, const float* p, int64_t n, const float* delta, const float* row_delta) {
  softmax_gradient_f32(dp, p, n, delta, row_delta);
}
void softmax_gradient(double* dp, const double* p, int64_t n, const double* delta, const double* row_delta) {
  softmax_gradient_f64(dp, p, n, delta, row_delta);
}
void copy_rows(const float* src, int64_t step, int64_t n, int64_t features, float* dst) {
  copy_rows_f32(src, step, n, features, dst);
}
void copy_rows(const double* src, int64_t step, int64_t n, int64_t features, double* dst) {
  copy_rows_f64(src, step, n, features, dst);
}
void copy_rows(const torch::headeronly::Half* src, int64_t step, int64_t n, int64_t features, float* dst) {
  copy_rows_half(reinterpret_cast<const uint16_t*>(src), step, n, features, dst);
}
void copy_rows(const torch::headeronly::BFloat16* src, int64_t step, int64_t n, int64_t features,
               float* dst) {
  copy_rows_bfloat16(reinterpret_cast<const uint16_t*>(src), step, n, features, dst);
}

}  // namespace nearfield::gna
