// What the decode kernels of both generations share: the work of a block, the layout of the sums over the
// keys, how they move to another reference, and the way from the sums to the output.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "lla/step.h"

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
// so that its cache is read from memory once.
struct StepWork {
  int64_t i, h, kv_head, b;
  int begin, end, num_tiles;  // keys
  bool possible;              // the length lies in [0, n]

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
    i = next(m);
    const uint32_t g = next(group);
    const int split = static_cast<int>(next(splits));
    kv_head = next(heads), b = rest, h = kv_head * group + g;

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
  // Without a key: the output, or for merge_kernel that there was none.
  template <class Tag, int kD, int kDv>
  __device__ __forceinline__ void answer_without_keys(const StepArgs& args) const {
    using E = StepElement<Tag>;
    if (args.splits == 1) {
      auto* o = static_cast<typename E::type*>(args.o) + ((b * args.m + i) * args.heads + h) * args.dv;
      for (int c = threadIdx.x; c < args.dv; c += kStepThreads<kD>) o[c] = E::round(possible ? 0.f : NAN);
    } else if (threadIdx.x == 0) {
      float* record = args.moments + blockIdx.x * static_cast<int64_t>(Moments<kD, kDv>::kFloats);
      record[Moments<kD, kDv>::kTop] = possible ? -INFINITY : NAN;
      record[Moments<kD, kDv>::kSum] = 0.f;
    }
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

// Shared memory of solve(): the columns of the elimination, and the right-hand side, which becomes x.
template <int kD>
struct System {
  static constexpr int kRow = kD + 2;
  float column[kD * kRow];  // column j of what was left at step j
  float x[kD];
  float second[2]
              [kD + 2];  // of a pair of columns, and its x, before the first is eliminated; pairs take turns
};

__device__ __forceinline__ float pivot_reciprocal(float x) {
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return x > 0.f ? r : NAN;
}

// Solves A x = b for a symmetric positive definite A, spread over the block like Sums::key_key. Elimination
// with the matrix in registers, two columns at a time: a step publishes columns j and j + 1, which by
// symmetry are also rows, and everybody subtracts its multiples of both; elements of finished rows and
// columns become garbage that nothing reads. NaN if a pivot is not positive.
template <int kD, int kDv>
__device__ __forceinline__ void solve(Sums<kD, kDv>& a, System<kD>& s) {
  using S = Sums<kD, kDv>;
  constexpr int kRow = System<kD>::kRow;
  const int lane = threadIdx.x % 32, row[2] = {S::row(0), S::row(2)};
  __syncthreads();
  float b[2] = {s.x[row[0]], s.x[row[1]]};  // every lane of a row keeps its own copy
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
#pragma unroll 1
    for (int l = 0; l < 4; ++l) {
      const int j = 8 * n + 2 * l;
      float *v = s.column + j * kRow, *w = s.second[l % 2];
      if (lane % 4 == l) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          v[row[h]] = a.key_key(n)[2 * h], w[row[h]] = a.key_key(n)[2 * h + 1];
          if (row[h] == j) s.x[j] = b[h];
          if (row[h] == j + 1) w[kD] = b[h];
        }
      }
      __syncthreads();
      const float2 top = *reinterpret_cast<const float2*>(v + j);
      const float r = pivot_reciprocal(top.x), share = top.y * r;  // of column j in the next
      const float r_second = pivot_reciprocal(w[j + 1] - share * top.y);
      const float b_first = s.x[j], b_second = w[kD];
      float m[2], m_second[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float left = w[row[h]] - share * v[row[h]];
        if (lane % 4 == l) {
          v[kRow + row[h]] = left;
          if (row[h] == j + 1) s.x[j + 1] = b_second - share * b_first;
        }
        m_second[h] = left * r_second;
        m[h] = v[row[h]] * r - m_second[h] * share;
        b[h] -= m[h] * b_first + m_second[h] * b_second;
      }
#pragma unroll
      for (int c = n; c < kD / 8; ++c) {
        const float2 x = *reinterpret_cast<const float2*>(v + S::column(c, 0));
        const float2 y = *reinterpret_cast<const float2*>(w + S::column(c, 0));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          a.key_key(c)[2 * h] -= m[h] * x.x + m_second[h] * y.x;
          a.key_key(c)[2 * h + 1] -= m[h] * x.y + m_second[h] * y.y;
        }
      }
    }
  }
  __syncthreads();
  // Back substitution: x_i = (b_i - sum_{j > i} v_i[j] x_j) / v_i[i].
  if (threadIdx.x < 32) {
    constexpr int kMine = kD / 32;
    float z[kMine], inverse[kMine];
#pragma unroll
    for (int c = 0; c < kMine; ++c) {
      const int i = 32 * c + lane;
      inverse[c] = 1.f / s.column[i * kRow + i];
      z[c] = s.x[i] * inverse[c];
    }
#pragma unroll
    for (int c = kMine - 1; c >= 0; --c) {
#pragma unroll 8
      for (int l = 31; l >= 0; --l) {
        const int j = 32 * c + l;
        const float x = __shfl_sync(0xffffffffu, z[c], l);
#pragma unroll
        for (int i = 0; i <= c; ++i) {
          const int mine = 32 * i + lane;
          if (mine < j) z[i] -= s.column[mine * kRow + j] * inverse[i] * x;
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kMine; ++c) s.x[32 * c + lane] = z[c];
  }
  __syncthreads();
}

// lam of channel c, with the factor of the absolute ridge: e^-lse = 2^-(top + log2 l).
__device__ __forceinline__ float ridge_at(const StepArgs& args, int64_t b, int64_t i, int64_t h, int c,
                                          float top, float sum) {
  const Ridge<float>& r = args.ridge;
  const float lam =
      r.data[b * r.stride[0] + i * r.stride[1] + h * r.stride[2] + (r.channels == 1 ? 0 : c * r.stride[3])];
  return r.absolute ? lam * exp2f(fminf(-top - log2f(sum), 126.f)) : lam;
}

// From the sums, in units of the inputs and with w relative to 2^top, to the output. key_sum and value_sum
// (shared memory) are sum w k' and sum w v; `scratch` is shared memory that the block may overwrite.
template <class Tag, int kD, int kDv>
__device__ __forceinline__ void answer(const StepArgs& args, int64_t b, int64_t i, int64_t h, float top,
                                       float l, const float* c, const float* key_sum, const float* value_sum,
                                       Sums<kD, kDv>& sums, unsigned char* scratch) {
  using S = Sums<kD, kDv>;
  using E = StepElement<Tag>;
  using Element = typename E::type;
  constexpr int kWarps = kStepWarps<kD>, kThreads = kStepThreads<kD>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto& system = *reinterpret_cast<System<kD>*>(scratch);
  const float r = 1.f / l;
  // A = C + lam I, b = q - c - kbar'
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int row = S::row(e);
    const float mean = key_sum[row] * r;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      const int column = S::column(n, e);
      float& x = sums.key_key(n)[e];
      x = x * r - mean * (key_sum[column] * r);
      if (row == column) x = row < args.d ? x + ridge_at(args, b, i, h, row, top, l) : 1.f;
    }
  }
  const auto* q = static_cast<const Element*>(args.q.data) + b * args.q.batch_stride + i * args.q.row_stride +
                  h * args.q.head_stride;
  for (int at = threadIdx.x; at < kD; at += kThreads)
    system.x[at] = at < args.d ? E::widen(q[at]) - c[at] - key_sum[at] * r : 0.f;
  solve(sums, system);

  // o = vbar (1 - kbar'.x) + sum_r x_r (sum w k'_r v) / l
  float slope = 0.f;
  for (int at = lane; at < kD; at += 32) slope += system.x[at] * key_sum[at] * r;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) slope += __shfl_xor_sync(0xffffffffu, slope, step);
  float* parts = system.column;  // [kWarps, kDv]
  static_assert(kWarps * kDv <= kD * System<kD>::kRow);
