// Importing the extension registers its operators (see ops.cpp); the module itself is empty.
#include <Python.h>

PyMODINIT_FUNC PyInit__cpp(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpp", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
