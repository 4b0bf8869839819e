#include "cpu/linalg.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace nearfield::cpu {
namespace {

constexpr int kRows = 6;         // rows of C held in registers; 6 x 64 bytes also fit the 16 AVX2 registers
constexpr int64_t kDepth = 512;  // depth of a panel: 32 KB, so that it stays in the L1 cache

// Rows of C from registers: acc[r] = sum_p A(r, p) * panel[p]. Written once, instantiated inside each clone.
template <int R, class T, class V>
__attribute__((always_inline)) inline void tile(int64_t k, const T* a, int64_t rs, int64_t cs, const V* panel,
                                                T alpha, T beta, T* c, int64_t ldc, int64_t width) {
  V acc[R];
  for (int r = 0; r < R; ++r) acc[r] = V{};
  for (int64_t p = 0; p < k; ++p) {
    const V b = panel[p];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) acc[r] += a[r * rs + p * cs] * b;
  }
  constexpr int lanes = kPanel / sizeof(T);
  for (int r = 0; r < R; ++r) {
    T* row = c + r * ldc;
    if (width == lanes) {
      V out = alpha * acc[r], old;
      if (beta != T(0)) {
        std::memcpy(&old, row, sizeof(V));
        out += beta * old;
      }
      std::memcpy(row, &out, sizeof(V));
    } else {
      for (int64_t j = 0; j < width; ++j)
        row[j] = beta == T(0) ? alpha * acc[r][j] : alpha * acc[r][j] + beta * row[j];
    }
  }
}

template <class T, class V>
__attribute__((always_inline)) inline void panel_rows(int64_t m, int64_t k, const T* a, int64_t rs,
                                                      int64_t cs, const V* panel, T alpha, T beta, T* c,
                                                      int64_t ldc, int64_t width) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows)
    tile<kRows>(k, a + i * rs, rs, cs, panel, alpha, beta, c + i * ldc, ldc, width);
  for (; i + 2 <= m; i += 2) tile<2>(k, a + i * rs, rs, cs, panel, alpha, beta, c + i * ldc, ldc, width);
  for (; i < m; ++i) tile<1>(k, a + i * rs, rs, cs, panel, alpha, beta, c + i * ldc, ldc, width);
}

NEARFIELD_CLONES void panel_f32(int64_t m, int64_t k, const float* a, int64_t rs, int64_t cs,
                                const f32x16* panel, float alpha, float beta, float* c, int64_t ldc,
                                int64_t width) {
  panel_rows(m, k, a, rs, cs, panel, alpha, beta, c, ldc, width);
}
NEARFIELD_CLONES void panel_f64(int64_t m, int64_t k, const double* a, int64_t rs, int64_t cs,
                                const f64x8* panel, double alpha, double beta, double* c, int64_t ldc,
                                int64_t width) {
  panel_rows(m, k, a, rs, cs, panel, alpha, beta, c, ldc, width);
}
void run_panel(int64_t m, int64_t k, const float* a, int64_t rs, int64_t cs, const f32x16* panel, float alpha,
               float beta, float* c, int64_t ldc, int64_t width) {
  panel_f32(m, k, a, rs, cs, panel, alpha, beta, c, ldc, width);
}
void run_panel(int64_t m, int64_t k, const double* a, int64_t rs, int64_t cs, const f64x8* panel,
               double alpha, double beta, double* c, int64_t ldc, int64_t width) {
  panel_f64(m, k, a, rs, cs, panel, alpha, beta, c, ldc, width);
}

template <class T, class V>
void gemm_impl(int64_t m, int64_t n, int64_t k, T alpha, MatrixView<T> A, MatrixView<T> B, T beta, T* C,
               int64_t ldc) {
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) C[i * ldc + j] = beta == T(0) ? T(0) : beta * C[i * ldc + j];
    return;
  }
  constexpr int64_t lanes = kLanes<T>;
  if (n == lanes && B.cs == 1 && B.rs == lanes && reinterpret_cast<uintptr_t>(B.data) % kPanel == 0) {
    for (int64_t p0 = 0; p0 < k; p0 += kDepth)
      run_panel(m, std::min(kDepth, k - p0), A.data + p0 * A.cs, A.rs, A.cs,
                reinterpret_cast<const V*>(B.data + p0 * lanes), alpha, p0 == 0 ? beta : T(1), C, ldc, lanes);
    return;
  }
  alignas(kPanel) thread_local static T panel[kDepth * lanes];
  for (int64_t p0 = 0; p0 < k; p0 += kDepth) {
    const int64_t depth = std::min(kDepth, k - p0);
    for (int64_t j0 = 0; j0 < n; j0 += lanes) {
      const int64_t width = std::min(lanes, n - j0);
      const T* b = B.data + p0 * B.rs + j0 * B.cs;
      if (B.cs == 1) {
        for (int64_t p = 0; p < depth; ++p) {
          T* row = panel + p * lanes;
          for (int64_t j = 0; j < width; ++j) row[j] = b[p * B.rs + j];
          for (int64_t j = width; j < lanes; ++j) row[j] = T(0);
        }
      } else {
        for (int64_t j = 0; j < lanes; ++j)
          for (int64_t p = 0; p < depth; ++p)
            panel[p * lanes + j] = j < width ? b[p * B.rs + j * B.cs] : T(0);
      }
      run_panel(m, depth, A.data + p0 * A.cs, A.rs, A.cs, reinterpret_cast<const V*>(panel), alpha,
                p0 == 0 ? beta : T(1), C + j0, ldc, width);
    }
  }
}

