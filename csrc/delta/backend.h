// Which kernels run a call: Hopper's own, or the portable ones.
#pragma once

#include "delta/checks.h"

namespace nearfield::delta {

struct Backend {
  bool portable;
  std::string because;  // why not Hopper's kernels, if they were not refused by name
};

// What decides it.
struct Request {
  const char* op;
  bool backward;
  int capability;
  std::optional<std::string> name;  // "hopper", "portable"; none: hopper where it serves the call
};

// Whether Hopper's kernels run both the forward and the backward of a call: then the one can keep things for
// the other.
bool keeps_for_backward(Request request, const Inputs& x);

// Throws where there is no kernel.
Backend choose_backend(const Request& request, const Inputs& x);

}  // namespace nearfield::delta
