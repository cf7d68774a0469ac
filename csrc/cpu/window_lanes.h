// The pixels that pooled outputs of a convolution see, sorted so that vectors run over outputs.
//
// Output (p, q) sees pixel (y, x) of a patch of its own, which begins at line p * step_h - pad_h
// and column q * step_w - pad_w. Value (c, y, x) of the patches of all outputs of a band lies in
// one stretch, in the order of the outputs: a value of the convolution is then a sum of stretches,
// each times one weight, and so is its gradient in the weight.
#pragma once

#include <limits>

#include "pool.h"

namespace gdfast::cpu {
namespace {

template <typename T>
class WindowLanes {
  using A = typename Accumulator<T>::type;
  // The stretches of a band and the lines that they are made of stay in the second-level cache.
  static constexpr int64_t kBytes = 128 * 1024;

 public:
  WindowLanes(const Conv2dProblem& conv, const MaxPool2dProblem& pool)
      : conv_(conv), outputs_w_(pool.Q) {
    step_h_ = pool.stride_h * conv.stride_h;
    step_w_ = pool.stride_w * conv.stride_w;
    height_ = (pool.R - 1) * conv.stride_h + (conv.R - 1) * conv.dilation_h + 1;
    width_ = (pool.S - 1) * conv.stride_w + (conv.S - 1) * conv.dilation_w + 1;
    is_square_ =
        conv.R == 3 && conv.S == 3 && pool.R == 2 && pool.S == 2 && height_ == 4 && width_ == 4;
    left_ = ceil_div(conv.pad_w, step_w_);
    const int64_t last = floor_quotient(width_ - 1 - conv.pad_w, step_w_);
    // Whole vectors are read beyond the last column.
    columns_ =
        left_ + max_of(round_up(pool.Q, kLanes<A>) + max_of(0, last), ceil_div(conv.W, step_w_));
    whole_ = conv.W / step_w_;
    rest_ = conv.W % step_w_;
    const int64_t per_line = conv.C * (height_ * width_ * pool.Q + step_h_ * line_size());
    band_ = min_of(pool.P, max_of(1, kBytes / (per_line * static_cast<int64_t>(sizeof(A)))));
    bands_ = ceil_div(pool.P, band_);
    band_ = ceil_div(pool.P, bands_);
    length_ = round_up(band_ * pool.Q, kLanes<A>) + kLanes<A>;
  }

  int64_t band() const { return band_; }      // lines of outputs
  int64_t bands() const { return bands_; }    // of one image
  int64_t length() const { return length_; }  // from one stretch to the next
  // Whether a 3x3 kernel and a 2x2 window see patches of 4x4 pixels.
  bool is_square() const { return is_square_; }
  int64_t stretch(int64_t c, int64_t y, int64_t x) const {
    return ((c * height_ + y) * width_ + x) * length_;
  }

  struct Scratch {
    A* stretches;  // [C][height][width][length]
    A* lines;      // [(band - 1) * step_h + height][step_w][columns]
    A* line;       // one line in order
  };
  Scratch carve(Carver& carver) const {
    return {carver.template take<A>(conv_.C * height_ * width_ * length_),
            carver.template take<A>(line_count(band_) * line_size()),
            carver.template take<A>(conv_.W)};
  }

  // Sorts what output lines [begin, end) of one image see. Returns the largest magnitude there is
  // among it, a NaN where there is one.
  A fill(const T* image, int64_t begin, int64_t end, const Scratch& scratch) const {
    const int64_t used = (end - begin) * outputs_w_;
    PlaceOf<A> largest = 0;
    for (int64_t c = 0; c < conv_.C; ++c) {
      for (int64_t i = 0; i < line_count(end - begin); ++i) {
        copy_line(image + c * conv_.input.c, begin * step_h_ - conv_.pad_h + i,
                  scratch.lines + i * line_size(), scratch.line);
      }
      const int64_t count = line_count(end - begin) * line_size();
      const PlaceOf<A> magnitude = largest_magnitude(scratch.lines, count);
      largest = magnitude > largest ? magnitude : largest;
      for (int64_t x = 0; x < width_; ++x) {
        const int64_t w = x - conv_.pad_w, shift = floor_quotient(w, step_w_);
        const A* from = scratch.lines + (w - shift * step_w_) * columns_ + left_ + shift;
        for (int64_t y = 0; y < height_; ++y, from += line_size()) {
          A* to = scratch.stretches + stretch(c, y, x);
          if (outputs_w_ <= kLanes<A>) {
            copy_outputs<1>(from, end - begin, to);
          } else if (outputs_w_ <= 2 * kLanes<A>) {
            copy_outputs<2>(from, end - begin, to);
          } else {
            copy_outputs<0>(from, end - begin, to);
          }
          store<A>(to + used, Vec<A>{});
        }
      }
    }
    A magnitude;
    std::memcpy(&magnitude, &largest, sizeof magnitude);
    return magnitude;
  }

