// The contract between cuda_step.cpp, which knows tensors, and the decode kernel, which does not.
#pragma once

#include "delta/delta.h"
#include "nearfield/dtype.h"

namespace nearfield::delta {

// A [B, T, heads, channels] tensor as it lies in memory: any of the three types, any strides (0 where
// shared).
struct Operand {
  const void* data;  // null: absent
  Element type;
  int64_t batch, token, head, channel;  // strides
};

// [B] or [B, T] int32 or int64; data null: row b uses slot b.
struct SlotIndex {
  const void* data;
  bool is_int64;
  int64_t row, token;  // strides
};

// What DeltaStepParams says, for operands as they lie in memory.
struct StepArgs {
  int64_t batch;
  int tokens, heads, value_heads, key_dim, value_dim, gate_dim;  // gate_dim: 0 without a gate, 1 or key_dim
  Operand q, k;                                                  // [B, T, H, K]
  Operand v;                                                     // [B, T, HV, V]
  Operand beta;                                                  // [B, T, HV]
  Operand g;               // [B, T, HV, G]; without a gate anything that can be read
  Operand A_log, dt_bias;  // [HV], [HV, G]
  Element out_type;
  void* o;  // [B, T, HV, V] contiguous
  float scale, gate_bound;
  BetaActivation beta_activation;
  Gate gate;
  bool qk_l2norm;

  void* state;                 // [slots, HV, K, V] or [slots, HV, V, K]; rows aligned to four elements
  int64_t slots, slot_stride;  // slot_stride in elements
  SlotIndex read, write;       // write [B, T]: the state after each token
  bool state_per_token;
  bool write_replayed, write_tokens;
  Pending<float> pending;
  SlotIndex accepted;  // [B], 0 to P
  Pending<float> next;

  int num_sms;
};

// Pool: fp32 or bf16. kVFirst: slots are [V, K]. kKeyDim: the smallest built that holds K.
template <class Pool, bool kVFirst, int kKeyDim>
struct step_sm80 {
  static int run(const StepArgs& args, void* stream);  // returns a cudaError_t
};

}  // namespace nearfield::delta
