// One function per group of kernels; each adds its names to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace gdfast::cuda {

void bind_batch_norm(pybind11::module_& m);
void bind_conv2d(pybind11::module_& m);
void bind_depthwise(pybind11::module_& m);
void bind_max_pool2d(pybind11::module_& m);
void bind_stem(pybind11::module_& m);

}  // namespace gdfast::cuda
