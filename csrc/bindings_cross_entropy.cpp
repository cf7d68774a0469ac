// Binds the cross entropy of few classes.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "cpu/cross_entropy.h"

namespace gdfast {
namespace {

namespace py = pybind11;

cpu::CrossEntropyProblem make_problem(int64_t N, int64_t C, int64_t step, int64_t ignored,
                                      double smoothing, bool mean) {
  if (N < 0 || C < 1) throw py::value_error("CrossEntropyProblem: sizes: expected N >= 0, C >= 1");
  return {N, C, step, ignored, smoothing, mean};
}

void check_classes(const cpu::CrossEntropyProblem& problem, const int64_t* classes) {
  const int64_t row = cpu::first_wrong_class(problem, classes);
  if (row == problem.N) return;
  throw py::index_error("Target " + std::to_string(classes[row]) + " is out of bounds.");
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  py::class_<cpu::CrossEntropyProblem>(m, "CrossEntropyProblem", "What cross_entropy computes.",
                                       py::module_local())
      .def(py::init(&make_problem), py::arg("N"), py::arg("C"), py::arg("step"), py::arg("ignored"),
           py::arg("smoothing"), py::arg("mean"));
  m.def(
      "cross_entropy",
      [](const cpu::CrossEntropyProblem& problem, uintptr_t logits, uintptr_t classes,
         uintptr_t loss, uintptr_t probabilities) {
        check_classes(problem, pointer<const int64_t>(classes));
        cpu::cross_entropy(problem, pointer<const float>(logits), pointer<const int64_t>(classes),
                           pointer<float>(loss), pointer<float>(probabilities));
      },
      py::arg("problem"), py::arg("logits"), py::arg("classes"), py::arg("loss"),
      py::arg("probabilities"),
      "Writes loss, and probabilities unless 0. Arguments after problem are addresses, of float32 "
      "and, for classes, int64. Raises IndexError for a class that there is not.");
  m.def(
      "cross_entropy_backward",
      [](const cpu::CrossEntropyProblem& problem, uintptr_t grad_loss, uintptr_t probabilities,
         uintptr_t classes, uintptr_t grad_logits) {
        check_classes(problem, pointer<const int64_t>(classes));
        cpu::cross_entropy_backward(problem, pointer<const float>(grad_loss),
                                    pointer<const float>(probabilities),
                                    pointer<const int64_t>(classes), pointer<float>(grad_logits));
      },
      py::arg("problem"), py::arg("grad_loss"), py::arg("probabilities"), py::arg("classes"),
      py::arg("grad_logits"), "Writes grad_logits.");
}

}  // namespace gdfast
