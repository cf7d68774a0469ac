// Binds the kernels of depthwise convolution.
#include <pybind11/pybind11.h>

#include "../bindings.h"
#include "bindings.h"
#include "depthwise.h"

namespace gdfast::cuda {

namespace py = pybind11;

namespace {

DepthwiseWay way_named(const std::string& name) {
  if (name == "depthwise") return DepthwiseWay::kVectors;
  if (name == "depthwise-tensor") return DepthwiseWay::kSlabs;
  if (name == "depthwise-tensor-narrow") return DepthwiseWay::kNarrowSlabs;
  if (name == "depthwise-rows") return DepthwiseWay::kRows;
  if (name == "depthwise-boxes") return DepthwiseWay::kBoxes;
  if (name == "depthwise-toeplitz") return DepthwiseWay::kToeplitz;
  throw py::value_error(
      "depthwise_conv2d: way: expected depthwise, depthwise-tensor, depthwise-tensor-narrow, "
      "depthwise-rows, depthwise-boxes or depthwise-toeplitz, got " +
      name);
}

}  // namespace

void bind_depthwise(py::module_& m) {
  m.def("depthwise_tensor_why_not", &depthwise_tensor_why_not, py::arg("problem"),
        "Why no pass of a problem runs on the tensor cores, or an empty string. Where one could "
        "and is told to, an address that 16 does not divide keeps it from doing so.");
  m.def("depthwise_rows_why_not", &depthwise_rows_why_not, py::arg("problem"),
        "The same for the kernels by whole rows, which run on Hopper (hopper_missing).");
  m.def("depthwise_boxes_why_not", &depthwise_boxes_why_not, py::arg("problem"),
        "The same for the kernels in boxes, which run on Hopper too.");
  m.def("depthwise_toeplitz_why_not", &depthwise_toeplitz_why_not, py::arg("problem"),
        "The same for the kernels by bands, which run on Hopper too.");
  m.def(
      "depthwise_conv2d",
      [](const Conv2dProblem& problem, const std::string& way, uintptr_t input, uintptr_t weight,
         uintptr_t bias, uintptr_t output, int device, uintptr_t stream) {
        launching(problem, [&] {
          depthwise_conv2d(problem, way_named(way), pointer(input), pointer(weight), pointer(bias),
                           pointer(output), {device, stream});
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("input"), py::arg("weight"), py::arg("bias"),
      py::arg("output"), py::arg("device"), py::arg("stream"),
      "Writes activation(conv2d + bias) to output. Tensors are addresses on the device, bias 0 for "
      "none.");
  m.def(
      "depthwise_conv2d_grad_input",
      [](const Conv2dProblem& problem, const std::string& way, uintptr_t grad_output,
         uintptr_t weight, uintptr_t grad_input, int device, uintptr_t stream) {
        launching(problem, [&] {
          depthwise_conv2d_grad_input(problem, way_named(way), pointer(grad_output),
                                      pointer(weight), pointer(grad_input), {device, stream});
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("grad_output"), py::arg("weight"),
      py::arg("grad_input"), py::arg("device"), py::arg("stream"), "Writes grad_input.");
  m.def(
      "depthwise_conv2d_grad_weight_workspace",
      [](const Conv2dProblem& problem, const std::string& way) {
        return depthwise_conv2d_grad_weight_workspace(problem, way_named(way));
      },
      py::arg("problem"), py::arg("way"),
      "The bytes of workspace that depthwise_conv2d_grad_weight needs.");
  m.def(
      "depthwise_conv2d_grad_weight",
      [](const Conv2dProblem& problem, const std::string& way, uintptr_t grad_output,
         uintptr_t input, uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t workspace,
         int device, uintptr_t stream) {
        launching(problem, [&] {
          depthwise_conv2d_grad_weight(problem, way_named(way), pointer(grad_output),
                                       pointer(input), pointer(grad_weight), pointer(grad_bias),
                                       pointer(workspace), {device, stream});
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("grad_output"), py::arg("input"),
      py::arg("grad_weight"), py::arg("grad_bias"), py::arg("workspace"), py::arg("device"),
      py::arg("stream"), "Writes grad_weight and, unless its address is 0, grad_bias.");
}

}  // namespace gdfast::cuda
