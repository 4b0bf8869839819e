// Decoding in one pass over the cache: sums over the visible keys ("moments") of w, w k', w v, w k' k'^T and
// w k' v^T, then a factorisation of C + lam I. README.md, "Decoding on CUDA", says why this beats reading the
// keys twice.
//
// A block treats one query of one head and one split of its keys. Tiles of 64 keys arrive through a ring of
// stages. Per tile: scores from the raw keys; keys become w^1/2 (k - c) 2^e and values w^1/2 v 2^f in
// float16, in place; then the tensor cores multiply the tile by itself. Warp i owns rows 16 i .. 16 i + 15 of
// the sums.
//
// The reference c is the key with the highest score (or within 2^kSlack of it), and w is relative to its
// score. As that key has a large share of the weight, |k'| is then hardly larger than the spread of the keys,
// so C = sum w k'k'^T / l - kbar' kbar'^T does not cancel beyond the rounding of its terms; and when one key
// has all the weight, k' is exactly 0 there. Where a higher score turns up, the sums are moved to the new
// reference: seldom, since the maximum of n scores exceeds its predecessors by a factor only a few times.
//
// The same rounded w^1/2, w^1/2 k' and w^1/2 v enter all sums, so what is solved is exactly the fit to
// slightly different keys and values: C is positive semidefinite whatever the rounding. e and f follow the
// largest key and value, so that any bfloat16 input fits float16.
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
  static constexpr int kBlocks = kD + kDv <= 64 ? 4 : kD + kDv <= 128 ? 3 : kD < 128 ? 2 : 1;  // per SM
  static constexpr int kKeyRow = kD + 8,
                       kValueRow = kDv + 8;  // 16-bit elements; padded against bank conflicts
  static constexpr int kStage = kStepTile * (kKeyRow + kValueRow);
  static constexpr int kStagesBytes = kStepStages * kStage * 2;
  static constexpr int kSystemBytes = kD * (kD + 2) * 4;
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

// What a thread holds of sums [kD, kD] and [kD, kDv]: rows 16 warp + lane / 4 and that + 8, columns
// 8 n + lane % 4 * 2 and the next.
template <int kD, int kDv>
struct Sums {
  float key_key[kD / 8][4], key_value[kDv / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) key_key[n][e] = 0.f;
#pragma unroll
      for (int n = 0; n < kDv / 8; ++n) key_value[n][e] = 0.f;
    }
  }
  __device__ __forceinline__ static int row(int e) {
    return static_cast<int>(threadIdx.x) / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ static int column(int n, int e) { return 8 * n + threadIdx.x % 4 * 2 + e % 2; }
};

// Shared memory of solve(): the columns of the elimination, and the right-hand side, which becomes x.
template <int kD>
struct System {
  static constexpr int kRow = kD + 1;
  float column[kD * kRow];  // column j of what was left at step j
  float x[kD];
};

