// Binds the pooling kernels.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "bindings_max_pool2d_problem.h"
#include "cpu/kernels.h"

namespace gdfast {
namespace {

// The fused kernels leave out what these rule out.
void check_fused(const Conv2dProblem& conv, const MaxPool2dProblem& pool) {
  require(conv.groups == 1 && conv.dtype == pool.dtype && conv.N == pool.N && conv.K == pool.C &&
              conv.P == pool.H && conv.Q == pool.W,
          "conv: expected an output that is the input of pool, without groups");
  require(pool.relu && pool.is_narrow(), "pool: expected relu, and at most 255 places");
  require(pool.pad_h == 0 && pool.pad_w == 0 && pool.dilation_h == 1 && pool.dilation_w == 1,
          "pool: expected neither padding nor dilation");
  require(pool.stride_h >= pool.R && pool.stride_w >= pool.S,
          "pool: expected windows that do not overlap");
  require((pool.P - 1) * pool.stride_h + pool.R <= conv.P &&
              (pool.Q - 1) * pool.stride_w + pool.S <= conv.Q,
          "pool: expected windows within its input");
}

void bind_launches(py::module_& m) {
  m.def(
      "max_pool2d_launch",
      [](const MaxPool2dProblem& problem) {
        return as_object([problem](void* const* at, const Call& call) {
          cpu::kernels().max_pool2d(problem, at[0], at[1], at[2], call.where);
        });
      },
      py::arg("problem"), "A launch of max_pool2d, on input, output and argmax.");
  m.def(
      "max_pool2d_grad_launch",
      [](const MaxPool2dProblem& problem) {
        return as_object([problem](void* const* at, const Call& call) {
          cpu::kernels().max_pool2d_grad(problem, at[0], at[1], at[2], call.where);
        });
      },
      py::arg("problem"), "A launch of max_pool2d_grad, on grad_output, argmax and grad_input.");
  m.def(
      "conv2d_relu_max_pool2d_launch",
      [](const Conv2dProblem& conv, const MaxPool2dProblem& pool) {
        check_fused(conv, pool);
        return as_object([conv, pool](void* const* at, const Call& call) {
          cpu::kernels().conv2d_relu_max_pool2d(conv, pool, at[0], at[1], at[2], at[3],
                                                static_cast<uint8_t*>(at[4]), call.where);
        });
      },
      py::arg("conv"), py::arg("pool"),
      "A launch of conv2d_relu_max_pool2d, on input, weight, bias, output and argmax.");
  m.def(
      "conv2d_relu_max_pool2d_grad_weight_launch",
      [](const Conv2dProblem& conv, const MaxPool2dProblem& pool) {
        check_fused(conv, pool);
        return as_object([conv, pool](void* const* at, const Call& call) {
          cpu::kernels().conv2d_relu_max_pool2d_grad_weight(conv, pool, at[0],
                                                            static_cast<const uint8_t*>(at[1]),
                                                            at[2], at[3], at[4], call.where);
        });
      },
      py::arg("conv"), py::arg("pool"),
      "A launch of conv2d_relu_max_pool2d_grad_weight, on grad_output, argmax, input, grad_weight "
      "and grad_bias.");
}

}  // namespace

void bind_max_pool2d(py::module_& m) {
  bind_max_pool2d_problem(m);
  m.def(
      "max_pool2d",
      [](const MaxPool2dProblem& problem, uintptr_t input, uintptr_t output, uintptr_t argmax,
         int threads) {
        check_threads("max_pool2d", threads);
        py::gil_scoped_release release;
        cpu::kernels().max_pool2d(problem, pointer(input), pointer(output), pointer(argmax),
                                  threads);
      },
      py::arg("problem"), py::arg("input"), py::arg("output"), py::arg("argmax"),
      py::arg("threads"), "Writes output and argmax; arguments after problem are addresses.");
  m.def(
      "max_pool2d_grad",
      [](const MaxPool2dProblem& problem, uintptr_t grad_output, uintptr_t argmax,
         uintptr_t grad_input, int threads) {
        check_threads("max_pool2d_grad", threads);
        py::gil_scoped_release release;
        cpu::kernels().max_pool2d_grad(problem, pointer(grad_output), pointer(argmax),
                                       pointer(grad_input), threads);
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("argmax"), py::arg("grad_input"),
      py::arg("threads"), "Writes grad_input; arguments after problem are addresses.");

  m.def(
      "conv2d_relu_max_pool2d",
      [](const Conv2dProblem& conv, const MaxPool2dProblem& pool, uintptr_t input, uintptr_t weight,
         uintptr_t bias, uintptr_t output, uintptr_t argmax, int threads) {
        check_fused(conv, pool);
        check_threads("conv2d_relu_max_pool2d", threads);
        py::gil_scoped_release release;
        cpu::kernels().conv2d_relu_max_pool2d(conv, pool, pointer(input), pointer(weight),
                                              pointer(bias), pointer(output),
                                              pointer<uint8_t>(argmax), threads);
      },
      py::arg("conv"), py::arg("pool"), py::arg("input"), py::arg("weight"), py::arg("bias"),
      py::arg("output"), py::arg("argmax"), py::arg("threads"),
      "Writes output and argmax; arguments after the problems are addresses, bias 0 for none.");
  m.def(
      "conv2d_relu_max_pool2d_grad_weight",
      [](const Conv2dProblem& conv, const MaxPool2dProblem& pool, uintptr_t grad_output,
         uintptr_t argmax, uintptr_t input, uintptr_t grad_weight, uintptr_t grad_bias,
         int threads) {
        check_fused(conv, pool);
        check_threads("conv2d_relu_max_pool2d_grad_weight", threads);
        py::gil_scoped_release release;
        cpu::kernels().conv2d_relu_max_pool2d_grad_weight(
            conv, pool, pointer(grad_output), pointer<uint8_t>(argmax), pointer(input),
            pointer(grad_weight), pointer(grad_bias), threads);
      },
      py::arg("conv"), py::arg("pool"), py::arg("grad_output"), py::arg("argmax"), py::arg("input"),
      py::arg("grad_weight"), py::arg("grad_bias"), py::arg("threads"),
      "Writes grad_weight and, unless its address is 0, grad_bias.");
  bind_launches(m);
}

}  // namespace gdfast
