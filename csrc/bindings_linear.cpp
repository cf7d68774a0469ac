// Binds the kernels of linear layers.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "cpu/kernels.h"

namespace gdfast {
namespace {

namespace py = pybind11;

LinearProblem make_problem(int64_t N, int64_t C, int64_t K, int64_t input_step,
                           const std::string& dtype) {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw py::value_error(std::string("LinearProblem: ") + what);
  };
  // A backward kernel computes whole vectors, of 16 float32 at most.
  require(N >= 0 && C >= 16 && K >= 0, "sizes: expected N, K >= 0 and C >= 16");
  require(input_step >= 0, "input_step: expected >= 0");
  const DType type = dtype_named("LinearProblem", dtype);
  require(type == DType::kFloat32 || type == DType::kFloat64, "dtype: expected float32 or float64");
  return {N, C, K, input_step, type};
}

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<LinearProblem>(m, "LinearProblem", "The sizes and dtype of one linear layer.",
                            py::module_local())
      .def(py::init(&make_problem), py::arg("N"), py::arg("C"), py::arg("K"), py::arg("input_step"),
           py::arg("dtype"));
  m.def(
      "linear",
      [](const LinearProblem& problem, uintptr_t input, uintptr_t weight, uintptr_t bias,
         uintptr_t output, int threads) {
        check_threads("linear", threads);
        py::gil_scoped_release release;
        cpu::kernels().linear(problem, pointer(input), pointer(weight), pointer(bias),
                              pointer(output), threads);
      },
      py::arg("problem"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
      py::arg("threads"), "Writes output; arguments after problem are addresses, bias 0 for none.");
  m.def(
      "linear_backward",
      [](const LinearProblem& problem, uintptr_t grad_output, uintptr_t input, uintptr_t weight,
         uintptr_t grad_input, uintptr_t grad_weight, uintptr_t grad_bias, int threads) {
        check_threads("linear_backward", threads);
        py::gil_scoped_release release;
        cpu::kernels().linear_backward(problem, pointer(grad_output), pointer(input),
                                       pointer(weight), pointer(grad_input), pointer(grad_weight),
                                       pointer(grad_bias), threads);
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("input"), py::arg("weight"),
      py::arg("grad_input"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("threads"),
      "Writes the gradients whose addresses are not 0.");
  m.def(
      "linear_launch",
      [](const LinearProblem& problem) {
        return as_object([problem](void* const* at, const Call& call) {
          cpu::kernels().linear(problem, at[0], at[1], at[2], at[3], call.where);
        });
      },
      py::arg("problem"), "A launch of linear, on input, weight, bias and output.");
  m.def(
      "linear_backward_launch",
      [](const LinearProblem& problem) {
        return as_object([problem](void* const* at, const Call& call) {
          cpu::kernels().linear_backward(problem, at[0], at[1], at[2], at[3], at[4], at[5],
                                         call.where);
        });
      },
      py::arg("problem"),
      "A launch of linear_backward, on grad_output, input, weight and the three gradients.");
}

}  // namespace gdfast
