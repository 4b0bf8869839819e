// What the decode kernels of both generations share: the work of a block, the layout of the sums over the
// keys, how they move to another reference, and the way from the sums to the output.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "lla/step.h"
#include "nearfield/warp_mma.cuh"

namespace nearfield::lla {
// ---- Elements and units ----

template <class Tag>
struct StepElement;
template <>
struct StepElement<bf16> {
  using type = __nv_bfloat16;
  __device__ __forceinline__ static float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
  __device__ __forceinline__ static uint32_t largest(uint32_t x, uint32_t y) {
    const auto z =
        __hmax2(reinterpret_cast<const __nv_bfloat162&>(x), reinterpret_cast<const __nv_bfloat162&>(y));
    return reinterpret_cast<const uint32_t&>(z);
  }
  __device__ __forceinline__ static float widen(type x) { return __bfloat162float(x); }
  __device__ __forceinline__ static type round(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct StepElement<fp16> {
  using type = __half;
  __device__ __forceinline__ static float2 unpack(uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
  __device__ __forceinline__ static uint32_t largest(uint32_t x, uint32_t y) {
    const auto z = __hmax2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(y));
    return reinterpret_cast<const uint32_t&>(z);
  }
  __device__ __forceinline__ static float widen(type x) { return __half2float(x); }
  __device__ __forceinline__ static type round(float x) { return __float2half_rn(x); }
};

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// The power of two that brings a largest value x into [2^exponent, 2^(exponent + 1)).
__device__ __forceinline__ float power_to(int exponent, float x) {
  const int e = (__float_as_int(x) >> 23 & 0xff) - 127;
  return x > 0.f ? __int_as_float((min(max(exponent - e, -120), 120) + 127) << 23) : 1.f;
}

constexpr int kStepTile = 64;  // keys
template <int kD>
constexpr int kStepWarps = kD / 16;  // of a block: each owns 16 rows of the sums
template <int kD>
constexpr int kStepThreads = 32 * kStepWarps<kD>;

constexpr float kSlack = 3.f;  // a score may exceed the reference's by this, in powers of two
// Largest |k| and |v| in float16 units: aimed at, and at which the scale is lowered. 2^kSlack 2 2^12 fits.
constexpr int kKeyExponent = 8, kValueExponent = 10;
constexpr float kKeyLimit = 2048.f, kValueLimit = 16384.f;

// ---- Work of a block ----

// One query of one head and one split of its keys. The blocks of the query heads of a key head are neighbors,
// so that its cache is read from memory once, and those of the splits of a query, which may be a cluster.
struct StepWork {
  int i, h, kv_head, b;
  uint32_t row;                      // of the output
  int split, begin, end, num_tiles;  // keys
  bool possible;                     // the length lies in [0, n]

  __device__ __forceinline__ explicit StepWork(const StepArgs& args) {
    // 32-bit divisions: the grid fits, and a block waits for them before it can load anything.
    const auto m = static_cast<uint32_t>(args.m), heads = static_cast<uint32_t>(args.kv_heads),
               group = static_cast<uint32_t>(args.heads) / heads, splits = static_cast<uint32_t>(args.splits);
    uint32_t rest = blockIdx.x;
    const auto next = [&](uint32_t count) {
      const uint32_t quotient = rest / count, remainder = rest - quotient * count;
      rest = quotient;
      return remainder;
    };
    split = static_cast<int>(next(splits));
    i = static_cast<int>(next(m));
    const uint32_t g = next(group);
    kv_head = static_cast<int>(next(heads)), b = static_cast<int>(rest);
    h = static_cast<int>(static_cast<uint32_t>(kv_head) * group + g);
    row = (rest * m + static_cast<uint32_t>(i)) * heads * group + static_cast<uint32_t>(h);

    int64_t length = args.n;
    if (args.lengths != nullptr) {
      const int64_t at = b * args.lengths_stride;
      length = args.lengths_are_int64 ? static_cast<const int64_t*>(args.lengths)[at]
                                      : static_cast<const int32_t*>(args.lengths)[at];
    }
    possible = 0 <= length && length <= args.n;
    const int64_t last = possible ? length - args.m + i + 1 : 0;
    end = static_cast<int>(last > 0 ? last : 0);
    begin = static_cast<int>(last > args.window ? last - args.window : 0);
    const int share =
        (static_cast<int>((end - begin + splits - 1) / splits) + kStepTile - 1) / kStepTile * kStepTile;
    begin = min(begin + split * share, end);
    end = min(begin + share, end);
    num_tiles = (end - begin + kStepTile - 1) / kStepTile;
  }
  // The output where no key is visible.
  template <class Tag>
  __device__ __forceinline__ void answer_without_keys(const StepArgs& args) const {
    using E = StepElement<Tag>;
    if (threadIdx.x < args.dv)
      static_cast<typename E::type*>(args.o)[static_cast<int64_t>(row) * args.dv + threadIdx.x] =
          E::round(possible ? 0.f : NAN);
  }
  // A split without keys tells merge_kernel only that.
  template <int kD, int kDv>
  __device__ __forceinline__ void record_no_keys(const StepArgs& args) const {
    if (threadIdx.x != 0) return;
    float* record = args.moments + blockIdx.x * static_cast<int64_t>(Moments<kD, kDv>::kFloats);
    record[Moments<kD, kDv>::kTop] = possible ? -INFINITY : NAN;
    record[Moments<kD, kDv>::kSum] = 0.f;
  }
};

// ---- Sums over the keys ----

// What a thread holds of sums [kD, kD] and [kD, kDv]: rows 16 warp + lane / 4 and that + 8, columns
// 8 n + lane % 4 * 2 and the next.
template <int kD, int kDv>
struct Sums {
  float x[kD / 8 + kDv / 8][4] = {};

  __device__ __forceinline__ float (&key_key(int n))[4] { return x[n]; }
  __device__ __forceinline__ float (&key_value(int n))[4] { return x[kD / 8 + n]; }
  __device__ __forceinline__ static int row(int e) {
    return static_cast<int>(threadIdx.x) % kStepThreads<kD> / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ static int column(int n, int e) { return 8 * n + threadIdx.x % 4 * 2 + e % 2; }
};

// Weights are relative to 2^top; key and value are the powers of two of the float16 operands.
struct Units {
  float top = -INFINITY, key = 1.f, value = 1.f;

  // The first tile sets all three; later ones raise top where a score is much higher, and lower the scales
  // where an operand would not fit.
  __device__ __forceinline__ Units next(bool first, bool higher, float score, float k, float v) const {
    return {higher ? score : top, first || k * key > kKeyLimit ? power_to(kKeyExponent, k) : key,
            first || v * value > kValueLimit ? power_to(kValueExponent, v) : value};
  }
};

// What the sums are multiplied with when the units change.
struct UnitChange {
  float weight, key, key_key, key_value, value;
  __device__ __forceinline__ UnitChange(const Units& from, const Units& to, bool first) {
    const float k = to.key / from.key, v = to.value / from.value;
    weight = first ? 0.f : exp2f(from.top - to.top);
    key = weight * k, key_key = key * k, key_value = key * v, value = weight * v;
  }
};

// Moves the sums to another reference, with delta = c_old - c_new in units of the key operand:
//   sum w k' k'^T += delta M^T + M delta^T + l delta delta^T,  sum w k' v^T += delta (sum w v)^T
// where M = sum w k' and l = sum w before the move.
template <int kD, int kDv>
__device__ __forceinline__ void move_sums(Sums<kD, kDv>& sums, const UnitChange& change, const float* delta,
                                          const float* key_sum, const float* value_sum, float l) {
  using S = Sums<kD, kDv>;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float d = delta[S::row(e)], m = key_sum[S::row(e)];
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      const int column = S::column(n, e);
      float& x = sums.key_key(n)[e];
      x = change.key_key * (x + d * (key_sum[column] + l * delta[column]) + m * delta[column]);
    }
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n) {
      float& x = sums.key_value(n)[e];
      x = change.key_value * (x + d * value_sum[S::column(n, e)]);
    }
  }
}

// ---- From the sums to the output ----

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

// What the answer needs of the query.
template <int kD>
struct StepQuery {
  float q[kD], lam[kD];  // lam without the factor of the absolute ridge, one in features that are not there
};

// A thread's feature of the query and its ridge, read before the tiles are asked for: behind tens of KB of
// tiles per block this little would arrive last, and everything waits for it.
template <class Tag>
struct QueryFeature {
  using E = StepElement<Tag>;
  typename E::type q;
  float lam;

