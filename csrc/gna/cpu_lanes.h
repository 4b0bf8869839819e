// What the CPU kernels do to a panel of scores: one row per partner, one vector lane per query (or per key).
// Scores never leave the cache as a matrix of queries by keys; they exist only as such panels of a few
// hundred rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/linalg.h"

namespace nearfield::gna {

using cpu::kLanes;

// Integer of the width of C, so that comparisons of both give masks of the same shape.
template <class C>
using LaneInt = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;

// Row i is coordinate first + i: s[i][lane] = -inf unless begin[lane] <= first + i < end[lane] and
// outer[lane] != 0. outer is 0 or -1 per lane. All arrays are 64-byte aligned.
void mask_line(float* s, int64_t n, int64_t first, const int32_t* outer, const int32_t* begin,
               const int32_t* end);
void mask_line(double* s, int64_t n, int64_t first, const int64_t* outer, const int64_t* begin,
               const int64_t* end);

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

// dst[i] = src[i] in single precision; src holds IEEE half or bfloat16 bit patterns.
void widen_half(const uint16_t* src, float* dst, int64_t n);
void widen_bfloat16(const uint16_t* src, float* dst, int64_t n);

}  // namespace nearfield::gna
