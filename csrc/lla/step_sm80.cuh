// Decoding in one pass over the cache: sums over the visible keys ("moments") of w, w k', w v, w k' k'^T and
// w k' v^T, then a factorisation of C + lam I. README.md, "Decoding on CUDA", says why this beats reading the
// keys twice.
//
// A block treats one query of one head and one split of its keys. Tiles of 64 keys arrive through a ring of
// stages. Per tile: scores from the raw keys; keys become k' = (k - c) 2^e in float16, in place, values v
// 2^f; then the tensor cores add (w k')^T [k' | v]. Warp i owns rows 16 i .. 16 i + 15 of the sums.
//
// The reference c is the key with the highest score (or within 2^kSlack of it), and w is relative to its
// score. As that key has a large share of the weight, |k'| is then hardly larger than the spread of the keys,
// so C = sum w k'k'^T / l - kbar' kbar'^T does not cancel beyond the rounding of its terms; and when one key
// has all the weight, k' is exactly 0 there. Where a higher score turns up, the sums are moved to the new
// reference: seldom, since the maximum of n scores exceeds its predecessors by a factor only a few times.
//
// Rounding is consistent: the same rounded w and k' enter all sums, and e and f are powers of two that
// follow the largest key and value, so that any bfloat16 input fits float16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "lla/step.h"

namespace nearfield::lla {

template <class Tag>
struct StepElement;
template <>
struct StepElement<bf16> {
  using type = __nv_bfloat16;
  __device__ __forceinline__ static float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
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
  __device__ __forceinline__ static float widen(type x) { return __half2float(x); }
  __device__ __forceinline__ static type round(float x) { return __float2half_rn(x); }
};

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1],
                                          c[2], c[3]);
}

// The power of two that brings a largest value x into [2^exponent, 2^(exponent + 1)).
__device__ __forceinline__ float power_to(int exponent, float x) {
  const int e = (__float_as_int(x) >> 23 & 0xff) - 127;
  return x > 0.f ? __int_as_float((min(max(exponent - e, -120), 120) + 127) << 23) : 1.f;
}

constexpr int kStepTile = 64;  // keys
constexpr int kStepStages = 3;
constexpr float kSlack = 3.f;  // a score may exceed the reference's by this, in powers of two
// Largest |k| and |v| in float16 units: aimed at, and at which the scale is lowered. 2^kSlack 2 2^12 fits.
constexpr int kKeyExponent = 8, kValueExponent = 10;
constexpr float kKeyLimit = 2048.f, kValueLimit = 16384.f;

template <int kD, int kDv>
struct StepShape {
  static constexpr int kWarps = kD / 16, kThreads = 32 * kWarps;
  static constexpr int kBlocks = kD + kDv <= 64 ? 5 : kD + kDv <= 128 ? 3 : kD < 128 ? 2 : 1;  // per SM
  static constexpr int kKeyRow = kD + 8,
                       kValueRow = kDv + 8;  // 16-bit elements; padded against bank conflicts
  static constexpr int kStage = kStepTile * (kKeyRow + kValueRow);
  static constexpr int kMatrixRow = kD + 1;  // of the system in shared memory
  static constexpr int kStagesBytes = kStepStages * kStage * 2;
  static constexpr int kSystemBytes = (kD + 1) * kMatrixRow * 4;
  static constexpr int kBytes = kStagesBytes > kSystemBytes ? kStagesBytes : kSystemBytes;
};

// Keys that query i sees: [begin, end). False if the length is impossible.
__device__ __forceinline__ bool visible(const StepSm80Args& args, int64_t b, int64_t i, int& begin,
                                        int& end) {
  int64_t length = args.n;
  if (args.lengths != nullptr) {
    const int64_t at = b * args.lengths_stride;
    length = args.lengths_are_int64 ? static_cast<const int64_t*>(args.lengths)[at]
                                    : static_cast<const int32_t*>(args.lengths)[at];
  }
  const bool possible = 0 <= length && length <= args.n;
  const int64_t last = possible ? length - args.m + i + 1 : 0;
  end = static_cast<int>(last > 0 ? last : 0);
  begin = static_cast<int>(last > args.window ? last - args.window : 0);
  return possible;
}

