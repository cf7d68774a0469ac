// Binds the SGD kernel: lists of addresses in, converted by hand because a step on 160 small
// tensors spends more time here than in the arithmetic.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace gdfast {
namespace {

// The dtype that a name stands for, with its size in bytes.
std::pair<DType, int64_t> dtype_named(const std::string& name) {
  if (name == "float32") return {DType::kFloat32, 4};
  if (name == "float64") return {DType::kFloat64, 8};
  if (name == "bfloat16") return {DType::kBFloat16, 2};
  if (name == "float16") return {DType::kFloat16, 2};
  throw py::value_error("sgd: dtype: expected float32, float64, bfloat16 or float16, got " + name);
}

void* address_at(const py::list& addresses, size_t index) {
  void* address = PyLong_AsVoidPtr(PyList_GET_ITEM(addresses.ptr(), index));
  if (address == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return address;
}

void require_length(const py::list& list, size_t expected, const char* name) {
  if (list.size() != expected) {
    throw py::value_error("sgd: " + std::string(name) + ": expected " + std::to_string(expected) +
                          " entries as in params, got " + std::to_string(list.size()));
  }
}

// Whether no two tensors of one role share memory: threads would update it at the same time.
bool disjoint(std::vector<std::pair<char*, char*>>& ranges) {
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return false;
  }
  return true;
}

bool sgd(const py::list& params, const py::list& grads, const py::list& momenta,
         const py::list& numels, const std::string& dtype, double lr, double momentum,
         double dampening, double weight_decay, double grad_scale, bool nesterov, bool maximize,
         bool first_step, bool zero_grad, int threads) {
  const auto [type, size] = dtype_named(dtype);
  const SgdHyper hyper{type,       lr,       momentum, dampening,  weight_decay,
                       grad_scale, nesterov, maximize, first_step, zero_grad};
  const size_t count = params.size();
  require_length(grads, count, "grads");
  require_length(numels, count, "numels");
  require_length(momenta, momentum == 0 ? 0 : count, "momenta");

  std::vector<SgdTensor> tensors;
  std::vector<std::pair<char*, char*>> ranges;
  tensors.reserve(count);
  ranges.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = PyLong_AsLongLong(PyList_GET_ITEM(numels.ptr(), i));
    if (numel == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (numel == 0) continue;
    void* const param = address_at(params, i);
    void* const grad = address_at(grads, i);
    void* const buffer = momentum == 0 ? nullptr : address_at(momenta, i);
    tensors.push_back({param, grad, buffer, numel});
    ranges.emplace_back(static_cast<char*>(param), static_cast<char*>(param) + numel * size);
  }
  if (!disjoint(ranges)) return false;

  py::gil_scoped_release release;
  cpu::kernels().sgd(tensors.data(), static_cast<int64_t>(tensors.size()), hyper, threads);
  return true;
}

}  // namespace

void bind_sgd(py::module_& m) {
  m.def(
      "sgd", &sgd, py::arg("params"), py::arg("grads"), py::arg("momenta"), py::arg("numels"),
      py::arg("dtype"), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
      py::arg("weight_decay"), py::arg("grad_scale"), py::arg("nesterov"), py::arg("maximize"),
      py::arg("first_step"), py::arg("zero_grad"), py::arg("threads"),
      "Updates params in one pass, whose addresses (as those of grads and momenta, which is empty "
      "where momentum is 0) come as lists.");
}

}  // namespace gdfast
