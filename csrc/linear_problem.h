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

// Internal to each file, as those for different instruction sets must not share one.
namespace {

// The first of a part of a matrix's columns: parts begin at cache lines. The layer's kernels and
// the update of its weight divide them alike, so that each core finds in its caches what it has
// written.
inline int64_t column_begin(int64_t part, int64_t parts, int64_t columns) {
  return part == parts ? columns : part * columns / parts / 16 * 16;
}

}  // namespace

}  // namespace gdfast
