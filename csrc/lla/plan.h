// Which kernels serve a call on a GPU, and why: the table that the dispatch carries out and explain tells.
#pragma once

#include <optional>
#include <string>

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

// Why Hopper's kernels do not serve the call; empty if they do.
std::string hopper_refuses(int capability, ScalarType dtype, int64_t d, int64_t dv);

}  // namespace nearfield::lla
