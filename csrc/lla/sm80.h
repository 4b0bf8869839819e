// The contract between cuda.cpp and the portable kernels: the operands and arguments of the Hopper kernels,
// but operands are fp16 or, for float32 tensors, float (then in plain rows), head dims may be any, and what a
// thread keeps between two sweeps lies in scratch memory.
#pragma once

#include "lla/sm90.h"

namespace nearfield::lla {

struct FwdSm80Args : FwdSm90Args {
  Element type;    // of o
  float* scratch;  // solver_scratch elements
  Grid grid;       // if given, in place of problem.visible
};

struct BwdSm80Args : BwdSm90Args {
  Element type;    // of dq, dk, dv
  float* scratch;  // solver_scratch elements
  float* d_lse;    // [B, m, Hq] scratch: the gradient of lse that an absolute ridge brings, in gam units
  Grid grid;       // if given, in place of problem.visible
};

// Floats of scratch memory: r, x and kbar of every query, padded.
inline int64_t solver_scratch(const QueryProblem& p, int head_dim) {
  return int64_t{3} * p.batch * p.heads * p.q.tiles_per_head * kTileRows * head_dim;
}

// Element is that of the operands, fp16 or fp32. Each returns a cudaError_t.
template <class Element, int kHeadDim>
struct portable_sm80 {
  static int operands(const OperandsArgs& args, void* stream);  // fp32: rows of floats from float32 tensors
  static int fwd(const FwdSm80Args& args, void* stream);
  static int bwd_queries(const BwdSm80Args& args, void* stream);  // h, the second solve, dlam, dx
  static int bwd_dq(const BwdSm80Args& args, void* stream);       // behind bwd_queries
  static int bwd_dkv(const BwdSm80Args& args,
                     void* stream);  // behind bwd_queries; wants x_tiles, minus_y_tiles
};

}  // namespace nearfield::lla
