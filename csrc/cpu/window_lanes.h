// The pixels that pooled outputs of a convolution see, sorted so that vectors run over outputs.
//
// Output (p, q) sees pixel (y, x) of a patch of its own, which begins at line p * step_h - pad_h
// and column q * step_w - pad_w. Value (c, y, x) of the patches of all outputs of a band lies in
// one stretch, in the order of the outputs: a value of the convolution is then a sum of stretches,
// each times one weight, and so is its gradient in the weight.
//
// A 2x2 window and the 4x4 pixels that a 3x3 kernel sees from it are a tile of F(2x2, 3x3) (Lavin
// and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016): 16 products instead of
// 36, whose factors are differences and sums of two pixels in either direction.
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
    const int64_t per_output = height_ * width_ + (is_square_ ? 16 : 0);
    const int64_t per_line = conv.C * per_output * pool.Q + step_h_ * line_size();
    band_ = min_of(pool.P, max_of(1, kBytes / (per_line * static_cast<int64_t>(sizeof(A)))));
    bands_ = ceil_div(pool.P, band_);
    band_ = ceil_div(pool.P, bands_);
    const int64_t below = is_square_ ? 3 / step_h_ : 0;  // a tile's lines that others begin with
    length_ = round_up((band_ + below) * pool.Q, kLanes<A>) + kLanes<A>;
  }

  int64_t band() const { return band_; }      // lines of outputs
  int64_t bands() const { return bands_; }    // of one image
  int64_t length() const { return length_; }  // of a stretch, at least
  // Whether a 3x3 kernel and a 2x2 window see patches of 4x4 pixels.
  bool is_square() const { return is_square_; }
  int64_t stretch(int64_t c, int64_t y, int64_t x) const {
    return ((c * height_ + y) * width_ + x) * length_;
  }
  // From the tiles of one channel to those of the next.
  int64_t tiles_size() const { return is_square_ ? 16 * length_ : 0; }

  struct Scratch {
    A* stretches;  // [C][height][width][length]
    A* tiles;      // [C][length / kLanes][4][4][kLanes]
    A* lines;      // [(band - 1) * step_h + height][step_w][columns]
    A* line;       // one line in order
  };
  Scratch carve(Carver& carver) const {
    return {carver.template take<A>(conv_.C * height_ * width_ * length_),
            carver.template take<A>(conv_.C * tiles_size()),
            carver.template take<A>(line_count(band_) * line_size() + kLanes<A>),
            carver.template take<A>(conv_.W)};
  }

  // Sorts what output lines [begin, end) of one image see, or makes the factors of their tiles of
  // it. Returns the largest magnitude there is among the pixels, a NaN where there is one.
  template <bool kTiles>
  A fill(const T* image, int64_t begin, int64_t end, const Scratch& scratch) const {
    const int64_t count = line_count(end - begin);
    PlaceOf<A> largest = 0;
    for (int64_t c = 0; c < conv_.C; ++c) {
      for (int64_t i = 0; i < count; ++i) {
        copy_line(image + c * conv_.input.c, begin * step_h_ - conv_.pad_h + i,
                  scratch.lines + i * line_size(), scratch.line);
      }
      const PlaceOf<A> magnitude = largest_magnitude(scratch.lines, count * line_size());
      largest = magnitude > largest ? magnitude : largest;
      A* const to = scratch.stretches + stretch(c, 0, 0);
      if constexpr (kTiles) {
        transform_lines(scratch.lines, count, to);
        transform_columns(to, (end - begin) * outputs_w_, scratch.tiles + c * tiles_size());
      } else {
        copy_lines(scratch.lines, end - begin, to);
      }
    }
    A magnitude;
    std::memcpy(&magnitude, &largest, sizeof magnitude);
    return magnitude;
  }

 private:
  // Where in a sorted line the first output sees its column x.
  int64_t column(int64_t x) const {
    const int64_t w = x - conv_.pad_w, shift = floor_quotient(w, step_w_);
    return (w - shift * step_w_) * columns_ + left_ + shift;
  }

  // To every pixel of a patch its stretch, in whole vectors: what is written past the end of a line
  // of outputs, the next line writes over. What is read beyond the last output is a number.
  void copy_lines(const A* lines, int64_t count, A* to) const {
    for (int64_t y = 0; y < height_; ++y) {
      for (int64_t x = 0; x < width_; ++x, to += length_) {
        const A* from = lines + y * line_size() + column(x);
        for (int64_t p = 0; p < count; ++p, from += step_h_ * line_size()) {
          for (int64_t q = 0; q < outputs_w_; q += kLanes<A>) {
            store<A>(to + p * outputs_w_ + q, load(from + q));
          }
        }
        store<A>(to + count * outputs_w_, Vec<A>{});
      }
    }
  }

  // Lines y, y + step_h and so on of all tiles in one stretch, whose pixels y + step_h are thus
  // those of y from the second line of outputs on: the pixels d of a line as d B.
  void transform_lines(const A* lines, int64_t count, A* to) const {
    const A *at0 = lines + column(0), *at1 = lines + column(1);
    const A *at2 = lines + column(2), *at3 = lines + column(3);
    for (int64_t y = 0; y < min_of(step_h_, 4); ++y, to += 4 * length_) {
      int64_t i = 0;
      for (int64_t line = y; line < count; line += step_h_, i += outputs_w_) {
        const int64_t from = line * line_size();
        for (int64_t q = 0; q < outputs_w_; q += kLanes<A>) {
          const Vec<A> d0 = load(at0 + from + q), d1 = load(at1 + from + q);
          const Vec<A> d2 = load(at2 + from + q), d3 = load(at3 + from + q);
          store<A>(to + i + q, d0 - d2);
          store<A>(to + length_ + i + q, d1 + d2);
          store<A>(to + 2 * length_ + i + q, d2 - d1);
          store<A>(to + 3 * length_ + i + q, d1 - d3);
        }
      }
      for (int64_t x = 0; x < 4; ++x) store<A>(to + x * length_ + i, Vec<A>{});
    }
  }

  // B^T times that, for `count` outputs.
  void transform_columns(const A* stretches, int64_t count, A* to) const {
    const A* rows[4];
    for (int64_t y = 0; y < 4; ++y) {
      rows[y] = stretches + y % step_h_ * 4 * length_ + y / step_h_ * outputs_w_;
    }
    for (int64_t i = 0; i < count; i += kLanes<A>, to += 16 * kLanes<A>) {
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const int64_t at = i + x * length_;
        const Vec<A> d0 = load(rows[0] + at), d1 = load(rows[1] + at);
        const Vec<A> d2 = load(rows[2] + at), d3 = load(rows[3] + at);
        store<A>(to + x * kLanes<A>, d0 - d2);
        store<A>(to + (4 + x) * kLanes<A>, d1 + d2);
        store<A>(to + (8 + x) * kLanes<A>, d2 - d1);
        store<A>(to + (12 + x) * kLanes<A>, d1 - d3);
      }
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
    // Zeros to the left and to the right.
    for (int64_t x = 0; x < line_size(); x += kLanes<A>) store<A>(to + x, Vec<A>{});
    split_phases(in_order, conv_.W, step_w_, to + left_, columns_);
  }

  const Conv2dProblem& conv_;
  int64_t outputs_w_;
  int64_t step_h_, step_w_;
  int64_t height_, width_;  // of a patch
  bool is_square_;
  int64_t left_, columns_;
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
