// Hopper's kernels on a grid: the arguments are those of a sequence, the grid says who sees whom in place of
// problem.visible.
#pragma once

#include "lla/sm90.h"

namespace nearfield::lla {

template <int kHeadDim>
struct fwd_grid_sm90 {
  static int run(const FwdSm90Args& args, const Grid& grid, void* stream);
};

template <int kHeadDim>
struct bwd_query_grid_sm90 {
  static int run(const BwdSm90Args& args, const Grid& grid, void* stream);
};

template <int kHeadDim>
struct bwd_key_grid_sm90 {
  static int run(const BwdSm90Args& args, const Grid& grid, void* stream);
};

}  // namespace nearfield::lla
