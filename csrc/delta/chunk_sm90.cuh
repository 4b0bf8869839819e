// What the Hopper kernels of the family share: element types, images in shared memory, the tensor maps of
// token tensors, the tokens behind a slot, gates.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>

#include "delta/sm90.h"
#include "nearfield/dependent_launch.cuh"
#include "nearfield/mma.cuh"
#include "nearfield/pairs.cuh"
#include "nearfield/pipeline.cuh"
#include "nearfield/shared_memory.cuh"
#include "nearfield/tma.h"

namespace nearfield::delta {
using namespace cute;

template <class Tag>
using element_t = std::conditional_t<std::is_same_v<Tag, bf16>, cutlass::bfloat16_t, cutlass::half_t>;

constexpr int kRows = static_cast<int>(kChunk);
constexpr int kImageBytes = static_cast<int>(kImage) * 2;
constexpr float kLog2e = 1.44269504088896341f;

// With a gate per head the states of odd chunks of a sequence are left to the backward, which has that of the
// chunk before, unless that one is hard: then V' are large and S is their small sum. Where a state is
// missing, its first two elements are these bits, a NaN.
constexpr uint32_t kNoState = 0xffffffffu;

// ---- Shared memory ----

extern __shared__ __align__(1024) char dynamic_shared[];

template <class Storage>
__device__ __forceinline__ Storage& shared_storage() {
  return *reinterpret_cast<Storage*>(dynamic_shared);
}

// The layouts in which an image [features / 64][64][64] is an operand: rows as M or N and features
// contracted, or features as N and rows contracted.
template <class Element, int kFeatures>
using LayoutByRow =
    decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, cute::Shape<Int<kRows>, Int<kFeatures>>{}));
template <class Element, int kFeatures>
using LayoutByFeature = decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{},
                                               cute::Shape<Int<kFeatures>, Int<kRows>>{}, Step<_2, _1>{}));

// Eight elements of a row of an image of 64 columns.
template <class Element>
__device__ __forceinline__ Element* image_piece(Element* image, int row, int piece) {
  return image + row * kImageColumns + (piece ^ (row & 7)) * 8;
}
// Where this lane points in a load or store of four 8 x 8 matrices; matrix m covers rows `row` + 8 (m / 2)
// and piece `piece` + m % 2, or, with kRowsFirst, rows `row` + 8 (m % 2) and piece `piece` + m / 2.
template <bool kRowsFirst, class Element>
__device__ __forceinline__ uint128_t& matrices_at(Element* image, int row, int piece) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  const int down = kRowsFirst ? matrix % 2 : matrix / 2, right = kRowsFirst ? matrix / 2 : matrix % 2;
  return *reinterpret_cast<uint128_t*>(image_piece(image, row + 8 * down + lane % 8, piece + right));
}

// A warp's 16 columns of a [64 rows of the image] tile whose transpose it holds as a (64, 64) accumulator:
// word 2 j + i of `words` has columns 8 i + lane / 4 and rows 8 j + 2 (lane % 4) and the next.
template <class Element>
__device__ __forceinline__ void store_transposed(Element* image, int warp, const uint32_t* words) {
  CUTE_UNROLL
  for (int j = 0; j < 8; j += 2) {
    SM90_U16x8_STSM_T::copy(words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3],
                            matrices_at<false>(image, 8 * j, 2 * warp));
  }
}
template <class Element>
__device__ __forceinline__ void load_transposed(Element* image, int warp, uint32_t* words) {
  CUTE_UNROLL
  for (int j = 0; j < 8; j += 2) {
    SM75_U16x8_LDSM_T::copy(matrices_at<false>(image, 8 * j, 2 * warp), words[2 * j], words[2 * j + 1],
                            words[2 * j + 2], words[2 * j + 3]);
  }
}
// A warp's 16 rows of pieces of an image, in accumulator order: word 2 j + i has rows 8 i + lane / 4, columns
// 8 j + 2 (lane % 4) behind the first piece.
template <int kPieces = 8, class Element>
__device__ __forceinline__ void store_rows(Element* image, int warp, const uint32_t* words,
                                           int first_piece = 0) {
  CUTE_UNROLL
  for (int j = 0; j < kPieces; j += 2) {
    SM90_U32x4_STSM_N::copy(words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3],
                            matrices_at<true>(image, 16 * warp, first_piece + j));
  }
}

