// Depthwise 3x3 layers where channels lie side by side: one or two vectors of channels walk along a
// line of the image.
//
// Three lines are seen together, a column of each pixel being loaded once for all outputs that see
// it: 3 loads for 9 products with step 1, 6 with step 2. Weights and sums stay in registers all the
// way, and from one column to the next nothing but addresses has to be found.
#pragma once

#include "ending.h"
#include "parallel.h"

namespace gdfast::cpu {
namespace {

// As many as weights, or sums, for all of which there are registers.
constexpr int kWalkVectors = kVectorRegisters == 32 ? 2 : 1;

// The lines that one line of outputs sees, and the columns of them.
template <typename T>
struct SeenLines {
  const T* at[3];    // column 0; beyond the border there are zeros, 0 apart
  int64_t pitch[3];  // from one column to the next
  int64_t width;     // columns
  int64_t first_dw;  // of the first tap
  int64_t ahead;     // from the third line to one that is fetched meanwhile, 0: none
};

// A column after the other of those lines, of vectors of channels from c on.
template <typename T, int kStep, int kVectors>
class Walk {
 public:
  // Each address by itself: filled as vectors, they would wait for what was stored a moment ago.
  GDFAST_INLINE Walk(const SeenLines<T>& seen, int64_t c, int64_t column) : ahead_(seen.ahead) {
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) {
      pitch_[r] = seen.pitch[r];
      at_[r] = seen.at[r] + c + column * pitch_[r];
      forget_origin(pitch_[r]);
      forget_origin(at_[r]);
    }
  }

  // Calls each(row, vector, pixels) for a column, and goes on to the next.
  template <typename Each>
  GDFAST_INLINE void take(const Each& each) {
#pragma GCC unroll 2
    for (int g = 0; g < kVectors; ++g) {
#pragma GCC unroll 2
      for (int x = 1; x <= kStep; ++x) {
        if (ahead_ != 0) __builtin_prefetch(at_[2] + g * kLanes<T> + x * ahead_, 0, 2);
      }
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        Vec<T> pixels = load(at_[r] + g * kLanes<T>);
        keep_in_register<T>(pixels);
        each(r, g, pixels);
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) at_[r] += pitch_[r];
  }

 private:
  const T* at_[3];
  int64_t pitch_[3], ahead_;
};

// Pixels [j, end) of a line of dest, of which `to` is pixel 0 and `step` lies between two.
template <typename T>
struct WalkedPixels {
  int64_t j, end;
  T* to;
  int64_t step;
  bool stream = false;  // past the caches: all vectors are aligned
};

// Sums of kVectors vectors of channels from c on; weights lie [vector][row][column][lane].
template <typename T, int kStep, int kVectors>
void walk_sums(const SeenLines<T>& seen, int64_t c, const T* weights, const T* starts,
               const WalkedPixels<T>& pixels, const Ending<T>& ending_of_all) {
  const Ending<T> ending = ending_of_all;
  T* const line = pixels.to + c;
  const int64_t j = pixels.j, end = pixels.end, step = pixels.step;
  const bool stream = pixels.stream;
  Vec<T> weight[kVectors][3][3], start[kVectors];
#pragma GCC unroll 2
  for (int g = 0; g < kVectors; ++g) {
    start[g] = load(starts + g * kLanes<T>);
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) weight[g][t / 3][t % 3] = load(weights + (g * 9 + t) * kLanes<T>);
  }
  const auto write = [&](int64_t x, Vec<T>(&sums)[kVectors]) {
    finish_sums<1, kVectors>(ending, &sums);
    T* const to = line + x * step;
#pragma GCC unroll 2
    for (int g = 0; g < kVectors; ++g) {
      T* const at = to + g * kLanes<T>;
      stream ? store_streaming<T>(at, sums[g]) : store<T>(at, sums[g]);
    }
  };
  // Sums of neighbouring pixels that see the column.
  Vec<T> sums[kVectors], next[kVectors], last[kVectors];
  const auto begin = [&](Vec<T>(&those)[kVectors]) {
#pragma GCC unroll 2
    for (int g = 0; g < kVectors; ++g) those[g] = start[g];
  };
  const auto move = [](const Vec<T>(&from)[kVectors], Vec<T>(&to)[kVectors]) {
#pragma GCC unroll 2
    for (int g = 0; g < kVectors; ++g) to[g] = from[g];
  };
  begin(sums);
  if constexpr (kStep == 1) {
    begin(next);
    const int64_t first = max_of(0, j + seen.first_dw);
    const int64_t columns_end = min_of(seen.width, end + seen.first_dw + 2);
    int64_t x = first - seen.first_dw - 2;  // the pixel whose last tap sees the column
    Walk<T, kStep, kVectors> walk(seen, c, first);
    for (int64_t column = first; column < columns_end; ++column, ++x) {
      begin(last);
      walk.take([&](int r, int g, Vec<T> pixel) {
        sums[g] += weight[g][r][2] * pixel;
        next[g] += weight[g][r][1] * pixel;
        last[g] += weight[g][r][0] * pixel;
      });
      if (x >= j) write(x, sums);
      move(next, sums);
      move(last, next);
    }
    for (; x < end; ++x) {
      if (x >= j) write(x, sums);
      move(next, sums);
    }
  } else {
    int64_t column = j * kStep + seen.first_dw;
    Walk<T, kStep, kVectors> walk(seen, c, max_of(0, column));
    if (column >= 0) {
      walk.take([&](int r, int g, Vec<T> pixel) { sums[g] += weight[g][r][0] * pixel; });
    }
    for (int64_t x = j; x < end; ++x) {
      walk.take([&](int r, int g, Vec<T> pixel) { sums[g] += weight[g][r][1] * pixel; });
      begin(next);
      column += kStep;
      if (column < seen.width) {
        walk.take([&](int r, int g, Vec<T> pixel) {
          sums[g] += weight[g][r][2] * pixel;
          next[g] += weight[g][r][0] * pixel;
        });
      }
      write(x, sums);
      move(next, sums);
    }
  }
}

