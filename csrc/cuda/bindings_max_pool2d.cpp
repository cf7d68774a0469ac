// Binds the pooling kernels.
#include "../bindings.h"
#include "../bindings_max_pool2d_problem.h"
#include "bindings.h"
#include "kernels.h"

namespace gdfast::cuda {

void bind_max_pool2d(py::module_& m) {
  bind_max_pool2d_problem(m);
  m.def(
      "max_pool2d",
      [](const MaxPool2dProblem& problem, uintptr_t input, uintptr_t output, uintptr_t argmax,
         int device, uintptr_t stream) {
        launching(problem, [&] {
          max_pool2d(problem, pointer(input), pointer(output), pointer(argmax), device, stream);
        });
      },
      py::arg("problem"), py::arg("input"), py::arg("output"), py::arg("argmax"), py::arg("device"),
      py::arg("stream"), "Writes output and argmax; arguments after problem are addresses.");
  m.def(
      "max_pool2d_grad",
      [](const MaxPool2dProblem& problem, uintptr_t grad_output, uintptr_t argmax,
         uintptr_t grad_input, int device, uintptr_t stream) {
        launching(problem, [&] {
          max_pool2d_grad(problem, pointer(grad_output), pointer(argmax), pointer(grad_input),
                          device, stream);
        });
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("argmax"), py::arg("grad_input"),
      py::arg("device"), py::arg("stream"),
      "Writes grad_input; arguments after problem are addresses.");
  m.def(
      "max_pool2d_launch",
      [](const MaxPool2dProblem& problem) {
        return as_object([problem](void* const* at, const Call& call) {
          telling(problem,
                  [&] { max_pool2d(problem, at[0], at[1], at[2], call.where, call.stream); });
        });
      },
      py::arg("problem"), "A launch of max_pool2d.");
  m.def(
      "max_pool2d_grad_launch",
      [](const MaxPool2dProblem& problem) {
        return as_object([problem](void* const* at, const Call& call) {
          telling(problem,
                  [&] { max_pool2d_grad(problem, at[0], at[1], at[2], call.where, call.stream); });
        });
      },
      py::arg("problem"), "A launch of max_pool2d_grad.");
}

}  // namespace gdfast::cuda
