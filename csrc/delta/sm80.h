// The contract of the portable kernels: any GPU since Ampere, any head dims up to 256, any strides, and
// float32 beside the 16-bit types. Order: prepare, walk (forward: with output; backward: both directions at
// once), chunk gradient, finish. Everything that one kernel leaves for the next is made of 64 x 64 tiles in
// q's type, padded with zeros, so that every kernel reads a stream of equal pieces. Symbols: README.md.
#pragma once

#include "delta/sm90.h"

namespace nearfield::delta {

using InputsSm80 = InputsSm90;  // here start addresses, strides and head dims are free

constexpr int kTile = 64;
constexpr int64_t kTileElements = kTile * kTile;
constexpr int kMostFeaturesSm80 = 256;

constexpr int64_t tiles_of(int64_t features) { return (features + kTile - 1) / kTile; }
// The key dims of the built walks: 64, 128, 256.
constexpr int key_tiles_of(int64_t key_dim) { return key_dim <= 64 ? 1 : key_dim <= 128 ? 2 : 4; }

// What the walks multiply the tokens of a chunk with.
struct WalkFactors {
  struct {
    float read, beta;
  } first[kChunk];
  struct {
    float ask, write;
  } second[kChunk];
  float hard, unused[3];  // 1 for a chunk that has low tiles, else 0
};

// Per (slot, value head). Rows past the end of the sequence have beta 0 and the G of the last token.
struct ChunkRowsSm80 {
  double G[kChunk];     // log2(e) (g_1 + .. + g_i); 0 with a gate per channel
  WalkFactors factors;  // Where q and k are read raw, what makes Kh, Qh and Kt of them; else 1
  float q_norm[kChunk], k_norm[kChunk];  // 1 / sqrt(sum x^2 + eps), or 1

  constexpr float beta(int row) const { return factors.first[row].beta; }
};

// Tiles of a chunk: [rows of the chunk][features], or [row i][row j]. T = I + diag(beta) Z; the two factors
// of Z's error are split: Z is a high and a low part in 16-bit types. In bfloat16 a hard chunk (kHardSquare),
// whose results are small differences, also has what rounding Kh, Kt and P lost; others leave these tiles
// alone.
struct ChunkTiles {
  int keys, parts, values;  // K / 64; parts of Z; V / 64
  bool has_low, raw;
  constexpr ChunkTiles(int64_t key_dim, int64_t value_dim, bool is_float, bool has_low_, bool raw_ = false)
      : keys(key_tiles_of(key_dim)),
        parts(is_float ? 1 : 2),
        values(static_cast<int>(tiles_of(value_dim))),
        has_low(has_low_),
        raw(raw_) {}
  constexpr int features() const { return raw ? 0 : keys; }
  constexpr int Kh() const { return 0; }                       // normalised, e^{G_i}
  constexpr int Z() const { return features(); }               // strictly lower
  constexpr int Qh() const { return features() + parts; }      // normalised, scale e^{G_i}
  constexpr int P() const { return 2 * features() + parts; }   // scale P, lower with diagonal
  constexpr int Kt() const { return P() + 1; }                 // normalised, e^{G_C - G_i}
  constexpr int Abar() const { return P() + 1 + features(); }  // strictly lower
  constexpr int Kh_low() const { return Abar() + (raw ? 0 : 1); }
  constexpr int Kt_low() const { return Kh_low() + features(); }
  constexpr int P_low() const { return Kt_low() + features(); }
  constexpr int V() const { return has_low ? P_low() + 1 : Kh_low(); }
  constexpr int dO() const { return V() + values; }  // for the gradient only
  constexpr int total(bool backward) const { return V() + (raw ? 0 : values) * (backward ? 2 : 1); }
};

struct ScratchSm80 {
  ChunkRowsSm80* rows;  // [slot][value head]
  void* tiles;          // [slot][value head][ChunkTiles::total]
  bool backward;        // whether dO is among them
  // The walk reads q, k and v in place: a gate per head, no gradient, 16-bit rows that cp.async can read.
  // Tiles with features or values do not exist then, nor does Abar.
  bool raw;
  float* decay;  // [slot][value head][K padded]: e^{G_C}
  float* G;  // [slot][value head][64][K padded] with a gate per channel, in units of log2; for the gradient
};

struct PrepareSm80Args {
  InputsSm80 in;
  ScratchSm80 scratch;
  Rows<void> d_o;  // [B, T, HV, V]; data null: zero, or no gradient
};

template <class Tag, bool kChannelGate>
struct prepare_sm80 {
  static int run(const PrepareSm80Args& args, void* stream);
};

// What the walks leave for the chunk gradient: tiles [slot][value head][V / 64] of rows of the chunk, or
// [V / 64][K / 64] of S^T. r is the error just before a token, V' = beta r; Y the gradient of V', dR = beta
// Y.
struct WalkTiles {
  void *r, *Y, *S, *dS;
};

struct WalkSm80Args {
  InputsSm80 in;
  ScratchSm80 scratch;
  int value_warps;  // a CTA has 16 values per warp: 2 or 4, or 1 in place
  int stages;       // of the ring of tiles, where the kernel is free to choose
  // Forward; o null: no output, and Qh and P are not read.
  void* o;             // [B, T, HV, V] contiguous
  float* final_state;  // like initial_state, or null
  float* states;       // after every so many whole chunks, as delta_fwd_states returns them, or null
  int64_t states_every;
  // Backward: both directions in one launch.
  bool backward;
  WalkTiles left;
  const float* d_final;  // like initial_state, or null: zero
  void* dv;              // [B, T, HV, V] contiguous
  float* d_initial;      // like initial_state, or null

  // Chains and their outputs by different warps: walk_in_place_sm80.cuh.
  constexpr bool in_place() const { return scratch.raw && states == nullptr && in.key_dim <= 128; }
};

// The serial walk over the chunks of a sequence, one CTA per (sequence, value head, 16 value_warps values).
template <class Tag, int kKeyDim>
struct walk_sm80 {
  static int run(const WalkSm80Args& args, void* stream);
};

struct GradientSm80Args {
  InputsSm80 in;
  ScratchSm80 scratch;
  WalkTiles left;
  float *dq_heads, *dk_heads;  // [B, T, HV, K]: gradients of the normalised rows
  float* dbeta;                // [B, T, HV]
  float* dg;                   // [B, T, HV(, K)] or null
  float* gate_parts;           // [2][slot][value head](, K): sums of a chunk for dA_log and ddt_bias, or null
  void *dq, *dk;               // [B, T, H, K] contiguous
  float *dA_log, *ddt_bias;    // [HV](, K) or null
};

// All gradients of a chunk but dv, for all chunks at once; then sums over value heads and chunks.
template <class Tag, bool kChannelGate>
struct gradient_sm80 {
  static int run(const GradientSm80Args& args, void* stream);
};

}  // namespace nearfield::delta
