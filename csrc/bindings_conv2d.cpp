// Binds the convolution kernels.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "bindings_conv2d_problem.h"
#include "cpu/kernels.h"

namespace gdfast {

void bind_conv2d(py::module_& m) {
  bind_conv2d_problem(m);
  m.def(
      "conv2d",
      [](const Conv2dProblem& problem, uintptr_t input, uintptr_t weight, uintptr_t bias,
         uintptr_t output, int threads) {
        check_threads("conv2d", threads);
        py::gil_scoped_release release;
        cpu::kernels().conv2d(problem, pointer(input), pointer(weight), pointer(bias),
                              pointer(output), threads);
      },
      py::arg("problem"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
      py::arg("threads"), "Writes output; arguments after problem are addresses, bias 0 for none.");
  m.def(
      "conv2d_grad_input",
      [](const Conv2dProblem& problem, uintptr_t grad_output, uintptr_t weight,
         uintptr_t grad_input, int threads) {
        check_threads("conv2d", threads);
        py::gil_scoped_release release;
        cpu::kernels().conv2d_grad_input(problem, pointer(grad_output), pointer(weight),
                                         pointer(grad_input), threads);
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("weight"), py::arg("grad_input"),
      py::arg("threads"), "Writes grad_input; arguments after problem are addresses.");
  m.def(
      "conv2d_grad_weight",
      [](const Conv2dProblem& problem, uintptr_t grad_output, uintptr_t input,
         uintptr_t grad_weight, uintptr_t grad_bias, int threads) {
        check_threads("conv2d", threads);
        py::gil_scoped_release release;
        cpu::kernels().conv2d_grad_weight(problem, pointer(grad_output), pointer(input),
                                          pointer(grad_weight), pointer(grad_bias), threads);
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("input"), py::arg("grad_weight"),
      py::arg("grad_bias"), py::arg("threads"),
      "Writes grad_weight and, unless its address is 0, grad_bias.");
  m.def(
      "conv2d_launch",
      [](const Conv2dProblem& problem) {
        return as_object([problem](void* const* at, const Call& call) {
          cpu::kernels().conv2d(problem, at[0], at[1], at[2], at[3], call.where);
        });
      },
      py::arg("problem"), "A launch of conv2d, on input, weight, bias and output.");
  m.def(
      "conv2d_grad_input_launch",
      [](Conv2dProblem problem, bool adds) {
        problem.adds = adds;
        return as_object([problem](void* const* at, const Call& call) {
          cpu::kernels().conv2d_grad_input(problem, at[0], at[1], at[2], call.where);
        });
      },
      py::arg("problem"), py::arg("adds") = false,
      "A launch of conv2d_grad_input, on grad_output, weight and grad_input, which it adds to or "
      "writes.");
  m.def(
      "conv2d_adds",
      [](const Conv2dProblem& problem) { return cpu::kernels().conv2d_adds(problem); },
      py::arg("problem"), "Whether launches of conv2d_grad_input can add.");
  m.def(
      "conv2d_grad_weight_launch",
      [](const Conv2dProblem& problem) {
        return as_object([problem](void* const* at, const Call& call) {
          cpu::kernels().conv2d_grad_weight(problem, at[0], at[1], at[2], at[3], call.where);
        });
      },
      py::arg("problem"),
      "A launch of conv2d_grad_weight, on grad_output, input, grad_weight and grad_bias.");
}

}  // namespace gdfast
