// Mean and squared deviations of channels, in parts that join by Chan's formula, which loses
// nothing to a large mean.
//
// Source: Chan, Golub and LeVeque, 1979, "Updating formulae and a pairwise algorithm".
#pragma once

#include "sums.h"

namespace gdfast::cuda {

// Of kCount channels side by side: over `count` values of each their mean, and the sum of the
// squares of what they differ from it.
template <typename A, int kCount>
struct Moments {
  A count;
  A mean[kCount];
  A squares[kCount];

  GDFAST_DEVICE void join(Moments& to, const Moments& other) {
    const A total = to.count + other.count;
    const A share = total > 0 ? other.count / total : A(0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const A away = other.mean[i] - to.mean[i];
      to.squares[i] += other.squares[i] + away * away * (to.count * share);
      to.mean[i] += away * share;
    }
    to.count = total;
  }
};

// Counts, and sums of what means differ from one of them, with the squares about that.
struct PartSums {
  double count, away, squares;

  GDFAST_DEVICE void join(PartSums& to, const PartSums& other) {
    to.count += other.count;
    to.away += other.away;
    to.squares += other.squares;
  }
};

// Parts are a table [parts, 3, C]: counts, means and squares. What a thread of a block of
// kJoinChannels x kJoinThreads joins for channel c of the parts from first to before end; the first
// row of threads has it all.
template <typename A>
GDFAST_DEVICE Moments<double, 1> join_parts(const A* parts, int C, int c, int64_t first,
                                            int64_t end) {
  const int thread = static_cast<int>(threadIdx.x) / kJoinChannels;
  PartSums sums{};
  // The same for all threads: no division until all is there, and nothing lost to a large mean.
  double near = 0;
  if (c < C && first < end) {
    near = parts[3 * first * C + C + c];
    // Several parts are under way at a time.
#pragma unroll 8
    for (int64_t part = first + thread; part < end; part += kJoinThreads) {
      const A* const from = parts + 3 * part * C + c;
      const double count = from[0], away = from[C] - near;
      PartSums::join(sums, {count, count * away, from[2 * C] + count * away * away});
    }
  }
  join_rows(sums, thread, kJoinThreads, kJoinChannels);
  const double shift = sums.count > 0 ? sums.away / sums.count : 0;
  const double squares = sums.squares - sums.away * shift;
  // A NaN stays one.
  return {sums.count, {near + shift}, {squares < 0 ? 0 : squares}};
}

template <typename A, typename B>
GDFAST_DEVICE void write_part(A* to, int C, const Moments<B, 1>& moments) {
  to[0] = static_cast<A>(moments.count);
  to[C] = static_cast<A>(moments.mean[0]);
  to[2 * C] = static_cast<A>(moments.squares[0]);
}

GDFAST_DEVICE int join_channel() {
  return static_cast<int>(blockIdx.x) * kJoinChannels +
         static_cast<int>(threadIdx.x) % kJoinChannels;
}

constexpr size_t kJoinMemory = kJoinChannels * kJoinThreads * kValuesStep<PartSums>;

// How many parts a convolution of so many output pixels hands to a batch normalisation: few, since
// one kernel joins them, and of some for each of its own threads.
inline int64_t moment_splits(int64_t pixels) {
  constexpr int64_t kLeastPixels = 1024, kMost = 128;
  const int64_t splits = ceil_div(pixels, kLeastPixels);
  return splits < kMost ? splits : kMost;
}

}  // namespace gdfast::cuda