  __device__ __forceinline__ QueryFeature(const StepArgs& args, int64_t b, int64_t i, int64_t h) {
    const Ridge<float>& r = args.ridge;
    const int c = min(static_cast<int>(threadIdx.x), args.d - 1);
    q = static_cast<const typename E::type*>(
        args.q.data)[b * args.q.batch_stride + i * args.q.row_stride + h * args.q.head_stride + c];
    lam =
        r.data[b * r.stride[0] + i * r.stride[1] + h * r.stride[2] + (r.channels == 1 ? 0 : c * r.stride[3])];
    if (static_cast<int>(threadIdx.x) >= args.d) q = E::round(0.f), lam = 1.f;
  }
  template <int kD>
  __device__ __forceinline__ void put(StepQuery<kD>& query) const {
    if (threadIdx.x < kD) query.q[threadIdx.x] = E::widen(q), query.lam[threadIdx.x] = lam;
  }
};

// From the sums, in units of the inputs and with w relative to 2^top, to the output. key_sum and value_sum
// (shared memory) are sum w k' and sum w v; `scratch` is shared memory that the block may overwrite.
template <class Tag, int kD, int kDv>
__device__ __forceinline__ void answer(const StepArgs& args, uint32_t output_row, const StepQuery<kD>& query,
                                       float top, float l, const float* c, const float* key_sum,
                                       const float* value_sum, Sums<kD, kDv>& sums, unsigned char* scratch) {
  using S = Sums<kD, kDv>;
  using E = StepElement<Tag>;
  constexpr int kWarps = kStepWarps<kD>, kThreads = kStepThreads<kD>;
  static_assert(kDv <= kThreads && kD <= kThreads);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  auto& system = *reinterpret_cast<System<kD>*>(scratch);
  const float r = 1.f / l;
  // The factor of the absolute ridge: e^-lse = 2^-(top + log2 l).
  const float unit = args.ridge.absolute ? exp2f(fminf(-top - log2f(l), 126.f)) : 1.f;
  // A = C + lam I, b = q - c - kbar'
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = S::row(2 * h);
    const float mean = key_sum[row] * r, ridge = query.lam[row] * (row < args.d ? unit : 1.f);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      const float2 sum = *reinterpret_cast<const float2*>(key_sum + S::column(n, 0));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = sums.key_key(n)[2 * h + e];
        x = x * r - mean * ((e ? sum.y : sum.x) * r);  // symmetric, rounding included
        if (row == S::column(n, e)) x += ridge;
      }
    }
  }
  if (thread < kD)
    system.x[thread] = thread < args.d ? query.q[thread] - c[thread] - key_sum[thread] * r : 0.f;
  solve(sums, system);

  // o = vbar (1 - kbar'.x) + sum_r x_r (sum w k'_r v) / l
  float slope = 0.f;
