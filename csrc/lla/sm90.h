// The contract between cuda.cpp, which knows tensors, and the Hopper kernels, which do not.
//
// The kernels never see the caller's q, k, v and dO. A first kernel writes each of them as 16-bit operands: fp16
// times one power of two per head, rows in tiles of 64 that already have the layout of shared memory, features
// padded with zeros to the compiled head dim. A tile is one contiguous block, and the other kernels need
// neither element types nor strides.
#pragma once

#include "lla/lla.h"
#include "nearfield/dtype.h"

namespace nearfield::lla {

constexpr int kTileRows = 64;

// Tiles [B, heads, tiles_per_head][64 x compiled head dim]; the true values are tiles * operand_unit(largest).
struct Operand {
  void* tiles;     // fp16
  float* largest;  // [B, heads]: largest absolute value
  int tiles_per_head;
};

struct OperandSource {
  const void* data;  // [B, rows, heads, features]
  int64_t batch_stride, row_stride, head_stride;
  int rows, heads, features;
  Operand out;
};

struct OperandsArgs {
  static constexpr int kMost = 4;
  int count, batch, head_dim;  // the compiled head dim
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
  Operand q, k, v;  // Q has two tiles for each block of 128 queries
  NEARFIELD_HOST_DEVICE int query_blocks() const { return (m + 2 * kTileRows - 1) / (2 * kTileRows); }
};

struct FwdSm90Args {
  QueryProblem problem;
  bool solve;               // else x is given
  View<const float> given;  // [B, m, Hq, d], if not solve
  Ridge<float> ridge;       // if solve
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

}  // namespace nearfield::lla
