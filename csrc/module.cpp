// Importing nearfield._C loads the library, whose static initialisers register the operators of every family
// with the PyTorch dispatcher. The module itself only says what it was built with.
#include <Python.h>
#include <torch/headeronly/version.h>

#ifdef NEARFIELD_WITH_CUDA
#include "nearfield_build.h"
#else
#define NEARFIELD_CUDA_ARCHS ""
#define NEARFIELD_CUDA_VERSION ""
#endif

static PyModuleDef moddef = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {
  PyObject* m = PyModule_Create(&moddef);
  if (m == nullptr || PyModule_AddStringConstant(m, "cuda_archs", NEARFIELD_CUDA_ARCHS) != 0 ||
      PyModule_AddStringConstant(m, "cuda_version", NEARFIELD_CUDA_VERSION) != 0 ||
      PyModule_AddStringConstant(m, "torch_version", TORCH_VERSION) != 0) {
    Py_XDECREF(m);
    return nullptr;
  }
  return m;
}
