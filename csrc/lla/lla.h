// Local linear attention: the contract between register.cpp (tensors) and the kernels (pointers).
// The mathematics, the letters and the order in which to read the files are in README.md.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "lla/grid.h"
#include "nearfield/window.h"

namespace nearfield::lla {

// The type in which a CPU kernel computes: 16-bit types are widened.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Which keys a query sees: always an interval. Query i stands at key position i + n - m, so that the last
// query stands at the last key. Causal: the last `window` keys up to that position. Otherwise the `window`
// keys around it, shifted inwards at the ends so that there are always `window` of them (the rule of
// neighborhood attention).
//
// Packed sequences (cu, m = n) see only themselves, each by these rules; rows behind the last see nothing.
// Both ends of the interval remain non-decreasing in the query, so kernels need not know where a sequence
// ends: a tile of rows walks over what any of them sees, and masks.
struct Visibility {
  int m, n, window;
  bool causal;
  const int64_t* cu = nullptr;  // [sequences + 1]: sequence s is rows cu[s] to cu[s + 1]; null: one sequence
  int sequences = 1;

  static Visibility make(int64_t m, int64_t n, int64_t window, bool causal, const int64_t* cu = nullptr,
                         int64_t sequences = 1) {
    return {
        static_cast<int>(m),        static_cast<int>(n), static_cast<int>(std::min(window, n)), causal, cu,
        static_cast<int>(sequences)};
  }

  // Keys that any of the queries [first, last] sees; both ends are non-decreasing in the query.
  NEARFIELD_HOST_DEVICE Range any_sees(int64_t first, int64_t last) const {
    const Range low = keys(first), high = keys(last);
    return {low.begin, std::max(low.begin, high.end)};
  }

  NEARFIELD_HOST_DEVICE Range keys(int64_t i) const {
    const Range own = sequence_of(i);
    if (own.begin == own.end) return own;
    const Window w = window_in(own);
    const int position = static_cast<int>(i) - own.begin + shift();
    const int begin = w.start(position);
    return {own.begin + begin, own.begin + std::max(begin, w.end(position))};
  }

  // A lone key leaves nothing to fit: o = v, and no gradient but that of v.
  NEARFIELD_HOST_DEVICE bool lone(int64_t i) const {
    const Range seen = keys(i);
    return seen.end - seen.begin == 1;
  }

  // Queries that see any of the keys [first, last].
  NEARFIELD_HOST_DEVICE Range any_seen_by(int64_t first, int64_t last) const {
    const Range low = queries(first), high = queries(last);
    return {low.begin, std::max(low.begin, high.end)};
  }

  // Queries that see key j.
  NEARFIELD_HOST_DEVICE Range queries(int64_t j) const {
    const Range own = sequence_of(j);
    if (own.begin == own.end) return own;
    const Range position = window_in(own).queries(static_cast<int>(j) - own.begin);
    const int rows = cu ? own.end - own.begin : m;
    // Queries left of key 0 (m > n) see nothing if causal, else the first window.
    const int begin = !causal && position.begin == 0 ? 0 : std::max(position.begin - shift(), 0);
    return {own.begin + begin, own.begin + std::max(begin, std::min(position.end - shift(), rows))};
  }

 private:
  NEARFIELD_HOST_DEVICE int shift() const { return cu ? 0 : n - m; }

  NEARFIELD_HOST_DEVICE Window window_in(Range own) const {
    const int length = own.end - own.begin;
    return {length, std::min(window, length), 1, causal};
  }

  // Keys of the sequence of row i, empty behind the last. cu may hold anything, on a GPU nobody has looked:
  // what comes out lies within the tensors.
  NEARFIELD_HOST_DEVICE Range sequence_of(int64_t i) const {
    if (!cu) return {0, n};
    int low = 0, high = sequences;
    while (low + 1 < high) {
      const int middle = (low + high) / 2;
      (cu[middle] <= i ? low : high) = middle;
    }
    const int64_t begin = cu[low], end = std::min<int64_t>(cu[high], n);
    if (begin >= 0 && begin <= i && i < end) return {static_cast<int>(begin), static_cast<int>(end)};
    const int behind = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(cu[sequences], n)));
    return {behind, behind};
  }
};

