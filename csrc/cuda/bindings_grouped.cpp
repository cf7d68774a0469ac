// Binds the kernels of convolution in groups of few channels.
#include <pybind11/pybind11.h>

#include "../bindings.h"
#include "bindings.h"
#include "conv2d.h"

namespace gdfast::cuda {

namespace py = pybind11;

namespace {

GroupedPass pass_named(const std::string& name) {
  if (name == "conv2d") return GroupedPass::kForward;
  if (name == "conv2d_grad_input") return GroupedPass::kGradInput;
  if (name == "conv2d_grad_weight") return GroupedPass::kGradWeight;
  throw py::value_error(
      "conv2d_grouped_why_not: op: expected conv2d, conv2d_grad_input or conv2d_grad_weight, got " +
      name);
}

}  // namespace

void bind_grouped(py::module_& m) {
  m.def(
      "conv2d_grouped_why_not",
      [](const Conv2dProblem& problem, const std::string& op) {
        return grouped_why_not(problem, pass_named(op));
      },
      py::arg("problem"), py::arg("op"),
      "Why conv2d_grouped, or its gradient of that name, does not take a problem, or an empty "
      "string. Addresses but the weight's must be multiples of 16 too.");
  m.def(
      "conv2d_grouped",
      [](const Conv2dProblem& problem, uintptr_t input, uintptr_t weight, uintptr_t bias,
         uintptr_t output, int device, uintptr_t stream) {
        launching(problem, [&] {
          conv2d_grouped(problem, pointer(input), pointer(weight), pointer(bias), pointer(output),
                         {device, stream});
        });
      },
      py::arg("problem"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
      py::arg("device"), py::arg("stream"),
      "As conv2d without moments, for problems that conv2d_grouped_why_not has nothing against.");
  m.def(
      "conv2d_grad_input_grouped",
      [](const Conv2dProblem& problem, uintptr_t grad_output, uintptr_t weight,
         uintptr_t grad_input, int device, uintptr_t stream) {
        launching(problem, [&] {
          conv2d_grad_input_grouped(problem, pointer(grad_output), pointer(weight),
                                    pointer(grad_input), {device, stream});
        });
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("weight"), py::arg("grad_input"),
      py::arg("device"), py::arg("stream"), "As conv2d_grad_input, likewise.");
  m.def("conv2d_grouped_splits", &grouped_splits, py::arg("problem"),
        "In how many splits conv2d_grad_weight_grouped fills the current device.");
  m.def(
      "conv2d_grad_weight_grouped",
      [](const Conv2dProblem& problem, uintptr_t grad_output, uintptr_t input,
         uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t workspace, int64_t splits,
         int device, uintptr_t stream) {
        launching(problem, [&] {
          conv2d_grad_weight_grouped(problem, pointer(grad_output), pointer(input),
                                     pointer(grad_weight), pointer(grad_bias), pointer(workspace),
                                     splits, {device, stream});
        });
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("input"), py::arg("grad_weight"),
      py::arg("grad_bias"), py::arg("workspace"), py::arg("splits"), py::arg("device"),
      py::arg("stream"),
      "As conv2d_grad_weight, likewise and with its workspace: without grad_weight, whose parts "
      "stay there, it makes no gradient of the bias unless asked.");
}

}  // namespace gdfast::cuda
