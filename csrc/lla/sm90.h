// The contract between cuda.cpp, which knows tensors, and the Hopper kernels, which do not.
//
// The kernels never see the caller's q, k, v and dO. A first kernel writes each of them as 16-bit operands:
// fp16 times one power of two per head, rows in tiles of 64 that already have the layout of shared memory,
// features padded with zeros to the compiled head dim. A tile is one contiguous block, and the other kernels
// need neither element types nor strides.
#pragma once

#include "lla/lla.h"
#include "nearfield/dtype.h"

namespace nearfield::lla {

constexpr int kTileRows = 64;

// Tiles [B, heads, tiles_per_head][64 x compiled head dim]; the true values are tiles times operand_unit.
struct Operand {
  void* tiles;     // fp16
  float* largest;  // [B, heads]: largest absolute value
  int tiles_per_head;
  float least_unit = 0.f;  // the unit is at least this
};

struct OperandSource {
  const void* data;  // [B, rows, heads, features]
  int64_t batch_stride, row_stride, head_stride;
  int rows, heads, features;
  Operand out;
  // If set, the rows are queries, and those that see one key are written as zeros: with q = 0 and x = 0 the
  // backward of such a row is exact, whatever its logit and ridge.
  bool blank_lone_rows;
  Visibility visible;
  Grid grid;           // of the rows, if given in place of `visible`
  const int64_t* end;  // of packed sequences: rows from there on are zeros too; null: there are none
};

struct OperandsArgs {
  static constexpr int kMost = 4;
  int count, batch, head_dim;  // the compiled head dim
  float* clear;                // maxima to set to zero first; null: they are
  int clear_count;
  OperandSource source[kMost];
};

// Element is bf16, fp16 or float. Each run returns a cudaError_t.
template <class Element>
struct operands_sm80 {
  static int run(const OperandsArgs& args, void* stream);
};

// What the passes over the keys share.
struct QueryProblem {
  int batch, m, n, heads, kv_heads, d, dv;
  Visibility visible;
  float scale;
  // The two row tiles of a CTA are the longest and the shortest left, instead of neighbors: for causal
  // problems that fill the GPU once at most, where the CTA with the longest rows decides. The same for the
  // two tiles of keys of the pass that holds keys.
  bool mix_lengths, mix_key_lengths;
  bool resident;    // of a solve whose tiles of queries see few tiles: their weights stay in shared memory
  Operand q, k, v;  // Q has two tiles for each block of 128 queries
  NEARFIELD_HOST_DEVICE int query_blocks() const { return (m + 2 * kTileRows - 1) / (2 * kTileRows); }
  NEARFIELD_HOST_DEVICE int key_blocks() const { return (n + 2 * kTileRows - 1) / (2 * kTileRows); }
};

struct FwdSm90Args {
  QueryProblem problem;
  bool solve;                        // else x is given
  View<const float> given;           // [B, m, Hq, d], if not solve
  View<const uint16_t> given_16bit;  // the same in place of it, of the type of o, unless null
  Ridge<float> ridge;                // if solve
  float tol;
  int max_iters;
  bool is_bf16;     // of o
  void* o;          // [B, m, Hq, dv]
  float *x, *kbar;  // [B, m, Hq, d]; x if solve
  float* lse;       // [B, m, Hq]
  int* iterations;  // [B, m, Hq], if solve
  float* ratio;     // [B, m, Hq], if solve
};

template <int kHeadDim>
struct fwd_sm90 {
  static int run(const FwdSm90Args& args, void* stream);
};

// What the gradients of the keys need of a query.
struct RowSums {
  float gbar, d, weight;
};
// p, in the unit of the weights, = weight exp2(scaled logit - shift); x.kbar, Gbar + y.kbar and D in units of
// the operands.
struct alignas(16) PairRow {
  float xbar, rbar, d;
  alignas(16) float shift;
  float weight;
};

// Units of the backward. Gam'_ij = dO'_i.v'_j of operands is Gam_ij over the units of dO and V: "gam units".
// Slopes are (k' - kbar').z with z = x times the unit of K. y is kept as minus y times the unit of K, in gam
// units.
struct BwdSm90Args {
  QueryProblem problem;
  bool solve;               // else y = 0, and the gradient of x is h
  Ridge<float> ridge;       // if solve
  float tol;                // if solve
  int max_iters;            // if solve
  bool is_bf16;             // of dq, dk, dv
  Operand d_o;              // two tiles for each block of 128 queries, as Q, x and minus_y
  View<const float> x;      // [B, m, Hq, d]
  const float *kbar, *lse;  // [B, m, Hq, d], [B, m, Hq]
  float* minus_y;           // [B, m, Hq, d] scratch, in gam units; 0 if not solve
  RowSums* row_sums;        // [B, m, Hq] scratch: in gam units
  void* dq;                 // [B, m, Hq, d]
  float* dx;                // [B, m, Hq, d], if not solve
  float* dlam;              // [B, m, Hq, channels], if solve
  // For the gradients of the keys; what holds queries finds the largest values of the two, from zero on.
  Operand x_tiles, minus_y_tiles;
  PairRow* pair_rows;  // [B, Hq, tiles of Q, 64] scratch
  void *dk, *dv;       // [B, n, Hk, d], [B, n, Hk, dv]
};

// Query-stationary: h, the second solve, dq, dlam, dx.
template <int kHeadDim>
struct bwd_query_sm90 {
  static int run(const BwdSm90Args& args, void* stream);
};

// Key-stationary: dk, dv.
template <int kHeadDim>
struct bwd_key_sm90 {
  static int run(const BwdSm90Args& args, void* stream);
};

}  // namespace nearfield::lla