// Solves A x = b for the symmetric positive definite A [d, d] in the lower triangle of `a` (rows of kD + 1),
// with b as row kD below it. x replaces b. A = L D L^T, columns left to right; b is eliminated along as one
// more row. NaN if a pivot is not positive. The whole block calls it.
template <int kD>
__device__ __forceinline__ void solve(float* a, float* inverse) {
  constexpr int kRow = kD + 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int j = 0; j < kD; ++j) {
    __syncthreads();
    const float pivot = a[j * kRow + j];
    const float r = pivot > 0.f ? 1.f / pivot : NAN;
    if (threadIdx.x == 0) inverse[j] = r;
#pragma unroll 4
    for (int i = j + 1 + warp; i <= kD; i += warps) {
      const float l = a[i * kRow + j] * r;
#pragma unroll
      for (int from = 0; from < kD; from += 32) {
        const int k = from + lane;
        if (k > j && k <= i && k < kD) a[i * kRow + k] -= l * a[k * kRow + j];
      }
    }
  }
  __syncthreads();
  if (warp == 0) {
    constexpr int kMine = kD / 32;
    float z[kMine];
#pragma unroll
    for (int c = 0; c < kMine; ++c) z[c] = a[kD * kRow + 32 * c + lane];
#pragma unroll
    for (int c = kMine - 1; c >= 0; --c) {
#pragma unroll 8
      for (int l = 31; l >= 0; --l) {
        const int j = 32 * c + l;
        const float x = __shfl_sync(0xffffffffu, z[c], l) * inverse[j];
        if (lane == l) z[c] = x;
#pragma unroll
        for (int i = 0; i <= c; ++i)
          if (32 * i + lane < j) z[i] -= a[j * kRow + 32 * i + lane] * x;
      }
    }
#pragma unroll
    for (int c = 0; c < kMine; ++c) a[kD * kRow + 32 * c + lane] = z[c];
  }
  __syncthreads();
}

// lam of channel c, with the factor of the absolute ridge: e^-lse = 2^-(top + log2 l).
__device__ __forceinline__ float ridge_at(const StepSm80Args& args, int64_t b, int64_t i, int64_t h, int c,
                                          float top, float sum) {
  const Ridge<float>& r = args.ridge;
  const float lam =
      r.data[b * r.stride[0] + i * r.stride[1] + h * r.stride[2] + (r.channels == 1 ? 0 : c * r.stride[3])];
  return r.absolute ? lam * exp2f(fminf(-top - log2f(sum), 126.f)) : lam;
}

