// The dense arithmetic of the CPU kernels: matrix multiply on strided views and the exponential of a row.
// Everything here is single-threaded; the kernels run it inside parallel_for over (batch, head, block).
#pragma once

#include <cstdint>
#include <vector>

// One source, three instruction sets: the loader picks the best clone for the machine it runs on, so that
// a wheel built anywhere uses AVX2 or AVX-512 where they exist. For plain functions, not for templates.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NEARFIELD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NEARFIELD_CLONES
#endif

namespace nearfield::cpu {

constexpr int kPanel = 64;  // bytes in one row of a panel: one AVX-512 register
typedef float f32x16 __attribute__((vector_size(kPanel)));
typedef double f64x8 __attribute__((vector_size(kPanel)));

// A panel is a row-major matrix [n, kLanes] on 64-byte aligned memory: one vector register per row.
template <class T>
constexpr int kLanes = kPanel / sizeof(T);

// A matrix in memory: element (i, j) is data[i * rs + j * cs].
template <class T>
struct MatrixView {
  const T* data;
  int64_t rs;
  int64_t cs;
  MatrixView transposed() const { return {data, cs, rs}; }
};

template <class T>
MatrixView<T> row_major(const T* data, int64_t ld) {
  return {data, ld, 1};
}

// C[m, n] = alpha * A[m, k] B[k, n] + beta * C, with C row-major of leading dimension ldc. beta = 0 does not
// read C. B is copied into panels first, unless it is one itself: row_major(B, kLanes<T>), n == kLanes<T>,
// aligned.
void gemm(int64_t m, int64_t n, int64_t k, float alpha, MatrixView<float> A, MatrixView<float> B, float beta,
          float* C, int64_t ldc);
void gemm(int64_t m, int64_t n, int64_t k, double alpha, MatrixView<double> A, MatrixView<double> B,
          double beta, double* C, int64_t ldc);

// x[i] = exp(x[i] - shift); -inf gives 0. Returns the sum.
float exp_sum(float* x, int64_t n, float shift);
double exp_sum(double* x, int64_t n, double shift);

// x[i][lane] = exp(x[i][lane] - shift[lane] - row_shift[i]) on a panel of n rows; row_shift may be null
// (zeros). sum[lane] receives the sum of the column; it may be null.
void exp_panel(float* x, int64_t n, const float* shift, const float* row_shift, float* sum);
void exp_panel(double* x, int64_t n, const double* shift, const double* row_shift, double* sum);

// Scratch memory of one task, 64-byte aligned; grows, never shrinks, contents undefined.
template <class T>
class Scratch {
 public:
  T* get(int64_t n) {
    if (static_cast<int64_t>(storage_.size()) < n + kLanes<T>) storage_.resize(n + kLanes<T>);
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    return reinterpret_cast<T*>((address + kPanel - 1) / kPanel * kPanel);
  }

 private:
  std::vector<T> storage_;
};

}  // namespace nearfield::cpu
