// The contract between the CUDA operators, which know tensors, and the Hopper kernels, which do not:
// arguments, and the scratch in which one kernel leaves a chunk's intermediates for the next. Symbols:
// README.md.
#pragma once

#include "delta/delta.h"
#include "nearfield/dtype.h"

namespace nearfield::delta {

using InputsSm90 =
    DeltaInputs<void, float>;  // q, k, v: 16-byte aligned rows, strides multiples of 8 elements

// ---- Chunks ----

// Every chunk of 64 tokens has a slot. Packed sequence n begins with slot cu_seqlens[n] / 64 + n: known
// without a scan, unique, increasing; some slots stay without a chunk.
struct ChunkSlots {
  int64_t per_sequence;  // not packed
  int64_t total;
  explicit ChunkSlots(const InputsSm90& in) {
    per_sequence = (in.tokens + kChunk - 1) / kChunk;
    total = in.cu_seqlens ? in.tokens / kChunk + in.sequences : in.sequences * per_sequence;
  }
};

// Rows of a 16-bit operand in the order in which the tensor cores read them: [features / 64][64 rows][64
// features], each row of 128 bytes swizzled (the 16-byte piece p of row r is at piece p ^ (r % 8)). One
// contiguous copy moves it, and it serves as an operand with either index as the contraction.
constexpr int kImageRows = 64, kImageColumns = 64;
constexpr int64_t kImage = kImageRows * kImageColumns;  // elements

// A long sequence may be split into spans of whole chunks, which then have slots in the same way.
struct Spans {
  int64_t tokens;  // of a span
  int64_t total;
  Spans(const InputsSm90& in, int64_t span_chunks) : tokens(span_chunks * kChunk) {
    total = in.cu_seqlens ? in.tokens / tokens + in.sequences
                          : in.sequences * ((in.tokens + tokens - 1) / tokens);
  }
};

// Of the kernels of the forward: all value heads, or some of one sequence, whose beta, g and o lie among
// those of all, and perhaps also what `prepare` and the walk leave for each chunk.
struct ForwardInputsSm90 : InputsSm90 {
  int64_t token_heads;  // value heads from a token of beta, g and o to the next
  int64_t slot_heads;   // the same from slot to slot of ChunkScratch, states and V'
  ForwardInputsSm90(const InputsSm90& in)
      : InputsSm90(in), token_heads(in.value_heads), slot_heads(in.value_heads) {}
};

// ---- Scratch: what `prepare` finds out about a chunk; arrays indexed [slot][value head] ----

// Gates in units of log2 are cut off where 2^g is 0 in float32 anyway, so that -inf has differences.
constexpr float kLowestGate = -200.f;

// Per token of a chunk. Rows past the end of the sequence have beta and factors 0 and G of the last token.
// With a gate per channel beta only and, where ChunkScratch::G is wanted, the norms.
struct ChunkRows {
  float G[kChunk];        // log2(e) (g_1 + .. + g_i), each gate at least kLowestGate
  float beta[kChunk];     // after its activation
  float k_read[kChunk];   // k_norm e^{G_i}: Kh = k_read . K
  float k_write[kChunk];  // k_norm e^{G_C - G_i}: Kt = k_write . K
  float k_norm[kChunk];   // 1 / sqrt(sum k^2 + eps), or 1 without qk_l2norm
  // Only where P is wanted, for else Q is not read:
  float q_read[kChunk];  // scale q_norm e^{G_i}: scale Qh = q_read . Q
  float q_norm[kChunk];
};

struct ChunkScratch {
  ChunkRows* rows;
  // With a gate per head:
  void* N;  // image of T - I, strictly lower, rounded to 16 bit
  void* P;  // image of scale P (normalised q and k), lower with diagonal; null: left to the state pass
  // Both in one image: N below its diagonal, P^T on and above it. With a gate per head for the backward only,
  // or null.
  void* NP;
  // With a gate per channel, K padded to 64 or 128: images [K / 64] of Kh, Kt and scale Qh, normalised.
  void *Kh, *Kt, *Qh;
  float* decay;  // [K]: e^{G_C}
  float* G;      // [64][K]: G of every row as in ChunkRows; null: not wanted
  // What rounding N, P and Kt to 16 bit lost, as images like theirs. Only for chunks whose keys repeat and
  // whose writes are strong, where results are small differences of what these multiply; or all null.
  float* hard;  // 1 for such a chunk, else 0, and then the low halves are not written
  void *N_low, *P_low, *Kt_low;
};

// A chunk is hard if the mean square of a row of N is larger. Random keys with beta up to 1: 0.2 (K = 128) or
// 0.37 (K = 64); beta uniform up to 2: 0.36, 0.7; identical keys with beta 0.9 to 1: 0.9.
constexpr float kHardSquare = 0.75f;

// ---- Kernels; each returns a cudaError_t. Tag is bf16 or fp16, kKeyDim the padded K ----

// What `ready` says of a chunk that is no longer 0.
constexpr int kReady = 1, kReadyHard = 2;

struct PrepareArgs {
  ForwardInputsSm90 in;
  ChunkScratch scratch;
  int64_t slots;  // of ChunkSlots
  int ctas;       // they stay on as many SMs; with a gate per channel only beside the state pass
  // Beside the state pass instead of before it, for sequences that are not packed; or null:
  int* ready;  // [value head][slot], zeros
};

// Everything of a chunk that does not depend on the state.
template <class Tag, int kKeyDim, bool kChannelGate>
struct prepare_sm90 {
  static int run(const PrepareArgs& args, void* stream);
};

struct StatePassArgs {
  ForwardInputsSm90 in;
  ChunkScratch scratch;
  const int*
      ready;      // as above: the launch begins when prepare has its SMs, and waits chunk by chunk; or null
  int64_t slots;  // of ready
  void* o;        // [B, T, HV, V] contiguous; null: no output, and Q is not read
  float* final_state;  // like initial_state, or null
  // For the backward, both or neither; with output for K padded to 128 and with P only:
  void* states;  // image [slot][value head][V / 64][K / 64] (K and V padded): S^T of the state that enters
                 // the chunk, rows are values, rounded to 16 bit; of some chunks kNoState (chunk_sm90.cuh)
  void* v_new;   // image [slot][value head][V / 64]: V'; rows past the end are zero
  // The states after every so many whole chunks of a sequence, [row][value head] like
  // initial_state; sequence n begins with row n (T / 64 / chunks), packed with cu_seqlens[n] / 64 / chunks.
  float* boundary_states;
  int64_t boundary_chunks;  // 0: not wanted
  // With split sequences; K and V padded to whole tiles:
  int64_t span_chunks;       // chunks of a span; 0: sequences are not split
  const float* span_states;  // [span][value head][V][K]: state that enters each span but the first of a
                             // sequence
  float* transitions;        // [span][value head][V + K][K]: see below; without output only
  bool all_transitions;      // also of the last span of a sequence, and from a state of zero for the first
};

// The serial walk over the chunks of a sequence: V', S, and O. One CTA per (sequence or span, value head, 64
// values). With `transitions`, what a span does to the state that enters it, S -> M S + N: N^T, the state
// after the span that started with zero, then M^T. M is the same walk without values from S = I, so its
// columns are further tiles of 64 "values". For the first span of a sequence, whose entering state is known,
// N is the state after it, and M is absent; unless all_transitions, the last span is absent.
template <class Tag, int kKeyDim, bool kChannelGate>
struct state_pass_sm90 {
  static int run(const StatePassArgs& args, void* stream);
};

struct ComposeSpansArgs {
  InputsSm90 in;
  int64_t span_chunks;
  const float* transitions;  // as above
  float* span_states;        // as above
};

// The states that enter the spans of a sequence, from the transitions of the spans before, in float32.
template <int kKeyDim>
struct compose_spans_sm90 {
  static int run(const ComposeSpansArgs& args, void* stream);
};

}  // namespace nearfield::delta
