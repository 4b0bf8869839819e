// The dense arithmetic of the CPU kernels: matrix multiply on strided views and the exponential of a row.
// Everything here is single-threaded; the kernels run it inside parallel_for over (batch, head, block).
#pragma once

#include <cstdint>
#include <vector>

namespace nearfield::cpu {

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

// C[m, n] = alpha * A[m, k] B[k, n] + beta * C, with C row-major of leading dimension ldc. beta = 0 does not read C.
void gemm(int64_t m, int64_t n, int64_t k, float alpha, MatrixView<float> A, MatrixView<float> B, float beta,
          float* C, int64_t ldc);
void gemm(int64_t m, int64_t n, int64_t k, double alpha, MatrixView<double> A, MatrixView<double> B, double beta,
          double* C, int64_t ldc);

// x[i] = exp(x[i] - shift); -inf gives 0. Returns the sum.
float exp_sum(float* x, int64_t n, float shift);
double exp_sum(double* x, int64_t n, double shift);

// Scratch memory of one task; grows, never shrinks, contents undefined.
template <class T>
class Scratch {
 public:
  T* get(int64_t n) {
    if (static_cast<int64_t>(storage_.size()) < n) storage_.resize(n);
    return storage_.data();
  }

 private:
  std::vector<T> storage_;
};

}  // namespace nearfield::cpu
