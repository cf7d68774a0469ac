// Where the pixels of an image lie whose channels lie side by side, as a 1x1 convolution sees them.
#pragma once

#include "tap_conv.h"

namespace gdfast::cpu {
namespace {

// Of source with T const, of dest without.
template <typename T>
class PixelLines {
 public:
  PixelLines(const TapConv& conv, T* memory, const Strides4& strides, int64_t step_h,
             int64_t step_w)
      : conv_(conv),
        memory_(memory),
        n_(strides.n),
        h_(step_h * strides.h),
        w_(step_w * strides.w) {
    even_ = h_ == conv.width * w_ && n_ == conv.height * h_;
  }

  static PixelLines source(const TapConv& conv, T* memory) {
    return {conv, memory, conv.source, conv.step_h, conv.step_w};
  }
  static PixelLines dest(const TapConv& conv, T* memory) { return {conv, memory, conv.dest, 1, 1}; }

  // to[x] = a channel of pixel first + x, for each x below count.
  void point(int64_t first, int64_t count, int64_t channel, T** to) const {
    if (even_) {
      for (int64_t x = 0; x < count; ++x) to[x] = memory_ + (first + x) * w_ + channel;
      return;
    }
    GridPoint at = GridPoint::at(conv_, first);
    for (int64_t x = 0; x < count; ++x, at.advance(conv_)) {
      to[x] = memory_ + at.n * n_ + at.i * h_ + at.j * w_ + channel;
    }
  }

 private:
  const TapConv& conv_;
  T* memory_;
  int64_t n_, h_, w_;  // from one image, line or pixel to the next
  bool even_;          // one pixel follows the other at the same distance, all of them
};

}  // namespace
}  // namespace gdfast::cpu