// to += gradients * seen for each tap, over the pixels of a whole line. Sums lie as weights do.
template <typename T, int kStep, int kVectors>
void walk_tap_sums(const SeenLines<T>& seen, int64_t c, const WalkedPixels<const T>& grads, T* to) {
  const T* const grad = grads.to + c;
  const int64_t end = grads.end, step = grads.step;
  Vec<T> sums[kVectors][3][3] = {};
  const auto fetch = [&](int64_t x, Vec<T>(&those)[kVectors]) {
    const bool inside = x >= 0 && x < end;
#pragma GCC unroll 2
    for (int g = 0; g < kVectors; ++g) {
      those[g] = inside ? load(grad + x * step + g * kLanes<T>) : Vec<T>{};
    }
  };
  const auto move = [](const Vec<T>(&from)[kVectors], Vec<T>(&to)[kVectors]) {
#pragma GCC unroll 2
    for (int g = 0; g < kVectors; ++g) to[g] = from[g];
  };
  // Gradients of the pixels that see the column through their last, middle and first tap.
  Vec<T> past[kVectors], middle[kVectors], now[kVectors];
  if constexpr (kStep == 1) {
    const int64_t first = max_of(0, seen.first_dw);
    const int64_t columns_end = min_of(seen.width, end + seen.first_dw + 2);
    int64_t x = first - seen.first_dw;
    fetch(x - 2, past);
    fetch(x - 1, middle);
    Walk<T, kStep, kVectors> walk(seen, c, first);
    for (int64_t column = first; column < columns_end; ++column, ++x) {
      fetch(x, now);
      walk.take([&](int r, int g, Vec<T> pixel) {
        sums[g][r][0] += now[g] * pixel;
        sums[g][r][1] += middle[g] * pixel;
        sums[g][r][2] += past[g] * pixel;
      });
      move(middle, past);
      move(now, middle);
    }
  } else {
    int64_t column = seen.first_dw;
    Walk<T, kStep, kVectors> walk(seen, c, max_of(0, column));
    fetch(-1, past);
    for (int64_t x = 0; x < end; ++x, column += kStep) {
      fetch(x, now);
      if (column >= 0) {
        walk.take([&](int r, int g, Vec<T> pixel) {
          sums[g][r][0] += now[g] * pixel;
          sums[g][r][2] += past[g] * pixel;
        });
      }
      walk.take([&](int r, int g, Vec<T> pixel) { sums[g][r][1] += now[g] * pixel; });
      move(now, past);
    }
    if (column < seen.width) {
      walk.take([&](int r, int g, Vec<T> pixel) { sums[g][r][2] += past[g] * pixel; });
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < kVectors; ++g) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
      T* const sum = to + (g * 9 + t) * kLanes<T>;
      store<T>(sum, load(sum) + sums[g][t / 3][t % 3]);
    }
  }
}

}  // namespace
}  // namespace gdfast::cpu
