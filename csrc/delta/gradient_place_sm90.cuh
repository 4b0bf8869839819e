// Which chunk, value head and block of values a CTA of the chunk gradients takes, and in which order.
#pragma once

#include <cutlass/fast_math.h>

#include <algorithm>

#include "delta/chunk_sm90.cuh"
#include "delta/sm90_bwd.h"

namespace nearfield::delta {

// Below this |beta|, V'_i / beta_i has lost digits of V'_i (in fp16, to its smallest numbers).
constexpr float kLeastDivisor = 1.f / 64;

// What divides the grid, as multipliers: every warp of a CTA divides before it can ask for anything.
struct GradientGrid {
  cutlass::FastDivmod blocks, value_heads, sequences, group, early, late;
  int tiles, slots;  // of a value head; of a sequence, or packed of all

  GradientGrid(const InputsSm90& in, uint32_t early_of_16) {
    const auto divide_by = [](int64_t n) {
      return cutlass::FastDivmod(static_cast<int>(std::max<int64_t>(n, 1)));
    };
    const bool packed = in.cu_seqlens != nullptr;
    blocks = divide_by(value_blocks(in)), value_heads = divide_by(in.value_heads);
    sequences = divide_by(packed ? 1 : in.sequences), group = divide_by(in.value_heads / in.heads);
    early = divide_by(early_of_16), late = divide_by(16 - early_of_16);
    tiles = static_cast<int>((in.value_dim + kImageColumns - 1) / kImageColumns);
    slots = static_cast<int>(ChunkSlots(in).total / (packed ? 1 : in.sequences));
  }
};

// The walk goes from the last chunk of a sequence to the first, and announces chunks faster than the SMs that
// it leaves free can take them. So CTAs first take `early` of every 16 pairs, evenly spread and close behind
// the walk, while the L2 cache still has what it read and wrote; then the others, those it wrote last first.
// An odd chunk and the even one before it need the same S, and K and V' of the latter: they are taken
// together. Returns how many of the chunks of a sequence the walk has done before the `which`-th that is
// taken.
__device__ __forceinline__ int done_before(int which, int early, const GradientGrid& grid) {
  const int alone = grid.slots % 2;  // the last chunk, which comes first
  if (which < alone) return 0;
  const int pairs = grid.slots / 2, pair = (which - alone) / 2, second = (which - alone) % 2;
  const int early_pairs = pairs * early / 16;
  int q, r;
  if (pair < early_pairs) {
    grid.early(q, r, pair);
    const int done = q * 16 + grid.early.div((r + 1) * 16 + early - 1) - 1;
    return alone + 2 * done + second;
  }
  grid.late(q, r, pairs - 1 - pair);
  const int done = q * 16 + grid.late.div(r * 16);
  return alone + 2 * done + 1 - second;
}

// A CTA has a slot, a value head and a block of its values.
struct GradientPlace {
  Sequence sequence;
  int64_t slot, head, head_k, block, blocks;
  int64_t token, chunk;    // the first token; [slot][value head]
  int64_t first_row, row;  // in [B, T, HV, blocks]: the first token, and from one to the next
  int64_t first_image;     // of this block, among images of values; with keys, one per 64 of them
  int valid, value_images;
  bool inside;  // else there is no such chunk
  bool odd;     // of its sequence: its entering state may have to be made from that of the chunk before

  // In 32 bits, as far as the grid is: few instructions that wait for each other.
  __device__ __forceinline__ void find(const ChunkGradientArgs& args, const GradientGrid& grid) {
    const InputsSm90& in = args.in;
    int index, b, h, rest, n, which;
    grid.blocks(index, b, static_cast<int>(blockIdx.x));
    grid.value_heads(rest, h, index);
    grid.sequences(which, n, rest);
    const int of_sequence = grid.slots - 1 - done_before(which, static_cast<int>(args.early), grid);
    slot = n * grid.slots + of_sequence;
    sequence = in.cu_seqlens != nullptr ? sequence_of(in, sequence_at_slot(in, slot))
                                        : Sequence{n, 0, in.tokens, n * grid.slots};
    const int ordinal = static_cast<int>(slot - sequence.first_slot);
    const int64_t first = static_cast<int64_t>(ordinal) * kRows;
    block = b, blocks = grid.blocks.divisor;
    head = h, head_k = grid.group.div(h);
    chunk = static_cast<int>(slot) * grid.value_heads.divisor + h;
    token = sequence.begin + first;
    row = grid.value_heads.divisor * grid.blocks.divisor;
    first_row = (sequence.batch * in.tokens + token) * row + h * grid.blocks.divisor + b;
    value_images = min(grid.tiles - 2 * b, 2);
    first_image = static_cast<int64_t>(static_cast<int>(chunk)) * grid.tiles + 2 * b;
    valid = static_cast<int>(min(static_cast<int64_t>(kRows), sequence.length - first));
    inside = first >= 0 && first < sequence.length;
    odd = ordinal % 2 != 0;
  }
  // The first elements of its entering state, of which kNoState says that it is missing.
  __device__ __forceinline__ uint32_t first_of_state(const ChunkGradientArgs& args) const {
    return *reinterpret_cast<const uint32_t*>(static_cast<const char*>(args.states) +
                                              2 * first_image * kImageBytes);
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
