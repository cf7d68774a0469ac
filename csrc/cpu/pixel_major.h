// Images whose pixels have their channels side by side, as pairs along the channels need them:
// channels_last tensors as they are, a copy of all others.
#pragma once

#include "numeric.h"
#include "parallel.h"

namespace gdfast::cpu {
namespace {

class PixelMajor {
 public:
  // Of [N, groups * channels, H, W]; a group gets `padded` channels, zeros behind its own.
  PixelMajor(const BFloat16* image, const Strides4& strides, int64_t N, int64_t H, int64_t W,
             int64_t groups, int64_t channels, int64_t padded, int threads)
      : in_place_(padded == channels && (strides.c == 1 || channels == 1)),
        data_(image),
        strides_(strides),
        group_step_(channels * strides.c),
        memory_(in_place_ ? 0 : N * H * W * groups * padded * sizeof(BFloat16)) {
    if (in_place_) return;
    BFloat16* copy = reinterpret_cast<BFloat16*>(memory_.data());
    const int64_t pixel = groups * padded;
    parallel_for(N * H, threads, [&](int64_t line, int) {
      for (int64_t group = 0; group < groups; ++group) {
        copy_line(image + line / H * strides.n + line % H * strides.h + group * group_step_, W,
                  channels, padded, copy + line * W * pixel + group * padded, pixel);
      }
    });
    data_ = copy;
    strides_ = {H * W * pixel, 1, W * pixel, pixel};
    group_step_ = padded;
  }

  const BFloat16* data() const { return data_; }
  const Strides4& strides() const { return strides_; }
  int64_t group_step() const { return group_step_; }

 private:
  // In squares, so that whole cache lines are read and written wherever the channels lie.
  void copy_line(const BFloat16* from, int64_t width, int64_t channels, int64_t padded,
                 BFloat16* to, int64_t pixel) const {
    constexpr int64_t kSide = 32;
    const Strides4 step = strides_;
    for (int64_t w0 = 0; w0 < width; w0 += kSide) {
      const int64_t w_end = min_of(w0 + kSide, width);
      for (int64_t c0 = 0; c0 < channels; c0 += kSide) {
        const int64_t c_end = min_of(c0 + kSide, channels);
        for (int64_t w = w0; w < w_end; ++w) {
          for (int64_t c = c0; c < c_end; ++c) to[w * pixel + c] = from[w * step.w + c * step.c];
        }
      }
      for (int64_t w = w0; w < w_end; ++w) {
        for (int64_t c = channels; c < padded; ++c) to[w * pixel + c] = {0};
      }
    }
  }

  const bool in_place_;
  const BFloat16* data_;
  Strides4 strides_;
  int64_t group_step_;
  Workspace memory_;
};

}  // namespace
}  // namespace gdfast::cpu
