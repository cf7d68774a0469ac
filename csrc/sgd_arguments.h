// What the bindings of both SGD kernels do with their arguments: lists of addresses, converted by
// hand because a step on 160 small tensors spends more time here than in the arithmetic.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "sgd_math.h"

namespace gdfast {

// The dtype that a name stands for, with its size in bytes.
inline std::pair<DType, int64_t> sgd_dtype(const std::string& name) {
  if (name == "float32") return {DType::kFloat32, 4};
  if (name == "float64") return {DType::kFloat64, 8};
  if (name == "bfloat16") return {DType::kBFloat16, 2};
  if (name == "float16") return {DType::kFloat16, 2};
  throw pybind11::value_error("sgd: dtype: expected float32, float64, bfloat16 or float16, got " +
                              name);
}

inline void* sgd_address(const pybind11::list& addresses, size_t index) {
  void* address = PyLong_AsVoidPtr(PyList_GET_ITEM(addresses.ptr(), index));
  if (address == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
  return address;
}

inline void sgd_require_length(const pybind11::list& list, size_t expected, const char* name) {
  if (list.size() != expected) {
    throw pybind11::value_error("sgd: " + std::string(name) + ": expected " +
                                std::to_string(expected) + " entries, as many as params, got " +
                                std::to_string(list.size()));
  }
}

// The tensors that have elements. momenta is empty where there is no momentum, masters where there
// are no master copies.
inline std::vector<SgdTensor> sgd_tensors(const pybind11::list& params, const pybind11::list& grads,
                                          const pybind11::list& momenta,
                                          const pybind11::list& masters,
                                          const pybind11::list& numels, const SgdHyper& hyper) {
  const size_t count = params.size();
  const bool momentum = hyper.momentum != 0;
  if (hyper.master && hyper.dtype != DType::kBFloat16 && hyper.dtype != DType::kFloat16) {
    throw pybind11::value_error(
        "sgd: masters: expected none, because only params of half types "
        "have master copies");
  }
  sgd_require_length(grads, count, "grads");
  sgd_require_length(numels, count, "numels");
  sgd_require_length(momenta, momentum ? count : 0, "momenta");
  sgd_require_length(masters, hyper.master ? count : 0, "masters");
  std::vector<SgdTensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = PyLong_AsLongLong(PyList_GET_ITEM(numels.ptr(), i));
    if (numel == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    if (numel <= 0) continue;
    tensors.push_back({sgd_address(params, i), sgd_address(grads, i),
                       momentum ? sgd_address(momenta, i) : nullptr,
                       hyper.master ? sgd_address(masters, i) : nullptr, numel});
  }
  return tensors;
}

// Whether no two parameters share memory: threads would update it at the same time.
inline bool sgd_disjoint(const std::vector<SgdTensor>& tensors, int64_t element_size) {
  std::vector<std::pair<char*, char*>> ranges;
  ranges.reserve(tensors.size());
  for (const SgdTensor& tensor : tensors) {
    char* const param = static_cast<char*>(tensor.param);
    ranges.emplace_back(param, param + tensor.numel * element_size);
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return false;
  }
  return true;
}

}  // namespace gdfast