 private:
  // Of every step_h-th line what its outputs see, kVectors vectors of it or, if 0, as many as there
  // are. What a line writes past its end, the next one writes over.
  template <int kVectors>
  void copy_outputs(const A* from, int64_t lines, A* to) const {
    const int64_t step = step_h_ * line_size();
    const int64_t width = kVectors == 0 ? outputs_w_ : kVectors * kLanes<A>;
    for (int64_t p = 0; p < lines; ++p, from += step, to += outputs_w_) {
      for (int64_t q = 0; q < width; q += kLanes<A>) store<A>(to + q, load(from + q));
    }
  }

  // As the bits of a number: without their sign, numbers have the order of their bits, and NaN
  // comes after infinity.
  static PlaceOf<A> largest_magnitude(const A* values, int64_t count) {
    PlaceOf<A> largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      PlaceOf<A> bits;
      std::memcpy(&bits, values + i, sizeof bits);
      bits &= std::numeric_limits<PlaceOf<A>>::max();
      largest = bits > largest ? bits : largest;
    }
    return largest;
  }

  int64_t line_size() const { return step_w_ * columns_; }
  int64_t line_count(int64_t outputs) const { return (outputs - 1) * step_h_ + height_; }

  void copy_line(const T* plane, int64_t h, A* to, A* line) const {
    if (h < 0 || h >= conv_.H) {
      std::memset(to, 0, line_size() * sizeof(A));
      return;
    }
    const T* from = plane + h * conv_.input.h;
    const A* in_order = line;
    if constexpr (kSame<T, A>) {
      if (conv_.input.w == 1) in_order = from;
    }
    if (in_order == line) copy_widened(from, conv_.input.w, conv_.W, line);
    split_phases(in_order, conv_.W, step_w_, to + left_, columns_);
    for (int64_t phase = 0; phase < step_w_; ++phase, to += columns_) {
      const int64_t count = whole_ + (phase < rest_ ? 1 : 0);
      for (int64_t x = 0; x < left_; ++x) to[x] = A(0);
      for (int64_t x = left_ + count; x < columns_; ++x) to[x] = A(0);
    }
  }

  const Conv2dProblem& conv_;
  int64_t outputs_w_;
  int64_t step_h_, step_w_;
  int64_t height_, width_;  // of a patch
  bool is_square_;
  int64_t left_, columns_;
  int64_t whole_, rest_;  // pixels of a line in each phase, and phases that have one more
  int64_t band_, bands_, length_;
};

// In how many groups threads divide the channels between them. A layer that has its columns divided
// then finds those that it needs in the cache of its core. What all groups do, sorting pixels,
// costs little beside 16 channels.
inline int64_t channel_groups(int64_t channels, int threads) {
  return max_of(1, min_of(threads, channels / 16));
}

// Where in the stretches each tap of the kernel lies, and how much further for each window place.
template <typename T>
void find_offsets(const WindowLanes<T>& lanes, const Conv2dProblem& conv,
                  const MaxPool2dProblem& pool, int64_t* taps, int64_t* places) {
  for (int64_t c = 0; c < conv.C; ++c) {
    for (int64_t r = 0; r < conv.R; ++r) {
      for (int64_t s = 0; s < conv.S; ++s) {
        *taps++ = lanes.stretch(c, r * conv.dilation_h, s * conv.dilation_w);
      }
    }
  }
  for (int64_t a = 0; a < pool.R; ++a) {
    for (int64_t b = 0; b < pool.S; ++b) {
      *places++ = lanes.stretch(0, a * conv.stride_h, b * conv.stride_w);
    }
  }
}

}  // namespace
}  // namespace gdfast::cpu
