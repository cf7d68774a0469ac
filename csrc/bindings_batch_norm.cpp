// Binds the batch normalisation kernels.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "bindings_batch_norm_problem.h"
#include "cpu/kernels.h"

namespace gdfast {
void bind_batch_norm(py::module_& m) {
  bind_batch_norm_problem(m);
  m.def(
      "batch_norm",
      [](const BatchNormProblem& problem, uintptr_t input, uintptr_t weight, uintptr_t bias,
         uintptr_t running_mean, uintptr_t running_var, uintptr_t residual, uintptr_t output,
         uintptr_t mean, uintptr_t invstd, bool training, double momentum, int threads,
         uintptr_t shift, uintptr_t sum, uintptr_t sum_of_squares) {
        check_threads("batch_norm", threads);
        const BatchNormForward to{pointer(input),        pointer(weight),
                                  pointer(bias),         pointer(residual),
                                  pointer(running_mean), pointer(running_var),
                                  pointer(output),       pointer(mean),
                                  pointer(invstd),       nullptr};
        const BatchNormSums sums{pointer<double>(shift), pointer<double>(sum),
                                 pointer<double>(sum_of_squares)};
        py::gil_scoped_release release;
        cpu::kernels().batch_norm(problem, to, training, momentum, sum == 0 ? nullptr : &sums,
                                  threads);
      },
      py::arg("problem"), py::arg("input"), py::arg("weight"), py::arg("bias"),
      py::arg("running_mean"), py::arg("running_var"), py::arg("residual"), py::arg("output"),
      py::arg("mean"), py::arg("invstd"), py::arg("training"), py::arg("momentum"),
      py::arg("threads"), py::arg("shift") = 0, py::arg("sum") = 0, py::arg("sum_of_squares") = 0,
      "Writes output, mean and invstd and, in training, the running statistics. Arguments are "
      "addresses, 0 for none; the sums, float64 [C], take the place of a pass over the input.");
  m.def(
      "batch_norm_backward",
      [](const BatchNormProblem& problem, uintptr_t grad_output, uintptr_t input,
         uintptr_t residual_or_output, uintptr_t weight, uintptr_t bias, uintptr_t mean,
         uintptr_t invstd, uintptr_t grad_input, uintptr_t grad_weight, uintptr_t grad_bias,
         uintptr_t grad_residual, bool training, const std::string& pre_activation, int threads) {
        check_threads("batch_norm_backward", threads);
        const PreActivation from = pre_activation_named(pre_activation, problem.activation);
        if (from == PreActivation::kMask) {
          throw py::value_error("batch_norm_backward: pre_activation: no mask on the CPU");
        }
        check_grad_residual(grad_residual, from);
        const BatchNormBackward to{
            pointer(grad_output), pointer(input),        pointer(residual_or_output),
            pointer(weight),      pointer(bias),         pointer(mean),
            pointer(invstd),      pointer(grad_input),   pointer(grad_weight),
            pointer(grad_bias),   pointer(grad_residual)};
        py::gil_scoped_release release;
        cpu::kernels().batch_norm_backward(problem, to, training, from, threads);
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("input"), py::arg("residual_or_output"),
      py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("invstd"), py::arg("grad_input"),
      py::arg("grad_weight"), py::arg("grad_bias"), py::arg("grad_residual"), py::arg("training"),
      py::arg("pre_activation"), py::arg("threads"),
      "Writes those gradients whose address is not 0.");
  m.def(
      "batch_norm_launch",
      [](const BatchNormProblem& problem, bool training) {
        return as_object([=](void* const* at, const Call& call) {
          cpu::kernels().batch_norm(problem, forward_at(at), training, call.momentum, nullptr,
                                    call.where);
          if (at[10] != nullptr) ++*static_cast<int64_t*>(at[10]);
        });
      },
      py::arg("problem"), py::arg("training"),
      "A launch of batch_norm, on input, weight, bias, running_mean, running_var, residual, "
      "output, mean, invstd, none, and a counter of batches, to which it adds 1.");
  m.def(
      "batch_norm_backward_launch",
      [](const BatchNormProblem& problem, bool training, const std::string& pre_activation) {
        const PreActivation from = pre_activation_named(pre_activation, problem.activation);
        return as_object([=](void* const* at, const Call& call) {
          cpu::kernels().batch_norm_backward(problem, backward_at(at), training, from, call.where);
        });
      },
      py::arg("problem"), py::arg("training"), py::arg("pre_activation"),
      "A launch of batch_norm_backward, on grad_output, input, weight, bias, residual_or_output, "
      "mean, invstd and the gradients of input, weight, bias and residual.");
  m.def(
      "conv2d_norm_fits",
      [](const Conv2dProblem& conv, bool backward, int threads) {
        check_threads("conv2d_norm_fits", threads);
        return cpu::kernels().conv2d_norm_fits(conv, backward, threads);
      },
      py::arg("conv"), py::arg("backward"), py::arg("threads"),
      "Whether a convolution, or `backward` the problem of one of its gradients, joins with a norm "
      "in training, which has to be of float32 and the layout of its output.");
  m.def(
      "conv2d_norm_launch",
      [](const Conv2dProblem& conv, const BatchNormProblem& norm) {
        return as_object([=](void* const* at, const Call& call) {
          cpu::kernels().conv2d_norm(conv, norm, at[0], at[1], at[2], forward_at(at + 4), at[3],
                                     call.momentum, call.where);
          if (at[14] != nullptr) ++*static_cast<int64_t*>(at[14]);
        });
      },
      py::arg("conv"), py::arg("norm"),
      "A launch of both, on the tensors of conv2d_launch and then those of batch_norm_launch.");
  m.def(
      "conv2d_norm_backward_launch",
      [](const BatchNormProblem& norm, const std::string& pre_activation, Conv2dProblem of_input,
         const Conv2dProblem& of_weight, bool adds) {
        of_input.adds = adds;
        const PreActivation from = pre_activation_named(pre_activation, norm.activation);
        return as_object([=](void* const* at, const Call& call) {
          const Conv2dGradients conv{at[15], at[12], at[13], at[16], at[17]};
          cpu::kernels().conv2d_norm_backward(of_input, of_weight, norm, backward_at(at), from,
                                              conv, call.where);
        });
      },
      py::arg("norm"), py::arg("pre_activation"), py::arg("of_input"), py::arg("of_weight"),
      py::arg("adds") = false,
      "A launch of all gradients, on the tensors of batch_norm_backward_launch, "
      "conv2d_grad_input_launch and conv2d_grad_weight_launch; what one hands to the next is "
      "none.");
}

}  // namespace gdfast