#pragma unroll
  for (int n = 0; n < kDv / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = system.x[S::row(0)] * sums.key_value(n)[e] + system.x[S::row(2)] * sums.key_value(n)[e + 2];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane < 4) parts[warp * kDv + S::column(n, e)] = sum;
    }
  }
  __syncthreads();
  auto* o = static_cast<Element*>(args.o) + ((b * args.m + i) * args.heads + h) * args.dv;
  for (int at = threadIdx.x; at < args.dv; at += kThreads) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w * kDv + at];
    o[at] = E::round((sum + value_sum[at] * (1.f - slope)) * r);
  }
}

// ---- Splits ----

// After the last tile, with everything in units of the inputs: the output, or the split's record for
// merge_kernel. c, key_sum and value_sum are in shared memory.
template <class Tag, int kD, int kDv>
__device__ __forceinline__ void finish_split(const StepArgs& args, const StepWork& work, float top, float l,
                                             const float* c, const float* key_sum, const float* value_sum,
                                             Sums<kD, kDv>& sums, unsigned char* scratch) {
  using Record = Moments<kD, kDv>;
  using S = Sums<kD, kDv>;
  if (args.splits == 1)
    return answer<Tag>(args, work.b, work.i, work.h, top, l, c, key_sum, value_sum, sums, scratch);
  float* record = args.moments + blockIdx.x * static_cast<int64_t>(Record::kFloats);
  if (threadIdx.x == 0) record[Record::kTop] = top, record[Record::kSum] = l;
  for (int at = threadIdx.x; at < kD; at += kStepThreads<kD>) {
    record[Record::kC + at] = c[at];
    record[Record::kKey + at] = key_sum[at];
  }
  for (int at = threadIdx.x; at < kDv; at += kStepThreads<kD>) record[Record::kValue + at] = value_sum[at];
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
  using Element = typename E::type;
  using S = Sums<kD, kDv>;
  using Storage = MergeStorage<kD, kDv>;
  constexpr int kThreads = kStepThreads<kD>, kGroups = kMergeGroups<kD, kDv>, kSmall = Storage::kSmall;
  extern __shared__ __align__(16) unsigned char storage[];
  auto& shared = *reinterpret_cast<Storage*>(storage);
  const int thread = threadIdx.x % kThreads, turn = threadIdx.x / kThreads;
  __shared__ float sC[kD], sKeySum[kD], sValueSum[kDv];
  __shared__ float sTop[kMaxSplits], sSum[kMaxSplits], sFactor[kMaxSplits];
  const int group = static_cast<int>(args.heads) / static_cast<int>(args.kv_heads), splits = args.splits;
  const auto m = static_cast<uint32_t>(args.m), heads = static_cast<uint32_t>(args.heads);
  const uint32_t head = blockIdx.x / m;
  const int64_t i = blockIdx.x % m, h = head % heads, b = head / heads;
  const int64_t stride = static_cast<int64_t>(group) * args.m * Record::kFloats;  // from split to split
  const float* first =
      args.moments + ((b * args.kv_heads + static_cast<int>(h) / group) * splits * group * args.m +
                      static_cast<int>(h) % group * args.m + i) *
                         Record::kFloats;
  for (int s = threadIdx.x; s < splits; s += kGroups * kThreads) {
    sTop[s] = first[s * stride + Record::kTop];
    sSum[s] = first[s * stride + Record::kSum];
  }
  __syncthreads();
  int best = 0;
  for (int s = 1; s < splits; ++s)
    if (sTop[s] > sTop[best]) best = s;
  const float top = sTop[best];
  if (!(top > -INFINITY)) {  // no visible key; an impossible length has left NaN
    auto* o = static_cast<Element*>(args.o) + ((b * args.m + i) * args.heads + h) * args.dv;
    for (int c = threadIdx.x; c < args.dv; c += kGroups * kThreads) o[c] = E::round(isnan(top) ? NAN : 0.f);
    return;
  }
  for (int s = threadIdx.x; s < splits; s += kGroups * kThreads) sFactor[s] = exp2f(sTop[s] - top);
  const float* c_best = first + best * stride + Record::kC;
  for (int c = threadIdx.x; c < kD; c += kGroups * kThreads) sC[c] = c_best[c];
  for (int at = threadIdx.x; at < splits * kSmall; at += kGroups * kThreads) {
    const int s = at / kSmall, c = at % kSmall;
    // A split without keys has only said so.
    if (sSum[s] != 0.f) shared.small[s][c] = first[s * stride + Record::kC + c] - (c < kD ? c_best[c] : 0.f);
  }
  __syncthreads();

  S sums;
#pragma unroll 1
  for (int s = turn; s < splits; s += kGroups) {
    const float sum = sSum[s], f = sFactor[s];
    if (sum == 0.f) continue;
    const float* from = first + s * stride;
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
  answer<Tag>(args, b, i, h, top, l, sC, sKeySum, sValueSum, sums, storage);
}

// The blocks of both kernels, one after the other.
template <class Tag, int kD, int kDv, class Kernel, class... Maps>
cudaError_t launch_step(Kernel kernel, int shared_bytes, const StepArgs& args, cudaStream_t stream,
                        const Maps&... maps) {
  constexpr int kMergeBytes = sizeof(MergeStorage<kD, kDv>),
                kMergeThreads = kMergeGroups<kD, kDv> * kStepThreads<kD>;
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;  // per device, so not remembered
  cudaError_t error = cudaFuncSetAttribute(kernel, attribute, shared_bytes);
  if (error == cudaSuccess && args.splits > 1)
    error = cudaFuncSetAttribute(merge_kernel<Tag, kD, kDv>, attribute, kMergeBytes);
  if (error != cudaSuccess) return error;
  const int64_t queries = args.batch * args.heads * args.m;
  kernel<<<static_cast<unsigned>(queries * args.splits), kStepThreads<kD>, shared_bytes, stream>>>(maps...,
                                                                                                   args);
  if (args.splits > 1)
    merge_kernel<Tag, kD, kDv><<<static_cast<unsigned>(queries), kMergeThreads, kMergeBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace nearfield::lla
