// What the CPU kernels do to a panel of scores: one row per partner, one vector lane per query (or per key).
// Scores never leave the cache as a matrix of queries by keys; they exist only as such panels of a few
// hundred rows.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "cpu/linalg.h"

namespace nearfield::gna {

using cpu::kLanes;

// Row i of a line is seen by a lane iff first[lane] + hidden[lane] <= i <= last[lane]; the other scores
// become -inf. Bounds are of the scores' own type, because comparisons of floats vectorise everywhere.
void mask_line(float* s, int64_t n, const float* first, const float* last, const float* hidden);
void mask_line(double* s, int64_t n, const double* first, const double* last, const double* hidden);

// One step of the online softmax, per lane: turns scores into exp(score - max) with the running maximum,
// updates running maximum and sum, and returns in `rescale` the factor for what was accumulated with the old
// maximum.
void online_softmax(float* s, int64_t n, float* max, float* sum, float* rescale);
void online_softmax(double* s, int64_t n, double* max, double* sum, double* rescale);

// x[i][lane] *= factor[lane].
void scale_lanes(float* x, int64_t n, const float* factor);
void scale_lanes(double* x, int64_t n, const double* factor);

// dS = P * (dP - delta), in place of dP; delta[lane] + row_delta[i], of which row_delta may be null (zeros).
void softmax_gradient(float* dp, const float* p, int64_t n, const float* delta, const float* row_delta);
void softmax_gradient(double* dp, const double* p, int64_t n, const double* delta, const double* row_delta);

// dst[row][f] = src[row * step + f] for n rows, widened.
void copy_rows(const float* src, int64_t step, int64_t n, int64_t features, float* dst);
void copy_rows(const double* src, int64_t step, int64_t n, int64_t features, double* dst);
void copy_rows(const torch::headeronly::Half* src, int64_t step, int64_t n, int64_t features, float* dst);
void copy_rows(const torch::headeronly::BFloat16* src, int64_t step, int64_t n, int64_t features, float* dst);

}  // namespace nearfield::gna
