// Hopper's forward on a grid: the arguments are those of a sequence, the grid says who sees whom in place of
// problem.visible.
#pragma once

#include "lla/sm90.h"

namespace nearfield::lla {

template <int kHeadDim>
struct fwd_grid_sm90 {
  static int run(const FwdSm90Args& args, const Grid& grid, void* stream);
};

}  // namespace nearfield::lla
