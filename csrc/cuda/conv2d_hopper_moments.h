// Mean and squared deviations of the channels of a Hopper convolution's output, taken of the tiles
// of results in shared memory, rounded as they are written.
#pragma once

#include "conv2d_hopper_ring.h"
#include "vectors.h"

namespace gdfast::cuda {
namespace {

// How those who share a tile divide it: each warp has a box of 64 channels, of which a lane has the
// eight of one 16-byte chunk, and a group of the pixels.
template <typename Its>
struct MomentsOfTile {
  static constexpr int kChunk = 8, kChunks = kBoxRow / 16;
  static constexpr int kPixels = Its::kPixelBytes / kBoxRow;
  static constexpr int kGroups = 4 * Its::kSharers / Its::kParts;
  static constexpr int kRows = kPixels / kGroups;
  static constexpr int kParts = Its::kTurns * kGroups;  // of a block
};

#if defined(GDFAST_HOPPER)

// What a lane has seen of its channels: sums of what values differ from `origin`, and its squares.
// Lanes of a warp with the same channels have the same origin.
struct RunningMoments {
  int count;
  float origin[8], sum[8], squares[8];
};

// Whether a row of a tile's results is a pixel of the output.
GDFAST_DEVICE bool is_pixel(const HopperArguments& a, const Tile& tile, int row) {
  const Divided w = divide(row, a.moments.box_w), h = divide(w.quotient, a.moments.box_h);
  return h.quotient < a.box_n && tile.n + h.quotient < a.moments.n &&
         tile.h + h.rest < a.moments.h && tile.w + w.rest < a.moments.w;
}

// Adds a tile; the first one gives the origin, by its first pixel.
template <typename T, typename Its>
GDFAST_DEVICE void add_tile(const HopperArguments& a, const Tile& tile,
                            const unsigned char* results, int warp, bool is_first,
                            RunningMoments& to) {
  using Mine = MomentsOfTile<Its>;
  constexpr int kAtOnce = 4, kStep = kWarp / Mine::kChunks;
  static_assert(Mine::kRows % (kAtOnce * kStep) == 0, "a whole number of rounds");
  const int lane = computed_again(warp_lane()), chunk = lane % Mine::kChunks;
  const int first = warp % Mine::kGroups * Mine::kRows + lane / Mine::kChunks;
  const unsigned char* const box = results + warp / Mine::kGroups * Its::kPixelBytes;
  const auto load = [box, chunk](int row) {
    return load_16(box + row * kBoxRow + (chunk ^ row % 8) * 16);
  };
  if (is_first) {
    to.count = 0;
    unpack<T, Mine::kChunk>(load(0), to.origin);
#pragma unroll
    for (int i = 0; i < Mine::kChunk; ++i) to.sum[i] = to.squares[i] = 0;
  }
  const bool whole = a.moments.boxes_fill_tiles && tile.n + a.box_n <= a.moments.n &&
                     tile.h + a.box_h <= a.moments.h && tile.w + a.box_w <= a.moments.w;
#pragma unroll 1
  for (int row = first; row < first + Mine::kRows; row += kAtOnce * kStep) {
    Pack16 packs[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) packs[i] = load(row + i * kStep);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!whole && !is_pixel(a, tile, row + i * kStep)) continue;
      float values[Mine::kChunk];
      unpack<T, Mine::kChunk>(packs[i], values);
      ++to.count;
#pragma unroll
      for (int j = 0; j < Mine::kChunk; ++j) {
        const float away = values[j] - to.origin[j];
        to.sum[j] += away;
        to.squares[j] += away * away;
      }
    }
  }
}

// Writes what a warp has of the channels from `channel` on, as one part.
GDFAST_DEVICE void write_moments(const HopperArguments& a, const RunningMoments& from, int part,
                                 int channel) {
  constexpr int kChunks = kBoxRow / 16, kChunk = 8;
  const auto over_lanes = [](auto value) {
#pragma unroll
    for (int lane = kChunks; lane < kWarp; lane *= 2) value += shuffle_xor(value, lane);
    return value;
  };
  const auto count = static_cast<float>(over_lanes(from.count));
  const float share = count > 0 ? 1 / count : 0;
  float means[kChunk], squares[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float sum = over_lanes(from.sum[i]), shift = sum * share;
    means[i] = from.origin[i] + shift;
    squares[i] = over_lanes(from.squares[i]) - sum * shift;
    if (squares[i] < 0) squares[i] = 0;  // a NaN stays one
  }
  const int lane = warp_lane(), at = channel + lane * kChunk;
  if (lane >= kChunks || at >= a.channels) return;
  float* const to = a.moments.parts + int64_t{3} * part * a.channels + at;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    to[i] = count;
    to[a.channels + i] = means[i];
    to[2 * a.channels + i] = squares[i];
  }
}

// A consumer's warp among those that share its tiles.
template <typename Its>
GDFAST_DEVICE int sharing_warp(int consumer) {
  return consumer % Its::kSharers * 4 + warp_index() % 4;
}

// Takes the moments of a tile whose results lie in shared memory. What is written for a tile alone
// goes to a part of its own.
template <typename T, typename Its>
GDFAST_DEVICE void take_moments(const HopperArguments& a, int index, int consumer, bool is_first,
                                RunningMoments& moments) {
  using Mine = MomentsOfTile<Its>;
  const Tile tile = tile_at<Its::kParts * kChannels>(a, index);
  const int warp = sharing_warp<Its>(consumer);
  const unsigned char* const results = shared_memory() + consumer / Its::kSharers * Its::kResults;
  add_tile<T, Its>(a, tile, results, warp, is_first || !a.moments.of_blocks, moments);
  if (a.moments.of_blocks) return;
  const int pixels = divide(index, a.tiles_channels).quotient;
  write_moments(a, moments, pixels * Mine::kGroups + warp % Mine::kGroups,
                tile.channel + warp / Mine::kGroups * kChannels);
}

// Writes the moments of all of a consumer's tiles, which may be none.
template <typename Its>
GDFAST_DEVICE void write_block_moments(const HopperArguments& a, int consumer,
                                       const RunningMoments& moments) {
  using Mine = MomentsOfTile<Its>;
  const Divided block = divide(static_cast<int>(blockIdx.x), a.tiles_channels);
  const int warp = sharing_warp<Its>(consumer), turn = consumer / Its::kSharers;
  const int part = block.quotient * Mine::kParts + turn * Mine::kGroups + warp % Mine::kGroups;
  write_moments(a, moments, part, (block.rest * Its::kParts + warp / Mine::kGroups) * kChannels);
}

#endif

}  // namespace
}  // namespace gdfast::cuda
