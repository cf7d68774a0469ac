// Conv2dProblem as a Python class, which gdfast._cpu and gdfast._cuda each have for themselves.
// Problems are checked once, when they are made.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings.h"

namespace gdfast {
namespace {

namespace py = pybind11;

using Pair = std::array<int64_t, 2>;
using Four = std::array<int64_t, 4>;

Algorithm algorithm_named(const std::string& name) {
  if (name == "direct") return Algorithm::kDirect;
  if (name == "winograd") return Algorithm::kWinograd;
  if (name == "bf16") return Algorithm::kBf16;
  if (name == "strassen") return Algorithm::kStrassen;
  throw py::value_error(
      "Conv2dProblem: algorithm: expected direct, winograd, bf16 or strassen, got " + name);
}

void require(bool holds, const char* what) {
  if (!holds) throw py::value_error(std::string("Conv2dProblem: ") + what);
}

Conv2dProblem make_problem(const std::array<int64_t, 9>& sizes, const Pair& stride,
                           const Pair& padding, const Pair& dilation, int64_t groups,
                           const std::string& dtype, const Four& input, const Four& weight,
                           const Four& output, const std::string& algorithm,
                           const std::string& activation, double negative_slope) {
  const auto [N, C, H, W, K, R, S, P, Q] = sizes;
  require(N >= 0, "sizes: expected N >= 0");
  require(C > 0 && H > 0 && W > 0 && K > 0 && R > 0 && S > 0 && P > 0 && Q > 0,
          "sizes: expected C, H, W, K, R, S, P, Q > 0");
  require(stride[0] > 0 && stride[1] > 0, "stride: expected both > 0");
  require(padding[0] >= 0 && padding[1] >= 0, "padding: expected both >= 0");
  require(dilation[0] > 0 && dilation[1] > 0, "dilation: expected both > 0");
  require(groups > 0 && C % groups == 0 && K % groups == 0,
          "groups: expected a divisor of both C and K");
  return {N,
          C,
          H,
          W,
          K,
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
          groups,
          dtype_named("Conv2dProblem", dtype),
          {input[0], input[1], input[2], input[3]},
          {weight[0], weight[1], weight[2], weight[3]},
          {output[0], output[1], output[2], output[3]},
          algorithm_named(algorithm),
          activation_named("Conv2dProblem", activation),
          negative_slope};
}

void bind_conv2d_problem(py::module_& m) {
  py::class_<Conv2dProblem>(m, "Conv2dProblem",
                            "The geometry, dtype and element strides of one convolution, and the "
                            "activation of its forward pass.",
                            py::module_local())
      .def(py::init(&make_problem), py::arg("sizes"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("groups"), py::arg("dtype"), py::arg("input_strides"),
           py::arg("weight_strides"), py::arg("output_strides"), py::arg("algorithm") = "direct",
           py::arg("activation") = "none", py::arg("negative_slope") = 0.0);
}

}  // namespace
}  // namespace gdfast
