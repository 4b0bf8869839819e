// The contract between cuda.cpp, which knows tensors, and the portable kernels, which do not. Their arguments
// are those of the Hopper kernels, but strides, start addresses and head dims may be any, boxes reach over
// any dilation, and dQ always comes from a kernel of its own.
#pragma once

#include "gna/sm90.h"

namespace nearfield::gna {

template <class Element, int kHeadDim>
struct portable_sm80 {
  // Each returns a cudaError_t.
  static int fwd(const FwdSm90Args& args, void* stream);
  static int bwd_dq(const BwdSm90Args& args, void* stream);   // dq_out
  static int bwd_dkv(const BwdSm90Args& args, void* stream);  // dk and dv
};

}  // namespace nearfield::gna