#pragma unroll
  for (int at = 0; at < kD; at += 32) slope += system.x[at + lane] * key_sum[at + lane] * r;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) slope += __shfl_xor_sync(0xffffffffu, slope, step);
  float* parts = system.panel;  // [kWarps, kDv]
  static_assert(kWarps * kDv <= kD * System<kD>::kRow);
  const float x[2] = {system.x[S::row(0)], system.x[S::row(2)]};
#pragma unroll
  for (int n = 0; n < kDv / 8; ++n) {
    float sum[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      sum[e] = x[0] * sums.key_value(n)[e] + x[1] * sums.key_value(n)[e + 2];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], step);
    }
    if (lane < 4) *reinterpret_cast<float2*>(parts + warp * kDv + S::column(n, 0)) = {sum[0], sum[1]};
  }
  __syncthreads();
  if (thread >= args.dv) return;
  float sum = value_sum[thread] * (1.f - slope);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += parts[w * kDv + thread];
  static_cast<typename E::type*>(args.o)[static_cast<int64_t>(output_row) * args.dv + thread] =
      E::round(sum * r);
}

// ---- Splits ----

// What a split leaves for merge_kernel, with everything in units of the inputs. c, key_sum and value_sum are
// in shared memory.
template <int kD, int kDv>
__device__ __forceinline__ void record_split(const StepArgs& args, float top, float l, const float* c,
                                             const float* key_sum, const float* value_sum,
                                             Sums<kD, kDv>& sums) {
  using Record = Moments<kD, kDv>;
  using S = Sums<kD, kDv>;
  float* record = args.moments + blockIdx.x * static_cast<int64_t>(Record::kFloats);
  if (threadIdx.x == 0) record[Record::kTop] = top, record[Record::kSum] = l;
  const int at = threadIdx.x;
  if (at < kD) record[Record::kC + at] = c[at], record[Record::kKey + at] = key_sum[at];
  if (at < kDv) record[Record::kValue + at] = value_sum[at];
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    const auto put = [&](int first, const float (&x)[4]) {
      *reinterpret_cast<float2*>(record + first) = {x[e], x[e + 1]};
    };
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) put(Record::kKeyKey + S::row(e) * kD + S::column(n, 0), sums.key_key(n));
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n)
      put(Record::kKeyValue + S::row(e) * kDv + S::column(n, 0), sums.key_value(n));
  }
}