template <class Tag, int kD, int kDv>
__global__ void __launch_bounds__(StepShape<kD, kDv>::kThreads, StepShape<kD, kDv>::kBlocks)
    moments_kernel(const __grid_constant__ StepSm80Args args) {
  using Shape = StepShape<kD, kDv>;
  using Record = Moments<kD, kDv>;
  using E = StepElement<Tag>;
  using Element = typename E::type;
  constexpr int kWarps = Shape::kWarps, kThreads = Shape::kThreads;
  constexpr int kKeyChunks = kD / 8, kValueChunks = kDv / 8;  // of 16 bytes in a row
  constexpr int kKeyRows = kThreads / kKeyChunks, kValueRows = kThreads / kValueChunks;  // rows of one sweep
  constexpr int kKeySweeps = kStepTile / kKeyRows, kValueSweeps = kStepTile / kValueRows;

  extern __shared__ __align__(16) unsigned char storage[];
  auto* stages = reinterpret_cast<uint16_t*>(storage);
  __shared__ float sScore[kStepTile];
  __shared__ __align__(4) __half sWeight[kStepTile];
  __shared__ float sLargest[3][kWarps];  // per warp: score, |k|, |v|
  __shared__ int sArgmax;
  __shared__ float sDelta[kD], sKeySum[kD], sValueSum[kDv], sInverse[kD];
  __shared__ float sOut[kWarps][kDv];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = static_cast<int>(args.heads / args.kv_heads);
  int64_t rest = blockIdx.x;
  const int64_t i = rest % args.m;
  rest /= args.m;
  const int g = static_cast<int>(rest % group);
  rest /= group;
  const int split = static_cast<int>(rest % args.splits);
  rest /= args.splits;
  const int64_t kv_head = rest % args.kv_heads, b = rest / args.kv_heads, h = kv_head * group + g;
  auto* out = static_cast<Element*>(args.o) + ((b * args.m + i) * args.heads + h) * args.dv;

  int begin, end;
  const bool possible = visible(args, b, i, begin, end);
  const int share = ((end - begin + args.splits - 1) / args.splits + kStepTile - 1) / kStepTile * kStepTile;
  begin = min(begin + split * share, end);
  end = min(begin + share, end);
  const int num_tiles = (end - begin + kStepTile - 1) / kStepTile;
  if (args.splits == 1 && num_tiles == 0) {
    for (int c = threadIdx.x; c < args.dv; c += kThreads) out[c] = E::round(possible ? 0.f : NAN);
    return;
  }
  float* record = args.moments + blockIdx.x * static_cast<int64_t>(Record::kFloats);
  if (num_tiles == 0) {
    if (threadIdx.x == 0) record[Record::kTop] = possible ? -INFINITY : NAN, record[Record::kSum] = 0.f;
    return;
  }

  const int key_chunk = threadIdx.x % kKeyChunks, key_row = threadIdx.x / kKeyChunks;
  const int value_chunk = threadIdx.x % kValueChunks, value_row = threadIdx.x / kValueChunks;
  const auto* k_rows = static_cast<const Element*>(args.k.data) + b * args.k.batch_stride +
                       kv_head * args.k.head_stride + 8 * key_chunk;
  const auto* v_rows = static_cast<const Element*>(args.v.data) + b * args.v.batch_stride +
                       kv_head * args.v.head_stride + 8 * value_chunk;
  const bool key_inside = 8 * key_chunk < args.d, value_inside = 8 * value_chunk < args.dv;
  const auto keys_of = [&](int tile) { return stages + tile % kStepStages * Shape::kStage; };
  const auto values_of = [&](int tile) { return keys_of(tile) + kStepTile * Shape::kKeyRow; };
  // Every thread later transforms the chunks that it brings.
  const auto fetch = [&](int tile) {
    if (tile < num_tiles) {
      uint16_t* keys = keys_of(tile) + 8 * key_chunk;
      uint16_t* values = values_of(tile) + 8 * value_chunk;
#pragma unroll
      for (int s = 0; s < kKeySweeps; ++s) {
        const int row = key_row + s * kKeyRows, j = begin + tile * kStepTile + row;
        const bool inside = key_inside && j < end;
        cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
            *reinterpret_cast<const cute::uint128_t*>(inside ? k_rows + j * args.k.row_stride
                                                             : k_rows - 8 * key_chunk),
            *reinterpret_cast<cute::uint128_t*>(keys + row * Shape::kKeyRow), inside);
      }
#pragma unroll
      for (int s = 0; s < kValueSweeps; ++s) {
        const int row = value_row + s * kValueRows, j = begin + tile * kStepTile + row;
        const bool inside = value_inside && j < end;
        cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
            *reinterpret_cast<const cute::uint128_t*>(inside ? v_rows + j * args.v.row_stride
                                                             : v_rows - 8 * value_chunk),
            *reinterpret_cast<cute::uint128_t*>(values + row * Shape::kValueRow), inside);
      }
    }
    cute::cp_async_fence();
  };
#pragma unroll
  for (int s = 0; s < kStepStages - 1; ++s) fetch(s);

  float q[8], c0[8];  // of this thread's key chunk; q times scale log2(e)
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const auto* q_row = static_cast<const Element*>(args.q.data) + b * args.q.batch_stride +
                        i * args.q.row_stride + h * args.q.head_stride;
    q[e] = key_inside ? E::widen(q_row[8 * key_chunk + e]) * args.scale * 1.44269504088896341f : 0.f;
    c0[e] = 0.f;
  }
  if (threadIdx.x == 0) sArgmax = kStepTile;

  // Accumulators: rows 16 warp + lane / 4 and that + 8, columns 8 n + lane % 4 * 2 and the next.
  float key_key[kD / 8][4], key_value[kDv / 8][4];
  // Sums of w k' and w v of the warp's share of the columns, and of w: row 0, so in lanes 0 to 3.
  constexpr int kKeyShare = kD / 8 / kWarps, kValueShare = kDv / 8 / kWarps;
  float key_sum[kKeyShare][4], value_sum[kValueShare][4], weight_sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int n = 0; n < kD / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) key_key[n][e] = key_sum[n % kKeyShare][e] = 0.f;
