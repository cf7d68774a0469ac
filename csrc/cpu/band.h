// Copies of image planes with a border of zeros, for kernels whose vectors run along the lines.
#pragma once

#include "pack.h"
#include "tap_conv.h"

namespace gdfast::cpu {
namespace {

// a / b and a % b rounded towards minus infinity, for b > 0.
inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// The copy of lines [first, first + lines) of one source plane, laid out [line][phase][column]:
// grid point j sees through a tap the value at phase_of(tap) and column j + shift_of(tap).
template <typename T>
class Band {
  using A = typename Accumulator<T>::type;

 public:
  explicit Band(const TapConv& conv) : conv_(conv) {
    int64_t low = 0, high = 0;
    for (int64_t t = 0; t < conv.tap_count; ++t) {
      low = min_of(low, floor_div(conv.taps[t].dw, conv.step_w));
      high = max_of(high, floor_div(conv.taps[t].dw, conv.step_w));
    }
    left_ = -low;
    // Whole vectors are read beyond the last column.
    columns_ = left_ + round_up(conv.width, kLanes<A>) + high;
  }

  int64_t line_size() const { return conv_.step_w * columns_; }
  int64_t phase_of(const Tap& tap) const {
    return tap.dw - floor_div(tap.dw, conv_.step_w) * conv_.step_w;
  }
  int64_t offset_of(const Tap& tap) const {
    return phase_of(tap) * columns_ + left_ + floor_div(tap.dw, conv_.step_w);
  }

  // The same of `channels` planes that lie one element apart, with room for plane_size between
  // their copies: memory is read along the channels.
  void copy_channels(const T* image, int64_t channels, int64_t first, int64_t end, A* to,
                     int64_t plane_size) const {
    for (int64_t h = first; h < end; ++h) {
      for (int64_t phase = 0; phase < conv_.step_w; ++phase, to += columns_) {
        const int64_t width = columns_ - left_;
        const int64_t valid =
            max_of(0, min_of(width, ceil_div(conv_.source_width - phase, conv_.step_w)));
        transpose_lines<A>(image + h * conv_.source.h + phase * conv_.source.w,
                           conv_.step_w * conv_.source.w, channels, valid, width,
                           [&](int64_t c) { return to + c * plane_size + left_; });
        for (int64_t c = 0; c < channels; ++c) {
          std::memset(to + c * plane_size, 0, left_ * sizeof(A));
        }
      }
    }
  }

  // Copies source lines [first, end), all within the image.
  void copy(const T* plane, int64_t first, int64_t end, A* to) const {
    for (int64_t h = first; h < end; ++h) {
      for (int64_t phase = 0; phase < conv_.step_w; ++phase, to += columns_) {
        const int64_t valid =
            max_of(0, min_of(columns_ - left_, ceil_div(conv_.source_width - phase, conv_.step_w)));
        std::memset(to, 0, left_ * sizeof(A));
        copy_widened(plane + h * conv_.source.h + phase * conv_.source.w,
                     conv_.step_w * conv_.source.w, valid, to + left_);
        std::memset(to + left_ + valid, 0, (columns_ - left_ - valid) * sizeof(A));
      }
    }
  }

 private:
  const TapConv& conv_;
  int64_t left_, columns_;
};

}  // namespace
}  // namespace gdfast::cpu
