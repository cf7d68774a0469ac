// Images for the Hopper kernels: what they take, and how the TMA unit is told of them.
#pragma once

#include <string>

#include "conv2d_hopper_tiles.h"
#include "hopper.h"

namespace gdfast::cuda {

// The axis after another. One of length 1 is never stepped along, but has to have a legal step.
inline Axis next_axis(const Axis& before, int64_t size, int64_t stride_bytes) {
  return {size, size == 1 ? before.size * before.bytes : stride_bytes};
}

// A tensor with its channels first, as boxes of pixels by 64 of them, 32 in float32; or half as
// many.
template <typename T>
TensorMap channels_first(const char* op, const void* address, const HopperImage& image,
                         const PixelBox& box, int row_bytes = kBoxRow) {
  constexpr int kBytes = sizeof(T);
  const Axis channels{image.channels, kBytes};
  const Axis w = next_axis(channels, image.W, kBytes * image.strides.w);
  const Axis h = next_axis(w, image.H, kBytes * image.strides.h);
  const Axis n = next_axis(h, image.N, kBytes * image.strides.n);
  return tensor_map<T>(op, address, {channels, w, h, n},
                       {row_bytes / kBytes, static_cast<int>(box.w), static_cast<int>(box.h),
                        static_cast<int>(box.n)});
}

// Each phase of an image as a tensor of its own.
template <typename T>
void phase_maps(const char* op, const void* address, const HopperImage& image, HopperPhases phases,
                const PixelBox& box, TensorMap (&maps)[kMostPhases][kMostPhases]) {
  for (int h = 0; h < phases.h; ++h) {
    for (int w = 0; w < phases.w; ++w) {
      const int64_t offset = (h * image.strides.h + w * image.strides.w) * int64_t{sizeof(T)};
      maps[h][w] = channels_first<T>(op, static_cast<const unsigned char*>(address) + offset,
                                     phase_image(image, phases, h, w), box);
    }
  }
}

// What the kernels ask of an image that this one is not, or "".
inline std::string image_why_not(const char* name, const HopperImage& image) {
  const Strides4& s = image.strides;
  const auto fits = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 38);
  };
  if (image.channels % 8 != 0) return std::string(name) + ": channels in eights";
  if (s.c != 1 || !fits(image.N, s.n) || !fits(image.H, s.h) || !fits(image.W, s.w)) {
    return std::string(name) + ": channels_last, with pixels a multiple of 16 bytes apart";
  }
  return "";
}

}  // namespace gdfast::cuda
