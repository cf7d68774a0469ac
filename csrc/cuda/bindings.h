// One function per group of kernels; each adds its names to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace gdfast::cuda {

void bind_conv2d(pybind11::module_& m);

}  // namespace gdfast::cuda
