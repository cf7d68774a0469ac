// The one description of a batch normalisation with what follows it: the only thing a kernel
// receives beside raw pointers.
#pragma once

#include <cstdint>

#include "conv2d_problem.h"

namespace gdfast {

// input, residual, output [N, C, S], S the pixels of an image, all in one dense memory order.
//
//   output = activation((input - mean) * invstd * weight + bias + residual)
//
// mean and invstd = 1 / sqrt(variance + eps) are per channel: in training over N and S.
struct BatchNormProblem {
  int64_t N, C, S;
  bool channels_last;  // in memory [N][S][C], else [N][C][S]
  DType dtype;         // of input, residual, output and their gradients
  DType param_dtype;   // of weight, bias, their gradients and the running statistics
  Activation activation;
  double negative_slope;
  double eps;
};

// Sums over N and S that somebody else has taken, a kernel that wrote the input say: of
// input - shift and of its square, per channel. Any shift gives the same statistics but for
// rounding; one near the mean keeps the squares from cancelling.
struct BatchNormSums {
  const double* shift;
  const double* sum;
  const double* sum_of_squares;
};

// The addresses of one forward pass. weight, bias, residual and the running statistics may be
// null; mean and invstd [C] are written, in the type that sums are taken in.
struct BatchNormForward {
  const void* input;
  const void* weight;
  const void* bias;
  const void* residual;
  void* running_mean;
  void* running_var;
  void* output;
  void* mean;
  void* invstd;
  void* mask;  // written where not null, by CUDA's kernels alone: see PreActivation::kMask
};

// Where the backward pass finds the argument of the activation.
enum class PreActivation : int32_t {
  kInput,     // computed from input again: no bytes beyond those that are read anyway
  kResidual,  // computed from input and residual: leaky_relu and silu
  kOutput,    // the output tells as much: relu, relu6, and leaky_relu with a slope of at least 0
  kMask,      // a bit of an element tells as much for these; a byte for each 16 bytes of output
};

// The addresses of one backward pass. residual_or_output is null, the residual, the output or its
// mask, as PreActivation says; all gradients but grad_output are written where not null.
struct BatchNormBackward {
  const void* grad_output;
  const void* input;
  const void* residual_or_output;
  const void* weight;
  const void* bias;
  const void* mean;
  const void* invstd;
  void* grad_input;
  void* grad_weight;
  void* grad_bias;
  void* grad_residual;
};

}  // namespace gdfast
