// Where the pixels of an image lie whose channels lie side by side, as a 1x1 convolution sees them.
#pragma once

#include "simd.h"
#include "tap_conv.h"
#include "tap_conv_pixels.h"

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

  // The same for a block of pixels that may lie as `lines` instead, side by side. Places past its
  // end, as many as `padded` in all, are those of the last pixel: what comes of them nobody reads.
  void point_block(int64_t first, int64_t count, int64_t padded, int64_t channel, T* lines,
                   T** to) const {
    if (lines == nullptr) {
      point(first, count, channel, to);
    } else {
      for (int64_t x = 0; x < count; ++x) to[x] = lines + x * conv_.reduced + channel;
    }
    for (int64_t x = count; x < padded; ++x) to[x] = to[x - 1];
  }

 private:
  const TapConv& conv_;
  T* memory_;
  int64_t n_, h_, w_;  // from one image, line or pixel to the next
  bool even_;          // one pixel follows the other at the same distance, all of them
};

// to[c][o] = weights of channels [channel, channel + length) for outputs [first, first + width), a
// multiple of the vector's length; zeros past the last output.
inline void pack_weight_part(const TapConv& conv, const float* weight, int64_t channel,
                             int64_t length, int64_t first, int64_t width, float* to) {
  const float* from = weight + channel * conv.weight_reduced;
  if (conv.weight_produced != 1 || first + width > conv.produced) {
    TapConv part = conv;
    part.reduced = length;
    pack_weight_panel(part, from, first, width, to);
    return;
  }
  from += conv.taps[0].weight + first;
  for (int64_t c = 0; c < length; ++c, from += conv.weight_reduced, to += width) {
    for (int64_t j = 0; j < width; j += kLanes<float>) store<float>(to + j, load(from + j));
  }
}

}  // namespace
}  // namespace gdfast::cpu