// A [B, L, H, D] tensor whose last dimension is dense.
template <class T>
struct View {
  T* data;
  int64_t batch_stride, row_stride, head_stride;
  NEARFIELD_HOST_DEVICE T* row(int64_t b, int64_t i, int64_t h) const {
    return data + b * batch_stride + i * row_stride + h * head_stride;
  }
};

// On the CPU.
template <class T>
struct Problem {
  int64_t batch, m, n, heads, kv_heads, d, dv;
  View<const T> q;  // [B, m, Hq, d]
  View<const T> k;  // [B, n, Hk, d]
  View<const T> v;  // [B, n, Hk, dv]
  double scale;
  Visibility visible;
  Grid grid{};  // if there is one, it says what is visible

  int64_t kv_head(int64_t h) const { return h / (heads / kv_heads); }
  int64_t row_index(int64_t b, int64_t i, int64_t h) const {
    return (b * m + i) * heads + h;
  }  // in [B, m, Hq]
};

// lam [B, m, Hq, channels] with any strides (0 where it is shared); channels is 1 or d.
template <class F>
struct Ridge {
  const F* data;
  int64_t stride[4];
  int64_t channels;
  bool absolute;  // lam exp(-lse) takes the place of lam
};

struct Solver {
  double tol;
  int64_t max_iters;
};

template <class T>
struct FwdParams {
  Problem<T> problem;
  Ridge<acc_t<T>> ridge;
  Solver solver;
  T* o;                 // [B, m, Hq, dv]
  acc_t<T>* x;          // [B, m, Hq, d]
  acc_t<T>* kbar;       // [B, m, Hq, d]
  acc_t<T>* lse;        // [B, m, Hq]
  int32_t* iterations;  // [B, m, Hq]
  float* ratio;         // [B, m, Hq]
};

template <class T>
struct ProbeFwdParams {
  Problem<T> problem;
  View<const acc_t<T>> x;  // [B, m, Hq, d]
  T* o;                    // [B, m, Hq, dv]
  acc_t<T>* kbar;          // [B, m, Hq, d]
  acc_t<T>* lse;           // [B, m, Hq]
};

// The backward of the readout; with `solve` also of the solve that made x.
template <class T>
struct BwdParams {
  Problem<T> problem;
  bool solve;
  Ridge<acc_t<T>> ridge;   // used if solve
  Solver solver;           // used if solve
  View<const T> d_o;       // [B, m, Hq, dv]
  View<const acc_t<T>> x;  // [B, m, Hq, d]
  const acc_t<T>* kbar;    // [B, m, Hq, d]
  const acc_t<T>* lse;     // [B, m, Hq]
  acc_t<T>* y;             // [B, m, Hq, d]: A^-1 h if solve, else h, which then is the gradient of x
  acc_t<T>* gbar;          // [B, m, Hq] scratch
  acc_t<T>* factor;        // [B, m, Hq] scratch: p = exp(s - lse) factor
  acc_t<T>* row_sum;       // [B, m, Hq] scratch: D
  T* dq;                   // [B, m, Hq, d]
  T* dk;                   // [B, n, Hk, d]
  T* dv;                   // [B, n, Hk, dv]
  acc_t<T>* dlam;          // [B, m, Hq, channels] if solve
};

// Decoding: k and v are a cache of which sequence b has filled the first lengths[b] positions; always causal.
template <class T>
struct StepParams {
  Problem<T> problem;
  Ridge<acc_t<T>> ridge;
  const int64_t* lengths;  // [B]
  int64_t window;
  T* o;  // [B, m, Hq, dv]
};

// One instance per element type: float, double, Half, BFloat16.
template <class T>
void run_fwd_cpu(const FwdParams<T>& params);
template <class T>
void run_probe_fwd_cpu(const ProbeFwdParams<T>& params);
template <class T>
void run_bwd_cpu(const BwdParams<T>& params);
template <class T>
void run_step_cpu(const StepParams<T>& params);

}  // namespace nearfield::lla
