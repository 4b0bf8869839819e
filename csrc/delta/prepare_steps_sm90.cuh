// What both kernels that prepare chunks share: which chunk, write strengths, N = T - I from A.
#pragma once

#include "delta/chunk_sm90.cuh"
#include "nearfield/triangular.cuh"

namespace nearfield::delta {

// ---- Which chunk ----

struct ChunkPlace {
  int64_t slot, batch, token, head, index;  // the first token; [slot][value head]
  int head_k, valid;

  // False: the slot has no chunk.
  __device__ __forceinline__ bool find(const ForwardInputsSm90& in, int64_t at, int64_t value_head) {
    slot = at, head = value_head;
    // Slots and heads fit 32 bits, whose division is short.
    const auto divided = [](int64_t a, int64_t b) {
      return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    };
    const Sequence sequence =
        sequence_of(in, in.cu_seqlens == nullptr ? divided(slot, (in.tokens + kRows - 1) / kRows)
                                                 : sequence_at_slot(in, slot));
    const int64_t first = (slot - sequence.first_slot) * kRows;
    batch = sequence.batch;
    token = sequence.begin + first;
    index = chunk_index(in, slot, head);
    head_k = static_cast<int>(divided(head, divided(in.value_heads, in.heads)));
    valid = static_cast<int>(min(static_cast<int64_t>(kRows), sequence.length - first));
    return first >= 0 && first < sequence.length;
  }
  // Chunk number `at` in the order in which walks need them: chunk after chunk, of all sequences and heads.
  // Not packed. False: none.
  __device__ __forceinline__ bool find_for_walks(const InputsSm90& in, uint32_t at) {
    const auto heads = static_cast<uint32_t>(in.value_heads),
               rows = static_cast<uint32_t>(in.sequences) * heads,
               chunks = static_cast<uint32_t>((in.tokens + kRows - 1) / kRows);
    const uint32_t chunk = at / rows, row = at % rows;
    if (chunk >= chunks) return false;
    set(in, chunk, row / heads, row % heads);
    return true;
  }
  // Not packed. Divides only where value heads share a key head: a CTA that prepares one chunk waits for it.
  __device__ __forceinline__ void set(const InputsSm90& in, uint32_t chunk, uint32_t sequence,
                                      uint32_t value_head) {
    const auto heads = static_cast<uint32_t>(in.value_heads), key_heads = static_cast<uint32_t>(in.heads),
               chunks = static_cast<uint32_t>((in.tokens + kRows - 1) / kRows);
    slot = sequence * chunks + chunk, head = value_head, index = slot * heads + head;
    batch = sequence, token = static_cast<int64_t>(chunk) * kRows;
    head_k = static_cast<int>(heads == key_heads ? value_head : value_head / (heads / key_heads));
    valid = static_cast<int>(min(static_cast<int64_t>(kRows), in.tokens - token));
  }
  // Index of a token of the chunk in [B, T, HV].
  __device__ __forceinline__ int64_t token_head(const ForwardInputsSm90& in, int row) const {
    return (batch * in.tokens + token + row) * in.token_heads + head;
  }
};

// Raises the flag of the chunk at this index in `ready`. By the thread that has sent the results: it waits
// until they are in memory, not only read from shared memory, and with them what other threads have stored.
__device__ __forceinline__ void announce(const PrepareArgs& args, uint32_t index, bool hard) {
  const auto heads = static_cast<uint32_t>(args.in.value_heads);
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  asm volatile(
      "st.release.gpu.global.s32 [%0], %1;" ::"l"(args.ready + index % heads * args.slots + index / heads),
      "r"(hard ? kReadyHard : kReady)
      : "memory");
}

// ---- N = T - I from A ----

// Takes a pair A_ij, A_i(j+1) of the accumulator of warp i / 16; j = 8 n + 2 (lane % 4). Zero on and above
// the diagonal.
__device__ __forceinline__ void put_pair(SplitBlocks& a, TriangularScratch& triangular, int i, int n,
                                         float a0, float a1) {
  const int warp = i / 16, column = 2 * (threadIdx.x % 4);
  if (n / 2 < warp) {
    uint32_t high, low;
    split_pair(a0, a1, high, low);
    const int block = SplitBlocks::index(warp, n / 2), at = block_piece_at(i % 16, n % 2) + column;
    *reinterpret_cast<uint32_t*>(&a.high[block][at]) = high;
    *reinterpret_cast<uint32_t*>(&a.low[block][at]) = low;
  } else if (n / 2 == warp) {
    triangular.diagonal[warp][n % 2 * 8 + column][i % 16] = a0;
    triangular.diagonal[warp][n % 2 * 8 + column + 1][i % 16] = a1;
  }
}

// What goes to a second image beside N: nothing; what rounding lost; N again, but only below its diagonal.
enum class Second { kNothing, kLost, kBelow };

// Column `lane` of a diagonal block of N, which this lane has, to rows and columns 16 block of the image;
// rounded(a, b) of two neighbors. With kBelow only what is below the diagonal.
template <bool kBelow = false, class Element, class Rounded>
__device__ __forceinline__ void put_column(Element* image, int block, const float (&column)[16],
                                           const Rounded& rounded) {
  const int lane = threadIdx.x % 32;
  if (lane >= 16) return;
  CUTE_UNROLL
  for (int i = 0; i < 16; i += 2) {
    const uint32_t pair = rounded(i > lane ? column[i] : 0.f, i + 1 > lane ? column[i + 1] : 0.f);
    const auto put = [&](int row, uint32_t bits) {
      if (kBelow && row <= lane) return;
      Element* at = image_piece(image, 16 * block + row, 2 * block + lane / 8) + lane % 8;
      *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(bits);
    };
    put(i, pair);
    put(i + 1, pair >> 16);
  }
}
// The same, rounded once, and the sum of its squares.
template <bool kBelow = false, class Element>
__device__ __forceinline__ float put_column(Element* image, int block, const float (&column)[16]) {
  put_column<kBelow>(image, block, column, [](float a, float b) { return pack<Element>(a, b); });
  const int lane = threadIdx.x % 32;
  float squares = 0.f;
  if (lane < 16) {
    CUTE_UNROLL
    for (int i = 1; i < 16; ++i) squares += i > lane ? column[i] * column[i] : 0.f;
  }
  return squares;
}

// A warpgroup, once the diagonal blocks are inverted: the others of N, and, unless the image has something
// else there, zeros above. Adds the squares that this thread has.
template <Second kSecond, bool kLeave, bool kZeros = true, class Element>
__device__ __forceinline__ float put_other_blocks(SplitBlocks& a, TriangularScratch& triangular,
                                                  Element* image, Element* second, float squares) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (warp < 3) {
    const auto load_a = [&](int I, int M) {
      SplitFragment f;
      const int block = SplitBlocks::index(I, M);
      const int at = block_piece_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
      SM75_U32x4_LDSM_N::copy(reinterpret_cast<uint128_t&>(a.high[block][at]), f.high[0], f.high[1],
                              f.high[2], f.high[3]);
      SM75_U32x4_LDSM_N::copy(reinterpret_cast<uint128_t&>(a.low[block][at]), f.low[0], f.low[1], f.low[2],
                              f.low[3]);
      return f;
    };
    const auto store = [&](int I, const float (&y)[2][4]) {
      uint32_t words[4], lost[4];
      CUTE_UNROLL
      for (int w = 0; w < 4; ++w) {
        const float y0 = y[w / 2][2 * (w % 2)], y1 = y[w / 2][2 * (w % 2) + 1];
        words[w] = pack<Element>(y0, y1);
        lost[w] = pack_low<Element>(y0, y1, words[w]);
        squares += y0 * y0 + y1 * y1;
      }
      SM90_U16x8_STSM_T::copy(words[0], words[1], words[2], words[3],
                              matrices_at<false>(image, 16 * I, 2 * warp));
      const auto& again = kSecond == Second::kLost ? lost : words;
      if constexpr (kSecond != Second::kNothing) {
        SM90_U16x8_STSM_T::copy(again[0], again[1], again[2], again[3],
                                matrices_at<false>(second, 16 * I, 2 * warp));
      }
    };
    solve_block_column<kLeave>(triangular, warp, load_a, store);
  } else if constexpr (kZeros) {
    for (int x = lane; x < 3 * kRows * 2; x += 32) {  // blocks above the diagonal
      const int row = x / 2 % kRows, piece = 2 * (x / (2 * kRows) + 1) + x % 2;
      if (piece / 2 <= row / 16) continue;
      *reinterpret_cast<uint4*>(image_piece(image, row, piece)) = uint4{0, 0, 0, 0};
      if constexpr (kSecond == Second::kLost)
        *reinterpret_cast<uint4*>(image_piece(second, row, piece)) = uint4{0, 0, 0, 0};
    }
  }
  return squares;
}

