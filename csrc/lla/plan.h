// Which kernels serve a call on a GPU, and why: the table that the dispatch carries out and explain tells.
#pragma once

#include <optional>
#include <string>

#include "lla/lla.h"
#include "tensor_checks.h"

namespace nearfield::lla {

struct Plan {
  bool portable = false;
  int head_dim = 0;     // the compiled one; smaller head dims are padded with zeros
  std::string because;  // why the portable kernels run although nobody asked for them
};

// backend: "hopper", "portable"; none: hopper where it serves the call. Throws where there is no kernel.
Plan choose_plan(const char* op, ScalarType dtype, int64_t d, int64_t dv, int capability,
                 const std::optional<std::string>& backend);

// Whether Hopper's kernels with a solve keep their weights in shared memory, because no tile of queries sees
// many tiles of keys. Known from the shapes: of packed sequences nobody on the host knows where they begin.
bool keeps_weights(const Plan& plan, const Visibility& visible, bool packed, const Grid& grid);

// Why Hopper's kernels do not serve the call; empty if they do.
std::string hopper_refuses(int capability, ScalarType dtype, int64_t d, int64_t dv);

}  // namespace nearfield::lla