// Adds up the splits of a query, moved to the reference of the one with the highest score. Few blocks, each
// waiting for memory: so several groups of threads take splits in turn, and the first adds up and solves.
template <int kD, int kDv>
constexpr int kMergeGroups = kD + kDv <= 128 ? 4
                             : kD < 128      ? 2
                                             : 1;  // as many as the registers suffice for

template <int kD, int kDv>
struct MergeStorage {
  static constexpr int kSmall = 2 * kD + kDv, kFloats = 4 * (kD / 8 + kDv / 8);  // of a thread
  union {
    float small[kMaxSplits][kSmall];  // delta, sum w k', sum w v
    System<kD> system;
  };
  float others[std::max(kMergeGroups<kD, kDv> - 1, 1)][kFloats][kStepThreads<kD>];
};

template <class Tag, int kD, int kDv>
__global__ void __launch_bounds__(kMergeGroups<kD, kDv>* kStepThreads<kD>)
    merge_kernel(const __grid_constant__ StepArgs args) {
  using Record = Moments<kD, kDv>;
  using E = StepElement<Tag>;
  using S = Sums<kD, kDv>;
  using Storage = MergeStorage<kD, kDv>;
  constexpr int kThreads = kStepThreads<kD>, kGroups = kMergeGroups<kD, kDv>, kSmall = Storage::kSmall;
  extern __shared__ __align__(16) unsigned char storage[];
  auto& shared = *reinterpret_cast<Storage*>(storage);
  const int thread = threadIdx.x % kThreads, turn = threadIdx.x / kThreads;
  __shared__ float sC[kD];
  __shared__ __align__(8) float sKeySum[kD];
  __shared__ float sValueSum[kDv];
  __shared__ StepQuery<kD> sQuery;
  __shared__ float sTop[kMaxSplits], sSum[kMaxSplits], sFactor[kMaxSplits];
  const int splits = args.splits;
  const auto m = static_cast<uint32_t>(args.m), heads = static_cast<uint32_t>(args.heads);
  const uint32_t head = blockIdx.x / m, i = blockIdx.x % m, h = head % heads, b = head / heads;
  const uint32_t row = (b * m + i) * heads + h;
  QueryFeature<Tag>(args, b, i, h).put(sQuery);
  const float* first = args.moments + static_cast<int64_t>(blockIdx.x) * splits * Record::kFloats;
  for (int s = threadIdx.x; s < splits; s += kGroups * kThreads) {
    sTop[s] = first[s * Record::kFloats + Record::kTop];
    sSum[s] = first[s * Record::kFloats + Record::kSum];
  }
  __syncthreads();
  int best = 0;
  for (int s = 1; s < splits; ++s)
    if (sTop[s] > sTop[best]) best = s;
  const float top = sTop[best];
  if (!(top > -INFINITY)) {  // no visible key; an impossible length has left NaN
    if (threadIdx.x < args.dv)
      static_cast<typename E::type*>(args.o)[static_cast<int64_t>(row) * args.dv + threadIdx.x] =
          E::round(isnan(top) ? NAN : 0.f);
    return;
  }
  for (int s = threadIdx.x; s < splits; s += kGroups * kThreads) sFactor[s] = exp2f(sTop[s] - top);
  const float* c_best = first + best * Record::kFloats + Record::kC;
  for (int c = threadIdx.x; c < kD; c += kGroups * kThreads) sC[c] = c_best[c];
  for (int at = threadIdx.x; at < splits * kSmall; at += kGroups * kThreads) {
    const int s = at / kSmall, c = at % kSmall;
    // A split without keys has only said so.
    if (sSum[s] != 0.f)
      shared.small[s][c] = first[s * Record::kFloats + Record::kC + c] - (c < kD ? c_best[c] : 0.f);
  }
  __syncthreads();

  S sums;
#pragma unroll 1
  for (int s = turn; s < splits; s += kGroups) {
    const float sum = sSum[s], f = sFactor[s];
    if (sum == 0.f) continue;
    const float* from = first + s * Record::kFloats;
    const float *delta = shared.small[s], *m = delta + kD, *mv = m + kD;
    // A group of loads before their first use.
    const auto take = [&](auto chunks, int begin, const auto& add) {
      constexpr int kChunks = decltype(chunks)::value;
      float2 x[kChunks][2];
#pragma unroll
      for (int n = 0; n < kChunks; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          x[n][h] = __ldcg(
              reinterpret_cast<const float2*>(from + begin + S::row(2 * h) * 8 * kChunks + S::column(n, 0)));
#pragma unroll
      for (int n = 0; n < kChunks; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          add(n, 2 * h, S::row(2 * h), S::column(n, 0), x[n][h].x);
          add(n, 2 * h + 1, S::row(2 * h), S::column(n, 1), x[n][h].y);
        }
    };
    take(std::integral_constant<int, kD / 8>{}, Record::kKeyKey,
         [&](int n, int e, int row, int column, float x) {
           sums.key_key(n)[e] +=
               f * (x + delta[row] * (m[column] + sum * delta[column]) + m[row] * delta[column]);
         });
    take(std::integral_constant<int, kDv / 8>{}, Record::kKeyValue,
         [&](int n, int e, int row, int column, float x) {
           sums.key_value(n)[e] += f * (x + delta[row] * mv[column]);
         });
  }
  for (int c = threadIdx.x; c < kD + kDv; c += kGroups * kThreads) {
    float total = 0.f;
    for (int s = 0; s < splits; ++s) {
      if (sSum[s] == 0.f) continue;
      const float* of = shared.small[s];
      total += sFactor[s] * (of[kD + c] + (c < kD ? sSum[s] * of[c] : 0.f));
    }
    (c < kD ? sKeySum[c] : sValueSum[c - kD]) = total;
  }
  float l = 0.f;
  for (int s = 0; s < splits; ++s) l += sFactor[s] * sSum[s];
  // A fixed order: the bits repeat.
  if (turn > 0) {
#pragma unroll
    for (int x = 0; x < Storage::kFloats; ++x) shared.others[turn - 1][x][thread] = sums.x[x / 4][x % 4];
  }
  __syncthreads();
  if (turn > 0) return;
  for (int other = 0; other < kGroups - 1; ++other) {
#pragma unroll
    for (int x = 0; x < Storage::kFloats; ++x) sums.x[x / 4][x % 4] += shared.others[other][x][thread];
  }
  answer<Tag>(args, row, sQuery, top, l, sC, sKeySum, sValueSum, sums, storage);
}

// The blocks of both kernels, one after the other.
template <class Tag, int kD, int kDv, class Kernel, class... Maps>
cudaError_t launch_step(Kernel kernel, int shared_bytes, const StepArgs& args, cudaStream_t stream,
                        const Maps&... maps) {
  constexpr int kMergeBytes = sizeof(MergeStorage<kD, kDv>),
                kMergeThreads = kMergeGroups<kD, kDv> * kStepThreads<kD>;
  const bool merges = args.splits > 1 && !args.cluster;
  const auto bytes = cudaFuncAttributeMaxDynamicSharedMemorySize;  // per device, so not remembered
  cudaError_t error = cudaFuncSetAttribute(kernel, bytes, shared_bytes);
  if (error == cudaSuccess && merges)
    error = cudaFuncSetAttribute(merge_kernel<Tag, kD, kDv>, bytes, kMergeBytes);
  if (error != cudaSuccess) return error;
  const auto queries = static_cast<unsigned>(args.batch * args.heads * args.m),
             splits = static_cast<unsigned>(args.splits);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {splits, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = queries * splits, config.blockDim = kStepThreads<kD>;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = stream;
  config.attrs = &cluster, config.numAttrs = args.cluster ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, maps..., args);
  if (error == cudaSuccess && merges)
    merge_kernel<Tag, kD, kDv><<<queries, kMergeThreads, kMergeBytes, stream>>>(args);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace nearfield::lla
