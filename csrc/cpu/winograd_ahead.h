// Pixels that the next steps of Winograd's convolution see, fetched while the products of a block
// keep the processor busy: else memory and arithmetic take turns.
#pragma once

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
        row_size_(strides.c == 1 && strides.w == channels ? kTileOut * channels : 0) {}

  // corners[i] is where tile first + i begins; beyond `end`, up to `size`, any place will do.
  void point(int64_t first, int64_t end, int64_t size, const T** corners) const {
    if (row_size_ == 0) return;
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

  // To be called with each product for every kTileRows tiles: fetches a row of one of them.
  void fetch(const T* const* corners, int product) const {
    static_assert(kTileRows * kTileOut <= kProducts);
    if (row_size_ == 0 || product >= kTileRows * kTileOut) return;
    const T* row = corners[product / kTileOut] + product % kTileOut * strides_.h;
    for (int64_t x = 0; x < row_size_; x += 16) __builtin_prefetch(row + x, 0, 2);
  }

 private:
  const TileGrid& grid_;
  const T* data_;
  Strides4 strides_;
  int64_t row_size_;  // of values side by side; 0 where they are not, and nothing is fetched
};

}  // namespace
}  // namespace gdfast::cpu
