// The one description of a linear layer: what its kernels receive beside raw pointers.
#pragma once

#include <cstdint>

#include "conv2d_problem.h"

namespace gdfast {

// output[n, k] = sum over c of input[n, c] * weight[k, c] + bias[k]
//
// The elements of a row lie side by side, rows of input `input_step` apart, all others one after
// the other. dtype is float32 or float64.
struct LinearProblem {
  int64_t N, C, K;
  int64_t input_step;
  DType dtype;
};

}  // namespace gdfast