#pragma unroll
  for (int n = 0; n < kDv / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) key_value[n][e] = value_sum[n % kValueShare][e] = 0.f;
  float top = -INFINITY, key_scale = 1.f, value_scale = 1.f;
  const int row0 = 16 * warp + lane / 4, column0 = lane % 4 * 2;

  const auto publish_sums = [&] {
    if (lane >= 4) return;
#pragma unroll
    for (int n = 0; n < kKeyShare; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) sKeySum[8 * (kKeyShare * warp + n) + column0 + e] = key_sum[n][e];
#pragma unroll
    for (int n = 0; n < kValueShare; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) sValueSum[8 * (kValueShare * warp + n) + column0 + e] = value_sum[n][e];
  };

  for (int tile = 0; tile < num_tiles; ++tile) {
    cute::cp_async_wait<kStepStages - 2>();
    uint16_t* keys = keys_of(tile);
    uint16_t* values = values_of(tile);

    // Scores s = log2(e) scale q.k of the thread's rows, and how large keys and values are.
    float score[kKeySweeps], largest = -INFINITY, largest_k = 0.f, largest_v = 0.f;
#pragma unroll
    for (int s = 0; s < kKeySweeps; ++s) {
      const int row = key_row + s * kKeyRows;
      const uint4 raw = *reinterpret_cast<const uint4*>(keys + row * Shape::kKeyRow + 8 * key_chunk);
      const uint32_t pair[4] = {raw.x, raw.y, raw.z, raw.w};
      float sum = 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 k = E::unpack(pair[e]);
        sum += q[2 * e] * k.x + q[2 * e + 1] * k.y;
        largest_k = fmaxf(largest_k, fmaxf(fabsf(k.x), fabsf(k.y)));
      }
#pragma unroll
      for (int step = 1; step < kKeyChunks; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      score[s] = begin + tile * kStepTile + row < end ? sum : -INFINITY;
      if (key_chunk == 0) sScore[row] = score[s];
      largest = fmaxf(largest, score[s]);
    }
#pragma unroll
    for (int s = 0; s < kValueSweeps; ++s) {
      const uint4 raw = *reinterpret_cast<const uint4*>(
          values + (value_row + s * kValueRows) * Shape::kValueRow + 8 * value_chunk);
      const uint32_t pair[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 v = E::unpack(pair[e]);
        largest_v = fmaxf(largest_v, fmaxf(fabsf(v.x), fabsf(v.y)));
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      largest_k = fmaxf(largest_k, __shfl_xor_sync(0xffffffffu, largest_k, step));
      largest_v = fmaxf(largest_v, __shfl_xor_sync(0xffffffffu, largest_v, step));
    }
    if (lane == 0) sLargest[0][warp] = largest, sLargest[1][warp] = largest_k, sLargest[2][warp] = largest_v;
    __syncthreads();  // also: all warps are done with the previous tile
    fetch(tile + kStepStages - 1);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      largest = fmaxf(largest, sLargest[0][w]);
      largest_k = fmaxf(largest_k, sLargest[1][w]);
      largest_v = fmaxf(largest_v, sLargest[2][w]);
    }

    const bool higher = largest > top + kSlack;
    const bool larger = largest_k * key_scale > kKeyLimit || largest_v * value_scale > kValueLimit;
    if (higher || larger || tile == 0) {
      // Move the sums to the new reference, with delta = c_old - c_new:
      //   sum w k' k'^T += delta M^T + M delta^T + l delta delta^T,  sum w k' v^T += delta (sum w v)^T,  M +=
      //   l delta
      publish_sums();
      if (higher && threadIdx.x < kStepTile && sScore[threadIdx.x] == largest)
        atomicMin(&sArgmax, threadIdx.x);
      __syncthreads();
      float c_new[8];
      if (higher) {
        const uint4 raw = *reinterpret_cast<const uint4*>(keys + sArgmax * Shape::kKeyRow + 8 * key_chunk);
        const uint32_t pair[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 k = E::unpack(pair[e]);
          c_new[2 * e] = k.x, c_new[2 * e + 1] = k.y;
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (!higher) c_new[e] = c0[e];
        if (key_row == 0) sDelta[8 * key_chunk + e] = (c0[e] - c_new[e]) * key_scale;
        c0[e] = c_new[e];
      }
      const float new_top = higher ? largest : top;
      const bool first = tile == 0;
      const float new_key_scale =
          first || largest_k * key_scale > kKeyLimit ? power_to(kKeyExponent, largest_k) : key_scale;
      const float new_value_scale =
          first || largest_v * value_scale > kValueLimit ? power_to(kValueExponent, largest_v) : value_scale;
      const float f = first ? 0.f : exp2f(top - new_top);
      const float a = f * (new_key_scale / key_scale), aa = a * (new_key_scale / key_scale);
      const float ab = a * (new_value_scale / value_scale), bb = f * (new_value_scale / value_scale);
      const float l = __shfl_sync(0xffffffffu, weight_sum[0], 0);
      __syncthreads();
      if (threadIdx.x == 0) sArgmax = kStepTile;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + e / 2 * 8;
        const float delta = sDelta[row], m = sKeySum[row];
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          const int column = 8 * n + column0 + e % 2;
          key_key[n][e] =
              aa * (key_key[n][e] + delta * (sKeySum[column] + l * sDelta[column]) + m * sDelta[column]);
        }
#pragma unroll
        for (int n = 0; n < kDv / 8; ++n)
          key_value[n][e] = ab * (key_value[n][e] + delta * sValueSum[8 * n + column0 + e % 2]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int n = 0; n < kKeyShare; ++n) {
          const int column = 8 * (kKeyShare * warp + n) + column0 + e % 2;
          key_sum[n][e] = e < 2 ? a * (key_sum[n][e] + l * sDelta[column]) : 0.f;
        }
#pragma unroll
        for (int n = 0; n < kValueShare; ++n) value_sum[n][e] *= bb;
        weight_sum[e] *= f;
      }
      top = new_top, key_scale = new_key_scale, value_scale = new_value_scale;
    }

    // w, k' and v in float16.
