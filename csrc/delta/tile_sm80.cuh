// What the portable kernels share: products of a warp's 16 rows with a 64 x 64 tile in shared memory, tiles
// on their way from memory, the tokens behind a slot, gates.
#pragma once

#include <cuda_runtime_api.h>

#include <cute/arch/copy_sm80.hpp>

#include "delta/sm80.h"
#include "nearfield/shared_memory.cuh"
#include "nearfield/warp_mma.cuh"

namespace nearfield::delta {

template <class Tag>
using portable_t = std::conditional_t<std::is_same_v<Tag, bf16>, cutlass::bfloat16_t,
                                      std::conditional_t<std::is_same_v<Tag, fp16>, cutlass::half_t, float>>;

constexpr int kTileThreads = 128;  // of a CTA that owns a chunk: a warp per 16 rows

template <class Element>
constexpr int kTileRow = kPaddedRow<Element, kTile>;
template <class Element>
constexpr int kTileShared = kTile * kTileRow<Element>;  // elements in shared memory
template <class Element>
constexpr bool kIsWide = sizeof(Element) == 4;
template <class Element>
constexpr bool kHasLow = std::is_same_v<Element, cutlass::bfloat16_t>;  // float16 has digits enough

extern __shared__ __align__(16) char portable_shared[];

// ---- Products ----

using Rows64 = Accumulator<1, kTile>;  // a warp's 16 rows of 64 columns

// Operands of a product. float32 sums in the order of the accumulator's columns (0, 2, 4, 6, 1, 3, 5, 7),
// whatever the source, so that every left operand goes with every right one.
template <class Element>
struct TileFragments : Fragments<Element> {
  using Base = Fragments<Element>;
  using A = typename Base::A;

  // Stored transposed: kDepth rows of 16 elements.
  __device__ __forceinline__ static A left_transposed(const Element* rows) {
    A a;
    const int lane = threadIdx.x % 32;
    const auto& at = *reinterpret_cast<const cute::uint128_t*>(
        rows + (lane / 16 * 8 + lane % 8) * kTileRow<Element> + lane / 8 % 2 * 8);
    cute::SM75_U16x8_LDSM_T::copy(at, a.word[0], a.word[1], a.word[2], a.word[3]);
    return a;
  }
  // What rounding left of columns [column, column + kDepth).
  __device__ __forceinline__ static A left_rest(const Rows64& c, int column) {
    A a;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* from = &c.tile[0][column / 8 + i / 2][i % 2 * 2];
      a.word[i] = pack_low<Element>(from[0], from[1], pack<Element>(from[0], from[1]));
    }
    return a;
  }
};

template <>
struct TileFragments<float> : Fragments<float> {
  using Fragments<float>::left;
  __device__ __forceinline__ static A left(const float* rows, int stride) {
    A a;
    const int lane = threadIdx.x % 32;
    const float* at = rows + lane / 4 * stride + lane % 4 * 2;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) a.word[i] = at[i % 2 * 8 * stride + i / 2];
    return a;
  }
  __device__ __forceinline__ static A left_transposed(const float* rows) {
    A a;
    const int lane = threadIdx.x % 32;
    const float* at = rows + lane % 4 * 2 * kTileRow<float> + lane / 4;
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) a.word[i] = at[i / 2 * kTileRow<float> + i % 2 * 8];
    return a;
  }
  __device__ __forceinline__ static A left_rest(const Rows64&, int) { return {}; }
  __device__ __forceinline__ static void right_transposed(B (&b)[1], const float* rows, int stride) {
    const int lane = threadIdx.x % 32;
    const float* at = rows + lane / 4 * stride + lane % 4 * 2;
    b[0].word[0] = at[0];
    b[0].word[1] = at[1];
  }
};

// c += a b for the right operand's rows (kTransposed: columns) [k, k + kDepth) of a tile, columns
// [first_column, columns) of c.
template <bool kTransposed, class Element, int kColumns>
__device__ __forceinline__ void multiply_step(Accumulator<1, kColumns>& c,
                                              const typename TileFragments<Element>::A& a,
                                              const Element* tile, int k, int columns = kColumns,
                                              int first_column = 0) {
  using F = TileFragments<Element>;
  CUTE_UNROLL
  for (int n = 0; n < kColumns; n += F::kColumns) {
    if (n < first_column) continue;
    if (n >= columns) break;
    typename F::B b[F::kColumns / 8];
    if constexpr (kTransposed) {
      F::right_transposed(b, tile + n * kTileRow<Element> + k, kTileRow<Element>);
    } else {
      F::right(b, tile + k * kTileRow<Element> + n, kTileRow<Element>);
    }
    CUTE_UNROLL
    for (int j = 0; j < F::kColumns / 8; ++j) F::multiply(c.tile[0][n / 8 + j], a, b[j]);
  }
}

