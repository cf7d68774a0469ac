// Copies of operands into the order that the micro-kernel reads, in the type that it sums in.
#pragma once

#include "numeric.h"
#include "parallel.h"
#include "simd.h"

namespace gdfast::cpu {
namespace {

template <typename A, typename B>
constexpr bool kSame = std::is_same<A, B>::value;

// to[x] = from[x * step], widened.
template <typename T, typename A>
GDFAST_INLINE void copy_widened(const T* from, int64_t step, int64_t count, A* to) {
  if (step == 1) {
    for (int64_t x = 0; x < count; ++x) to[x] = widen(from[x]);
  } else {
    for (int64_t x = 0; x < count; ++x) to[x] = widen(from[x * step]);
  }
}

// to[x * step] = from[x], rounded to T.
template <typename T, typename A>
GDFAST_INLINE void copy_narrowed(const A* from, int64_t count, T* to, int64_t step) {
  if (step == 1) {
    for (int64_t x = 0; x < count; ++x) to[x] = narrow<T>(from[x]);
  } else {
    for (int64_t x = 0; x < count; ++x) to[x * step] = narrow<T>(from[x]);
  }
}

// line_at(x)[y] = from[y * from_step + x] for x below count and y below lines, widened; y from
// lines to width are zeros. Memory is read along x and written along y; with `stream` past the
// caches, for which whole vectors of a line must be aligned.
template <typename A, typename T, typename LineAt>
void transpose_lines(const T* from, int64_t from_step, int64_t count, int64_t lines, int64_t width,
                     const LineAt& line_at, bool stream = false) {
  constexpr int kWidth = kLanes<A>;
  for (int64_t y = 0; y < width; y += kWidth) {
    const int64_t y_count = min_of(kWidth, width - y), y_valid = min_of(kWidth, lines - y);
    for (int64_t x = 0; x < count; x += kWidth) {
      const int64_t x_count = min_of(kWidth, count - x);
      const T* corner = from + y * from_step + x;
      Vec<A> square[kWidth];
      if constexpr (kSame<T, A>) {
        if (x_count == kWidth && y_valid == kWidth) {
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) square[i] = load(corner + i * from_step);
          transpose<A>(square);
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) {
            A* const to = line_at(x + i) + y;
            stream ? store_streaming<A>(to, square[i]) : store<A>(to, square[i]);
          }
          continue;
        }
      }
      A copy[kWidth][kWidth] = {};
      for (int64_t i = 0; i < y_valid; ++i)
        copy_widened(corner + i * from_step, 1, x_count, copy[i]);
      std::memcpy(square, copy, sizeof square);
      transpose<A>(square);
      for (int64_t i = 0; i < x_count; ++i) {
        A* to = line_at(x + i) + y;
        if (y_count == kWidth) {
          store<A>(to, square[i]);
        } else {
          A lanes[kWidth];
          store<A>(lanes, square[i]);
          for (int64_t lane = 0; lane < y_count; ++lane) to[lane] = lanes[lane];
        }
      }
    }
  }
}

// The same with lines that lie to_step apart.
template <typename T, typename A>
void transpose_widened(const T* from, int64_t from_step, int64_t count, int64_t lines,
                       int64_t width, A* to, int64_t to_step, bool stream = false) {
  transpose_lines<A>(
      from, from_step, count, lines, width, [to, to_step](int64_t x) { return to + x * to_step; },
      stream);
}

}  // namespace
}  // namespace gdfast::cpu
