// A column of tiles: the rows of a block times one panel, in one call.
//
//   out[i][column + j] (+)= start[j] + sum over x of rows[i][x * row_step] * panel[x * width + j]
//
// and the activation of that. It is what multiply_tile does, for the simplest of its cases: where
// sums are of 64 or 128 products, setting it up for every tile takes a tenth of the time.
#pragma once

#include "pack.h"
#include "tile.h"

namespace gdfast::cpu {
namespace {

// sum += a * b, in place. Left to itself the compiler may write the sum to where a or b was: with
// all registers in use it then moves them about, or spills some.
template <typename T>
GDFAST_INLINE void add_product(Vec<T>& sum, Vec<T> a, Vec<T> b) {
#if defined(__FMA__) && !defined(GDFAST_EMULATE_AVX512)
  if constexpr (kSame<T, float>) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return;
  }
#endif
  sum += a * b;
}

// sum += *a * b. AVX-512 broadcasts a number in the multiplication itself, which is quicker than a
// load of its own where no other vector needs it.
template <typename T>
GDFAST_INLINE void add_product_of(Vec<T>& sum, const T* a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (kSame<T, float>) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
    return;
  }
#endif
  Vec<T> value = broadcast(*a);
  keep_in_register<T>(value);
  add_product<T>(sum, value, b);
}

// Fetches a line that is about to be written.
template <typename T>
GDFAST_INLINE void prefetch_to_write(T* line) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*line));
#else
  __builtin_prefetch(line, 1);
#endif
}

// Whether rows of the next tile that lie apart are fetched ahead, and what is written next. With
// shorter vectors there is more time for what comes from memory, and less room for instructions.
constexpr bool kFetchesMore = kVectorRegisters == 32;

template <typename T>
struct ColumnArgs {
  const T* const* rows;  // [tiles][kTileRows]
  // [tiles][kTileRows], what to fetch meanwhile, from there on; or null.
  const T* const* ahead;
  T* const* out;        // [tiles][kTileRows]
  T* const* out_ahead;  // [tiles][kTileRows], what is written next, fetched; or null
  int64_t column;       // of out, where the panel's sums begin
  int64_t row_step = 1, panel_step;
  // What lies so far beyond a row's values is fetched as they are read: the next tile's, where each
  // step takes rows from another cache line.
  int64_t row_ahead = 0;
  // Steps from one fetch ahead to the next, and what lies between what they fetch: a cache line.
  int64_t stretch = 64 / sizeof(T), ahead_step = 64 / sizeof(T);
  int64_t tiles, length;
  const T* panel;
  const T* start;  // [width], or null to add to what out holds
  Ending<T> ending;
};

// Not inlined: where it knows some of the arguments the compiler was seen to spill the sums.
template <typename T, int kVectors>
__attribute__((noinline)) void multiply_column(const ColumnArgs<T>& args) {
  constexpr int kWidth = kLanes<T>;
  const int64_t length = args.length, column = args.column, ahead_step = args.ahead_step;
  const int64_t row_step = args.row_step, panel_step = args.panel_step, stretch = args.stretch;
  const int64_t out_lines = ceil_div(kVectors * stretch, length);  // fetched every `stretch` steps
  for (int64_t first = 0; first < args.tiles * kTileRows; first += kTileRows) {
    const T* const* ahead = args.ahead == nullptr ? nullptr : args.ahead + first;
    T* const* out = args.out + first;
    const T* row[kTileRows];
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) row[i] = args.rows[first + i];
    T* const* out_ahead = args.out_ahead == nullptr ? nullptr : args.out_ahead + first;
    const T *row_ahead = row[0] + args.row_ahead, *panel = args.panel;
    Vec<T> sum[kTileRows][kVectors] = {};
    int64_t at = 0;
    const auto step = [&]() __attribute__((always_inline)) {
      Vec<T> line[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) line[j] = load(panel + j * kWidth);
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
        if constexpr (kVectors == 1) {
          add_product_of<T>(sum[i][0], row[i] + at, line[0]);
          continue;
        }
        Vec<T> value = broadcast(row[i][at]);
        keep_in_register<T>(value);  // see multiply_tile
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) add_product<T>(sum[i][j], value, line[j]);
      }
      if constexpr (kFetchesMore) __builtin_prefetch(row_ahead + at);
      at += row_step;
      panel += panel_step;
    };
    int64_t left = length, out_line = 0;
    for (int64_t line = 0; left > 0; ++line) {
      if (ahead != nullptr) {
#pragma GCC unroll 6
        for (int i = 0; i < kTileRows; ++i) __builtin_prefetch(ahead[i] + line * ahead_step);
      }
      if constexpr (kFetchesMore) {
        if (out_ahead != nullptr) {
          for (; out_line < min_of((line + 1) * out_lines, kVectors); ++out_line) {
#pragma GCC unroll 6
            for (int i = 0; i < kTileRows; ++i) {
              prefetch_to_write(out_ahead[i] + column + out_line * kWidth);
            }
          }
        }
      }
      int64_t steps = min_of(stretch, left);
      left -= steps;
      for (; steps >= 2; steps -= 2) {
        step();
        step();
      }
      if (steps > 0) step();
    }
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const T* from = args.start == nullptr ? out[i] + column : args.start;
        sum[i][j] += load(from + j * kWidth);
      }
    }
    finish_sums<kTileRows, kVectors>(args.ending, sum);
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store<T>(out[i] + column + j * kWidth, sum[i][j]);
    }
    if (args.ending.activation == Activation::kSilu) {
      T* sums[kTileRows];
      for (int i = 0; i < kTileRows; ++i) sums[i] = out[i] + column;
      silu_rows(sums, kTileRows, kVectors * kWidth);
    }
  }
}

// Calls the column of the given number of vectors, 1 to kMaxVectors.
template <typename T>
GDFAST_INLINE void multiply_column(int64_t vectors, const ColumnArgs<T>& args) {
  switch (vectors) {
    case 1:
      return multiply_column<T, 1>(args);
    case 2:
      return multiply_column<T, 2>(args);
    case 3:
      if constexpr (kMaxVectors >= 3) multiply_column<T, 3>(args);
      return;
    case 4:
      if constexpr (kMaxVectors >= 4) multiply_column<T, 4>(args);
      return;
  }
}

}  // namespace
}  // namespace gdfast::cpu