#pragma unroll
    for (int s = 0; s < kKeySweeps; ++s) {
      const int row = key_row + s * kKeyRows;
      if (key_chunk == 0) sWeight[row] = __float2half_rn(exp2f(score[s] - top));
      auto& chunk = *reinterpret_cast<uint4*>(keys + row * Shape::kKeyRow + 8 * key_chunk);
      const uint32_t pair[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
      uint32_t moved[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 k = E::unpack(pair[e]);
        moved[e] = pack_half((k.x - c0[2 * e]) * key_scale, (k.y - c0[2 * e + 1]) * key_scale);
      }
      chunk = {moved[0], moved[1], moved[2], moved[3]};
    }
#pragma unroll
    for (int s = 0; s < kValueSweeps; ++s) {
      auto& chunk = *reinterpret_cast<uint4*>(values + (value_row + s * kValueRows) * Shape::kValueRow +
                                              8 * value_chunk);
      const uint32_t pair[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
      uint32_t moved[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 v = E::unpack(pair[e]);
        moved[e] = pack_half(v.x * value_scale, v.y * value_scale);
      }
      chunk = {moved[0], moved[1], moved[2], moved[3]};
    }
    __syncthreads();

#pragma unroll
    for (int step = 0; step < kStepTile / 16; ++step) {
      // A = (w k')^T: the thread's pairs of keys are 2 (lane % 4) and that + 8.
      const uint32_t w_low = *reinterpret_cast<const uint32_t*>(sWeight + 16 * step + column0);
      const uint32_t w_high = *reinterpret_cast<const uint32_t*>(sWeight + 16 * step + 8 + column0);
      const auto times = [](uint32_t x, uint32_t w) {
        const __half2 product =
            __hmul2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(w));
        return reinterpret_cast<const uint32_t&>(product);
      };
      uint32_t a[4];
      cute::SM75_U16x8_LDSM_T::copy(
          *reinterpret_cast<const cute::uint128_t*>(
              keys + (16 * step + lane / 16 * 8 + lane % 8) * Shape::kKeyRow + 16 * warp + lane / 8 % 2 * 8),
          a[0], a[1], a[2], a[3]);
      a[0] = times(a[0], w_low), a[1] = times(a[1], w_low);
      a[2] = times(a[2], w_high), a[3] = times(a[3], w_high);
      // The weights alone as row 0.
      const uint32_t w[4] = {lane < 4 ? w_low : 0u, 0u, lane < 4 ? w_high : 0u, 0u};
      constexpr uint32_t kOnes = 0x3c003c00u;
      multiply(weight_sum, w, kOnes, kOnes);
#pragma unroll
      for (int n = 0; n < kD / 8; n += 2) {
        uint32_t right[4];
        cute::SM75_U16x8_LDSM_T::copy(
            *reinterpret_cast<const cute::uint128_t*>(keys + (16 * step + lane % 16) * Shape::kKeyRow +
                                                      8 * n + lane / 16 * 8),
            right[0], right[1], right[2], right[3]);
        multiply(key_key[n], a, right[0], right[1]);
        multiply(key_key[n + 1], a, right[2], right[3]);
        if (n / kKeyShare == warp) {
          multiply(key_sum[n % kKeyShare], w, right[0], right[1]);
          multiply(key_sum[n % kKeyShare + 1], w, right[2], right[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kDv / 8; n += 2) {
        uint32_t right[4];
        cute::SM75_U16x8_LDSM_T::copy(
            *reinterpret_cast<const cute::uint128_t*>(values + (16 * step + lane % 16) * Shape::kValueRow +
                                                      8 * n + lane / 16 * 8),
            right[0], right[1], right[2], right[3]);
        multiply(key_value[n], a, right[0], right[1]);
        multiply(key_value[n + 1], a, right[2], right[3]);
        if (n / kValueShare == warp) {
          multiply(value_sum[n % kValueShare], w, right[0], right[1]);
          multiply(value_sum[n % kValueShare + 1], w, right[2], right[3]);
        }
      }
    }
  }

  // Sums in units of the inputs.
  const float l = __shfl_sync(0xffffffffu, weight_sum[0], 0);
  const float key_unit = 1.f / key_scale, value_unit = 1.f / value_scale;
  publish_sums();
  cute::cp_async_wait<0>();
  __syncthreads();
  if (args.splits > 1) {
    if (threadIdx.x == 0) record[Record::kTop] = top, record[Record::kSum] = l;
    if (key_row == 0) {
#pragma unroll
      for (int e = 0; e < 8; ++e) record[Record::kC + 8 * key_chunk + e] = c0[e];
    }
    for (int c = threadIdx.x; c < kD; c += kThreads) record[Record::kKey + c] = sKeySum[c] * key_unit;
    for (int c = threadIdx.x; c < kDv; c += kThreads) record[Record::kValue + c] = sValueSum[c] * value_unit;
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int row = row0 + e / 2 * 8;
#pragma unroll
      for (int n = 0; n < kD / 8; ++n)
        *reinterpret_cast<float2*>(record + Record::kKeyKey + row * kD + 8 * n + column0) = {
            key_key[n][e] * key_unit * key_unit, key_key[n][e + 1] * key_unit * key_unit};
#pragma unroll
      for (int n = 0; n < kDv / 8; ++n)
        *reinterpret_cast<float2*>(record + Record::kKeyValue + row * kDv + 8 * n + column0) = {
            key_value[n][e] * key_unit * value_unit, key_value[n][e + 1] * key_unit * value_unit};
    }
    return;
  }

  // A = C + lam I and g = q - c - kbar', in place of the stages.
  auto* a = reinterpret_cast<float*>(storage);
  constexpr int kRow = Shape::kMatrixRow;
  const float inverse_l = 1.f / l, mean = key_unit * inverse_l, square = key_unit * key_unit * inverse_l;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int row = row0 + e / 2 * 8;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      const int column = 8 * n + column0 + e % 2;
      float x = key_key[n][e] * square - sKeySum[row] * mean * (sKeySum[column] * mean);
      if (row == column) x = row < args.d ? x + ridge_at(args, b, i, h, row, top, l) : 1.f;
      a[row * kRow + column] = x;
    }
  }
  if (key_row == 0) {
    const auto* q_row = static_cast<const Element*>(args.q.data) + b * args.q.batch_stride +
                        i * args.q.row_stride + h * args.q.head_stride;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int c = 8 * key_chunk + e;
      a[kD * kRow + c] = key_inside ? E::widen(q_row[c]) - c0[e] - sKeySum[c] * mean : 0.f;
    }
  }
  solve<kD>(a, sInverse);

  // o = vbar + sum_r x_r (sum w k'_r v / l - kbar'_r vbar)
  const float* x = a + kD * kRow;
  const float value_mean = value_unit * inverse_l;
  float slope = 0.f;  // kbar'.x
  for (int c = lane; c < kD; c += 32) slope += x[c] * sKeySum[c] * mean;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) slope += __shfl_xor_sync(0xffffffffu, slope, step);
