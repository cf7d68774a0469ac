// The last steps of grad_weight by Winograd, for every stride: sums of products to filters, and
// filters to where they belong.
#pragma once

#include "tap_conv_pixels.h"
#include "weight_rows.h"

namespace gdfast::cpu {
namespace {

// Transform::apply takes the kAxis sums along one axis to three taps.
template <int kAxis, typename Transform>
class GradFilters {
  using T = float;
  static constexpr int kWidth = kLanes<T>;

 public:
  // Channels of a task, whole tiles and whole vectors: with 64 outputs at most 442 KB of sums.
  static constexpr int64_t kTaskChannels = 48;
  static_assert(kTaskChannels % kTileRows == 0 && kTaskChannels % kWidth == 0);

  GradFilters(const Conv2dProblem& p, T* grad_weight)
      : grad_weight_(grad_weight),
        output_step_(p.weight.n),
        reduced_(p.C / p.groups),
        produced_(p.K / p.groups),
        width_(Panels<T>(produced_).width),
        rows_(p) {}

  // lines (+)= the filters of channels [c, c + kTaskChannels), from sums [kAxis * kAxis][channels]
  // [width] that are added up over shares. Lines are in the order of the weight's rows, those of
  // these channels alone.
  void transform_back(int64_t c, const T* sums, int64_t sums_step, int64_t shares,
                      int64_t share_step, bool accumulate, T* lines) const {
    const int64_t channels = min_of(kTaskChannels, reduced_ - c);
    const int64_t row_step = rows_.channels_last() ? width_ : 9 * width_;
    const int64_t tap_step = rows_.channels_last() ? channels * width_ : width_;
    for (int64_t row = 0; row < channels; ++row) {
      for (int64_t k = 0; k < width_; k += kWidth) {
        Vec<T> half[3 * kAxis], taps[9];
#pragma GCC unroll 6
        for (int j = 0; j < kAxis; ++j) {
          Vec<T> column[kAxis];
          const T* from = sums + j * sums_step + row * width_ + k;
#pragma GCC unroll 6
          for (int i = 0; i < kAxis; ++i) column[i] = load(from + i * kAxis * sums_step);
          for (int64_t share = 1; share < shares; ++share) {
            from += share_step;
#pragma GCC unroll 6
            for (int i = 0; i < kAxis; ++i) column[i] += load(from + i * kAxis * sums_step);
          }
          Transform::apply(column, 1, half + j, kAxis);
        }
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) Transform::apply(half + r * kAxis, 1, taps + r * 3, 1);
        T* line = lines + row * row_step + k;
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t, line += tap_step) {
          store<T>(line, accumulate ? load(line) + taps[t] : taps[t]);
        }
      }
    }
  }

  // Writes the lines of channels [c, c + kTaskChannels) where they belong.
  void write(int64_t group, int64_t panel, int64_t c, const T* lines) const {
    const int64_t output = panel * width_;
    const int64_t channels = min_of(kTaskChannels, reduced_ - c);
    const int64_t valid = min_of(width_, produced_ - output);
    T* weight = grad_weight_ + (group * produced_ + output) * output_step_;
    if (!rows_.channels_last()) {
      rows_.write(lines, width_, valid, c * 9, (c + channels) * 9, weight);
      return;
    }
    for (int t = 0; t < 9; ++t) {
      const int64_t row = rows_.number({c, t / 3, t % 3});
      rows_.write(lines + t * channels * width_, width_, valid, row, row + channels, weight);
    }
  }

 private:
  T* grad_weight_;
  int64_t output_step_, reduced_, produced_, width_;
  WeightRows rows_;
};

}  // namespace
}  // namespace gdfast::cpu
