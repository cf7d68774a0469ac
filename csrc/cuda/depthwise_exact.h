// Depthwise convolution of no stride or dilation, number by number from global memory: for kernels
// in which zeros around an image meet numbers that are not finite, and which make what comes out
// NaN once more without them.
#pragma once

#include "activation.h"
#include "depthwise.h"

namespace gdfast::cuda {

// One output.
template <int kSize, typename T>
GDFAST_DEVICE float exact_output(const DepthwiseArguments& a, const T* input, const T* weight,
                                 const T* bias, int n, int k, int p, int q) {
  const T* const image = input + n * a.input.n + k;
  const T* const filter = weight + k * a.weight_k;
  float sums[1] = {bias == nullptr ? 0.f : to_float(bias[k])};
#pragma unroll 1
  for (int tap = 0; tap < kSize * kSize; ++tap) {
    const int r = tap / kSize, s = tap % kSize, h = p - a.pad_h + r, w = q - a.pad_w + s;
    if (static_cast<unsigned>(h) >= static_cast<unsigned>(a.H)) continue;
    if (static_cast<unsigned>(w) >= static_cast<unsigned>(a.W)) continue;
    const T pixel = image[int64_t{h} * a.input.h + int64_t{w} * a.input.w];
    sums[0] += to_float(pixel) * to_float(filter[r * a.weight_r + s * a.weight_s]);
  }
  activate(sums, a.activation, static_cast<float>(a.negative_slope));
  return sums[0];
}

// What some rows and columns of one image's outputs, from (p, q) on, add to the sum of tap (r, s).
template <typename T>
GDFAST_DEVICE float exact_sum(const DepthwiseArguments& a, const T* grad_output, const T* input,
                              int n, int p, int rows, int q, int columns, int k, int r, int s) {
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < rows * columns; ++i) {
    const int y = p + i / columns, x = q + i % columns, h = y - a.pad_h + r, w = x - a.pad_w + s;
    if (static_cast<unsigned>(h) >= static_cast<unsigned>(a.H)) continue;
    if (static_cast<unsigned>(w) >= static_cast<unsigned>(a.W)) continue;
    const T grad =
        grad_output[n * a.output.n + int64_t{y} * a.output.h + int64_t{x} * a.output.w + k];
    const T pixel = input[n * a.input.n + int64_t{h} * a.input.h + int64_t{w} * a.input.w + k];
    sum += to_float(grad) * to_float(pixel);
    if (sum != sum) return sum;
  }
  return sum;
}

}  // namespace gdfast::cuda