#pragma unroll
  for (int n = 0; n < kDv / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = x[row0] * key_value[n][e] + x[row0 + 8] * key_value[n][e + 2];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane < 4) sOut[warp][8 * n + column0 + e] = sum;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < args.dv; c += kThreads) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sOut[w][c];
    out[c] = E::round(sum * mean * value_unit + sValueSum[c] * value_mean * (1.f - slope));
  }
}

constexpr int kMergeThreads = 256;

// Adds up the splits of a query, moved to the reference of the one with the highest score; then as above.
template <class Tag, int kD, int kDv>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ StepSm80Args args) {
  using Record = Moments<kD, kDv>;
  using E = StepElement<Tag>;
  using Element = typename E::type;
  constexpr int kRow = kD + 1, kSmall = 2 * kD + kDv;
  extern __shared__ __align__(16) unsigned char storage[];
  auto* a = reinterpret_cast<float*>(storage);  // [kD + 1, kRow]
  float* small = a + (kD + 1) * kRow;           // [splits][delta, M, sum w v]
  __shared__ float sKeySum[kD], sValueSum[kDv], sInverse[kD];
  __shared__ float sTop[kMaxSplits], sSum[kMaxSplits];
  const int group = static_cast<int>(args.heads / args.kv_heads);
  const int64_t i = blockIdx.x % args.m;
  const int64_t h = blockIdx.x / args.m % args.heads, b = blockIdx.x / args.m / args.heads;
  const int64_t kv_head = h / group;
  const int64_t stride = static_cast<int64_t>(group) * args.m * Record::kFloats;  // from split to split
  const float* first =
      args.moments + ((b * args.kv_heads + kv_head) * args.splits * group * args.m + h % group * args.m + i) *
                         Record::kFloats;
  auto* out = static_cast<Element*>(args.o) + ((b * args.m + i) * args.heads + h) * args.dv;
  const int splits = args.splits;

  for (int s = threadIdx.x; s < splits; s += kMergeThreads) {
    sTop[s] = first[s * stride + Record::kTop];
    sSum[s] = first[s * stride + Record::kSum];
  }
  __syncthreads();
  int best = 0;
  for (int s = 1; s < splits; ++s)
    if (sTop[s] > sTop[best]) best = s;
  const float top = sTop[best];
  if (!(top > -INFINITY)) {  // no visible key; an impossible length has left NaN
    for (int c = threadIdx.x; c < args.dv; c += kMergeThreads) out[c] = E::round(isnan(top) ? NAN : 0.f);
    return;
  }
  const float* c_best = first + best * stride + Record::kC;
  for (int at = threadIdx.x; at < splits * kSmall; at += kMergeThreads) {
    const int s = at / kSmall, c = at % kSmall;
    if (sSum[s] == 0.f) continue;
    float x = first[s * stride + Record::kC + c];
    if (c < kD) x -= c_best[c];
    small[at] = x;
  }
  __syncthreads();
  float l = 0.f;
  for (int s = 0; s < splits; ++s) l += sSum[s] == 0.f ? 0.f : exp2f(sTop[s] - top) * sSum[s];
  for (int c = threadIdx.x; c < kD + kDv; c += kMergeThreads) {
    float sum = 0.f;
    for (int s = 0; s < splits; ++s) {
      if (sSum[s] == 0.f) continue;
      const float* of = small + s * kSmall;
      const float x = of[kD + c] + (c < kD ? sSum[s] * of[c] : 0.f);
      sum += exp2f(sTop[s] - top) * x;
    }
    (c < kD ? sKeySum[c] : sValueSum[c - kD]) = sum / l;
  }
  __syncthreads();

  constexpr int kKeyRuns = kD * kD / 4, kValueRuns = kD * kDv / 4;
  const float inverse_l = 1.f / l;
#pragma unroll 1
  for (int run = threadIdx.x; run < kKeyRuns; run += kMergeThreads) {
    const int row = run / (kD / 4), column = run % (kD / 4) * 4;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      if (sSum[s] == 0.f) continue;
      const float4 x = *reinterpret_cast<const float4*>(first + s * stride + Record::kKeyKey + 4 * run);
      const float from[4] = {x.x, x.y, x.z, x.w}, f = exp2f(sTop[s] - top);
      const float *delta = small + s * kSmall, *m = delta + kD;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum[e] += f * (from[e] + delta[row] * (m[column + e] + sSum[s] * delta[column + e]) +
                       m[row] * delta[column + e]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float x = sum[e] * inverse_l - sKeySum[row] * sKeySum[column + e];
      if (row == column + e) x = row < args.d ? x + ridge_at(args, b, i, h, row, top, l) : 1.f;
      a[row * kRow + column + e] = x;
    }
  }
  const auto* q_row = static_cast<const Element*>(args.q.data) + b * args.q.batch_stride +
                      i * args.q.row_stride + h * args.q.head_stride;
  for (int c = threadIdx.x; c < kD; c += kMergeThreads)
    a[kD * kRow + c] = c < args.d ? E::widen(q_row[c]) - c_best[c] - sKeySum[c] : 0.f;
  solve<kD>(a, sInverse);

  // o = vbar (1 - kbar'.x) + sum_s f_s / l (sum w k' v^T + delta (sum w v)^T)^T x
  float* x = a + kD * kRow;
  constexpr int kPerRow = kDv / 4, kRowsAtOnce = kMergeThreads / kPerRow;
  const int column = threadIdx.x % kPerRow * 4;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  for (int row = threadIdx.x / kPerRow; row < kD; row += kRowsAtOnce) {
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      if (sSum[s] == 0.f) continue;
      const float4 from =
          *reinterpret_cast<const float4*>(first + s * stride + Record::kKeyValue + row * kDv + column);
      const float f = exp2f(sTop[s] - top) * x[row];
      const float delta = small[s * kSmall + row];
      const float* value = small + s * kSmall + 2 * kD + column;
      sum[0] += f * (from.x + delta * value[0]), sum[1] += f * (from.y + delta * value[1]);
      sum[2] += f * (from.z + delta * value[2]), sum[3] += f * (from.w + delta * value[3]);
    }
  }
  static_assert(kValueRuns % kMergeThreads == 0);
  float slope = 0.f;
  for (int c = threadIdx.x % 32; c < kD; c += 32) slope += x[c] * sKeySum[c];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) slope += __shfl_xor_sync(0xffffffffu, slope, step);
  float* parts = a;  // [kRowsAtOnce, kDv]; x is in the last row of a
  static_assert(kRowsAtOnce * kDv <= kD * kRow);
  __syncthreads();