// Solves A x = b for a symmetric positive definite A, spread over the block like Sums::key_key. Elimination
// with the matrix in registers: step j publishes column j, which by symmetry is also row j, and everybody
// subtracts its multiple; elements of finished rows and columns become garbage that nothing reads. NaN if a
// pivot is not positive.
template <int kD, int kDv>
__device__ __forceinline__ void solve(Sums<kD, kDv>& a, System<kD>& s) {
  using S = Sums<kD, kDv>;
  constexpr int kRow = System<kD>::kRow;
  const int lane = threadIdx.x % 32, row0 = S::row(0), row1 = S::row(2);
  __syncthreads();
  float b0 = s.x[row0], b1 = s.x[row1];  // every lane of a row keeps its own copy
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kD / 8; ++n) {
#pragma unroll 1
    for (int l = 0; l < 4; ++l) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = 8 * n + 2 * l + e;
        float* v = s.column + j * kRow;
        if (lane % 4 == l) {
          v[row0] = a.key_key[n][e], v[row1] = a.key_key[n][2 + e];
          if (row0 == j) s.x[j] = b0;
          if (row1 == j) s.x[j] = b1;
        }
        __syncthreads();
        const float pivot = v[j], r = pivot > 0.f ? __frcp_rn(pivot) : NAN;
        const float m0 = v[row0] * r, m1 = v[row1] * r, b = s.x[j];
        b0 -= m0 * b, b1 -= m1 * b;
#pragma unroll
        for (int c = n; c < kD / 8; ++c) {
          const float low = v[S::column(c, 0)], high = v[S::column(c, 1)];
          a.key_key[c][0] -= m0 * low, a.key_key[c][1] -= m0 * high;
          a.key_key[c][2] -= m1 * low, a.key_key[c][3] -= m1 * high;
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
      inverse[c] = __frcp_rn(s.column[i * kRow + i]);
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
__device__ __forceinline__ float ridge_at(const StepSm80Args& args, int64_t b, int64_t i, int64_t h, int c,
                                          float top, float sum) {
  const Ridge<float>& r = args.ridge;
  const float lam =
      r.data[b * r.stride[0] + i * r.stride[1] + h * r.stride[2] + (r.channels == 1 ? 0 : c * r.stride[3])];
  return r.absolute ? lam * exp2f(fminf(-top - log2f(sum), 126.f)) : lam;
}

// From the sums, in units of the inputs and with w relative to 2^top, to the output. key_sum and value_sum
// (shared memory) are sum w k' and sum w v; `scratch` is shared memory that the block may overwrite.
template <class Tag, int kD, int kDv>
__device__ __forceinline__ void answer(const StepSm80Args& args, int64_t b, int64_t i, int64_t h, float top,
                                       float l, const float* c, const float* key_sum, const float* value_sum,
                                       Sums<kD, kDv>& sums, unsigned char* scratch) {
  using S = Sums<kD, kDv>;
  using E = StepElement<Tag>;
  using Element = typename E::type;
  constexpr int kWarps = StepShape<kD, kDv>::kWarps, kThreads = StepShape<kD, kDv>::kThreads;
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
      float& x = sums.key_key[n][e];
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
      float sum = system.x[S::row(0)] * sums.key_value[n][e] + system.x[S::row(2)] * sums.key_value[n][e + 2];
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
  __shared__ __align__(4) __half sWeight[kStepTile];  // square roots
  __shared__ float sLargest[3][kWarps];               // per warp: score, |k|, |v|
  __shared__ int sArgmax;
  __shared__ float sDelta[kD], sKeySum[kD], sValueSum[kDv];

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

  Sums<kD, kDv> sums;
  sums.clear();
  auto& [key_key, key_value] = sums;
  // Sums of w k' and w v of the warp's share of the columns, and of w: row 0, so in lanes 0 to 3.
  constexpr int kKeyShare = kD / 8 / kWarps, kValueShare = kDv / 8 / kWarps;
  float key_sum[kKeyShare][4] = {}, value_sum[kValueShare][4] = {}, weight_sum[4] = {};
  float top = -INFINITY, key_scale = 1.f, value_scale = 1.f;
  const int column0 = lane % 4 * 2;

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
    float score[kKeySweeps], largest = -INFINITY, largest_k = 0.f;
    uint32_t packed_v = 0;
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
      for (int e = 0; e < 4; ++e) packed_v = E::largest(packed_v, pair[e] & 0x7fff7fffu);
    }
    const float2 unpacked_v = E::unpack(packed_v);
    float largest_v = fmaxf(unpacked_v.x, unpacked_v.y);
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
        const int row = Sums<kD, kDv>::row(e);
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

    // w^1/2, w^1/2 k' and w^1/2 v in float16. A value's row may be another thread's score.
    const auto root = [&](float s) { return exp2f(0.5f * (s - top)); };
#pragma unroll
    for (int s = 0; s < kKeySweeps; ++s) {
      const int row = key_row + s * kKeyRows;
      const float w = root(score[s]), factor = w * key_scale;
      if (key_chunk == 0) sWeight[row] = __float2half_rn(w);
      auto& chunk = *reinterpret_cast<uint4*>(keys + row * Shape::kKeyRow + 8 * key_chunk);
      const uint32_t pair[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
      uint32_t moved[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 k = E::unpack(pair[e]);
        moved[e] = pack_half((k.x - c0[2 * e]) * factor, (k.y - c0[2 * e + 1]) * factor);
      }
      chunk = {moved[0], moved[1], moved[2], moved[3]};
    }
#pragma unroll
    for (int s = 0; s < kValueSweeps; ++s) {
      const int row = value_row + s * kValueRows;
      const float factor = root(kD == kDv ? score[s % kKeySweeps] : sScore[row]) * value_scale;
      auto& chunk = *reinterpret_cast<uint4*>(values + row * Shape::kValueRow + 8 * value_chunk);
      const uint32_t pair[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
      uint32_t moved[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 v = E::unpack(pair[e]);
        moved[e] = pack_half(v.x * factor, v.y * factor);
      }
      chunk = {moved[0], moved[1], moved[2], moved[3]};
    }
    __syncthreads();

#pragma unroll
    for (int step = 0; step < kStepTile / 16; ++step) {
      // The thread's pairs of keys are 2 (lane % 4) and that + 8.
      const uint32_t w_low = *reinterpret_cast<const uint32_t*>(sWeight + 16 * step + column0);
      const uint32_t w_high = *reinterpret_cast<const uint32_t*>(sWeight + 16 * step + 8 + column0);
      uint32_t a[4];
      cute::SM75_U16x8_LDSM_T::copy(
          *reinterpret_cast<const cute::uint128_t*>(
              keys + (16 * step + lane / 16 * 8 + lane % 8) * Shape::kKeyRow + 16 * warp + lane / 8 % 2 * 8),
          a[0], a[1], a[2], a[3]);
      // The weights as row 0 of the left operand, and as every column of the right one.
      const uint32_t w[4] = {lane < 4 ? w_low : 0u, 0u, lane < 4 ? w_high : 0u, 0u};
      multiply(weight_sum, w, w_low, w_high);
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
#pragma unroll
  for (int e = 0; e < 4; ++e) {
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) key_key[n][e] *= key_unit * key_unit;
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n) key_value[n][e] *= key_unit * value_unit;
#pragma unroll
    for (int n = 0; n < kKeyShare; ++n) key_sum[n][e] *= key_unit;
#pragma unroll
    for (int n = 0; n < kValueShare; ++n) value_sum[n][e] *= value_unit;
  }
  cute::cp_async_wait<0>();
  publish_sums();
  if (key_row == 0) {
#pragma unroll
    for (int e = 0; e < 8; ++e) sDelta[8 * key_chunk + e] = c0[e];
  }
  __syncthreads();
  if (args.splits == 1) return answer<Tag>(args, b, i, h, top, l, sDelta, sKeySum, sValueSum, sums, storage);

  if (threadIdx.x == 0) record[Record::kTop] = top, record[Record::kSum] = l;
  for (int c = threadIdx.x; c < kD; c += kThreads) {
    record[Record::kC + c] = sDelta[c];
    record[Record::kKey + c] = sKeySum[c];
  }
  for (int c = threadIdx.x; c < kDv; c += kThreads) record[Record::kValue + c] = sValueSum[c];
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    const int row = Sums<kD, kDv>::row(e);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
      *reinterpret_cast<float2*>(record + Record::kKeyKey + row * kD + 8 * n + column0) = {key_key[n][e],
                                                                                           key_key[n][e + 1]};
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n)
      *reinterpret_cast<float2*>(record + Record::kKeyValue + row * kDv + 8 * n + column0) = {
          key_value[n][e], key_value[n][e + 1]};
  }
}

