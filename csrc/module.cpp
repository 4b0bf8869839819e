// nearfield._C is an empty Python module: importing it loads the library, whose static
// initialisers register the operators of every family with the PyTorch dispatcher.
#include <Python.h>

static PyModuleDef moddef = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&moddef); }
