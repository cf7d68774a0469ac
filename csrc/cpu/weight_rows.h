// The (c, r, s) of a weight as rows, in the order of the weight's memory: grad_weight is computed
// as rows x k and written k by k, and in that order the writing is a plain transposition.
#pragma once

#include "../conv2d_problem.h"
#include "convert.h"
#include "pack.h"

namespace gdfast::cpu {
namespace {

// to[y * to_step + x] = from[x * from_step + y], rounded to T, for x below count and y below lines;
// lines of from are whole vectors.
template <typename T>
void transpose_narrowed(const float* from, int64_t from_step, int64_t count, int64_t lines, T* to,
                        int64_t to_step) {
  constexpr int kWidth = kLanes<float>;
  for (int64_t x = 0; x < count; x += kWidth) {
    const int64_t x_count = min_of(kWidth, count - x);
    for (int64_t y = 0; y < lines; y += kWidth) {
      Vec<float> square[kWidth] = {};
      for (int64_t i = 0; i < x_count; ++i) square[i] = load(from + (x + i) * from_step + y);
      transpose<float>(square);
      const int64_t y_count = min_of(kWidth, lines - y);
      for (int64_t i = 0; i < y_count; ++i) {
        T* line = to + (y + i) * to_step + x;
        if (x_count == kWidth) {
          store_narrowed(line, square[i]);
        } else {
          store_some(line, square[i], x_count);
        }
      }
    }
  }
}

class WeightRows {
  // A weight of so many elements, 1 MB of float, is written past the caches: its lines need not be
  // read first, and who reads them next, the optimizer, comes when others have driven them out.
  static constexpr int64_t kStreamSize = 256 * 1024;
  static constexpr int64_t kLine = 64;  // bytes

 public:
  struct Row {
    int64_t c, r, s;
  };

  explicit WeightRows(const Conv2dProblem& p)
      : strides_(p.weight), channels_(p.C / p.groups), R_(p.R), S_(p.S) {
    channels_last_ = strides_.c == 1 && channels_ > 1;
    const int64_t c_step = channels_last_ ? 1 : R_ * S_, s_step = channels_last_ ? channels_ : 1;
    side_by_side_ = (channels_ == 1 || strides_.c == c_step) && (S_ == 1 || strides_.w == s_step) &&
                    (R_ == 1 || strides_.h == S_ * s_step);
    streams_ =
        kVectorBytes == kLine && strides_.n % kLanes<float> == 0 && p.K * count() >= kStreamSize;
  }

  bool channels_last() const { return channels_last_; }
  int64_t count() const { return channels_ * R_ * S_; }

  Row at(int64_t row) const {
    const int64_t taps = R_ * S_;
    const int64_t tap = channels_last_ ? row / channels_ : row % taps;
    return {channels_last_ ? row % channels_ : row / taps, tap / S_, tap % S_};
  }

  // The row of a (c, r, s).
  int64_t number(const Row& row) const {
    const int64_t tap = row.r * S_ + row.s;
    return channels_last_ ? tap * channels_ + row.c : row.c * R_ * S_ + tap;
  }

  // Writes rows [row, end) of `valid` k: sums[x * width + k] belongs to row + x. `weight` is where
  // the first of these k begins.
  template <typename T, typename A>
  void write(const A* sums, int64_t width, int64_t valid, int64_t row, int64_t end,
             T* weight) const {
    if (side_by_side_) {
      if constexpr (kSame<T, A>) {
        const bool stream = streams_ && reinterpret_cast<uintptr_t>(weight + row) % kLine == 0;
        transpose_widened(sums, width, valid, end - row, end - row, weight + row, strides_.n,
                          stream);
        if (stream) stream_fence();
      } else {
        transpose_narrowed(sums, width, end - row, valid, weight + row, strides_.n);
      }
      return;
    }
    for (; row < end; ++row, sums += width) {
      const Row to = at(row);
      copy_narrowed(sums, valid, weight + to.c * strides_.c + to.r * strides_.h + to.s * strides_.w,
                    strides_.n);
    }
  }

 private:
  Strides4 strides_;
  int64_t channels_, R_, S_;
  bool channels_last_, side_by_side_, streams_;
};

}  // namespace
}  // namespace gdfast::cpu
