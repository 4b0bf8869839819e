// The contract between cuda.cpp, which knows tensors, and the Hopper kernels, which do not.
#pragma once

#include "gna/gna.h"
#include "nearfield/dtype.h"

namespace nearfield::gna {

// The shape of one block on the token grid (per dilation group): its sides, outermost first.
struct Box {
  int side[3];
  NEARFIELD_HOST_DEVICE int volume() const { return side[0] * side[1] * side[2]; }
};

struct FwdSm90Args {
  Problem problem;
  float scale;  // > 0: op.py folds other signs into q
  Tokens<const void> q, k, v;        // [B, X, H, D], [B, X, Hkv, D], [B, X, Hkv, Dv]; strides multiples of 16 bytes
  Tokens<const void> add_k, add_v;   // [B, M, Hkv, D], [B, M, Hkv, Dv]; unused without additional tokens
  Tokens<void> out;                  // [B, X, H, Dv]
  Tokens<float> lse;                 // [B, X, H]
  Box q_box, kv_box;
  int* next_work;  // device memory, one int: the scheduler's counter
  int num_sms;
};

// Each returns a cudaError_t.
template <class Element, int kHeadDim>
struct fwd_sm90 {
  static int run(const FwdSm90Args& args, void* stream);
};

}  // namespace nearfield::gna