__device__ __forceinline__ void copy_in(void* shared, const void* global, int bytes, uint64_t* barrier) {
  SM90_BULK_COPY_G2S::copy(global, barrier, shared, bytes);
}
// What the L2 cache should give up first: EVICT_FIRST is for what nobody needs again soon.
using CacheHint = TMA::CacheHintSm90;
constexpr CacheHint kStays = CacheHint::EVICT_NORMAL, kLeavesFirst = CacheHint::EVICT_FIRST;

__device__ __forceinline__ void copy_out(void* global, const void* shared, int bytes,
                                         CacheHint hint = kStays) {
  if (hint == kStays) {
    SM90_BULK_COPY_S2G::copy(shared, global, bytes);
  } else {
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(global),
        "r"(cute::cast_smem_ptr_to_uint(shared)), "r"(bytes), "l"(static_cast<uint64_t>(hint))
        : "memory");
  }
}

// ---- Token tensors ----

// [B, T, heads, D] as (feature, token, head, batch); one copy brings 64 features of 64 tokens as an image.
// What lies outside reads as zero.
inline cudaError_t encode_tokens(CUtensorMap* map, const Rows<void>& t, bool is_bf16, int64_t features,
                                 int64_t tokens, int64_t heads, int64_t batch) {
  TmaTensor d{};
  d.data = t.data;
  d.type = is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  d.element_bytes = 2;
  d.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  d.lay_out({features, tokens, heads, batch, 1}, {1, t.token, t.head, t.batch, 0},
            {kImageColumns, kImageRows, 1, 1, 1});
  return encode_tma(map, d);
}

struct TokenMaps {
  CUtensorMap q, k, v;
};

