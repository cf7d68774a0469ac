// The one description of a 2-D convolution: the only thing a kernel receives beside raw pointers.
#pragma once

#include <cstdint>

namespace gdfast {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// How a problem is solved. Any problem may ask for any algorithm: what winograd_fits or its like
// refuses falls to kDirect. The choice is a matter of speed and error. kBf16 multiplies bfloat16 as
// it is, where the instruction set has products of it; kDirect widens it to float32. kStrassen is
// for kernels of 1x1.
enum class Algorithm : int32_t { kDirect, kWinograd, kBf16, kStrassen };

enum class Activation : int32_t { kNone, kRelu, kRelu6, kLeakyRelu, kSilu };

// Element strides of a 4-D tensor, in the order of its logical axes. Any value is legal, 0 too:
// the gradient of y.sum() comes with strides 0, 0, 0, 0.
struct Strides4 {
  int64_t n, c, h, w;
};

// input       [N, C, H, W]
// weight      [K, C / groups, R, S]
// output      [N, K, P, Q]
//
//   output[n, k, p, q] = activation(sum over c, r, s of
//       weight[k, c, r, s] * input[n, c + group(k) * C / groups,
//                                  p * stride_h - pad_h + r * dilation_h,
//                                  q * stride_w - pad_w + s * dilation_w])
//
// pad_h and pad_w are the rows above and the columns to the left. What lies below and to the right
// follows from P and Q: reads outside of the input give zero wherever they fall.
struct Conv2dProblem {
  int64_t N, C, H, W;
  int64_t K, R, S;
  int64_t P, Q;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
  int64_t groups;
  DType dtype;
  // In a gradient, `input` strides are those of grad_input, `weight` those of grad_weight and
  // `output` those of grad_output where that tensor takes the place of its primal.
  Strides4 input, weight, output;
  Algorithm algorithm;
  // Of the forward pass; the gradients are those of a convolution without one.
  Activation activation = Activation::kNone;
  double negative_slope = 0;
  // That grad_input is added to what is there, in kernels that conv2d_adds() names.
  bool adds = false;

  bool is_depthwise() const { return groups > 1 && C == groups && K == groups; }
};

// The addresses of both gradients of a convolution. grad_input and grad_bias may be null.
struct Conv2dGradients {
  const void* input;
  const void* weight;
  void* grad_input;
  void* grad_weight;
  void* grad_bias;
};

}  // namespace gdfast
