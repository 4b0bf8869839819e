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

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "lla/step_merge.cuh"

namespace nearfield::lla {

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cute::SM80_16x8x16_F32F16F16F32_TN::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1],
                                          c[2], c[3]);
}

constexpr int kStepStages = 3;

template <int kD, int kDv>
struct StepShape {
  static constexpr int kBlocks = kD + kDv <= 64 ? 4 : kD + kDv <= 128 ? 3 : kD < 128 ? 2 : 1;  // per SM
  static constexpr int kKeyRow = kD + 8,
                       kValueRow = kDv + 8;  // 16-bit elements; padded against bank conflicts
  static constexpr int kStage = kStepTile * (kKeyRow + kValueRow);
  static constexpr int kStagesBytes = kStepStages * kStage * 2;
  static constexpr int kBytes = std::max<int>(kStagesBytes, sizeof(System<kD>));
};

template <class Tag, int kD, int kDv>
__global__ void __launch_bounds__(kStepThreads<kD>, StepShape<kD, kDv>::kBlocks)
    moments_kernel(const __grid_constant__ StepArgs args) {
  using Shape = StepShape<kD, kDv>;
  using E = StepElement<Tag>;
  using Element = typename E::type;
  constexpr int kWarps = kStepWarps<kD>, kThreads = kStepThreads<kD>;
  constexpr int kKeyChunks = kD / 8, kValueChunks = kDv / 8;  // of 16 bytes in a row
  constexpr int kKeyRows = kThreads / kKeyChunks, kValueRows = kThreads / kValueChunks;  // rows of one sweep
  constexpr int kKeySweeps = kStepTile / kKeyRows, kValueSweeps = kStepTile / kValueRows;

  extern __shared__ __align__(16) unsigned char storage[];
  auto* stages = reinterpret_cast<uint16_t*>(storage);
  __shared__ float sScore[kStepTile];
  __shared__ __align__(4) __half sWeight[kStepTile];  // square roots
  __shared__ float sLargest[3][kWarps];               // per warp: score, |k|, |v|
  __shared__ int sArgmax;
  __shared__ float sDelta[kD], sValueSum[kDv];
  __shared__ __align__(8) float sKeySum[kD];
  __shared__ StepQuery<kD> sQuery;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const StepWork work(args);
  if (work.num_tiles == 0)
    return args.splits == 1 ? work.answer_without_keys<Tag>(args) : work.record_no_keys<kD, kDv>(args);
  const int64_t b = work.b;
  const int begin = work.begin, end = work.end, num_tiles = work.num_tiles;

  const int key_chunk = threadIdx.x % kKeyChunks, key_row = threadIdx.x / kKeyChunks;
  const int value_chunk = threadIdx.x % kValueChunks, value_row = threadIdx.x / kValueChunks;
  const auto* k_rows = static_cast<const Element*>(args.k.data) + b * args.k.batch_stride +
                       work.kv_head * args.k.head_stride + 8 * key_chunk;
  const auto* v_rows = static_cast<const Element*>(args.v.data) + b * args.v.batch_stride +
                       work.kv_head * args.v.head_stride + 8 * value_chunk;
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
  if (args.splits == 1) QueryFeature<Tag>(args, b, work.i, work.h).put(sQuery);

  float q[8], c0[8];  // of this thread's key chunk; q times scale log2(e)
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const auto* q_row = static_cast<const Element*>(args.q.data) + b * args.q.batch_stride +
                        work.i * args.q.row_stride + work.h * args.q.head_stride;
    q[e] = key_inside ? E::widen(q_row[8 * key_chunk + e]) * args.scale * 1.44269504088896341f : 0.f;
    c0[e] = 0.f;
  }
  if (threadIdx.x == 0) sArgmax = kStepTile;

  Sums<kD, kDv> sums;
  // Sums of w k' and w v of the warp's share of the columns, and of w: row 0, so in lanes 0 to 3.
  constexpr int kKeyShare = kD / 8 / kWarps, kValueShare = kDv / 8 / kWarps;
  float key_sum[kKeyShare][4] = {}, value_sum[kValueShare][4] = {}, weight_sum[4] = {};
  Units units;
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

    const bool higher = largest > units.top + kSlack;
    const bool larger = largest_k * units.key > kKeyLimit || largest_v * units.value > kValueLimit;
    if (higher || larger || tile == 0) {
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
        if (key_row == 0) sDelta[8 * key_chunk + e] = (c0[e] - c_new[e]) * units.key;
        c0[e] = c_new[e];
      }
      const bool first = tile == 0;
      const Units next = units.next(first, higher, largest, largest_k, largest_v);
      const UnitChange change(units, next, first);
      const float l = __shfl_sync(0xffffffffu, weight_sum[0], 0);
      __syncthreads();
      if (threadIdx.x == 0) sArgmax = kStepTile;
      move_sums(sums, change, sDelta, sKeySum, sValueSum, l);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int n = 0; n < kKeyShare; ++n) {
          const int column = 8 * (kKeyShare * warp + n) + column0 + e % 2;
          key_sum[n][e] = e < 2 ? change.key * (key_sum[n][e] + l * sDelta[column]) : 0.f;
        }
