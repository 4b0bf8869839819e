// The contract between cuda.cpp, which knows tensors, and the portable kernels, which do not. Their arguments
// are those of the Hopper kernels, but strides, start addresses and head dims may be any, boxes reach over
// any dilation, and dQ always comes from a kernel of its own.
#pragma once

#include "gna/sm90.h"
#include "gna/tiles.h"

namespace nearfield::gna {

struct BwdSm80Args : BwdSm90Args {
  BiasGradient<float> dbias;  // of bwd_dbias
};

// As for dQ, with dS in shared memory. Latency bounds it, so three CTAs run on an SM where they fit.
constexpr PortableTile portable_dbias_tile(int head_dim, int element_bytes) {
  const int row_bytes = head_dim * element_bytes;
  if (row_bytes <= 256) return {64, 32, 1, 3};
  if (row_bytes <= 512) return {32, 32, 1};
  return {32, 8, 1};
}

// Elements of a head's bias up to which a CTA sums its gradient in shared memory.
constexpr int portable_dbias_places(int head_dim, int element_bytes) {
  const int row_bytes = head_dim * element_bytes;  // at 256 and 1024 the operands leave less room
  return row_bytes == 256 || row_bytes == 1024 ? 1024 : 4096;
}

template <class Element, int kHeadDim>
struct portable_sm80 {
  // Each returns a cudaError_t.
  static int fwd(const FwdSm90Args& args, void* stream);
  static int bwd_dq(const BwdSm80Args& args, void* stream);     // dq_out
  static int bwd_dkv(const BwdSm80Args& args, void* stream);    // dk and dv
  static int bwd_dbias(const BwdSm80Args& args, void* stream);  // adds to dbias
};

}  // namespace nearfield::gna
