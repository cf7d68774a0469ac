// Copies of the source lines that some lines of dest see, with a border of zeros: what a grid point
// sees through a tap then lies at a constant offset from it.
#pragma once

#include "memory_ahead.h"
#include "pack.h"
#include "tap_conv.h"

namespace gdfast::cpu {
namespace {

// [line][column][channel] where interleaved, else [line][channel][column].
template <typename T>
class SourceLines {
  using A = typename Accumulator<T>::type;

 public:
  // Grid points up to `beyond` past the last one may be looked at too. conv has at least one tap.
  SourceLines(const TapConv& conv, int64_t beyond, bool interleaved)
      : conv_(conv), interleaved_(interleaved) {
    low_h_ = conv.taps[0].dh;
    low_w_ = conv.taps[0].dw;
    int64_t high_h = low_h_, high_w = low_w_;
    for (int64_t t = 1; t < conv.tap_count; ++t) {
      low_h_ = min_of(low_h_, conv.taps[t].dh);
      low_w_ = min_of(low_w_, conv.taps[t].dw);
      high_h = max_of(high_h, conv.taps[t].dh);
      high_w = max_of(high_w, conv.taps[t].dw);
    }
    span_ = high_h - low_h_ + 1;
    columns_ = (conv.width + beyond - 1) * conv.step_w + high_w - low_w_ + 1;
  }

  // Lines of dest that a copy of about so many bytes serves, where `others` tasks stand beside
  // those of one image: enough of them for all threads to end together.
  int64_t lines_of(int64_t bytes, int64_t others, int threads) const {
    const int64_t line_bytes = line_size() * static_cast<int64_t>(sizeof(A));
    int64_t lines = max_of(4, (bytes / line_bytes - span_) / conv_.step_h + 1);
    lines = min_of(lines, ceil_div(conv_.height, ceil_div(8 * threads, others)));
    return ceil_div(conv_.height, ceil_div(conv_.height, lines));
  }

  // Elements of the copy for so many lines of dest.
  int64_t size(int64_t lines) const { return ((lines - 1) * conv_.step_h + span_) * line_size(); }
  int64_t line_size() const { return columns_ * conv_.reduced; }
  // From one line, or one pixel, of dest to the next.
  int64_t line_step() const { return conv_.step_h * line_size(); }
  int64_t pixel_step() const { return conv_.step_w * column_step(); }
  // From one channel to the next.
  int64_t channel_step() const { return interleaved_ ? 1 : columns_; }

  int64_t offset_of(const Tap& tap, int64_t c) const {
    return (tap.dh - low_h_) * line_size() + (tap.dw - low_w_) * column_step() + c * channel_step();
  }

  // Where the first line of source lies that a line of dest sees but for its topmost taps.
  const T* at(const T* source, int64_t n, int64_t group, int64_t line) const {
    return source + n * conv_.source.n + group * conv_.source_group +
           line * conv_.step_h * conv_.source.h;
  }

  // Has the lines of source fetched that come after those copied for lines [line0, line0 + lines):
  // what the next lines of dest see. Adds a stretch, or one for each channel.
  void fetch_ahead(const T* source, int64_t n, int64_t group, int64_t line0, int64_t lines,
                   MemoryAhead& ahead) const {
    if constexpr (kSame<T, float>) {
      const int64_t begin = max_of(0, (line0 + lines - 1) * conv_.step_h + low_h_ + span_);
      const int64_t end = min_of(begin + lines * conv_.step_h, conv_.source_height);
      const T* from = source + n * conv_.source.n + group * conv_.source_group;
      const bool together = conv_.source.c == 1;
      for (int64_t c = 0; c < (together ? 1 : conv_.reduced); ++c) {
        ahead.add(from + c * conv_.source.c + begin * conv_.source.h,
                  (end - begin) * conv_.source.h, false);
      }
    }
  }

  // Copies what lines [line0, line0 + lines) of dest see.
  void copy(const T* source, int64_t n, int64_t group, int64_t line0, int64_t lines, A* to) const {
    const int64_t top = line0 * conv_.step_h + low_h_;
    const int64_t end = top + (lines - 1) * conv_.step_h + span_;
    const int64_t begin = min_of(max_of(-low_w_, 0), columns_);
    const int64_t stop = max_of(begin, min_of(columns_, conv_.source_width - low_w_));
    const T* image = source + n * conv_.source.n + group * conv_.source_group;
    const int64_t channels = conv_.reduced;
    for (int64_t h = top; h < end; ++h, to += line_size()) {
      if (h < 0 || h >= conv_.source_height || begin == stop) {
        std::memset(to, 0, line_size() * sizeof(A));
        continue;
      }
      const T* from = image + h * conv_.source.h + (low_w_ + begin) * conv_.source.w;
      if (!interleaved_) {
        for (int64_t c = 0; c < channels; ++c) {
          A* line = to + c * columns_;
          std::memset(line, 0, begin * sizeof(A));
          copy_widened(from + c * conv_.source.c, conv_.source.w, stop - begin, line + begin);
          std::memset(line + stop, 0, (columns_ - stop) * sizeof(A));
        }
        continue;
      }
      std::memset(to, 0, begin * channels * sizeof(A));
      if (conv_.source.c == 1 && conv_.source.w == channels) {
        copy_widened(from, 1, (stop - begin) * channels, to + begin * channels);
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t x = begin; x < stop; ++x) {
            to[x * channels + c] = widen(from[c * conv_.source.c + (x - begin) * conv_.source.w]);
          }
        }
      }
      std::memset(to + stop * channels, 0, (columns_ - stop) * channels * sizeof(A));
    }
  }

 private:
  int64_t column_step() const { return interleaved_ ? conv_.reduced : 1; }

  const TapConv& conv_;
  bool interleaved_;
  int64_t low_h_, low_w_, span_;  // a line of dest sees source lines from step_h * i + low_h_ on
  int64_t columns_;
};

}  // namespace
}  // namespace gdfast::cpu
