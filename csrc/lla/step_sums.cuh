// What the decode kernels of both generations share before the solve: elements, the work of a block, the
// layout of the sums over the keys and how they move to another reference.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "lla/step.h"
#include "nearfield/pairs.cuh"
#include "nearfield/shared_memory.cuh"

namespace nearfield::lla {

// ---- Elements and units ----

template <class Tag>
struct StepElement;
template <>
struct StepElement<bf16> {
  using type = __nv_bfloat16;
  __device__ __forceinline__ static float2 unpack(uint32_t pair) {
    return nearfield::unpack<cutlass::bfloat16_t>(pair);
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
    return nearfield::unpack<cutlass::half_t>(pair);
  }
  __device__ __forceinline__ static uint32_t largest(uint32_t x, uint32_t y) {
    const auto z = __hmax2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(y));
    return reinterpret_cast<const uint32_t&>(z);
  }
  __device__ __forceinline__ static float widen(type x) { return __half2float(x); }
  __device__ __forceinline__ static type round(float x) { return __float2half_rn(x); }
};

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

}  // namespace nearfield::lla
