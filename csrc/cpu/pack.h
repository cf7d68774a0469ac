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

// to[x * to_step + y] = from[y * from_step + x] for x below count and y below lines, widened; lines
// up to width are filled with zeros. count runs along memory in from, y along memory in to.
template <typename T, typename A>
void transpose_widened(const T* from, int64_t from_step, int64_t count, int64_t lines,
                       int64_t width, A* to, int64_t to_step) {
  constexpr int kWidth = kLanes<A>;
  for (int64_t y = 0; y < width; y += kWidth) {
    const int64_t y_count = min_of(kWidth, width - y);
    int64_t x = 0;
    if constexpr (kSame<T, A>) {
      if (y_count == kWidth && y + kWidth <= lines) {
        for (; x + kWidth <= count; x += kWidth) {
          Vec<A> square[kWidth];
          for (int i = 0; i < kWidth; ++i) square[i] = load(from + (y + i) * from_step + x);
          transpose<A>(square);
          for (int i = 0; i < kWidth; ++i) store<A>(to + (x + i) * to_step + y, square[i]);
        }
      }
    }
    for (; x < count; ++x) {
      for (int64_t i = 0; i < y_count; ++i) {
        to[x * to_step + y + i] = y + i < lines ? widen(from[(y + i) * from_step + x]) : A(0);
      }
    }
  }
}

}  // namespace
}  // namespace gdfast::cpu
