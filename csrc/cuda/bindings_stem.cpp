// Binds the kernels of convolution with few channels.
#include <pybind11/pybind11.h>

#include "../bindings.h"
#include "bindings.h"
#include "conv2d.h"

namespace gdfast::cuda {

namespace py = pybind11;

void bind_stem(py::module_& m) {
  m.def("conv2d_stem_shared_bytes", &conv2d_stem_shared_bytes, py::arg("problem"),
        "The bytes of shared memory of a block of conv2d_stem.");
  m.def("conv2d_stem_moments_workspace", &conv2d_stem_moments_workspace, py::arg("problem"),
        "The bytes of workspace that conv2d_stem needs for moments.");
  m.def(
      "conv2d_stem",
      [](const Conv2dProblem& problem, const Conv2dWay& way, int64_t tiles_of_block,
         uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t output, uintptr_t moments,
         uintptr_t workspace, int device, uintptr_t stream) {
        launching(problem, [&] {
          conv2d_stem(problem, way.precision, tiles_of_block, pointer(input), pointer(weight),
                      pointer(bias), pointer(output), pointer(moments), pointer(workspace),
                      {device, stream});
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("tiles_of_block"), py::arg("input"),
      py::arg("weight"), py::arg("bias"), py::arg("output"), py::arg("moments"),
      py::arg("workspace"), py::arg("device"), py::arg("stream"),
      "As conv2d, for few channels, one group, no dilation, float16, bfloat16 and float32 by "
      "TF32.");
  m.def("conv2d_stem_grad_weight_workspace", &conv2d_stem_grad_weight_workspace, py::arg("problem"),
        py::arg("splits"), py::arg("bias"),
        "The bytes of workspace that conv2d_stem_grad_weight needs for so many splits.");
  m.def(
      "conv2d_stem_grad_weight",
      [](const Conv2dProblem& problem, const Conv2dWay& way, uintptr_t grad_output, uintptr_t input,
         uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t workspace, int64_t splits,
         int device, uintptr_t stream) {
        launching(problem, [&] {
          conv2d_stem_grad_weight(problem, way.precision, pointer(grad_output), pointer(input),
                                  pointer(grad_weight), pointer(grad_bias), pointer(workspace),
                                  splits, {device, stream});
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("grad_output"), py::arg("input"),
      py::arg("grad_weight"), py::arg("grad_bias"), py::arg("workspace"), py::arg("splits"),
      py::arg("device"), py::arg("stream"), "As conv2d_grad_weight, likewise.");
}

}  // namespace gdfast::cuda
