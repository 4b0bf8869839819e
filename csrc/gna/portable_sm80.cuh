// One instance of the portable path: the kernels of an element type and head dim.
#pragma once

#include "gna/bwd_dbias_sm80.cuh"
#include "gna/bwd_dkv_sm80.cuh"
#include "gna/bwd_dq_sm80.cuh"
#include "gna/fwd_sm80.cuh"
