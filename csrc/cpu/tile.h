// The micro-kernel: a tile of kTileRows x (kVectors vectors) sums, held in registers.
//
//   out[i][j] (+)= start(i, j) + sum over segments g and steps x of
//       rows[g][i][x * row_step] * panel[(g * length + x) * panel_step + j]
//
// and the activation of that, where it is complete.
//
// The row operand is broadcast, one element at a time, from kTileRows pointers of which each
// segment has its own set: that is how a convolution reads an image in place, a segment per tap.
// Where segments lie a constant step apart one set serves them all.
// The column operand is a panel whose lines are vectors.
#pragma once

#include "ending.h"
#include "parallel.h"

namespace gdfast::cpu {
namespace {

// What the operands are made of: numbers of the type that sums are taken in. bf16_pairs.h has
// another kind.
template <typename T>
struct Operand {
  using Sum = T;
  using Lane = T;  // of a vector of them

  static GDFAST_INLINE Vec<T> line(const T* from) { return load(from); }
  static GDFAST_INLINE Vec<T> spread(const T* from) { return broadcast(*from); }
  static GDFAST_INLINE void add_product(Vec<T>& sum, Vec<T> value, Vec<T> line) {
    sum += value * line;
  }
};

// 6 x 4 vectors take 24 accumulators, 4 for the panel's line and 1 for the broadcast: 29 of 32
// registers. 6 x 2 take 12, 2 and 1: 15 of 16.
constexpr int kTileRows = 6;
constexpr int kMaxVectors = kVectorRegisters == 32 ? 4 : 2;
static_assert(kTileRows * kMaxVectors + kMaxVectors + 1 <= kVectorRegisters);

// The widest panel, in elements.
template <typename T>
constexpr int kPanelWidth = kMaxVectors * kLanes<T>;

enum class Start {
  kAccumulate,  // add to what out holds
  kColumns,     // start[j], kVectors whole vectors
  kRows,        // start[i], kTileRows of them
};

template <typename T>
struct TileArgs {
  using A = typename Operand<T>::Sum;

  const T* const* rows;  // [segments][kTileRows], or [kTileRows] where segment_step is not 0
  int64_t row_step;
  int64_t segment_step = 0;
  // The rows of the tile to come, to be fetched meanwhile; null where they are at hand.
  const T* const* rows_ahead = nullptr;
  const T* panel;
  int64_t panel_step;
  int64_t segments, length;
  const A* start;
  Start how;
  A* const* out;  // [kTileRows], each to kVectors whole vectors
  Ending<A> ending;
};

template <typename T, int kVectors>
void multiply_tile(const TileArgs<T>& args) {
  using A = typename Operand<T>::Sum;
  using Lane = typename Operand<T>::Lane;
  constexpr int kWidth = kLanes<A>;
  Vec<A> sum[kTileRows][kVectors] = {};
  const T* panel = args.panel;
  const int64_t row_step = args.row_step, panel_step = args.panel_step, length = args.length;
  const int64_t segment_step = args.segment_step, set_step = segment_step == 0 ? kTileRows : 0;
  // Steps from one fetch ahead to the next: a cache line of a row.
  const int64_t stretch = args.rows_ahead == nullptr ? length : 64 / sizeof(T);
  for (int64_t g = 0; g < args.segments; ++g) {
    const T* row[kTileRows];
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) row[i] = args.rows[g * set_step + i] + g * segment_step;
    int64_t at = 0;
    for (int64_t begin = 0; begin < length; begin += stretch) {
      if (args.rows_ahead != nullptr) {
#pragma GCC unroll 6
        for (int i = 0; i < kTileRows; ++i) {
          __builtin_prefetch(args.rows_ahead[g * set_step + i] + g * segment_step + at);
        }
      }
      const int64_t end = min_of(begin + stretch, length);
      for (int64_t x = begin; x < end; ++x) {
        Vec<Lane> line[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) line[j] = Operand<T>::line(panel + j * kWidth);
#pragma GCC unroll 6
        for (int i = 0; i < kTileRows; ++i) {
          Vec<Lane> value = Operand<T>::spread(row[i] + at);
          // One broadcast serves kVectors products: keep it in a register, or the compiler loads it
          // anew for each of them and the load ports become the limit.
          keep_in_register<Lane>(value);
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) {
            Operand<T>::add_product(sum[i][j], value, line[j]);
          }
        }
        at += row_step;
        panel += panel_step;
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      // Sums of a part are added to what came before as a whole: two levels of summation keep the
      // error of long reductions small.
      sum[i][j] += args.how == Start::kAccumulate ? load<A>(args.out[i] + j * kWidth)
                   : args.how == Start::kColumns  ? load(args.start + j * kWidth)
                                                  : broadcast(args.start[i]);
    }
  }
  finish_sums<kTileRows, kVectors>(args.ending, sum);
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store<A>(args.out[i] + j * kWidth, sum[i][j]);
  }
  finish_rows(args.ending, args.out, kTileRows, kVectors * kWidth);
}

// Calls the tile of the given number of vectors, 1 to kMaxVectors.
template <typename T>
GDFAST_INLINE void multiply_tile(int vectors, const TileArgs<T>& args) {
  switch (vectors) {
    case 1:
      return multiply_tile<T, 1>(args);
    case 2:
      return multiply_tile<T, 2>(args);
    case 3:
      if constexpr (kMaxVectors >= 3) multiply_tile<T, 3>(args);
      return;
    case 4:
      if constexpr (kMaxVectors >= 4) multiply_tile<T, 4>(args);
      return;
  }
}

}  // namespace
}  // namespace gdfast::cpu
