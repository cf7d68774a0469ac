// The one description of a 2-D max pooling: what its kernels receive beside raw pointers.
#pragma once

#include <cstdint>

#include "conv2d_problem.h"

namespace gdfast {

// input   [N, C, H, W]
// output  [N, C, P, Q]
// argmax  [N, C, P, Q]   r * S + s, the place within the window where the largest value is
//
//   output[n, c, p, q] = max over r < R, s < S of input[n, c, p * stride_h - pad_h + r *
//   dilation_h,
//                                                          q * stride_w - pad_w + s * dilation_w]
//
// Places outside of the image take no part. Of equal values the first in the order of r, s counts,
// of several NaN the last. Where nothing is taken, argmax has all bits set: in a window that sees
// no pixel, whose output is -inf, and with `relu` where no value is above 0, whose output is 0.
struct MaxPool2dProblem {
  int64_t N, C, H, W;
  int64_t R, S;
  int64_t P, Q;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
  DType dtype;
  // In a gradient `input` strides are those of grad_input, `output` those of grad_output.
  Strides4 input, output, argmax;
  bool relu;

  // argmax is made of uint8_t where places and the mark fit, else of int32_t.
  bool is_narrow() const { return R * S <= 255; }
};

}  // namespace gdfast
