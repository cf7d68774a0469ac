// The taps of a depthwise convolution whose channels lie side by side, as rows of neighbouring
// columns, and where what they see lies.
#pragma once

#include "depthwise_walk.h"

namespace gdfast::cpu {
namespace {

// What kernels are compiled for: rows of taps (0: as many as there are) that see kColumns columns
// side by side, and columns from one pixel to the next. With one column, these may be any number.
template <int kTheRows, int kTheColumns, int kTheStep>
struct TapShape {
  static constexpr int kRows = kTheRows, kColumns = kTheColumns, kStep = kTheStep;
  static constexpr int kPixels = 4;  // of a block
  static constexpr int kSeen = (kPixels - 1) * kStep + kColumns;
  static constexpr bool kCareful = false;
};

constexpr int kBlockPixels = TapShape<0, 1, 1>::kPixels;

// For what is not finite, times which zeros beyond the border would be NaN: they are left out, and
// no address stands for them.
struct CarefulShape : TapShape<0, 1, 1> {
  static constexpr bool kCareful = true;
};

// Whether `count` values, `step` apart, are.
template <typename T>
bool all_finite(const T* values, int64_t count, int64_t step) {
  bool other = false;
  for (int64_t i = 0; i < count; ++i) {
    other |= !(values[i * step] - values[i * step] == T(0));
  }
  return !other;
}

// The taps as rows of neighbouring columns where `step` allows for it, else each tap as a row.
class TapRows {
 public:
  TapRows(const TapConv& conv, bool careful) : conv_(conv), careful_(careful) {
    while (columns < conv.tap_count && conv.taps[columns].dh == conv.taps[0].dh) ++columns;
    const int64_t apart = columns > 1 ? conv.taps[1].dw - conv.taps[0].dw : 1;
    reversed_ = apart < 0;
    const bool beside = apart == 1 || apart == -1;
    const int64_t step = conv.step_w;
    const bool has_shape = (step == 1 && columns <= 5) ||
                           ((step == 1 || step == 2) && columns == 7) ||
                           (step == 2 && (columns == 3 || columns == 5));
    if (careful || !beside || !has_shape) columns = min_of(columns, 1);
    rows = columns == 0 ? 0 : conv.tap_count / columns;
    spacing = columns == 1 ? step : 1;
    ahead = kBlockPixels * step * conv.source.w;
    for (int64_t row = 0; row < rows; ++row) {
      least_ = row == 0 ? tap(row, 0).dw : min_of(least_, tap(row, 0).dw);
      most_ = row == 0 ? tap(row, 0).dw : max_of(most_, tap(row, 0).dw);
    }
  }

  // The tap that sees the given column of a row.
  const Tap& tap(int64_t row, int64_t column) const {
    return conv_.taps[row * columns + (reversed_ ? columns - 1 - column : column)];
  }

  // Calls run(shape).
  template <typename Run>
  void with_shape(const Run& run) const {
    if (careful_) return run(CarefulShape());
    const int64_t step = columns == 1 ? 1 : conv_.step_w;
    if (columns <= 1)
      return rows == 1   ? run(TapShape<1, 1, 1>())
             : rows == 2 ? run(TapShape<2, 1, 1>())
                         : run(TapShape<0, 1, 1>());
    if (step == 1 && columns == 2)
      return rows == 2 ? run(TapShape<2, 2, 1>()) : run(TapShape<0, 2, 1>());
    if (step == 1 && columns == 3) return run(TapShape<0, 3, 1>());
    if (step == 1 && columns == 4) return run(TapShape<0, 4, 1>());
    if (step == 1 && columns == 5) return run(TapShape<0, 5, 1>());
    if (step == 1) return run(TapShape<0, 7, 1>());
    if (columns == 3) return run(TapShape<0, 3, 2>());
    if (columns == 5) return run(TapShape<0, 5, 2>());
    run(TapShape<0, 7, 2>());
  }

  // Writes which pixels dest pixels [j, j + kBlockPixels) of line i see: `seen` for each row.
  // line_at(h) is where a line of the image lies. Away from borders they follow from those of the
  // block before, where `to` has them.
  template <typename T, typename LineAt>
  void find(const LineAt& line_at, int64_t i, int64_t j, bool has_block_before, int seen,
            const T* zeros, const T** to) const {
    const bool follows = has_block_before && within(j - kBlockPixels, seen) && within(j, seen);
    for (int64_t row = 0; row < rows; ++row, to += seen) {
      const Tap& first = tap(row, 0);
      const int64_t h = i * conv_.step_h + first.dh;
      const bool inside = h >= 0 && h < conv_.source_height;
      if (follows) {
        if (!inside) continue;
        for (int x = 0; x < seen; ++x) to[x] += ahead;
        continue;
      }
      int64_t w = j * conv_.step_w + first.dw;
      const T* const line = inside ? line_at(h) : nullptr;
      for (int x = 0; x < seen; ++x, w += spacing) {
        to[x] = inside && w >= 0 && w < conv_.source_width && !(careful_ && j + x >= conv_.width)
                    ? line + w * conv_.source.w
                    : zeros;
      }
    }
  }

  // Whether a walk sees all taps: 3x3 of them, and each pixel sees some column of the image, with
  // steps of 2 the middle one.
  bool walks() const {
    const int64_t last = (conv_.width - 1) * conv_.step_w + least_;
    return rows == 3 && columns == 3 &&
           (conv_.step_w == 1 ? least_ >= -2 && last < conv_.source_width
                              : least_ >= -1 && last + 1 < conv_.source_width);
  }

  // What line i of dest sees.
  template <typename T, typename LineAt>
  SeenLines<T> seen_lines(const LineAt& line_at, int64_t i, const T* zeros) const {
    SeenLines<T> seen;
    for (int64_t row = 0; row < 3; ++row) {
      const int64_t h = i * conv_.step_h + tap(row, 0).dh;
      const bool inside = h >= 0 && h < conv_.source_height;
      seen.at[row] = inside ? line_at(h) : zeros;
      seen.pitch[row] = inside ? conv_.source.w : 0;
    }
    seen.width = conv_.source_width;
    seen.first_dw = least_;
    // Processors foresee a walk by themselves, if not as far ahead as memory is away. The line
    // below the lowest one comes next.
    constexpr int64_t kBytes = 8 << 20;
    const int64_t values = conv_.batch * conv_.source_height * conv_.source_width * conv_.groups;
    const bool fetches = !is_cached && values * static_cast<int64_t>(sizeof(T)) > kBytes;
    const int64_t lines = 1 + max_of(0, tap(0, 0).dh - tap(2, 0).dh);
    seen.ahead = fetches && seen.at[2] != zeros ? lines * conv_.source.h : 0;
    return seen;
  }

  int64_t rows = 0, columns = 0;
  int64_t spacing = 1;     // columns of the image between two pixels that are seen
  int64_t ahead;           // elements of the image between what two neighbouring blocks see
  bool is_cached = false;  // lines of the source are copies that a cache holds

 private:
  // Whether all that a block from column j on sees lies between the borders of its lines.
  bool within(int64_t j, int seen) const {
    const int64_t w = j * conv_.step_w;
    return !careful_ && w + least_ >= 0 && w + most_ + (seen - 1) * spacing < conv_.source_width;
  }

  const TapConv& conv_;
  bool careful_, reversed_ = false;
  int64_t least_ = 0, most_ = 0;  // of the rows' first columns, seen from a pixel
};

}  // namespace
}  // namespace gdfast::cpu
