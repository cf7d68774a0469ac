// BatchNormProblem as a Python class, which gdfast._cpu and gdfast._cuda each have for themselves,
// and checks of what their functions take. Problems are checked once, when they are made.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "batch_norm_problem.h"
#include "bindings.h"

namespace gdfast {
namespace {

namespace py = pybind11;

void require(bool holds, const std::string& what) {
  if (!holds) throw py::value_error("BatchNormProblem: " + what);
}

DType dtype_named(const char* argument, const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error(std::string("BatchNormProblem: ") + argument +
                        ": expected float32, float64, bfloat16 or float16, got " + name);
}

BatchNormProblem make_problem(int64_t N, int64_t C, int64_t S, bool channels_last,
                              const std::string& dtype, const std::string& param_dtype,
                              const std::string& activation, double negative_slope, double eps) {
  require(N > 0 && C > 0 && S > 0, "N, C, S: expected all > 0");
  return {N,
          C,
          S,
          channels_last,
          dtype_named("dtype", dtype),
          dtype_named("param_dtype", param_dtype),
          activation_named("BatchNormProblem", activation),
          negative_slope,
          eps};
}

PreActivation pre_activation_named(const std::string& name, Activation activation) {
  const bool relu = activation == Activation::kRelu || activation == Activation::kRelu6;
  const bool leaky = activation == Activation::kLeakyRelu;
  if (name == "input") return PreActivation::kInput;
  if (name == "residual" && !relu) return PreActivation::kResidual;
  if (name == "output" && (relu || leaky)) return PreActivation::kOutput;
  if (name == "mask" && (relu || leaky)) return PreActivation::kMask;
  throw py::value_error(
      "batch_norm_backward: pre_activation: expected input, residual (not for relu and relu6), "
      "output or mask (for these and leaky_relu), got " +
      name);
}

void check_grad_residual(uintptr_t grad_residual, PreActivation from) {
  if (grad_residual == 0 || from != PreActivation::kInput) return;
  throw py::value_error(
      "batch_norm_backward: grad_residual: expected none where pre_activation is input");
}

// The addresses of a launch forward: input, weight, bias, running mean and variance, residual,
// output, mean, invstd and mask.
BatchNormForward forward_at(void* const* at) {
  return {at[0], at[1], at[2], at[5], at[3], at[4], at[6], at[7], at[8], at[9]};
}

// Those of one backward: grad_output, input, weight, bias, residual_or_output, mean, invstd and the
// gradients of input, weight, bias and residual.
BatchNormBackward backward_at(void* const* at) {
  return {at[0], at[1], at[4], at[2], at[3], at[5], at[6], at[7], at[8], at[9], at[10]};
}

void bind_batch_norm_problem(py::module_& m) {
  py::class_<BatchNormProblem>(m, "BatchNormProblem",
                               "Sizes, memory order, dtypes and activation of one batch "
                               "normalisation.",
                               py::module_local())
      .def(py::init(&make_problem), py::arg("N"), py::arg("C"), py::arg("S"),
           py::arg("channels_last"), py::arg("dtype"), py::arg("param_dtype"),
           py::arg("activation"), py::arg("negative_slope"), py::arg("eps"));
}

}  // namespace
}  // namespace gdfast
