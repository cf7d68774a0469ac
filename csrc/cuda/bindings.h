// One function per group of kernels; each adds its names to the Python module. And what they share.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "../batch_norm_problem.h"
#include "../conv2d_problem.h"
#include "../max_pool2d_problem.h"
#include "linear.h"

namespace gdfast::cuda {

void bind_batch_norm(pybind11::module_& m);
void bind_conv2d(pybind11::module_& m);
void bind_depthwise(pybind11::module_& m);
void bind_grouped(pybind11::module_& m);
void bind_hopper_float32(pybind11::module_& m);
void bind_launches(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_max_pool2d(pybind11::module_& m);
void bind_stem(pybind11::module_& m);
void bind_transpose(pybind11::module_& m);

// --- What a launch was of, for the words of its error -----------------------------------------

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      break;
  }
  return "float16";
}

template <typename... Sizes>
std::string listed(Sizes... sizes) {
  std::string text;
  ((text += (text.empty() ? "[" : ", ") + std::to_string(sizes)), ...);
  return text + "]";
}

inline std::string told(const Conv2dProblem& p) {
  return std::string(name_of(p.dtype)) + ", input " + listed(p.N, p.C, p.H, p.W) + ", weight " +
         listed(p.K, p.C / p.groups, p.R, p.S) + ", stride " + listed(p.stride_h, p.stride_w) +
         ", padding " + listed(p.pad_h, p.pad_w) + ", dilation " +
         listed(p.dilation_h, p.dilation_w) + ", groups " + std::to_string(p.groups);
}

inline std::string told(const BatchNormProblem& p) {
  return std::string(name_of(p.dtype)) + ", input " + listed(p.N, p.C, p.S) +
         (p.channels_last ? ", channels last" : "");
}

inline std::string told(const Linear& p) {
  return std::string(name_of(p.output)) + ", input " + listed(p.N, p.C) + " of " +
         name_of(p.input) + ", weight " + listed(p.K, p.C) + " of " + name_of(p.weight);
}

inline std::string told(const MaxPool2dProblem& p) {
  return std::string(name_of(p.dtype)) + ", input " + listed(p.N, p.C, p.H, p.W) + ", window " +
         listed(p.R, p.S) + ", stride " + listed(p.stride_h, p.stride_w);
}

// Runs what launches kernels. An error, which has the operation's name already, is thrown on with
// the problem's sizes.
template <typename Problem, typename Run>
void telling(const Problem& problem, Run&& run) {
  try {
    std::forward<Run>(run)();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(error.what()) + " (" + told(problem) + ")");
  }
}

// The same without Python's lock.
template <typename Problem, typename Run>
void launching(const Problem& problem, Run&& run) {
  pybind11::gil_scoped_release release;
  telling(problem, std::forward<Run>(run));
}

}  // namespace gdfast::cuda
