// Depthwise convolution, gradient in the input:
//
//   grad_input[n, c, h, w] = sum over r, s and the filters k of channel c of
//       weight[k, 0, r, s] * grad_output[n, k, p, q]
//   p = (h + pad_h - r * dilation_h) / stride_h where that is whole and an output's, q likewise
//
// Without a stride this is a forward pass over grad_output with the filters turned round. With one
// each pixel gathers: its thread walks through the outputs that see it.
#include "depthwise.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_input";

// Here a.input is grad_input and a.output grad_output, in their sizes and strides.
template <typename T, int kVector>
GDFAST_KERNEL(kImageThreads, 2)
depthwise_grad_input_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                            const GDFAST_GRID_CONSTANT ImageWalk walk, const T* grad_output,
                            const T* weight, T* grad_input) {
  using A = SumOf<T>;
  const ImagePlace at = place_in_image(walk);
  if (!at.exists) return;
  const int c = at.group * kVector, k = c * a.multiplier;
  // From the edge of the padding; the first and the last outputs that can see the pixel.
  const int h = at.row + a.pad_h, w = at.column + a.pad_w;
  const int beyond_h = h - (a.R - 1) * a.dilation_h, beyond_w = w - (a.S - 1) * a.dilation_w;
  const int first_p = beyond_h > 0 ? (beyond_h + a.stride_h - 1) / a.stride_h : 0;
  const int first_q = beyond_w > 0 ? (beyond_w + a.stride_w - 1) / a.stride_w : 0;
  const int end_p = h / a.stride_h < a.P ? h / a.stride_h + 1 : a.P;
  const int end_q = w / a.stride_w < a.Q ? w / a.stride_w + 1 : a.Q;
  for (int n = static_cast<int>(blockIdx.y); n < walk.N; n += static_cast<int>(gridDim.y)) {
    const T* const image = grad_output + n * a.output.n + k * a.output.c;
    A sums[kVector] = {};
    for (int p = first_p; p < end_p; ++p) {
      const int down = h - p * a.stride_h, r = a.dilation_h == 1 ? down : down / a.dilation_h;
      if (r * a.dilation_h != down) continue;  // the pixel lies between two taps
#pragma unroll 2
      for (int q = first_q; q < end_q; ++q) {
        const int right = w - q * a.stride_w, s = a.dilation_w == 1 ? right : right / a.dilation_w;
        if (s * a.dilation_w != right) continue;
        const T* const pixel = image + p * a.output.h + q * a.output.w;
        const T* const tap = weight + k * a.weight_k + r * a.weight_r + s * a.weight_s;
        if constexpr (kVector > 1) {
          A grads[kVector];
          load_values<kVector>(pixel, grads);
#pragma unroll
          for (int lane = 0; lane < kVector; ++lane) {
            sums[lane] += grads[lane] * to_float(tap[lane * a.weight_k]);
          }
        } else {
          for (int copy = 0; copy < a.multiplier; ++copy) {
            sums[0] += A(to_float(pixel[copy * a.output.c])) * to_float(tap[copy * a.weight_k]);
          }
        }
      }
    }
    T* const to = grad_input + n * a.input.n + c * a.input.c;
    store_values<kVector>(to + at.row * a.input.h + at.column * a.input.w, sums);
  }
}

template <typename T, int kVector>
void gather(const DepthwiseArguments& a, const void* grad_output, const void* weight,
            void* grad_input, uintptr_t stream) {
  const bool channels_inside = a.input.c == 1 && a.C > 1;
  const auto walk = ImageWalk::of(a.N, a.C / kVector, a.H, a.W, channels_inside);
  launch(kOp, depthwise_grad_input_kernel<T, kVector>, walk.grid(), kImageThreads, 0, stream, a,
         walk, static_cast<const T*>(grad_output), static_cast<const T*>(weight),
         static_cast<T*>(grad_input));
}

// The forward pass that makes grad_input of a convolution without stride: filter [r, s] reads what
// [R - 1 - r, S - 1 - s] reads there.
DepthwiseArguments turned_round(DepthwiseArguments a) {
  const DepthwiseArguments b = a;
  a.H = b.P;
  a.W = b.Q;
  a.P = b.H;
  a.Q = b.W;
  a.input = b.output;
  a.output = b.input;
  a.pad_h = (b.R - 1) * b.dilation_h - b.pad_h;
  a.pad_w = (b.S - 1) * b.dilation_w - b.pad_w;
  a.weight_r = -b.weight_r;
  a.weight_s = -b.weight_s;
  return a;
}

}  // namespace

void depthwise_conv2d_grad_input(const Conv2dProblem& problem, DepthwiseWay wanted,
                                 const void* grad_output, const void* weight, void* grad_input,
                                 const Where& where) {
  if (problem.N == 0) return;
  const DeviceGuard guard(kOp, where.device);
  const DepthwiseArguments a = depthwise_arguments(problem);
  const DepthwiseWay way = depthwise_way(problem, wanted, are_aligned(grad_output, grad_input));
  with_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.multiplier == 1 && a.stride_h == 1 && a.stride_w == 1) {
      const auto* const last_tap =
          static_cast<const T*>(weight) + (a.R - 1) * a.weight_r + (a.S - 1) * a.weight_s;
      return depthwise_forward(problem.dtype, turned_round(a), way, grad_output, last_tap, nullptr,
                               grad_input, where.stream);
    }
    if constexpr (sizeof(T) < 8) {
      if (way == DepthwiseWay::kVectors) {
        return gather<T, kDepthwiseVector>(a, grad_output, weight, grad_input, where.stream);
      }
    }
    gather<T, 1>(a, grad_output, weight, grad_input, where.stream);
  });
}

}  // namespace gdfast::cuda
