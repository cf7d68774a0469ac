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
  int32_t h_bytes, w_bytes, N, P, Q, C;
  const void* bias;
  Activation activation;
  double negative_slope;
};

using PairSums = float[2][4];
using FlatSums = float[8];

GDFAST_DEVICE FlatSums& flat(PairSums& sums) { return reinterpret_cast<FlatSums&>(sums); }

// The zeros between small groups make NaN of a neighbour's infinities: sums that are NaN are made
// again without them, by sum_of_group(second, column, channel).
template <typename SumOfGroup>
GDFAST_DEVICE void mend(FlatSums& sums, SumOfGroup&& sum_of_group) {
  float zeros = 0;
#pragma unroll
  for (float sum : sums) zeros += sum * 0;
  if (zeros == 0) return;  // all are finite
  uint32_t wrong = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) wrong |= sums[i] == sums[i] ? 0u : 1u << i;
  for (int i = 0; wrong != 0; ++i, wrong >>= 1) {
    if ((wrong & 1) == 0) continue;
    const float sum =
        sum_of_group((i >> 1) % 2, warp_lane() / 4, (i >> 2) * 8 + warp_lane() % 4 * 2 + i % 2);
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] = i == j ? sum : sums[j];
  }
}

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
// It holds for all sums of a warp, and so is found once.
struct LaneOutput {
  unsigned char* data;
  int32_t channel, column, row, image;
  bool exists, ends;  // whether anything is done to sums before they are written
};

// The second row of a pair is so many rows and images further.
GDFAST_DEVICE LaneOutput lane_output(const GroupedOutput& a, int32_t channel, int rows,
                                     int images) {
  const int column = warp_lane() / 4, quarter = warp_lane() % 4, second = quarter >> 1;
  const int32_t first = channel + (quarter & 1) * 8;
  return {a.data + first * 2,
          channel,
          column,
          second * rows,
          second * images,
          first < a.C,
          a.bias != nullptr || a.activation != Activation::kNone};
}

// Where a lane writes those of a tile, and how many rows exist from there on.
struct LaneTile {
  unsigned char* to;
  int32_t rows;
};

GDFAST_DEVICE LaneTile lane_tile(const GroupedOutput& a, const LaneOutput& lane, int32_t image,
                                 int32_t row, int32_t column) {
  const int32_t n = image + lane.image, p = row + lane.row, q = column + lane.column;
  return {lane.data + (n * a.image_bytes + (p * a.h_bytes + q * a.w_bytes)),
          lane.exists && n < a.N && q < a.Q ? a.P - p : 0};
}

// Bias and activation.
template <typename T>
GDFAST_DEVICE void end_sums(FlatSums& sums, const GroupedOutput& a, const LaneOutput& lane) {
  if (a.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int32_t filter = lane.channel + (i >> 2) * 8 + warp_lane() % 4 * 2 + i % 2;
      if (filter < a.C) sums[i] += to_float(static_cast<const T*>(a.bias)[filter]);
    }
  }
  activate(sums, a.activation, static_cast<float>(a.negative_slope));
}

// Writes the sums of the pair whose first row is this one of the tile.
template <typename T>
GDFAST_DEVICE void write_sums(FlatSums& sums, const GroupedOutput& a, const LaneOutput& lane,
                              const LaneTile& tile, int row) {
  if (lane.ends) end_sums<T>(sums, a, lane);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = (i & 1) * 4 + (i >> 1) * 2;
    words[i] = pack_two<T>(sums[at], sums[at + 1]);
  }
  exchange_words(words);
  if (row < tile.rows) {
    store_16(tile.to + row * a.h_bytes, {{words[0], words[1], words[2], words[3]}});
  }
}

// --- From a problem ---------------------------------------------------------------------------

inline GroupedOutput grouped_output(const Conv2dProblem& p, const void* bias, void* output) {
  return {static_cast<unsigned char*>(output),
          p.output.n * 2,
          small(p.output.h * 2),
          small(p.output.w * 2),
          small(p.N),
          small(p.P),
          small(p.Q),
          small(p.C),
          bias,
          p.activation,
          p.negative_slope};
}

}  // namespace
}  // namespace gdfast::cuda
