// What becomes of sums of convolution in groups of few channels (grouped.h): a warp has those of 16
// channels, in two halves, for a pair of rows of 8 pixels.
#pragma once

#include "activation.h"
#include "grouped.h"

namespace gdfast::cuda {
namespace {

struct GroupedOutput {
  unsigned char* data;
  int64_t image_bytes;
  int32_t h_bytes, w_bytes, P, Q, C;
  const void* bias;
  Activation activation;
  double negative_slope;
};

using PairSums = float[2][4];

// The sums of some pairs in a row.
template <int kPairs>
GDFAST_DEVICE float (&flat(PairSums (&sums)[kPairs]))
    [kPairs * 8] { return reinterpret_cast<float (&)[kPairs * 8]>(sums); }

template <int kSums>
GDFAST_DEVICE bool are_finite(const float (&sums)[kSums]) {
  float zeros = 0;
#pragma unroll
  for (float sum : sums) zeros += sum * 0;
  return zeros == 0;
}

// The zeros between small groups make NaN of a neighbour's infinities: sums that are NaN are made
// again without them, by sum_of_group(pair, second, column, channel).
template <int kSums, typename SumOfGroup>
GDFAST_DEVICE void mend(float (&sums)[kSums], SumOfGroup&& sum_of_group) {
  static_assert(kSums <= 32, "a bit for each");
  if (are_finite(sums)) return;
  uint32_t wrong = 0;
#pragma unroll
  for (int i = 0; i < kSums; ++i) wrong |= sums[i] == sums[i] ? 0u : 1u << i;
  for (int i = 0; wrong != 0; ++i, wrong >>= 1) {
    if ((wrong & 1) == 0) continue;
    const float sum = sum_of_group(i / 8, (i >> 1) % 2, warp_lane() / 4,
                                   (i >> 2) % 2 * 8 + warp_lane() % 4 * 2 + i % 2);
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[j] = i == j ? sum : sums[j];
  }
}

// Bias and activation, of the channels from this one on.
template <typename T, int kSums>
GDFAST_DEVICE void end_sums(float (&sums)[kSums], const GroupedOutput& a, int32_t channel) {
  if (a.bias == nullptr && a.activation == Activation::kNone) return;
  if (a.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t filter = channel + (i >> 1) * 8 + warp_lane() % 4 * 2 + i % 2;
      if (filter >= a.C) continue;
      const float bias = to_float(static_cast<const T*>(a.bias)[filter]);
#pragma unroll
      for (int j = 0; j < kSums; j += 8) {
        sums[j + (i >> 1) * 4 + i % 2] += bias;
        sums[j + (i >> 1) * 4 + i % 2 + 2] += bias;
      }
    }
  }
  activate(sums, a.activation, static_cast<float>(a.negative_slope));
}

// Those of two channels as they are written: of the halves of the first row, then of the second's.
template <typename T>
GDFAST_DEVICE void pack_sums(uint32_t (&words)[4], const PairSums& sums) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float (&half)[4] = sums[i & 1];
    words[i] = pack_two<T>(half[(i >> 1) * 2], half[(i >> 1) * 2 + 1]);
  }
}

// --- Written from registers -------------------------------------------------------------------

// Of four lanes side by side, each has a word for each: these go to whom they are for.
GDFAST_DEVICE void exchange_words(uint32_t (&words)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (this_thread() & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      uint32_t &low = words[i], &high = words[i + distance];
      const auto sent = static_cast<int>(upper ? low : high);
      const auto received = static_cast<uint32_t>(shuffle_xor(sent, distance));
      (upper ? low : high) = received;
    }
  }
}

// Where a lane writes: of two pixels by sixteen channels it has half of the channels of one pixel.
// It holds for all sums of a warp, and so is found once. The second row of a pair is so many rows
// further.
struct LaneOutput {
  unsigned char* data;
  int32_t column, row;
  bool exists;
};

GDFAST_DEVICE LaneOutput lane_output(const GroupedOutput& a, int32_t channel, int rows) {
  const int quarter = warp_lane() % 4;
  const int32_t first = channel + (quarter & 1) * 8;
  return {a.data + first * 2, warp_lane() / 4, (quarter >> 1) * rows, first < a.C};
}

// Writes sums whose places exist, of pairs of which each is a row further.
template <typename T, int kPairs>
GDFAST_DEVICE void write_sums(const PairSums (&sums)[kPairs], const GroupedOutput& a,
                              const LaneOutput& lane, int32_t image, int32_t row, int32_t column) {
  const int32_t p = row + lane.row, q = column + lane.column;
  unsigned char* const to = lane.data + (image * a.image_bytes + (p * a.h_bytes + q * a.w_bytes));
  const int32_t rows = lane.exists && q < a.Q ? a.P - p : 0;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    uint32_t words[4];
    pack_sums<T>(words, sums[pair]);
    exchange_words(words);
    if (pair < rows) store_16(to + pair * a.h_bytes, {{words[0], words[1], words[2], words[3]}});
  }
}

// --- From a problem ---------------------------------------------------------------------------

inline GroupedOutput grouped_output(const Conv2dProblem& p, const void* bias, void* output) {
  return {static_cast<unsigned char*>(output),
          p.output.n * 2,
          small(p.output.h * 2),
          small(p.output.w * 2),
          small(p.P),
          small(p.Q),
          small(p.C),
          bias,
          p.activation,
          p.negative_slope};
}

}  // namespace
}  // namespace gdfast::cuda
