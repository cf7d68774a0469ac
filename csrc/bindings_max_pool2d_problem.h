// MaxPool2dProblem as a Python class, which gdfast._cpu and gdfast._cuda each have for themselves.
// Problems are checked once, when they are made.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings.h"
#include "max_pool2d_problem.h"

namespace gdfast {
namespace {

namespace py = pybind11;

using Pair = std::array<int64_t, 2>;
using Four = std::array<int64_t, 4>;

void require(bool holds, const char* what) {
  if (!holds) throw py::value_error(std::string("MaxPool2dProblem: ") + what);
}

MaxPool2dProblem make_problem(const std::array<int64_t, 8>& sizes, const Pair& stride,
                              const Pair& padding, const Pair& dilation, const std::string& dtype,
                              const Four& input, const Four& output, const Four& argmax,
                              bool relu) {
  const auto [N, C, H, W, R, S, P, Q] = sizes;
  require(N >= 0 && C >= 0, "sizes: expected N, C >= 0");
  require(H > 0 && W > 0 && R > 0 && S > 0 && P > 0 && Q > 0,
          "sizes: expected H, W, R, S, P, Q > 0");
  require(stride[0] > 0 && stride[1] > 0, "stride: expected both > 0");
  require(padding[0] >= 0 && padding[1] >= 0, "padding: expected both >= 0");
  require(dilation[0] > 0 && dilation[1] > 0, "dilation: expected both > 0");
  return {N,
          C,
          H,
          W,
          R,
          S,
          P,
          Q,
          stride[0],
          stride[1],
          padding[0],
          padding[1],
          dilation[0],
          dilation[1],
          dtype_named("MaxPool2dProblem", dtype),
          {input[0], input[1], input[2], input[3]},
          {output[0], output[1], output[2], output[3]},
          {argmax[0], argmax[1], argmax[2], argmax[3]},
          relu};
}

void bind_max_pool2d_problem(py::module_& m) {
  py::class_<MaxPool2dProblem>(m, "MaxPool2dProblem",
                               "The geometry, dtype and element strides of one max pooling.",
                               py::module_local())
      .def(py::init(&make_problem), py::arg("sizes"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("dtype"), py::arg("input_strides"),
           py::arg("output_strides"), py::arg("argmax_strides"), py::arg("relu") = false);
}

}  // namespace
}  // namespace gdfast
