// Binds the batch normalisation kernels.
#include "../bindings_batch_norm_problem.h"
#include "bindings.h"
#include "kernels.h"

namespace gdfast::cuda {

void bind_batch_norm(py::module_& m) {
  bind_batch_norm_problem(m);
  m.def("batch_norm_workspace_bytes", &batch_norm_workspace_bytes, py::arg("problem"),
        "How much memory on the device either direction needs for itself.");
  m.def(
      "batch_norm",
      [](const BatchNormProblem& problem, uintptr_t input, uintptr_t weight, uintptr_t bias,
         uintptr_t running_mean, uintptr_t running_var, uintptr_t residual, uintptr_t output,
         uintptr_t mean, uintptr_t invstd, uintptr_t mask, bool training, double momentum,
         uintptr_t moments, int64_t splits, uintptr_t workspace, int device, uintptr_t stream) {
        const BatchNormForward to{pointer(input),    pointer(weight),       pointer(bias),
                                  pointer(residual), pointer(running_mean), pointer(running_var),
                                  pointer(output),   pointer(mean),         pointer(invstd),
                                  pointer(mask)};
        launching(problem, [&] {
          batch_norm(problem, to, training, momentum, {pointer(moments), splits}, nullptr,
                     pointer(workspace), device, stream);
        });
      },
      py::arg("problem"), py::arg("input"), py::arg("weight"), py::arg("bias"),
      py::arg("running_mean"), py::arg("running_var"), py::arg("residual"), py::arg("output"),
      py::arg("mean"), py::arg("invstd"), py::arg("mask"), py::arg("training"), py::arg("momentum"),
      py::arg("moments"), py::arg("splits"), py::arg("workspace"), py::arg("device"),
      py::arg("stream"),
      "Writes output, mean and invstd and, in training, the running statistics. Arguments are "
      "addresses, 0 for none; moments [splits, 3, C] that conv2d wrote take the place of a pass "
      "over the input; mask gets a byte for each 16 bytes of output, a bit for each element, and "
      "asks for addresses and sizes that 16-byte vectors fit.");
  m.def(
      "batch_norm_backward",
      [](const BatchNormProblem& problem, uintptr_t grad_output, uintptr_t input,
         uintptr_t residual_or_output, uintptr_t weight, uintptr_t bias, uintptr_t mean,
         uintptr_t invstd, uintptr_t grad_input, uintptr_t grad_weight, uintptr_t grad_bias,
         uintptr_t grad_residual, bool training, const std::string& pre_activation,
         uintptr_t workspace, int device, uintptr_t stream) {
        const PreActivation from = pre_activation_named(pre_activation, problem.activation);
        check_grad_residual(grad_residual, from);
        const BatchNormBackward to{
            pointer(grad_output), pointer(input),        pointer(residual_or_output),
            pointer(weight),      pointer(bias),         pointer(mean),
            pointer(invstd),      pointer(grad_input),   pointer(grad_weight),
            pointer(grad_bias),   pointer(grad_residual)};
        launching(problem, [&] {
          batch_norm_backward(problem, to, training, from, pointer(workspace), device, stream);
        });
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("input"), py::arg("residual_or_output"),
      py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("invstd"), py::arg("grad_input"),
      py::arg("grad_weight"), py::arg("grad_bias"), py::arg("grad_residual"), py::arg("training"),
      py::arg("pre_activation"), py::arg("workspace"), py::arg("device"), py::arg("stream"),
      "Writes those gradients whose address is not 0.");
  m.def(
      "batch_norm_launch",
      [](const BatchNormProblem& problem, bool training, int64_t splits) {
        return as_object([=](void* const* at, const Call& call) {
          telling(problem, [&] {
            batch_norm(problem, forward_at(at), training, call.momentum, {at[11], splits},
                       static_cast<int64_t*>(at[10]), at[12], call.where, call.stream);
          });
        });
      },
      py::arg("problem"), py::arg("training"), py::arg("splits"),
      "A launch of batch_norm, on input, weight, bias, running_mean, running_var, residual, "
      "output, mean, invstd, mask, a counter of batches, to which it adds 1, moments and "
      "workspace.");
  m.def(
      "batch_norm_backward_launch",
      [](const BatchNormProblem& problem, bool training, const std::string& pre_activation) {
        const PreActivation from = pre_activation_named(pre_activation, problem.activation);
        return as_object([=](void* const* at, const Call& call) {
          telling(problem, [&] {
            batch_norm_backward(problem, backward_at(at), training, from, at[11], call.where,
                                call.stream);
          });
        });
      },
      py::arg("problem"), py::arg("training"), py::arg("pre_activation"),
      "A launch of batch_norm_backward, on grad_output, input, weight, bias, residual_or_output, "
      "mean, invstd, the gradients of input, weight, bias and residual, and workspace.");
}

}  // namespace gdfast::cuda
