// Binds the SGD kernel: lists of addresses in, nothing of torch.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/kernels.h"
#include "sgd_arguments.h"

namespace py = pybind11;

namespace gdfast {
namespace {

bool sgd(const py::list& params, const py::list& grads, const py::list& momenta,
         const py::list& masters, const py::list& numels, const std::string& dtype, double lr,
         double momentum, double dampening, double weight_decay, double grad_scale, bool nesterov,
         bool maximize, bool first_step, bool zero_grad, int threads) {
  const auto [type, element_size] = sgd_dtype(dtype);
  const SgdHyper hyper{type,     lr,       momentum,   dampening, weight_decay,    grad_scale,
                       nesterov, maximize, first_step, zero_grad, !masters.empty()};
  const std::vector<SgdTensor> tensors =
      sgd_tensors(params, grads, momenta, masters, numels, hyper);
  if (!sgd_disjoint(tensors, element_size)) return false;
  py::gil_scoped_release release;
  cpu::kernels().sgd(tensors.data(), static_cast<int64_t>(tensors.size()), hyper, threads);
  return true;
}

}  // namespace

void bind_sgd(py::module_& m) {
  m.def("sgd", &sgd, py::arg("params"), py::arg("grads"), py::arg("momenta"), py::arg("masters"),
        py::arg("numels"), py::arg("dtype"), py::arg("lr"), py::arg("momentum"),
        py::arg("dampening"), py::arg("weight_decay"), py::arg("grad_scale"), py::arg("nesterov"),
        py::arg("maximize"), py::arg("first_step"), py::arg("zero_grad"), py::arg("threads"),
        "Updates all params in one pass. They, grads, momenta (none where momentum is 0) and "
        "masters (none but for half types: then they and momenta are float32) are lists of "
        "addresses. False, with nothing done, where two params share memory.");
}

}  // namespace gdfast
