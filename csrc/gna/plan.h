// What runs on a GPU for a problem: which kernels, in which order, with which tiles. Decided here and nowhere
// else: cuda.cpp carries the steps out, the operator gna_plan tells them to users.
#pragma once

#include <string>
#include <vector>

#include "gna/checks.h"
#include "gna/sm90.h"

namespace nearfield::gna {

enum class Kernel {
  kForward,
  kStats,    // lse and delta per query
  kClearDq,  // zeros to the float32 dQ
  kKeys,     // dK and dV, and adds to the float32 dQ
  kQueries,  // dQ, the deterministic way, which is the portable one
  kBias,     // adds to the gradient of the bias, part by part
  kRoundDq   // float32 dQ to dQ
};

// The tiles of a step: its boxes, and how many pairs of them it multiplies.
struct Tiles {
  Box q, kv;
  int64_t visited, full;  // full: without a mask
};

struct Step {
  Kernel kernel;
  int head_dim;   // the compiled one
  bool portable;  // else Hopper's own
  HeadGroup heads;
  Problem
      problem;  // of this launch: these heads, one dilation group where the copy engine cannot step so far
  // Where that group begins on the grid, and the distance of its tokens.
  int first[3] = {0, 0, 0}, distance[3] = {1, 1, 1};
  bool additional = false;  // the staying keys are the additional tokens, seen by the whole grid
  bool accumulate = false;  // kRoundDq: adds to what an earlier step wrote
  bool wide = false;        // kForward: the kernel with the wide tile
  bool beside = false;      // kKeys rounds dQ beside its products, and kRoundDq does the rest
  bool clears = false;      // and clears most of it, too, after what kClearDq does
  Tiles tiles{};

  bool is_tiled() const {
    return kernel == Kernel::kForward || kernel == Kernel::kKeys || kernel == Kernel::kQueries ||
           kernel == Kernel::kBias;
  }
  int64_t launches() const { return is_tiled() && !portable ? Launches(problem, head_dim).count : 1; }
};

// Units (see DqCounters) that have been cleared when kKeys begins: all, or, if that clears, those of the
// tiles that thread blocks begin with.
int64_t units_cleared_before(const Step& step, int num_sms);
// Those of the tiles that thread blocks begin with.
int64_t units_of_first_tiles(const Step& step, int num_sms);

struct Plan {
  std::vector<Step> steps;
  bool portable = false;      // all steps are
  std::string because;        // why not Hopper's own kernels; empty if nobody asked that
  int64_t stats_rows = 0;     // of RowStats
  bool stats_beside = false;  // those of most heads are summed beside the products
  int64_t dq_elements = 0;    // of the float32 dQ
  int64_t bias_elements = 0;  // of the bias of all heads, in each of the parts of its gradient
  int bias_parts = 0;
  int64_t counters = 1;  // the scheduler's, and DqCounters

  // Beside outputs and copies of tensors that the copy engine cannot read; with the scheduler's counter.
  int64_t workspace_bytes() const {
    return stats_rows * sizeof(RowStats) + (dq_elements + bias_parts * bias_elements) * 4 +
           counters * sizeof(int);
  }
};

// Tags of instances.def and the types they stand for.
template <class Element>
constexpr ScalarType dtype_of = std::is_same_v<Element, bf16>   ? ScalarType::BFloat16
                                : std::is_same_v<Element, fp16> ? ScalarType::Half
                                : std::is_same_v<Element, e4m3> ? ScalarType::Float8_e4m3fn
                                                                : ScalarType::Float;

inline int element_bytes(ScalarType dtype) {
  return dtype == ScalarType::Float ? 4 : dtype == ScalarType::Float8_e4m3fn ? 1 : 2;
}

// What is asked for beside the problem.
struct Request {
  const char* op;
  ScalarType dtype;
  int capability;  // 10 * major + minor of the GPU
  const std::optional<std::string>&
      backend;  // "hopper", "portable"; none: hopper where it serves the problem
};

// Throw what the operator throws when there is no kernel.
Plan plan_forward(const Request& request, const Call& call);
Plan plan_backward(const Request& request, const Call& call, bool deterministic, bool bias_gradient = true);

// Why Hopper's own kernels do not serve a problem; empty if they do.
std::string hopper_refuses(int capability, ScalarType dtype, int64_t dim, int64_t dim_v);

// Whether the copy engine can read a tensor as it is: contiguous features, 16-byte aligned start and strides.
bool is_loadable(const Tensor& t);

}  // namespace nearfield::gna