enum class Part { kHigh, kLow, kBoth };  // of a left operand that is rounded to 16 bit

// c += left tile, or left tile^T; left is an accumulator.
template <bool kTransposed, Part kPart = Part::kHigh, class Element>
__device__ __forceinline__ void multiply_tile(Rows64& c, const Rows64& left, const Element* tile) {
  using F = TileFragments<Element>;
  CUTE_UNROLL
  for (int k = 0; k < kTile; k += F::kDepth) {
    if constexpr (kPart != Part::kLow) multiply_step<kTransposed>(c, F::left(left, 0, k), tile, k);
    if constexpr (kPart != Part::kHigh && !kIsWide<Element>)
      multiply_step<kTransposed>(c, F::left_rest(left, k), tile, k);
  }
}

// The same with the left operand in shared memory: rows (kLeftTransposed: columns) [row, row + 16) of a tile.
// Only the first `columns` of c.
template <bool kLeftTransposed, bool kTransposed, class Element>
__device__ __forceinline__ void multiply_tiles(Rows64& c, const Element* left, int row, const Element* tile,
                                               int columns = kTile) {
  using F = TileFragments<Element>;
#pragma unroll 2
  for (int k = 0; k < kTile; k += F::kDepth) {
    if constexpr (kLeftTransposed) {
      multiply_step<kTransposed>(c, F::left_transposed(left + k * kTileRow<Element> + row), tile, k, columns);
    } else {
      multiply_step<kTransposed>(c, F::left(left + row * kTileRow<Element> + k, kTileRow<Element>), tile, k,
                                 columns);
    }
  }
}

// f(row below 16, column, element) over what this lane holds.
template <class F>
__device__ __forceinline__ void for_each(Rows64& c, const F& f) {
  const int lane = threadIdx.x % 32;
  CUTE_UNROLL
  for (int n = 0; n < 8; ++n) {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) f(lane / 4 + i / 2 * 8, 8 * n + lane % 4 * 2 + i % 2, c.tile[0][n][i]);
  }
}

// 8 x 8 elements of 16 bit of which a lane holds two neighbors in row lane / 4, turned.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// x rounded, or what that lost, rounded.
template <bool kLow, class Element>
__device__ __forceinline__ Element half_of(float x) {
  const Element high(x);
  return kLow ? Element(x - static_cast<float>(high)) : high;
}

// ---- Tiles in memory ----

template <class Element>
struct alignas(16) Piece {  // what one access moves
  static constexpr int kCount = 16 / sizeof(Element);
  Element at[kCount];
};

// Starts copying a tile from scratch.
template <class Element>
__device__ __forceinline__ void copy_tile(Element* shared, const Element* tile, int num_threads) {
  constexpr int kPiece = Piece<Element>::kCount, kPieces = kTile / kPiece;  // num_threads is a multiple
  const int thread = static_cast<int>(threadIdx.x);
  Element* to = shared + thread / kPieces * kTileRow<Element> + thread % kPieces * kPiece;
  const Element* from = tile + thread * kPiece;
  const int to_step = num_threads / kPieces * kTileRow<Element>, from_step = num_threads * kPiece;
#pragma unroll 4
  for (int i = kTile * kPieces / num_threads; i > 0; --i, to += to_step, from += from_step)
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(*reinterpret_cast<const cute::uint128_t*>(from),
                                                           *reinterpret_cast<cute::uint128_t*>(to));
}

