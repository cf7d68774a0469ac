// Pixels that the next steps of Winograd's convolution see, fetched while the products of a block
// keep the processor busy: else memory and arithmetic take turns.
#pragma once

#include "winograd_products.h"
#include "winograd_runs.h"

namespace gdfast::cpu {
namespace {

// The pixels from (h + low_h, w + low_w) on of each tile of a grid, as many as the tile has.
class TilesAhead {
  using T = float;

 public:
  TilesAhead(const TileGrid& grid, const T* data, const Strides4& strides, int64_t channels,
             int64_t low_h, int64_t low_w)
      : grid_(grid),
        data_(data + low_h * strides.h + low_w * strides.w),
        strides_(strides),
        channels_(strides.c == 1 ? channels : 0) {}

  // corners[i] is where tile first + i begins; beyond `end`, up to `size`, any place will do.
  void point(int64_t first, int64_t end, int64_t size, const T** corners) const {
    if (channels_ == 0) return;
    int64_t run;
    for (int64_t tile = first; tile < end; tile += run) {
      run = grid_.run_from(tile, end);
      const TileGrid::At at = grid_.at(tile);
      const T* corner = data_ + at.n * strides_.n + at.h * strides_.h + at.w * strides_.w;
      const int64_t step = tile_step_of(at) * strides_.w;
      for (int64_t x = 0; x < run; ++x) corners[tile - first + x] = corner + x * step;
    }
    for (int64_t i = end - first; i < size; ++i) corners[i] = data_;
  }

  // Pixel `index` of the tiles, 0 to 15.
  Ahead pixel(const T* const* corners, int index) const {
    const int64_t offset = index / kTileOut * strides_.h + index % kTileOut * strides_.w;
    return {corners, offset, channels_};
  }

 private:
  const TileGrid& grid_;
  const T* data_;
  Strides4 strides_;
  int64_t channels_;  // 0 where they don't lie side by side, and nothing is fetched
};

// What one product fetches, all products together every pixel of the tiles of both, whose corners
// lie `size` apart.
inline Ahead ahead_of(int product, const TilesAhead& first, const TilesAhead& second,
                      const float* const* corners, int64_t size) {
  constexpr int kPixels = kTileOut * kTileOut;
  static_assert(2 * kPixels <= kProducts);
  if (product < kPixels) return first.pixel(corners, product);
  if (product < 2 * kPixels) return second.pixel(corners + size, product - kPixels);
  return {corners, 0, 0};
}

}  // namespace
}  // namespace gdfast::cpu
