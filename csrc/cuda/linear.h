// The launchers of linear layers' kernels, and what they are told.
#pragma once

#include <cstdint>

#include "conv2d.h"

namespace gdfast::cuda {

// output[n, k] = sum over c of input[n, c] * weight[k, c] + bias[k]
//
// Rows of input are `input_step` elements apart, all else lies one after the other. bias is of
// weight's type, gradients of that of what they are of. Types are all the same, or those of
// autocast: output of a half type, weight float32, input of either.
struct Linear {
  int64_t N, C, K, input_step;
  DType input, weight, output;
};

// Which kernels there are. Few outputs are products of rows, wide layers those of tiles on the
// tensor cores: of half types (or what is rounded to them), C and K that 8 divides, and addresses
// that 16 divides.
constexpr int64_t kMostFewOutputs = 32;
inline bool is_half(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }
inline bool has_types(const Linear& p) {
  if (p.weight == p.output) return p.input == p.output;
  return is_half(p.output) && p.weight == DType::kFloat32 &&
         (p.input == p.output || p.input == DType::kFloat32);
}
inline bool is_few(const Linear& p) { return p.K <= kMostFewOutputs; }
inline bool is_wide(const Linear& p) {
  return is_half(p.output) && p.C % 8 == 0 && p.K % 8 == 0 && p.input_step % 8 == 0;
}

// Each in one launch. Addresses of gradients that are not wanted are null, and those of the tensor
// that only they need may be.
struct LinearGradients {
  void *input, *weight, *bias;
};
void linear_few(const Linear& problem, const void* input, const void* weight, const void* bias,
                void* output, const Where& where);
void linear_few_backward(const Linear& problem, const void* grad_output, const void* input,
                         const void* weight, const LinearGradients& to, const Where& where);
void linear_wide(const Linear& problem, const void* input, const void* weight, const void* bias,
                 void* output, const Where& where);
void linear_wide_backward(const Linear& problem, const void* grad_output, const void* input,
                          const void* weight, const LinearGradients& to, const Where& where);

}  // namespace gdfast::cuda
