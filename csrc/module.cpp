// `import srlm_kernels._C`: an empty module. The ops register themselves when it is loaded.
#include <Python.h>

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
