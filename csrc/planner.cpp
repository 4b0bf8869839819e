// nearfield._planner: the host-only tile planner, for Python. No tensors, no Torch.
#include <pybind11/pybind11.h>

#include "nearfield/window.h"

namespace py = pybind11;

PYBIND11_MODULE(_planner, m) {
  m.doc() = "Window arithmetic and tile planning of nearfield, as the kernels do it.";
}