// A warpgroup, which `barrier` is for, after put_pair of the whole lower triangle. Returns the sum of the
// squares of N that this thread has. May be called once more, for what rounding lost.
template <Second kSecond, bool kLeave, class Element>
__device__ __forceinline__ float invert(SplitBlocks& a, TriangularScratch& triangular, Element* image,
                                        Element* second, uint32_t barrier = 1) {
  const int warp = threadIdx.x / 32 % 4;
  __syncwarp();
  float column[16];
  invert_diagonal_block(triangular, warp, column);
  const float squares = put_column(image, warp, column);
  if constexpr (kSecond == Second::kBelow)
    put_column<true>(second, warp, column, [](float a, float b) { return pack<Element>(a, b); });
  cutlass::arch::NamedBarrier::sync(128, barrier);
  if constexpr (kSecond == Second::kLost) {
    put_column(second, warp, column,
               [](float a, float b) { return pack_low<Element>(a, b, pack<Element>(a, b)); });
  }
  return put_other_blocks<kSecond, kLeave>(a, triangular, image, second, squares);
}

// The transpose of a warp's 16 rows of P, words in accumulator order, to the blocks of an image on and above
// the diagonal.
template <class Element>
__device__ __forceinline__ void store_upper(Element* image, int warp, const uint32_t (&words)[16]) {
  CUTE_UNROLL
  for (int J = 0; J < 4; ++J) {
    if (J > warp) break;
    SM90_U16x8_STSM_T::copy(words[4 * J], words[4 * J + 1], words[4 * J + 2], words[4 * J + 3],
                            matrices_at<false>(image, 16 * J, 2 * warp));
  }
}

