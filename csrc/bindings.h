// One function per group of kernels; each adds its names to the Python module. And what they share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "conv2d_problem.h"
#include "launch.h"

namespace gdfast {

inline DType dtype_named(const std::string& owner, const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float64") return DType::kFloat64;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw pybind11::value_error(
      owner + ": dtype: expected float32, float64, bfloat16 or float16, got " + name);
}

inline Activation activation_named(const std::string& owner, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  if (name == "silu") return Activation::kSilu;
  throw pybind11::value_error(
      owner + ": activation: expected none, relu, relu6, leaky_relu or silu, got " + name);
}

inline void check_threads(const char* op, int threads) {
  if (threads >= 1) return;
  throw pybind11::value_error(std::string(op) + ": threads: expected >= 1, got " +
                              std::to_string(threads));
}

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Python's side of a launch.
inline pybind11::object as_object(Launch launch) {
  PyObject* const capsule = launch_capsule(std::move(launch));
  if (capsule == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(capsule);
}

void bind_batch_norm(pybind11::module_& m);
void bind_conv2d(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_max_pool2d(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_nms(pybind11::module_& m);
void bind_sgd(pybind11::module_& m);

}  // namespace gdfast
