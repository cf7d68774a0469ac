// Depthwise convolution: what its passes share. Each filter reads one channel, c = k / multiplier.
//
//   output[n, k, p, q] = activation(bias[k] + sum over r, s of weight[k, 0, r, s] *
//       input[n, c, p * stride_h - pad_h + r * dilation_h, q * stride_w - pad_w + s * dilation_w])
//
// Common filters have kernels in which a thread makes several outputs, so that registers hold what
// these share: depthwise_columns.h in channels_last, depthwise_strips.h for 3 x 3 in NCHW; and, for
// half types in channels_last, depthwise_tensor.h on the tensor cores and, on Hopper,
// depthwise_rows.h, depthwise_boxes.h and depthwise_toeplitz.h. The rest has one for every shape,
// an output per thread.
#pragma once

#include <string>

#include "../batch_norm_problem.h"
#include "conv2d.h"
#include "images.h"

namespace gdfast::cuda {

// Channels that a thread takes in channels_last: 16 bytes in float32. Half types could move 16
// bytes too, but sums, pixels and weights of 8 channels would leave registers for a single output.
constexpr int kDepthwiseVector = 4;

struct DepthwiseArguments {
  int N, C, H, W;  // what is read
  int K, P, Q;     // what is written
  int R, S;
  int multiplier;  // K / C
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  ImageStrides input, output;
  int weight_k, weight_r, weight_s;  // element strides
  Activation activation;
  double negative_slope;
};

inline DepthwiseArguments depthwise_arguments(const Conv2dProblem& p) {
  DepthwiseArguments a{};
  a.N = static_cast<int>(p.N);
  a.C = static_cast<int>(p.C);
  a.H = static_cast<int>(p.H);
  a.W = static_cast<int>(p.W);
  a.K = static_cast<int>(p.K);
  a.P = static_cast<int>(p.P);
  a.Q = static_cast<int>(p.Q);
  a.R = static_cast<int>(p.R);
  a.S = static_cast<int>(p.S);
  a.multiplier = static_cast<int>(p.K / p.C);
  a.stride_h = static_cast<int>(p.stride_h);
  a.stride_w = static_cast<int>(p.stride_w);
  a.pad_h = static_cast<int>(p.pad_h);
  a.pad_w = static_cast<int>(p.pad_w);
  a.dilation_h = static_cast<int>(p.dilation_h);
  a.dilation_w = static_cast<int>(p.dilation_w);
  a.input = ImageStrides::of(p.input);
  a.output = ImageStrides::of(p.output);
  a.weight_k = static_cast<int>(p.weight.n);
  a.weight_r = static_cast<int>(p.weight.h);
  a.weight_s = static_cast<int>(p.weight.w);
  a.activation = Activation::kNone;
  return a;
}

// Whether threads may take vectors of channels, from addresses that 16 divides.
inline bool has_depthwise_vectors(const Conv2dProblem& p, bool aligned) {
  return aligned && p.K == p.C && p.C % kDepthwiseVector == 0 && p.dtype != DType::kFloat64 &&
         has_channel_vectors(p.input, kDepthwiseVector) &&
         has_channel_vectors(p.output, kDepthwiseVector);
}

template <int kTaps, int kSteps>
struct FilterKind {
  static constexpr int kSize = kTaps;
  static constexpr int kStride = kSteps;
};

// Calls f with the size and the stride of a filter that has kernels of its own; returns whether
// there are any.
template <typename F>
bool with_common_filter(const DepthwiseArguments& a, F&& f) {
  const bool square = a.R == a.S && a.stride_h == a.stride_w;
  const bool dense = a.dilation_h == 1 && a.dilation_w == 1;
  if (!square || !dense || a.stride_h > 2 || a.multiplier > 1) return false;
  const bool steps = a.stride_h == 2;
  if (a.R == 3) {
    steps ? f(FilterKind<3, 2>{}) : f(FilterKind<3, 1>{});
  } else if (a.R == 5) {
    steps ? f(FilterKind<5, 2>{}) : f(FilterKind<5, 1>{});
  } else if (a.R == 7 && !steps) {
    f(FilterKind<7, 1>{});
  } else {
    return false;
  }
  return true;
}

// How images are read: number by number, in vectors of channels, in slabs for the tensor cores, or,
// on Hopper, in whole rows, or in boxes for the tensor cores, by diagonals or by bands.
enum class DepthwiseWay { kNumbers, kVectors, kSlabs, kNarrowSlabs, kRows, kBoxes, kToeplitz };

// The passes of a convolution in which every group has one channel; tensors as for conv2d.h. What
// is asked for is taken for problems that its why_not has nothing against, where 16 divides the
// images' addresses; else the best that fits is.
std::string depthwise_tensor_why_not(const Conv2dProblem& problem);
std::string depthwise_rows_why_not(const Conv2dProblem& problem);
std::string depthwise_boxes_why_not(const Conv2dProblem& problem);
std::string depthwise_toeplitz_why_not(const Conv2dProblem& problem);
void depthwise_conv2d(const Conv2dProblem& problem, DepthwiseWay wanted, const void* input,
                      const void* weight, const void* bias, void* output, const Where& where);
void depthwise_conv2d_grad_input(const Conv2dProblem& problem, DepthwiseWay wanted,
                                 const void* grad_output, const void* weight, void* grad_input,
                                 const Where& where);
int64_t depthwise_conv2d_grad_weight_workspace(const Conv2dProblem& problem, DepthwiseWay wanted);
void depthwise_conv2d_grad_weight(const Conv2dProblem& problem, DepthwiseWay wanted,
                                  const void* grad_output, const void* input, void* grad_weight,
                                  void* grad_bias, void* workspace, const Where& where);

inline DepthwiseWay depthwise_way(const Conv2dProblem& p, DepthwiseWay wanted, bool aligned) {
  const auto why_not = wanted == DepthwiseWay::kRows       ? depthwise_rows_why_not
                       : wanted == DepthwiseWay::kBoxes    ? depthwise_boxes_why_not
                       : wanted == DepthwiseWay::kToeplitz ? depthwise_toeplitz_why_not
                                                           : depthwise_tensor_why_not;
  if (wanted >= DepthwiseWay::kSlabs && aligned && why_not(p).empty()) return wanted;
  return has_depthwise_vectors(p, aligned) ? DepthwiseWay::kVectors : DepthwiseWay::kNumbers;
}

// The forward pass for arguments that need not be a problem's: grad_input is one too, with the
// filters turned round.
void depthwise_forward(DType dtype, const DepthwiseArguments& arguments, DepthwiseWay way,
                       const void* input, const void* weight, const void* bias, void* output,
                       uintptr_t stream);

}  // namespace gdfast::cuda
