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
  int64_t ahead;     // to a line that is fetched meanwhile, 0: none

  SeenLines from_channel(int64_t c) const {
    SeenLines those = *this;
    for (int r = 0; r < 3; ++r) those.at[r] += c;
    return those;
  }

  GDFAST_INLINE void skip(int64_t columns) {
    for (int r = 0; r < 3; ++r) at[r] += columns * pitch[r];
  }

  // Calls each(row, vector, pixels) for a column, and goes on to the next.
  template <int kStep, int kVectors, typename Each>
  GDFAST_INLINE void take(const Each& each) {
#pragma GCC unroll 2
    for (int g = 0; g < kVectors; ++g) {
#pragma GCC unroll 2
      for (int x = 1; x <= kStep; ++x) __builtin_prefetch(at[2] + g * kLanes<T> + x * ahead, 0, 2);
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) each(r, g, load(at[r] + g * kLanes<T>));
    }
    skip(1);
  }
};

// Pixels [j, end) of a line of dest, of which `to` is pixel 0 and `step` lies between two.
template <typename T>
struct WalkedPixels {
  int64_t j, end;
  T* to;
  int64_t step;

  WalkedPixels from_channel(int64_t c) const { return {j, end, to + c, step}; }
};

// Sums of kVectors vectors; weights lie [vector][row][column][lane].
template <typename T, int kStep, int kVectors>
void walk_sums(SeenLines<T> seen, const T* weights, const T* starts, const WalkedPixels<T>& pixels,
               const Ending<T>& ending_of_all) {
  const Ending<T> ending = ending_of_all;
  const int64_t j = pixels.j, end = pixels.end, step = pixels.step;
  Vec<T> weight[kVectors][3][3], start[kVectors];
#pragma GCC unroll 2
  for (int g = 0; g < kVectors; ++g) {
    start[g] = load(starts + g * kLanes<T>);
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) weight[g][t / 3][t % 3] = load(weights + (g * 9 + t) * kLanes<T>);
  }
  const auto write = [&](int64_t x, Vec<T>(&sums)[kVectors]) {
    finish_sums<1, kVectors>(ending, &sums);
    T* const to = pixels.to + x * step;
#pragma GCC unroll 2
    for (int g = 0; g < kVectors; ++g) store<T>(to + g * kLanes<T>, sums[g]);
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
    seen.skip(first);
    for (int64_t column = first; column < columns_end; ++column, ++x) {
      begin(last);
      seen.template take<1, kVectors>([&](int r, int g, Vec<T> pixel) {
        sums[g] += weight[g][r][2] * pixel;
        next[g] += weight[g][r][1] * pixel;
        last[g] += weight[g][r][0] * pixel;
      });
      if (x >= j) write(x, sums);
      move(next, sums);
      move(last, next);
    }
    for (; x < end; ++x) {
      write(x, sums);
      move(next, sums);
    }
  } else {
    int64_t column = j * kStep + seen.first_dw;
    seen.skip(max_of(0, column));
    if (column >= 0) {
      seen.template take<kStep, kVectors>(
          [&](int r, int g, Vec<T> pixel) { sums[g] += weight[g][r][0] * pixel; });
    }
    for (int64_t x = j; x < end; ++x) {
      seen.template take<kStep, kVectors>(
          [&](int r, int g, Vec<T> pixel) { sums[g] += weight[g][r][1] * pixel; });
      begin(next);
      column += kStep;
      if (column < seen.width) {
        seen.template take<kStep, kVectors>([&](int r, int g, Vec<T> pixel) {
          sums[g] += weight[g][r][2] * pixel;
          next[g] += weight[g][r][0] * pixel;
        });
      }
      write(x, sums);
      move(next, sums);
    }
  }
}

// sums += gradients * seen for each tap, over the pixels of a whole line. Sums lie as weights do.
template <typename T, int kStep, int kVectors>
void walk_tap_sums(SeenLines<T> seen, const WalkedPixels<const T>& grads, T* to) {
  const T* const grad = grads.to;
  const int64_t end = grads.end, step = grads.step;
  Vec<T> sums[kVectors][3][3];
#pragma GCC unroll 2
  for (int g = 0; g < kVectors; ++g) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) sums[g][t / 3][t % 3] = load(to + (g * 9 + t) * kLanes<T>);
  }
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
    seen.skip(first);
    for (int64_t column = first; column < columns_end; ++column, ++x) {
      fetch(x, now);
      seen.template take<1, kVectors>([&](int r, int g, Vec<T> pixel) {
        sums[g][r][0] += now[g] * pixel;
        sums[g][r][1] += middle[g] * pixel;
        sums[g][r][2] += past[g] * pixel;
      });
      move(middle, past);
      move(now, middle);
    }
  } else {
    int64_t column = seen.first_dw;
    seen.skip(max_of(0, column));
    fetch(-1, past);
    for (int64_t x = 0; x < end; ++x, column += kStep) {
      fetch(x, now);
      if (column >= 0) {
        seen.template take<kStep, kVectors>([&](int r, int g, Vec<T> pixel) {
          sums[g][r][0] += now[g] * pixel;
          sums[g][r][2] += past[g] * pixel;
        });
      }
      seen.template take<kStep, kVectors>(
          [&](int r, int g, Vec<T> pixel) { sums[g][r][1] += now[g] * pixel; });
      move(now, past);
    }
    if (column < seen.width) {
      seen.template take<kStep, kVectors>(
          [&](int r, int g, Vec<T> pixel) { sums[g][r][2] += past[g] * pixel; });
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < kVectors; ++g) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) store<T>(to + (g * 9 + t) * kLanes<T>, sums[g][t / 3][t % 3]);
  }
}

}  // namespace
}  // namespace gdfast::cpu
