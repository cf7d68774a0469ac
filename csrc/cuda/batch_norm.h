// What both directions of batch normalisation share: how blocks walk through a tensor, and how
// their threads join what they have summed.
//
// A tensor is a table of vectors: in channels_last those of some neighbouring channels, a row for
// each pixel; in NCHW those of some neighbouring pixels, a column for each channel. A block takes
// some columns, side by side, of a split of the rows.
#pragma once

#include "../batch_norm_problem.h"
#include "divisor.h"
#include "sums.h"
#include "vectors.h"

namespace gdfast::cuda {

constexpr int kBatchNormThreads = kSumThreads;
// Vectors of a thread in a round: it asks memory for all or some of them at a time.
constexpr int kAtOnce = 4;
// Blocks of a pass that sums, at most: room for what they write.
constexpr int64_t kMostSumBlocks = 1024;

inline int64_t sum_blocks(int64_t blocks) {
  return blocks < kMostSumBlocks ? blocks : kMostSumBlocks;
}

struct BatchNormWalk {
  int C;
  int columns, rows;
  int tile_columns, tile_rows;  // of threads in a block; those left over do nothing
  int rows_per_round, rounds;   // of all blocks that share their columns
  int splits;                   // these blocks, which take rounds in turn
  Divisor image;                // rows of one image
  int64_t image_step, row_step, column_step;
};

// A walk in vectors of `vector` elements, which are channels where kAcross, by at most so many
// blocks. A thread of a summing pass has at least two rounds.
inline BatchNormWalk batch_norm_walk(const BatchNormProblem& p, int vector, bool across,
                                     int64_t blocks, bool sums) {
  const int64_t columns = across ? p.C / vector : p.C;
  const int64_t image = across ? p.S : p.S / vector;
  const int64_t rows = p.N * image;
  // Threads that lie side by side read side by side.
  const int64_t most = p.channels_last ? (vector == 1 ? 128 : 32) : 1;
  const int64_t tiles = ceil_div(columns, most);
  const int64_t tile_columns = ceil_div(columns, tiles);
  const int64_t tile_rows = kBatchNormThreads / tile_columns;
  const int64_t rows_per_round = tile_rows * kAtOnce;
  const int64_t rounds = ceil_div(rows, rows_per_round);
  int64_t splits = sums ? ceil_div(rounds, 2) : rounds;
  if (splits > blocks / tiles) splits = blocks / tiles > 1 ? blocks / tiles : 1;
  BatchNormWalk walk{};
  walk.C = static_cast<int>(p.C);
  walk.columns = static_cast<int>(columns);
  walk.rows = static_cast<int>(rows);
  walk.tile_columns = static_cast<int>(tile_columns);
  walk.tile_rows = static_cast<int>(tile_rows);
  walk.rows_per_round = static_cast<int>(rows_per_round);
  walk.rounds = static_cast<int>(rounds);
  walk.splits = static_cast<int>(splits);
  walk.image = Divisor::of(image);
  walk.image_step = p.C * p.S;
  walk.row_step = p.channels_last ? p.C : vector;
  walk.column_step = across ? vector : p.channels_last ? 1 : p.S;
  return walk;
}

inline dim3 batch_norm_grid(const BatchNormWalk& walk) {
  const int64_t tiles = ceil_div(walk.columns, walk.tile_columns);
  return dim3(static_cast<unsigned>(walk.splits), static_cast<unsigned>(tiles));
}

template <int kElements, bool kAreAcross>
struct VectorKind {
  static constexpr int kVector = kElements;
  static constexpr bool kAcross = kAreAcross;
};

// Calls f with the vectors that a problem of elements T allows at addresses that 16 divides.
template <typename T, typename F>
void with_vectors(const BatchNormProblem& p, bool aligned, F&& f) {
  constexpr int kVector = kWholeVector<T>;
  if constexpr (kVector > 1) {
    if (aligned && p.channels_last && p.C % kVector == 0) return f(VectorKind<kVector, true>{});
    if (aligned && !p.channels_last && p.S % kVector == 0) return f(VectorKind<kVector, false>{});
  }
  f(VectorKind<1, false>{});
}

// Where a thread is in a walk.
struct WalkPlace {
  int tile_row, column;
  bool exists;

  GDFAST_DEVICE WalkPlace of(const BatchNormWalk& walk) {
    const int thread = static_cast<int>(threadIdx.x);
    WalkPlace place;
    place.tile_row = thread / walk.tile_columns;
    place.column = static_cast<int>(blockIdx.y) * walk.tile_columns + thread % walk.tile_columns;
    place.exists = place.column < walk.columns && place.tile_row < walk.tile_rows;
    return place;
  }
};

// Calls each(row) for every kLoads of a thread's rows, with the first one; the next ones lie
// tile_rows apart. All blocks go through a tensor together, from its end where reversed: a second
// pass finds what the first one read last in L2. Their order does not depend on kLoads.
template <bool kReversed, int kLoads, typename Each>
GDFAST_DEVICE void for_each_round(const BatchNormWalk& walk, const WalkPlace& place, Each&& each) {
  static_assert(kAtOnce % kLoads == 0, "whole rounds");
  if (!place.exists) return;
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x); i < walk.rounds; i += walk.splits) {
    const int round = kReversed ? walk.rounds - 1 - i : i;
    const int first = round * walk.rows_per_round + place.tile_row;
#pragma unroll 1
    for (int at = 0; at < kAtOnce; at += kLoads) each(first + at * walk.tile_rows);
  }
}

// Pixels follow one another where vectors are of channels.
template <bool kAcross>
GDFAST_DEVICE int64_t element_of(const BatchNormWalk& walk, int row, int column) {
  if constexpr (kAcross) return row * walk.row_step + column * walk.column_step;
  const Divided at = divide(row, walk.image);
  return at.quotient * walk.image_step + at.rest * walk.row_step + column * walk.column_step;
}

// The factors of a vector's channels; in channels_last these lie at 16 bytes.
template <int kCount, typename A>
GDFAST_DEVICE void load_factors(const A* from, A (&factors)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      A four[4];
      load_values<4>(from + i, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) factors[i + j] = four[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) factors[i] = from[i];
  }
}

// params[c], or `otherwise` where there are none. They are of type T or, where wide, of its sums.
template <typename T>
GDFAST_DEVICE SumOf<T> param_at(const void* params, bool wide, int c, SumOf<T> otherwise) {
  if (params == nullptr) return otherwise;
  return wide ? static_cast<const SumOf<T>*>(params)[c]
              : SumOf<T>(to_float(static_cast<const T*>(params)[c]));
}

template <typename T>
GDFAST_DEVICE void set_param(void* params, bool wide, int c, double value) {
  if (params == nullptr) return;
  if (wide) {
    static_cast<SumOf<T>*>(params)[c] = static_cast<SumOf<T>>(value);
  } else {
    static_cast<T*>(params)[c] = from_float<T>(static_cast<SumOf<T>>(value));
  }
}

// The workspace: tables [C] of factors, then the splits' sums.
constexpr int kFactorTables = 5;

template <typename T>
struct BatchNormWorkspace {
  SumOf<T>* factors;
  SumOf<T>* partial;

  BatchNormWorkspace(const BatchNormProblem& p, void* memory)
      : factors(static_cast<SumOf<T>*>(memory)),
        partial(factors + ceil_div(p.C, 4) * 4 * kFactorTables) {}
};

}  // namespace gdfast::cuda
