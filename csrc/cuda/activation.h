// Activations and their gradients on a thread's values. The kind is looked at once for all of them:
// kernels that are bound by memory need no instance for each.
#pragma once

#include <cmath>

#include "../conv2d_problem.h"
#include "device.h"

namespace gdfast::cuda {

// values = activation(values). A NaN stays one: no comparison with it is true.
template <int kCount, typename A>
GDFAST_DEVICE void activate(A (&values)[kCount], Activation activation, A negative_slope) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
#pragma unroll
      for (A& z : values) z = z < 0 ? A(0) : z;
      break;
    case Activation::kRelu6:
#pragma unroll
      for (A& z : values) z = z < 0 ? A(0) : z > 6 ? A(6) : z;
      break;
    case Activation::kLeakyRelu:
#pragma unroll
      for (A& z : values) z = z > 0 ? z : z * negative_slope;
      break;
    case Activation::kSilu:
#pragma unroll
      for (A& z : values) z = z / (A(1) + std::exp(-z));
      break;
  }
}

// grads = grads * activation'(z); at a kink the derivative is native's. For relu, relu6 and
// leaky_relu with a slope of at least 0, activation(z) in the place of z gives the same.
template <int kCount, typename A>
GDFAST_DEVICE void activation_gradient(A (&grads)[kCount], const A (&z)[kCount],
                                       Activation activation, A negative_slope) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) grads[i] = z[i] <= 0 ? A(0) : grads[i];
      break;
    case Activation::kRelu6:
#pragma unroll
      for (int i = 0; i < kCount; ++i) grads[i] = z[i] <= 0 || z[i] >= 6 ? A(0) : grads[i];
      break;
    case Activation::kLeakyRelu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) grads[i] = z[i] > 0 ? grads[i] : grads[i] * negative_slope;
      break;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A sigmoid = A(1) / (A(1) + std::exp(-z[i]));
        grads[i] *= sigmoid * (z[i] * (A(1) - sigmoid) + A(1));
      }
      break;
  }
}

}  // namespace gdfast::cuda
