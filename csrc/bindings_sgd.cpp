// Binds the SGD kernel: lists of addresses in, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/kernels.h"
#include "linear_problem.h"
#include "sgd_arguments.h"
#include "sgd_launch.h"

namespace py = pybind11;

namespace gdfast {
namespace {

// A matrix with its columns in as many groups as there are threads: rows of the first group, of the
// second and so on. Threads take equal parts of all elements in their order, and the kernels of the
// layer divide its columns so: what a thread updates, its core then has in its caches.
void append_by_columns(const SgdTensor& matrix, int64_t rows, int64_t element_size, int threads,
                       std::vector<SgdTensor>* tensors) {
  const int64_t columns = matrix.numel / rows;
  const auto begin = [&](int64_t group) { return column_begin(group, threads, columns); };
  const auto at = [](void* memory, int64_t bytes) -> void* {
    return memory == nullptr ? nullptr : static_cast<char*>(memory) + bytes;
  };
  const int64_t state_size = matrix.master == nullptr ? element_size : 4;
  for (int64_t group = 0; group < threads; ++group) {
    const int64_t width = begin(group + 1) - begin(group);
    if (width == 0) continue;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t from = row * columns + begin(group);
      tensors->push_back(
          {at(matrix.param, from * element_size), at(matrix.grad, from * element_size),
           at(matrix.momentum, from * state_size), at(matrix.master, from * state_size), width});
    }
  }
}

// `rows` has those of the matrices to divide, and 1 for other params.
std::vector<SgdTensor> divided(const std::vector<SgdTensor>& tensors,
                               const std::vector<int64_t>& rows, int64_t element_size,
                               int threads) {
  std::vector<SgdTensor> parts;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 1 || tensors[i].numel % rows[i] != 0) {
      throw py::value_error("sgd: rows: expected divisors of numels");
    }
    if (rows[i] == 1) {
      parts.push_back(tensors[i]);
    } else {
      append_by_columns(tensors[i], rows[i], element_size, threads, &parts);
    }
  }
  return parts;
}

// Those of the params that have elements.
std::vector<int64_t> rows_of(const py::list& numels, const py::list& rows) {
  std::vector<int64_t> some;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (PyLong_AsLongLong(PyList_GET_ITEM(numels.ptr(), i)) <= 0) continue;  // no tensor has it
    some.push_back(rows[i].cast<int64_t>());
  }
  return some;
}

bool sgd(const py::list& params, const py::list& grads, const py::list& momenta,
         const py::list& masters, const py::list& numels, const std::string& dtype, double lr,
         double momentum, double dampening, double weight_decay, double grad_scale, bool nesterov,
         bool maximize, bool first_step, bool zero_grad, int threads, const py::list& rows) {
  const auto [type, element_size] = sgd_dtype(dtype);
  const SgdHyper hyper{type,     lr,       momentum,   dampening, weight_decay,    grad_scale,
                       nesterov, maximize, first_step, zero_grad, !masters.empty()};
  std::vector<SgdTensor> tensors = sgd_tensors(params, grads, momenta, masters, numels, hyper);
  if (!sgd_disjoint(tensors, element_size)) return false;
  if (!rows.empty() && threads > 1) {
    sgd_require_length(rows, params.size(), "rows");
    tensors = divided(tensors, rows_of(numels, rows), element_size, threads);
  }
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
        py::arg("rows") = py::list(),
        "Updates all params in one pass. They, grads, momenta (none where momentum is 0) and "
        "masters (none but for half types: then they and momenta are float32) are lists of "
        "addresses. rows are those of matrices whose columns threads divide between them, 1 for "
        "other params. False, with nothing done, where two params share memory.");
  m.def(
      "sgd_launch",
      [](const std::string& dtype, const std::vector<int64_t>& rows) {
        const int64_t element_size = sgd_dtype(dtype).second;
        PyObject* const capsule = sgd_launch_capsule([=](const SgdTensor* tensors, int64_t count,
                                                         const SgdHyper& hyper, const Call& call) {
          std::vector<SgdTensor> parts(tensors, tensors + count);
          if (!rows.empty() && call.where > 1) {
            parts = divided(parts, rows, element_size, call.where);
          }
          cpu::kernels().sgd(parts.data(), static_cast<int64_t>(parts.size()), hyper, call.where);
        });
        if (capsule == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(capsule);
      },
      py::arg("dtype"), py::arg("rows"), "The kernel for make_update; rows as for sgd.");
}

}  // namespace gdfast
