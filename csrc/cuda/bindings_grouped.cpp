// Binds the kernels of convolution in groups of few channels.
#include <pybind11/pybind11.h>

#include "../bindings.h"
#include "bindings.h"
#include "conv2d_grouped_whole.h"

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

// The kernels for every GPU, or Hopper's.
struct GroupedKernels {
  std::string ending;
  decltype(&grouped_why_not) why_not;
  decltype(&conv2d_grouped) forward;
  decltype(&conv2d_grad_input_grouped) grad_input;
  decltype(&grouped_splits) splits;
  decltype(&conv2d_grad_weight_grouped) grad_weight;
};

void bind(py::module_& m, const GroupedKernels& k) {
  const std::string grouped = "grouped" + k.ending, conv2d_grouped = "conv2d_" + grouped;
  m.def(
      (conv2d_grouped + "_why_not").c_str(),
      [k](const Conv2dProblem& problem, const std::string& op) {
        return k.why_not(problem, pass_named(op));
      },
      py::arg("problem"), py::arg("op"),
      ("Why " + conv2d_grouped +
       ", or its gradient of that name, does not take a problem, or an empty string. Addresses but "
       "the weight's must be multiples of 16 too.")
          .c_str());
  m.def(
      conv2d_grouped.c_str(),
      [k](const Conv2dProblem& problem, uintptr_t input, uintptr_t weight, uintptr_t bias,
          uintptr_t output, int device, uintptr_t stream) {
        launching(problem, [&] {
          k.forward(problem, pointer(input), pointer(weight), pointer(bias), pointer(output),
                    {device, stream});
        });
      },
      py::arg("problem"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
      py::arg("device"), py::arg("stream"),
      ("As conv2d without moments, for problems that " + conv2d_grouped +
       "_why_not has nothing against.")
          .c_str());
  m.def(("conv2d_grad_input_" + grouped).c_str(),
        [k](const Conv2dProblem& problem, uintptr_t grad_output, uintptr_t weight,
            uintptr_t grad_input, int device, uintptr_t stream) {
          launching(problem, [&] {
            k.grad_input(problem, pointer(grad_output), pointer(weight), pointer(grad_input),
                         {device, stream});
          });
        },
        py::arg("problem"), py::arg("grad_output"), py::arg("weight"), py::arg("grad_input"),
        py::arg("device"), py::arg("stream"), "As conv2d_grad_input, likewise.");
  const std::string grad_weight = "conv2d_grad_weight_" + grouped;
  m.def((conv2d_grouped + "_splits").c_str(), k.splits, py::arg("problem"),
        ("In how many splits " + grad_weight + " fills the current device.").c_str());
  m.def(
      grad_weight.c_str(),
      [k](const Conv2dProblem& problem, uintptr_t grad_output, uintptr_t input,
          uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t workspace, int64_t splits,
          int device, uintptr_t stream) {
        launching(problem, [&] {
          k.grad_weight(problem, pointer(grad_output), pointer(input), pointer(grad_weight),
                        pointer(grad_bias), pointer(workspace), splits, {device, stream});
        });
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("input"), py::arg("grad_weight"),
      py::arg("grad_bias"), py::arg("workspace"), py::arg("splits"), py::arg("device"),
      py::arg("stream"),
      "As conv2d_grad_weight, likewise and with its workspace: without grad_weight, whose parts "
      "stay there, it makes no gradient of the bias unless asked.");
}

}  // namespace

void bind_grouped(py::module_& m) {
  bind(m, {"", &grouped_why_not, &conv2d_grouped, &conv2d_grad_input_grouped, &grouped_splits,
           &conv2d_grad_weight_grouped});
  bind(m, {"_hopper", &grouped_hopper_why_not, &conv2d_grouped_hopper,
           &conv2d_grad_input_grouped_hopper, &grouped_hopper_splits,
           &conv2d_grad_weight_grouped_hopper});
  bind(m,
       {"_whole", &grouped_whole_why_not, &conv2d_grouped_whole, &conv2d_grad_input_grouped_whole,
        &grouped_whole_splits, &conv2d_grad_weight_grouped_whole});
}

}  // namespace gdfast::cuda