// Adds up the splits of a query, moved to the reference of the one with the highest score.
template <class Tag, int kD, int kDv>
__global__ void __launch_bounds__(StepShape<kD, kDv>::kThreads)
    merge_kernel(const __grid_constant__ StepSm80Args args) {
  using Record = Moments<kD, kDv>;
  using E = StepElement<Tag>;
  using Element = typename E::type;
  using S = Sums<kD, kDv>;
  constexpr int kThreads = StepShape<kD, kDv>::kThreads, kSmall = 2 * kD + kDv;
  extern __shared__ __align__(16) unsigned char storage[];
  auto* small = reinterpret_cast<float*>(storage);  // [splits][delta, sum w k', sum w v]
  __shared__ float sC[kD], sKeySum[kD], sValueSum[kDv];
  __shared__ float sTop[kMaxSplits], sSum[kMaxSplits], sFactor[kMaxSplits];
  const int group = static_cast<int>(args.heads / args.kv_heads), splits = args.splits;
  const int64_t i = blockIdx.x % args.m;
  const int64_t h = blockIdx.x / args.m % args.heads, b = blockIdx.x / args.m / args.heads;
  const int64_t stride = static_cast<int64_t>(group) * args.m * Record::kFloats;  // from split to split
  const float* first =
      args.moments +
      ((b * args.kv_heads + h / group) * splits * group * args.m + h % group * args.m + i) * Record::kFloats;
  for (int s = threadIdx.x; s < splits; s += kThreads) {
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
    for (int c = threadIdx.x; c < args.dv; c += kThreads) o[c] = E::round(isnan(top) ? NAN : 0.f);
    return;
  }
  for (int s = threadIdx.x; s < splits; s += kThreads) sFactor[s] = exp2f(sTop[s] - top);
  const float* c_best = first + best * stride + Record::kC;
  for (int c = threadIdx.x; c < kD; c += kThreads) sC[c] = c_best[c];
  for (int at = threadIdx.x; at < splits * kSmall; at += kThreads) {
    const int s = at / kSmall, c = at % kSmall;
    // A split without keys has only said so.
    if (sSum[s] != 0.f) small[at] = first[s * stride + Record::kC + c] - (c < kD ? c_best[c] : 0.f);
  }
  __syncthreads();

  S sums;
  sums.clear();
  float l = 0.f;
  for (int s = 0; s < splits; ++s) {
    const float sum = sSum[s], f = sFactor[s];
    if (sum == 0.f) continue;
    l += f * sum;
    const float* from = first + s * stride;
    const float *delta = small + s * kSmall, *m = delta + kD, *mv = m + kD;
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int row = S::row(e);
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        const int column = S::column(n, 0);
        const float2 x = *reinterpret_cast<const float2*>(from + Record::kKeyKey + row * kD + column);
        const float moved[2] = {x.x, x.y};
#pragma unroll
        for (int d = 0; d < 2; ++d)
          sums.key_key[n][e + d] += f * (moved[d] + delta[row] * (m[column + d] + sum * delta[column + d]) +
                                         m[row] * delta[column + d]);
      }
#pragma unroll
      for (int n = 0; n < kDv / 8; ++n) {
        const int column = S::column(n, 0);
        const float2 x = *reinterpret_cast<const float2*>(from + Record::kKeyValue + row * kDv + column);
        sums.key_value[n][e] += f * (x.x + delta[row] * mv[column]);
        sums.key_value[n][e + 1] += f * (x.y + delta[row] * mv[column + 1]);
      }
    }
  }
  for (int c = threadIdx.x; c < kD + kDv; c += kThreads) {
    float total = 0.f;
    for (int s = 0; s < splits; ++s) {
      if (sSum[s] == 0.f) continue;
      const float* of = small + s * kSmall;
      total += sFactor[s] * (of[kD + c] + (c < kD ? sSum[s] * of[c] : 0.f));
    }
    (c < kD ? sKeySum[c] : sValueSum[c - kD]) = total;
  }
  __syncthreads();
  answer<Tag>(args, b, i, h, top, l, sC, sKeySum, sValueSum, sums, storage);
}

template <class Tag, int kD, int kDv>
int step_sm80<Tag, kD, kDv>::run(const StepSm80Args& args, void* stream) {
  using Shape = StepShape<kD, kDv>;
  const auto on = static_cast<cudaStream_t>(stream);
  constexpr int kSmallBytes = kMaxSplits * (2 * kD + kDv) * 4;
  constexpr int kMergeBytes = kSmallBytes > Shape::kSystemBytes ? kSmallBytes : Shape::kSystemBytes;
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
    merge_kernel<Tag, kD, kDv><<<static_cast<unsigned>(queries), Shape::kThreads, kMergeBytes, on>>>(args);
  return cudaGetLastError();
}

}  // namespace nearfield::lla