// Warp sums of the squares to shared memory; all of them are there after the next barrier.
__device__ __forceinline__ void put_squares(float (&sums)[4], float squares) {
  CUTE_UNROLL
  for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32 % 4] = squares;
}
__device__ __forceinline__ bool is_hard(const float (&sums)[4], int rows) {
  return sums[0] + sums[1] + sums[2] + sums[3] > kHardSquare * static_cast<float>(rows);
}

// ---- Write strengths ----

// One warp, two tokens per lane.
__device__ __forceinline__ float2 load_betas(const ForwardInputsSm90& in, const ChunkPlace& place) {
  const int lane = threadIdx.x % 32;
  return {lane < place.valid ? in.beta[place.token_head(in, lane)] : 0.f,
          lane + 32 < place.valid ? in.beta[place.token_head(in, lane + 32)] : 0.f};
}
__device__ __forceinline__ void put_betas(const InputsSm90& in, float (&to)[kRows], const ChunkPlace& place,
                                          float2 beta) {
  const int lane = threadIdx.x % 32;
  to[lane] = lane < place.valid ? activated_beta(in, beta.x) : 0.f;
  to[lane + 32] = lane + 32 < place.valid ? activated_beta(in, beta.y) : 0.f;
}

}  // namespace nearfield::delta