template <class Args>
cudaError_t encode_inputs(TokenMaps* maps, const Args& in, bool is_bf16) {
  cudaError_t e = encode_tokens(&maps->q, in.q, is_bf16, in.key_dim, in.tokens, in.heads, in.batch);
  if (e == cudaSuccess) e = encode_tokens(&maps->k, in.k, is_bf16, in.key_dim, in.tokens, in.heads, in.batch);
  if (e == cudaSuccess)
    e = encode_tokens(&maps->v, in.v, is_bf16, in.value_dim, in.tokens, in.value_heads, in.batch);
  return e;
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

template <int kFeatures, class Element>
__device__ __forceinline__ void load_tokens(const CUtensorMap& map, uint64_t* barrier, Element* images,
                                            int first_feature, int64_t token, int head, int64_t batch,
                                            CacheHint hint = kStays) {
  CUTE_UNROLL
  for (int c = 0; c < kFeatures / kImageColumns; ++c) {
    SM90_TMA_LOAD_5D::copy(&map, barrier, static_cast<uint64_t>(hint), images + c * kImage,
                           first_feature + c * kImageColumns, static_cast<int>(token), head,
                           static_cast<int>(batch), 0);
  }
}

// Two threads of a warpgroup per row of kFeatures: 1 / sqrt(sum x^2 + eps).
template <int kFeatures, class Element>
__device__ __forceinline__ float inverse_norm(Element* images) {
  const int row = threadIdx.x % 128 / 2, half = threadIdx.x % 2;
  float sum = 0.f;
  CUTE_UNROLL
  for (int p = 0; p < kFeatures / 16; ++p) {
    const int piece = 2 * p + half;
    const uint4 words =
        *reinterpret_cast<const uint4*>(image_piece(images + piece / 8 * kImage, row, piece % 8));
    for (const uint32_t word : {words.x, words.y, words.z, words.w}) {
      const float2 x = unpack<Element>(word);
      sum += x.x * x.x + x.y * x.y;
    }
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  return rsqrtf(sum + static_cast<float>(kNormEps));
}

// ---- Chunks of sequences ----

struct Sequence {
  int64_t batch, begin, length, first_slot;
  int first_chunk = 0;  // of a part of a sequence: its place in the whole
  __device__ __forceinline__ int chunks() const { return static_cast<int>((length + kRows - 1) / kRows); }
};

// Bounds outside the token axis are cut off: the host has not seen them.
__device__ __forceinline__ Sequence sequence_of(const InputsSm90& in, int64_t n) {
  if (in.cu_seqlens == nullptr) {
    return {n, 0, in.tokens, n * ((in.tokens + kRows - 1) / kRows)};
  }
  const auto cut = [&](int64_t x, int64_t low) { return x < low ? low : (x > in.tokens ? in.tokens : x); };
  const int64_t begin = cut(in.cu_seqlens[n], 0), end = cut(in.cu_seqlens[n + 1], begin);
  return {0, begin, end - begin, begin / kRows + n};
}

// Where arrays [slot][value head] have a chunk.
__device__ __forceinline__ int64_t chunk_index(const InputsSm90& in, int64_t slot, int64_t head) {
  return slot * in.value_heads + head;
}
__device__ __forceinline__ int64_t chunk_index(const ForwardInputsSm90& in, int64_t slot, int64_t head) {
  return slot * in.slot_heads + head;
}

// The sequence whose slots, each of so many tokens, contain `slot`; its tokens there may lie beyond the end.
__device__ __forceinline__ int64_t sequence_at_slot(const InputsSm90& in, int64_t slot,
                                                    int64_t tokens = kRows) {
  if (in.cu_seqlens == nullptr) return slot / ((in.tokens + tokens - 1) / tokens);
  int64_t low = 0, high = in.sequences;  // the answer is in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (in.cu_seqlens[middle] / tokens + middle <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Slot of the first span of so many tokens of sequence n.
__device__ __forceinline__ int64_t first_span(const InputsSm90& in, int64_t n, const Sequence& sequence,
                                              int64_t tokens) {
  return in.cu_seqlens == nullptr ? n * ((in.tokens + tokens - 1) / tokens) : sequence.begin / tokens + n;
}

// What a CTA walks over: a sequence, or a span of one.
struct Part {
  int64_t n;          // sequence
  bool first, last;   // of its parts
  Sequence sequence;  // cut to the part

  // False: the slot has no part.
  __device__ __forceinline__ bool find(const InputsSm90& in, int64_t slot, int64_t span_tokens) {
    if (span_tokens == 0) {
      n = slot, first = last = true, sequence = sequence_of(in, n);
      return true;
    }
    n = sequence_at_slot(in, slot, span_tokens);
    sequence = sequence_of(in, n);
    const int64_t skipped = (slot - first_span(in, n, sequence, span_tokens)) * span_tokens;
    if (skipped > 0 && skipped >= sequence.length) return false;
    first = skipped == 0, last = skipped + span_tokens >= sequence.length;
    sequence.begin += skipped;
    sequence.first_chunk = static_cast<int>(skipped / kRows), sequence.first_slot += sequence.first_chunk;
    sequence.length = min(span_tokens, sequence.length - skipped);
    return true;
  }
};

// ---- Y of the backward ----

// The gradient multiplies Y, or with a gate per head dV = beta Y, which leaves anyway and in bfloat16, with
// the exponents of float32, has as many digits: Y, too, stays in memory only where a |beta| of the chunk is
// below kLeastBetaOfDv.
template <class Tag, bool kChannelGate>
constexpr bool kAlwaysY = kChannelGate || !std::is_same_v<Tag, bf16>;
constexpr float kLeastBetaOfDv = 0x1p-30f;

// A warp with all write strengths of a chunk: the least |beta| that a lane has.
__device__ __forceinline__ bool needs_y(float least) {
  return __any_sync(0xffffffffu, least < kLeastBetaOfDv);
}

// ---- Gates and write strengths ----

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float activated_beta(const InputsSm90& in, float b) {
  if (in.beta_activation == BetaActivation::kNone) return b;
  return (in.beta_activation == BetaActivation::kSigmoid2 ? 2.f : 1.f) * sigmoid(b);
}

__device__ __forceinline__ float in_log2(float g) {
  g *= kLog2e;
  return g < kLowestGate ? kLowestGate : g;  // NaN stays NaN
}

// log2 of the decay. `a` is the raw gate, rate exp(A_log) or 1; bias is added by the caller.
__device__ __forceinline__ float log2_decay(const InputsSm90& in, float a, float rate) {
  float g = a;
  if (in.gate == Gate::kSoftplus) g = -rate * (a > 20.f ? a : log1pf(expf(a)));
  if (in.gate == Gate::kBounded) g = static_cast<float>(in.gate_bound) * sigmoid(rate * a);
  return in_log2(g);
}

}  // namespace nearfield::delta
