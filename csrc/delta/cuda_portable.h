// The portable kernels, from tensors to tensors. Inputs are those of check_inputs; not empty.
#pragma once

#include "delta/checks.h"

namespace nearfield::delta {

// final_state and states (after every `states_every` whole chunks): null if not wanted.
void portable_forward(const char* op, Inputs x, const Options& options, const Tensor& o, float* final_state,
                      float* states, int64_t states_every);

struct GradientsOut {
  Tensor dq, dk, dv;
  float *dbeta, *dg, *d_initial, *dA_log, *ddt_bias;  // null: not wanted
};
void portable_backward(const char* op, const Inputs& x, const Options& options, const OptTensor& d_o,
                       const OptTensor& d_final, const GradientsOut& out);

}  // namespace nearfield::delta