#pragma unroll
        for (int n = 0; n < kValueShare; ++n) value_sum[n][e] *= change.value;
        weight_sum[e] *= change.weight;
      }
      units = next;
    }

    // w^1/2, w^1/2 k' and w^1/2 v in float16. A value's row may be another thread's score.
    const auto root = [&](float s) { return exp2f(0.5f * (s - units.top)); };
#pragma unroll
    for (int s = 0; s < kKeySweeps; ++s) {
      const int row = key_row + s * kKeyRows;
      const float w = root(score[s]), factor = w * units.key;
      if (key_chunk == 0) sWeight[row] = __float2half_rn(w);
      auto& chunk = *reinterpret_cast<uint4*>(keys + row * Shape::kKeyRow + 8 * key_chunk);
      const uint32_t pair[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
      uint32_t moved[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 k = E::unpack(pair[e]);
        moved[e] = pack<cutlass::half_t>((k.x - c0[2 * e]) * factor, (k.y - c0[2 * e + 1]) * factor);
      }
      chunk = {moved[0], moved[1], moved[2], moved[3]};
    }
#pragma unroll
    for (int s = 0; s < kValueSweeps; ++s) {
      const int row = value_row + s * kValueRows;
      const float factor = root(kD == kDv ? score[s % kKeySweeps] : sScore[row]) * units.value;
      auto& chunk = *reinterpret_cast<uint4*>(values + row * Shape::kValueRow + 8 * value_chunk);
      const uint32_t pair[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
      uint32_t moved[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 v = E::unpack(pair[e]);
        moved[e] = pack<cutlass::half_t>(v.x * factor, v.y * factor);
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
        multiply(sums.key_key(n), a, right[0], right[1]);
        multiply(sums.key_key(n + 1), a, right[2], right[3]);
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
        multiply(sums.key_value(n), a, right[0], right[1]);
        multiply(sums.key_value(n + 1), a, right[2], right[3]);
        if (n / kValueShare == warp) {
          multiply(value_sum[n % kValueShare], w, right[0], right[1]);
          multiply(value_sum[n % kValueShare + 1], w, right[2], right[3]);
        }
      }
    }
  }

  // Sums in units of the inputs.
  const float l = __shfl_sync(0xffffffffu, weight_sum[0], 0);
  const float key_unit = 1.f / units.key, value_unit = 1.f / units.value;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) sums.key_key(n)[e] *= key_unit * key_unit;
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n) sums.key_value(n)[e] *= key_unit * value_unit;
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
  if (args.splits > 1) return record_split(args, units.top, l, sDelta, sKeySum, sValueSum, sums);
  answer<Tag>(args, work.row, sQuery, units.top, l, sDelta, sKeySum, sValueSum, sums, storage);
}

template <class Tag, int kD, int kDv>
int step_sm80<Tag, kD, kDv>::run(const StepArgs& args, void* stream) {
  return launch_step<Tag, kD, kDv>(moments_kernel<Tag, kD, kDv>, StepShape<kD, kDv>::kBytes, args,
                                   static_cast<cudaStream_t>(stream));
}

}  // namespace nearfield::lla