// exp(x) to 2 ulp by Cody-Waite reduction and a degree-6 polynomial, 16 lanes at a time; 0 below -87.
__attribute__((always_inline)) inline f32x16 exp_lanes(f32x16 x) {
  typedef int32_t i32x16 __attribute__((vector_size(kPanel)));
  const i32x16 tiny = x < -87.0f;
  const f32x16 y = x * 1.44269504f;
  const i32x16 n = __builtin_convertvector(y < 0.0f ? y - 0.5f : y + 0.5f, i32x16);  // rounds to nearest
  const f32x16 nf = __builtin_convertvector(n, f32x16);
  const f32x16 r = x - nf * 0.693359375f + nf * 2.12194440e-4f;
  f32x16 p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const i32x16 bits = (n + 127) << 23;
  f32x16 power;
  std::memcpy(&power, &bits, sizeof(power));
  return tiny ? f32x16{} : p * power;
}

NEARFIELD_CLONES float exp_sum_f32(float* x, int64_t n, float shift) {
  f32x16 total{}, v;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    std::memcpy(&v, x + i, sizeof(v));
    v = exp_lanes(v - shift);
    std::memcpy(x + i, &v, sizeof(v));
    total += v;
  }
  if (i < n) {
    v = f32x16{} - std::numeric_limits<float>::infinity();
    std::memcpy(&v, x + i, (n - i) * sizeof(float));
    v = exp_lanes(v - shift);
    std::memcpy(x + i, &v, (n - i) * sizeof(float));
    total += v;
  }
  float sum = 0;
  for (int lane = 0; lane < 16; ++lane) sum += total[lane];
  return sum;
}

NEARFIELD_CLONES void exp_panel_f32(float* x, int64_t n, const float* shift, const float* row_shift,
                                    float* sum) {
  f32x16 lane_shift, total{};
  std::memcpy(&lane_shift, shift, kPanel);
  for (int64_t i = 0; i < n; ++i) {
    f32x16 v;
    std::memcpy(&v, x + i * 16, kPanel);
    v = exp_lanes(v - (row_shift ? lane_shift + row_shift[i] : lane_shift));
    std::memcpy(x + i * 16, &v, kPanel);
    total += v;
  }
  if (sum) std::memcpy(sum, &total, kPanel);
}

}  // namespace

void gemm(int64_t m, int64_t n, int64_t k, float alpha, MatrixView<float> A, MatrixView<float> B, float beta,
          float* C, int64_t ldc) {
  gemm_impl<float, f32x16>(m, n, k, alpha, A, B, beta, C, ldc);
}
void gemm(int64_t m, int64_t n, int64_t k, double alpha, MatrixView<double> A, MatrixView<double> B,
          double beta, double* C, int64_t ldc) {
  gemm_impl<double, f64x8>(m, n, k, alpha, A, B, beta, C, ldc);
}

float exp_sum(float* x, int64_t n, float shift) { return exp_sum_f32(x, n, shift); }
double exp_sum(double* x, int64_t n, double shift) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - shift);
  return sum;
}

void exp_panel(float* x, int64_t n, const float* shift, const float* row_shift, float* sum) {
  exp_panel_f32(x, n, shift, row_shift, sum);
}
void exp_panel(double* x, int64_t n, const double* shift, const double* row_shift, double* sum) {
  double total[kLanes<double>] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int lane = 0; lane < kLanes<double>; ++lane) {
      double& v = x[i * kLanes<double> + lane];
      total[lane] += v = std::exp(v - (row_shift ? shift[lane] + row_shift[i] : shift[lane]));
    }
  if (sum) std::memcpy(sum, total, sizeof(total));
}

}  // namespace nearfield::cpu
