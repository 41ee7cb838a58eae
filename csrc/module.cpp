// The Python module whose import registers the CPU kernels. The operators' schemas are in maxva_kernels/_ops.py, where
// installations without compiled code find them too.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
