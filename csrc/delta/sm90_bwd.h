// The contract of the Hopper kernels of the backward; continues sm90.h. Order: what the
// forward keeps (or prepare and state pass), reverse pass, chunk gradient, finish. Symbols: README.md.
#pragma once

#include "delta/sm90.h"

namespace nearfield::delta {

// Smaller head dims are padded with zeros inside the kernels.
constexpr int64_t kBackwardKeyDim = 128, kMostBackwardValues = 256;

// What the backward starts from, in one piece of memory: kept by the forward, or computed again.
struct KeptSm90 {
  ChunkScratch chunks{};  // all of it but the low halves and N and P apart
  void *states, *v_new;   // see StatePassArgs
  int64_t bytes = 0;

  // Every part has a multiple of 128 bytes.
  KeptSm90(const InputsSm90& in, void* memory) {
    const int64_t count = ChunkSlots(in).total * in.value_heads, image = kImage * 2;
    const int64_t value_images = (in.value_dim + kImageColumns - 1) / kImageColumns;
    const int64_t key_images = kBackwardKeyDim / kImageColumns;
    const auto take = [&](int64_t bytes_of_chunk) {
      void* here = memory == nullptr ? nullptr : static_cast<char*>(memory) + bytes;
      bytes += count * bytes_of_chunk;
      return here;
    };
    chunks.rows = static_cast<ChunkRows*>(take(sizeof(ChunkRows)));
    chunks.NP = take(image);
    if (in.channel_gate) {
      chunks.Kh = take(key_images * image), chunks.Kt = take(key_images * image);
      chunks.Qh = take(key_images * image);
      chunks.decay = static_cast<float*>(take(kBackwardKeyDim * 4));
      chunks.G = static_cast<float*>(take(kChunk * kBackwardKeyDim * 4));
    }
    states = take(value_images * key_images * image), v_new = take(value_images * image);
  }
};

struct ReversePassArgs {
  InputsSm90 in;
  ChunkScratch scratch;
  Rows<void> d_o;        // [B, T, HV, V], readable like v
  const float* d_final;  // like initial_state, or null: zero
  void* d_states;        // like StatePassArgs.states: gradient of the state after the chunk
  void* y;               // like StatePassArgs.v_new: Y, where dV does not serve (chunk_sm90.cuh)
  void* dv;              // [B, T, HV, V] contiguous: the result
  float* d_initial;      // like initial_state, or null
  int* announced;        // [slot][value head][V / 64], zeros: set to 1 when d_states, y and dv are in memory
};

// The walk over the chunks of a sequence from the last to the first. One CTA per (sequence, value head, 64
// values).
template <class Tag, int kKeyDim, bool kChannelGate>
struct reverse_pass_sm90 {
  static int run(const ReversePassArgs& args, void* stream);
};

// The chunk gradient is a sum over values. Blocks of them are treated as value heads of their own, and summed
// in the end.
constexpr int64_t kValueBlock = 128;
constexpr int64_t value_blocks(const InputsSm90& in) {
  return (in.value_dim + kValueBlock - 1) / kValueBlock;
}

struct ChunkGradientArgs {
  InputsSm90 in;
  const ChunkRows* rows;
  const float* G;                             // ChunkScratch.G: with a gate per channel
  Rows<void> d_o, dv;                         // [B, T, HV, V]
  const void *y, *v_new, *states, *d_states;  // as the walks leave them
  // The launch may begin when the last CTA of the reverse pass has; a chunk waits for what this announces
  // (see ReversePassArgs). states and v_new are there already.
  const int* announced;
  uint32_t early;  // so many of 16 pairs of chunks are taken while the walk is on
  // One value head per key head and one block: dq and dk [B, T, H, K] contiguous. Else *_heads: [B, T, HV,
  // blocks, K] contiguous, gradients of what is normalised, times the factor of the norm.
  void *dq, *dk;
  float *dq_heads, *dk_heads;
  float* dbeta;  // [B, T, HV, blocks]
  float* dg;     // [B, T, HV, blocks] or [B, T, HV, blocks, K], or null
  // Sums over some tokens (and channels) of a chunk for dA_log and ddt_bias, [slot][rate_parts_of or
  // bias_parts_of the gate][block][value head] and, with a gate per channel, [.., value head, K] for the
  // latter; or both null.
  float *rate_parts, *bias_parts;
};
constexpr int64_t rate_parts_of(bool channel_gate) { return channel_gate ? 16 : 1; }
constexpr int64_t bias_parts_of(bool channel_gate) { return channel_gate ? 4 : 1; }

// All gradients of a chunk but dv, for all chunks at once. A gate per head, or none.
template <class Tag, int kKeyDim>
struct chunk_gradient_sm90 {
  static int run(const ChunkGradientArgs& args, void* stream);
};
// The same for a gate per channel; reads scratch.G.
template <class Tag, int kKeyDim>
struct chunk_gradient_channel_sm90 {
  static int run(const ChunkGradientArgs& args, void* stream);
};

struct FinishGradientArgs {
  InputsSm90 in;
  const float *dbeta_blocks, *dg_blocks;  // as above; null: dbeta or dg is finished
  float *dbeta, *dg;
  const float *dq_heads, *dk_heads;  // as above; null: dq and dk are finished
  void *dq, *dk;
  const float *rate_parts, *bias_parts;  // as above, or null
  float *dA_log, *ddt_bias;              // [HV]; [HV] or [HV, K]; or null
};

// The sums over the value heads of a group, the blocks of values and the tokens, in a fixed order.
template <class Tag>
struct finish_gradient_sm90 {
  static int run(const FinishGradientArgs& args, void* stream);
};

}  // namespace nearfield::delta
