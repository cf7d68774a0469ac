// Mean and squared deviations of the channels that conv2d_hopper_halo.cu makes, taken of a
// product's sums once they are rounded as they are written.
#pragma once

#include "conv2d_hopper_halo_memory.h"
#include "vectors.h"

namespace gdfast::cuda {
namespace {

#if defined(GDFAST_HOPPER)

// What a lane has seen of its two channels, eight apart, at every fourth pair of positions: sums of
// what values differ from `origin`, and its squares. The count is that of all lanes.
struct ChannelMoments {
  int count;
  float origin[2], sum[2], squares[2];
};

// Which of a lane's positions, in their order, are pixels of a whole tile.
GDFAST_DEVICE uint64_t pixels_of_lane(const HaloArguments& a, int positions) {
  uint64_t pixels = 0;
#pragma unroll 1
  for (int i = 0; i < positions / 4; ++i) {
    const Divided row = divide(i / 2 * 8 + warp_lane() % 4 * 2 + i % 2, a.moments.pitch);
    const Divided image = divide(row.quotient, a.moments.image_h);
    const bool is_pixel =
        image.quotient < a.tile_n && image.rest < a.tile_h && row.rest < a.moments.w;
    pixels |= uint64_t{is_pixel} << i;
  }
  return pixels;
}

// Images and rows of a tile that exist.
GDFAST_DEVICE int images_of_tile(const HaloArguments& a, const HaloPlace& place) {
  const int left = a.moments.n - place.n;
  return left < a.tile_n ? left : a.tile_n;
}
GDFAST_DEVICE int rows_of_tile(const HaloArguments& a, const HaloPlace& place) {
  const int left = a.moments.h - place.h;
  return left < a.tile_h ? left : a.tile_h;
}

GDFAST_DEVICE int count_pixels(const HaloArguments& a, const HaloPlace& place) {
  return images_of_tile(a, place) * rows_of_tile(a, place) * a.moments.w;
}

// Likewise of one that the last image or row may cut off.
GDFAST_DEVICE uint64_t pixels_of_tile(const HaloArguments& a, const HaloPlace& place,
                                      uint64_t pixels) {
  const int images = images_of_tile(a, place), rows = rows_of_tile(a, place);
  if (images == a.tile_n && rows == a.tile_h) return pixels;
  const int image_rows = static_cast<int>(a.moments.image_h.divisor);
  const int end = a.pitch * (a.tile_n == 1 ? rows : images * image_rows);
  // Pairs of positions are eight apart, from this lane's first on.
  const int first = warp_lane() % 4 * 2;
  const int below = (end - first + 7) / 8 + (end - first + 6) / 8;
  return below <= 0 ? 0 : pixels & ((uint64_t{1} << below) - 1);
}

template <typename T>
GDFAST_DEVICE void unpack_words(const uint32_t (&words)[2], float (&values)[2][2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) unpack<T, 2>(PackOf<T, 2>{{words[i]}}, values[i]);
}

// The first position of a tile, which is a pixel, gives the origin.
template <typename T>
GDFAST_DEVICE void begin_moments(const uint32_t (&words)[2], ChannelMoments& to) {
  float values[2][2];
  unpack_words<T>(words, values);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    to.origin[i] = shuffle(values[i][0], warp_lane() & ~3);
    to.sum[i] = to.squares[i] = 0;
  }
}

// Adds two positions of each channel, those whose bit is set.
template <typename T>
GDFAST_DEVICE void add_positions(const uint32_t (&words)[2], uint32_t pixels, ChannelMoments& to) {
  float values[2][2];
  unpack_words<T>(words, values);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float away = (pixels >> j & 1) != 0 ? values[i][j] - to.origin[i] : 0;
      to.sum[i] += away;
      to.squares[i] += away * away;
    }
  }
}

// Writes what a warp has of its channels, those of a consumer beginning with `first`, as one part.
GDFAST_DEVICE void write_moments(const HaloArguments& a, int part, int first,
                                 const ChannelMoments& from) {
  const auto over_lanes = [](float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
  };
  const auto count = static_cast<float>(from.count);
  const float share = count > 0 ? 1 / count : 0;
  const int lane = warp_lane();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = over_lanes(from.sum[i]), shift = sum * share;
    float squares = over_lanes(from.squares[i]) - sum * shift;
    if (squares < 0) squares = 0;  // a NaN stays one
    const int channel = first + warp_index() % 4 * kWarpRows + lane / 4 + 8 * i;
    if (lane % 4 != 0 || channel >= a.channels) continue;
    float* const to = a.moments.parts + int64_t{3} * part * a.channels + channel;
    to[0] = count;
    to[a.channels] = from.origin[i] + shift;
    to[2 * a.channels] = squares;
  }
}

#endif

}  // namespace
}  // namespace gdfast::cuda