#pragma unroll
  for (int e = 0; e < 4; ++e) parts[threadIdx.x / kPerRow * kDv + column + e] = sum[e];
  __syncthreads();
  for (int c = threadIdx.x; c < args.dv; c += kMergeThreads) {
    float total = 0.f;
    for (int r = 0; r < kRowsAtOnce; ++r) total += parts[r * kDv + c];
    out[c] = E::round(total * inverse_l + sValueSum[c] * (1.f - slope));
  }
}

template <class Tag, int kD, int kDv>
int step_sm80<Tag, kD, kDv>::run(const StepSm80Args& args, void* stream) {
  using Shape = StepShape<kD, kDv>;
  const auto on = static_cast<cudaStream_t>(stream);
  constexpr int kMergeBytes = ((kD + 1) * (kD + 1) + kMaxSplits * (2 * kD + kDv)) * 4;
  // Per device, so not remembered.
  cudaError_t error = cudaFuncSetAttribute(moments_kernel<Tag, kD, kDv>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
  if (error == cudaSuccess && args.splits > 1)
    error = cudaFuncSetAttribute(merge_kernel<Tag, kD, kDv>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kMergeBytes);
  if (error != cudaSuccess) return error;
  const int64_t queries = args.batch * args.heads * args.m;
  moments_kernel<Tag, kD, kDv>
      <<<static_cast<unsigned>(queries * args.splits), Shape::kThreads, Shape::kBytes, on>>>(args);
  if (args.splits > 1)
    merge_kernel<Tag, kD, kDv><<<static_cast<unsigned>(queries), kMergeThreads, kMergeBytes, on>>>(args);
  return cudaGetLastError();
}

}  // namespace nearfield::lla
