// Which chunk, value head and block of values a CTA of the chunk gradients takes, and in which order.
#pragma once

#include "delta/chunk_sm90.cuh"
#include "delta/sm90_bwd.h"

namespace nearfield::delta {

// Below this |beta|, V'_i / beta_i has lost digits of V'_i (in fp16, to its smallest numbers).
constexpr float kLeastDivisor = 1.f / 64;

// The walk goes from the last chunk of a sequence to the first, and announces chunks faster than the SMs that
// it leaves free can take them. So CTAs first take `early` of every 16, evenly spread and close behind the
// walk, while the L2 cache still has what it wrote; then the others, those it wrote last first. Returns how
// many of the n chunks the walk has done before the `which`-th that is taken.
__device__ __forceinline__ uint32_t done_before(uint32_t which, uint32_t early, uint32_t n) {
  const uint32_t groups = n / 16, late = 16 - early;
  if (which < groups * early) return which / early * 16 + ((which % early + 1) * 16 + early - 1) / early - 1;
  const uint32_t left = n - 1 - which;
  if (left < groups * late) return left / late * 16 + left % late * 16 / late;
  return left + groups * early;
}

// A CTA has a slot, a value head and a block of its values.
struct GradientPlace {
  Sequence sequence;
  int64_t slot, head, head_k, block, blocks;
  int64_t token, chunk;    // the first token; [slot][value head]
  int64_t first_row, row;  // in [B, T, HV, blocks]: the first token, and from one to the next
  int64_t first_image;     // of this block, among images of values; with keys, one per 64 of them
  int valid, value_images;
  bool inside;       // else there is no such chunk
  bool from_before;  // its entering state follows from that of the chunk before

  __device__ __forceinline__ void find(const ChunkGradientArgs& args) {
    const InputsSm90& in = args.in;
    const bool packed = in.cu_seqlens != nullptr;
    const int64_t tiles = (in.value_dim + kImageColumns - 1) / kImageColumns;
    const auto value_heads = static_cast<uint32_t>(in.value_heads);
    const uint32_t block_count = static_cast<uint32_t>(tiles + 1) / 2, index = blockIdx.x / block_count;
    const uint32_t h = index % value_heads, rest = index / value_heads;
    const uint32_t sequences = packed ? 1u : static_cast<uint32_t>(in.sequences), n = rest % sequences;
    const uint32_t slots =
        gridDim.x / (block_count * value_heads * sequences);  // of a sequence, or packed of all
    blocks = block_count;
    block = blockIdx.x % block_count;
    head = h;
    head_k = h / (value_heads / static_cast<uint32_t>(in.heads));
    slot = (n + 1) * slots - 1 - done_before(rest / sequences, args.early, slots);
    chunk = slot * in.value_heads + head;
    sequence = sequence_of(in, packed ? sequence_at_slot(in, slot) : n);
    const int64_t first = (slot - sequence.first_slot) * kRows;
    token = sequence.begin + first;
    row = in.value_heads * blocks;
    first_row = (sequence.batch * in.tokens + token) * row + head * blocks + block;
    value_images = static_cast<int>(min(tiles - 2 * block, static_cast<int64_t>(2)));
    first_image = chunk * tiles + 2 * block;
    valid = static_cast<int>(min(static_cast<int64_t>(kRows), sequence.length - first));
    inside = first >= 0 && first < sequence.length;
    from_before = false;
  }
  // Without its entering state; see kNoState.
  __device__ __forceinline__ bool lacks_state(const ChunkGradientArgs& args) const {
    if ((slot - sequence.first_slot) % 2 == 0) return false;
    return *reinterpret_cast<const uint32_t*>(static_cast<const char*>(args.states) +
                                              2 * first_image * kImageBytes) == kNoState;
  }
  // first_image of the chunk before.
  __device__ __forceinline__ int64_t image_before(const InputsSm90& in) const {
    const int64_t tiles = (in.value_dim + kImageColumns - 1) / kImageColumns;
    return first_image - in.value_heads * tiles;
  }
  // Index of a token of the chunk in [B, T, HV].
  __device__ __forceinline__ int64_t token_head(const InputsSm90& in, int i) const {
    return (sequence.batch * in.tokens + token + i) * in.value_heads + head;
  }
  __device__ __forceinline__ int64_t part(const InputsSm90& in, int count, int which) const {
    return ((slot * count + which) * blocks + block) * in.value_heads + head;
  }
  __device__ __forceinline__ int values(const InputsSm90& in) const {
    return static_cast<int>(min(in.value_dim - block * kValueBlock, kValueBlock));
  }
  // V of a token, in rows whose dbeta needs it.
  template <class Element>
  __device__ __forceinline__ const Element* value_row(const InputsSm90& in, int i, float beta) const {
    if (i >= valid || fabsf(beta) >= kLeastDivisor) return nullptr;
    return static_cast<const Element*>(in.v.data) + sequence.batch * in.v.batch + (token + i) * in.v.token +
           head * in.v.head + block * kValueBlock;
  }
};

}  // namespace nearfield::delta