// Rows of a token tensor, any strides; zeros past the rows and past the features.
template <int kToRow, class Element>
__device__ __forceinline__ void copy_rows(Element* to, const Element* first, int64_t stride, int rows,
                                          int features) {
  constexpr int kPiece = Piece<Element>::kCount, kPieces = kTile / kPiece, kEach = 4;
  constexpr int kRowStep = kTileThreads / kPieces;
  const bool whole =
      reinterpret_cast<uintptr_t>(first) % 16 == 0 && stride % kPiece == 0 && features >= kTile;
  const int column = static_cast<int>(threadIdx.x) % kPieces * kPiece;
  for (int row = static_cast<int>(threadIdx.x) / kPieces; row < kTile; row += kEach * kRowStep) {
    Piece<Element> piece[kEach];
    if (whole) {  // without branches, so that the loads overlap
      const Element* from = first + column;
      CUTE_UNROLL
      for (int i = 0; i < kEach; ++i) {
        const int at = row + i * kRowStep;
        if (rows > 0) piece[i] = *reinterpret_cast<const Piece<Element>*>(from + min(at, rows - 1) * stride);
      }
      CUTE_UNROLL
      for (int i = 0; i < kEach; ++i) {
        if (row + i * kRowStep < rows) continue;
        CUTE_UNROLL
        for (int c = 0; c < kPiece; ++c) piece[i].at[c] = Element(0.f);
      }
    } else {
      CUTE_UNROLL
      for (int i = 0; i < kEach; ++i) {
        const int at = row + i * kRowStep;
        CUTE_UNROLL
        for (int c = 0; c < kPiece; ++c)
          piece[i].at[c] =
              at < rows && column + c < features ? first[at * stride + column + c] : Element(0.f);
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < kEach; ++i)
      *reinterpret_cast<Piece<Element>*>(to + (row + i * kRowStep) * kToRow + column) = piece[i];
  }
}

template <class Element>
__device__ __forceinline__ void load_rows(Element* shared, const Element* first, int64_t stride, int rows,
                                          int features) {
  copy_rows<kTileRow<Element>>(shared, first, stride, rows, features);
}

// ---- Chunks ----

struct ChunkPlace {
  int64_t b, t;  // first token
  int rows;      // 0: no chunk here
  int64_t sequence;
};

__device__ __forceinline__ ChunkPlace find_chunk(const InputsSm80& in, int64_t slot) {
  if (in.cu_seqlens == nullptr) {
    const int64_t per_sequence = (in.tokens + kChunk - 1) / kChunk;
    const int64_t n = slot / per_sequence, t = slot % per_sequence * kChunk;
    return {n, t, static_cast<int>(min(kChunk, in.tokens - t)), n};
  }
  int64_t low = 0, high = in.sequences;  // the last sequence whose first slot is at most `slot`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (in.cu_seqlens[middle] / kChunk + middle <= slot ? low : high) = middle;
  }
  const int64_t begin = in.cu_seqlens[low];
  const int64_t t = begin + (slot - begin / kChunk - low) * kChunk;
  const int64_t end = min(in.cu_seqlens[low + 1], in.tokens);
  return {0, t, static_cast<int>(max(static_cast<int64_t>(0), min(kChunk, end - t))), low};
}

template <class Element, class T>
__device__ __forceinline__ const Element* row_at(const Rows<T>& rows, int64_t b, int64_t t, int64_t h) {
  return static_cast<const Element*>(rows.data) + b * rows.batch + t * rows.token + h * rows.head;
}

// ---- Gates ----

constexpr float kLog2eSm80 = 1.44269504088896341f;

__device__ __forceinline__ float sigmoid_of(float x) { return 1.f / (1.f + expf(-x)); }

// The log decay in units of log2, at least kLowestGate; NaN stays NaN.
__device__ __forceinline__ float gate_of(const InputsSm80& in, float raw, int64_t hv, int64_t channel) {
  float g = raw;
  if (in.gate != Gate::kLog) {
    const float rate = in.A_log != nullptr ? expf(in.A_log[hv]) : 1.f;
    const float x = raw + (in.dt_bias != nullptr ? in.dt_bias[hv * in.gate_dim() + channel] : 0.f);
    g = in.gate == Gate::kSoftplus ? -rate * (fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))))
                                   : static_cast<float>(in.gate_bound) * sigmoid_of(rate * x);
  }
  g *= kLog2eSm80;
  return g < kLowestGate ? kLowestGate : g;
}

__device__ __forceinline__ float beta_of(const InputsSm80& in, float raw) {
  if (in.beta_activation == BetaActivation::kNone) return raw;
  return (in.beta_activation == BetaActivation::kSigmoid2 ? 2.f : 1.f) * sigmoid_of(raw);
}

constexpr int kPortableShared = 99 * 1024;  // what CTAs of 8.6, 8.9 and 12.0 have

// Bytes that a CTA can have on the current device.
inline int largest_shared() {
  int device = 0, bytes = kPortableShared;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

}  // namespace nearfield::delta
