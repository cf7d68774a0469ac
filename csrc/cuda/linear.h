// Linear layers with few outputs: a general product of matrices has nothing to share there, and
// looks for a kernel at every call.
#pragma once

#include <cstdint>

#include "../linear_problem.h"
#include "conv2d.h"

namespace gdfast::cuda {

constexpr int kMostLinearOutputs = 16;
constexpr int64_t kMostLinearRows = 512;  // of backward, whose blocks hold all of grad_output

// output [N, K] = input [N, C] times weight [K, C] transposed, plus bias [K], which may be null;
// all are contiguous, of float32 or a half type, K <= 16. Sums are taken in float32.
void linear(const LinearProblem& problem, const void* input, const void* weight, const void* bias,
            void* output, const Where& where);

// Its gradients; each may be null. N <= 512.
void linear_backward(const LinearProblem& problem, const void* grad_output, const void* input,
                     const void* weight, void* grad_input, void* grad_weight, void* grad_bias,
                     const Where& where);

}  // namespace gdfast::cuda
