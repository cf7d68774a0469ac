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

// Parts are a table [parts, 3, C]: counts, means and squares. What a thread of a block of
// kJoinChannels x kJoinThreads joins for channel c of the parts from first to before end; after
// join_rows the first row of threads has it all.
template <typename A>
GDFAST_DEVICE Moments<double, 1> join_parts(const A* parts, int C, int c, int64_t first,
                                            int64_t end) {
  const int thread = static_cast<int>(threadIdx.x) / kJoinChannels;
  Moments<double, 1> joint{};
  if (c < C && first + thread < end) {
    // Sums of what the means differ from one of them: no division, and nothing lost to a large
    // mean. Several parts are under way at a time.
    const double near = parts[3 * first * C + C + c];
    double sum = 0, squares = 0;
#pragma unroll 8
    for (int64_t part = first + thread; part < end; part += kJoinThreads) {
      const A* const from = parts + 3 * part * C + c;
      const double count = from[0], away = from[C] - near;
      joint.count += count;
      sum += count * away;
      squares += from[2 * C] + count * away * away;
    }
    const double shift = joint.count > 0 ? sum / joint.count : 0;
    joint.mean[0] = near + shift;
    joint.squares[0] = squares - sum * shift;
    // A NaN stays one.
    if (joint.squares[0] < 0) joint.squares[0] = 0;
  }
  join_rows(joint, thread, kJoinThreads, kJoinChannels);
  return joint;
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

constexpr size_t kJoinMemory = kJoinChannels * kJoinThreads * kValuesStep<Moments<double, 1>>;

// How many parts a convolution of so many output pixels hands to a batch normalisation: few, since
// one kernel joins them, and of some for each of its own threads.
inline int64_t moment_splits(int64_t pixels) {
  constexpr int64_t kLeastPixels = 1024, kMost = 128;
  const int64_t splits = ceil_div(pixels, kLeastPixels);
  return splits < kMost ? splits : kMost;
}

}  // namespace gdfast::cuda
