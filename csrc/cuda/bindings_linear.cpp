// Binds the kernels of linear layers.
#include "../bindings.h"
#include "bindings.h"

namespace gdfast::cuda {

namespace py = pybind11;

namespace {

Linear make_problem(int64_t N, int64_t C, int64_t K, int64_t input_step, const std::string& input,
                    const std::string& weight, const std::string& output) {
  constexpr const char* kOwner = "LinearProblem";
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw py::value_error(std::string(kOwner) + ": " + what);
  };
  constexpr int64_t kMost = INT32_MAX - 1024;
  require(N >= 0 && C > 0 && K > 0 && N <= kMost && C <= kMost && K <= kMost,
          "sizes: expected N >= 0 and C, K > 0, less than 2^31");
  require(input_step >= 0, "input_step: expected >= 0");
  const Linear problem{N,
                       C,
                       K,
                       input_step,
                       dtype_named(kOwner, input),
                       dtype_named(kOwner, weight),
                       dtype_named(kOwner, output)};
  require(has_types(problem), "dtypes: expected one, or those of autocast");
  require(is_few(problem) || is_wide(problem),
          "sizes: expected at most 32 outputs, or half types, with C and K that 8 divides");
  return problem;
}

void forward(const Linear& p, const void* input, const void* weight, const void* bias, void* output,
             const Where& where) {
  const auto run = is_few(p) ? linear_few : linear_wide;
  run(p, input, weight, bias, output, where);
}

void backward(const Linear& p, const void* grad_output, const void* input, const void* weight,
              const LinearGradients& to, const Where& where) {
  const auto run = is_few(p) ? linear_few_backward : linear_wide_backward;
  run(p, grad_output, input, weight, to, where);
}

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<Linear>(m, "LinearProblem", "The sizes and dtypes of one linear layer.",
                     py::module_local())
      .def(py::init(&make_problem), py::arg("N"), py::arg("C"), py::arg("K"), py::arg("input_step"),
           py::arg("input"), py::arg("weight"), py::arg("output"))
      .def_property_readonly(
          "needs_alignment", [](const Linear& p) { return !is_few(p); },
          "Whether 16 must divide all addresses.");
  m.def(
      "linear",
      [](const Linear& problem, uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t output,
         int device, uintptr_t stream) {
        launching(problem, [&] {
          forward(problem, pointer(input), pointer(weight), pointer(bias), pointer(output),
                  {device, stream});
        });
      },
      py::arg("problem"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
      py::arg("device"), py::arg("stream"),
      "Writes output; arguments after problem are addresses, bias 0 for none.");
  m.def(
      "linear_launch",
      [](const Linear& problem) {
        return as_object([problem](void* const* at, const Call& call) {
          telling(problem,
                  [&] { forward(problem, at[0], at[1], at[2], at[3], {call.where, call.stream}); });
        });
      },
      py::arg("problem"), "A launch of linear.");
  m.def(
      "linear_backward",
      [](const Linear& problem, uintptr_t grad_output, uintptr_t input, uintptr_t weight,
         uintptr_t grad_input, uintptr_t grad_weight, uintptr_t grad_bias, int device,
         uintptr_t stream) {
        launching(problem, [&] {
          backward(problem, pointer(grad_output), pointer(input), pointer(weight),
                   {pointer(grad_input), pointer(grad_weight), pointer(grad_bias)},
                   {device, stream});
        });
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("input"), py::arg("weight"),
      py::arg("grad_input"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("device"),
      py::arg("stream"), "Writes the gradients whose addresses are not 0.");
  m.def(
      "linear_backward_launch",
      [](const Linear& problem) {
        return as_object([problem](void* const* at, const Call& call) {
          telling(problem, [&] {
            backward(problem, at[0], at[1], at[2], {at[3], at[4], at[5]},
                     {call.where, call.stream});
          });
        });
      },
      py::arg("problem"), "A launch of linear_backward.");
}

}  // namespace gdfast::cuda
