// Images in NCHW for the Hopper kernels of 1x1 convolutions: what they take, and how the TMA unit
// is told of them.
#pragma once

#include <string>
#include <tuple>

#include "conv2d_hopper_images.h"

namespace gdfast::cuda {

constexpr int kPlanePixels = 64;  // of a box: one row of it

// A tensor with its pixels first, as boxes of 64 of them by 64 channels.
template <typename T>
TensorMap plane_boxes(const char* op, const void* address, const HopperImage& image) {
  const Axis pixels{image.H * image.W, 2};
  const Axis channels = next_axis(pixels, image.channels, 2 * image.strides.c);
  const Axis n = next_axis(channels, image.N, 2 * image.strides.n);
  return tensor_map<T>(op, address, {pixels, channels, n, next_axis(n, 1, 0)},
                       {kPlanePixels, 64, 1, 1});
}

// What the kernels ask of a problem that this one is not, or "".
inline std::string planes_why_not(const Conv2dProblem& p) {
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return "half types";
  if (p.groups != 1) return "one group";
  const bool pointwise = p.R == 1 && p.S == 1 && p.pad_h == 0 && p.pad_w == 0;
  if (!pointwise || p.stride_h != 1 || p.stride_w != 1 || p.P != p.H || p.Q != p.W) {
    return "1x1 windows of stride 1 without padding";
  }
  if (p.N == 0) return "at least one image";
  if (p.H * p.W > int64_t{1} << 29) return "fewer pixels";
  for (const auto& [name, channels, s] :
       {std::tuple{"input", p.C, p.input}, std::tuple{"output", p.K, p.output}}) {
    const auto fits = [](int64_t size, int64_t stride) {
      return size == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 38);
    };
    const bool one_row = (p.W == 1 || s.w == 1) && (p.H == 1 || s.h == p.W);
    if (!one_row || !fits(channels, s.c) || !fits(p.N, s.n)) {
      return std::string(name) + ": NCHW, with planes a multiple of 16 bytes apart";
    }
  }
  return "";
}

}  // namespace gdfast::cuda
