// Binds the pooling kernels: problems are checked once, when they are made.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace gdfast {
namespace {

using Pair = std::array<int64_t, 2>;
using Four = std::array<int64_t, 4>;

void require(bool holds, const char* what) {
  if (!holds) throw py::value_error(std::string("MaxPool2dProblem: ") + what);
}

MaxPool2dProblem make_problem(const std::array<int64_t, 8>& sizes, const Pair& stride,
                              const Pair& padding, const Pair& dilation, const std::string& dtype,
                              const Four& input, const Four& output, const Four& argmax,
                              bool relu) {
  const auto [N, C, H, W, R, S, P, Q] = sizes;
  require(N >= 0 && C >= 0, "sizes: expected N, C >= 0");
  require(H > 0 && W > 0 && R > 0 && S > 0 && P > 0 && Q > 0,
          "sizes: expected H, W, R, S, P, Q > 0");
  require(stride[0] > 0 && stride[1] > 0, "stride: expected both > 0");
  require(padding[0] >= 0 && padding[1] >= 0, "padding: expected both >= 0");
  require(dilation[0] > 0 && dilation[1] > 0, "dilation: expected both > 0");
  return {N,
          C,
          H,
          W,
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
          dtype_named("MaxPool2dProblem", dtype),
          {input[0], input[1], input[2], input[3]},
          {output[0], output[1], output[2], output[3]},
          {argmax[0], argmax[1], argmax[2], argmax[3]},
          relu};
}

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

}  // namespace

void bind_max_pool2d(py::module_& m) {
  py::class_<MaxPool2dProblem>(m, "MaxPool2dProblem",
                               "The geometry, dtype and element strides of one max pooling.")
      .def(py::init(&make_problem), py::arg("sizes"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("dtype"), py::arg("input_strides"),
           py::arg("output_strides"), py::arg("argmax_strides"), py::arg("relu") = false);

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
}

}  // namespace gdfast
