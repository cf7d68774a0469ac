// The tiles that Winograd's convolution cuts an image into, and how they are read.
#pragma once

#include "../conv2d_problem.h"
#include "pack.h"
#include "tile.h"
#include "winograd_transforms.h"

namespace gdfast::cpu {
namespace {

// Tiles of 4x4 outputs over a grid of pixels, counted along lines of tiles.
struct TileGrid {
  int64_t across, down, count;

  TileGrid(int64_t batch, int64_t height, int64_t width)
      : across(ceil_div(width, kTileOut)),
        down(ceil_div(height, kTileOut)),
        count(batch * across * down) {}

  // Where a tile lies: its image, and the pixel of the grid that it begins at.
  struct At {
    int64_t n, h, w;
  };
  At at(int64_t tile) const {
    const int64_t line = tile / across;
    return {line / down, line % down * kTileOut, tile % across * kTileOut};
  }

  // Tiles from `tile` on that follow each other along a line, at most kRun.
  static constexpr int64_t kRun = 8;
  int64_t run_from(int64_t tile, int64_t end) const {
    return min_of(kRun, min_of(end - tile, across - tile % across));
  }
};

// Tiles of one block or task, and how far apart their vectors lie: an odd number of cache lines,
// so that the 36 products of one tile spread over all sets of the cache.
inline int64_t padded_tiles(int64_t tiles) { return tiles | 1; }

// Tiles whose transformed image is kept at once: about 32 MB of it, for it is more than twice as
// large as the image itself; at least as many as make the transformed weights worth their while.
inline int64_t image_round_tiles(int64_t tiles, int64_t channels) {
  const int64_t most = max_of(396, (32 << 20) / (kProducts * channels * 4));
  return round_up(ceil_div(tiles, ceil_div(tiles, most)), kTileRows);
}

// Reads, for every tile of a grid, the kSize x kSize pixels from (h + low_h, w + low_w) on as
// vectors of channels: where they lie, or from a stage that brings channels side by side.
template <int kSize>
class TileReader {
  using T = float;
  static constexpr int kWidth = kLanes<T>;
  static constexpr int64_t kColumns = TileGrid::kRun * kTileOut + kSize - kTileOut;

 public:
  static constexpr int64_t kStageSize = kSize * kColumns * kWidth;

  TileReader(const TileGrid& grid, const T* data, const Strides4& strides, int64_t channels,
             int64_t height, int64_t width, int64_t low_h, int64_t low_w)
      : grid_(grid),
        data_(data),
        strides_(strides),
        channels_(channels),
        height_(height),
        width_(width),
        low_h_(low_h),
        low_w_(low_w) {}

  // Calls use(from, offset, c, tile) for tiles [first, end) and each vector of channels: the
  // vectors lie at from[i * kSize + j] + offset. zeros holds as many as there are channels, padded.
  template <typename Use>
  void read(int64_t first, int64_t end, const T* zeros, T* stage, const Use& use) const {
    const T* from[kSize * kSize];
    // Whole vectors of channels are read where they lie.
    const int64_t in_place = strides_.c == 1 ? channels_ / kWidth * kWidth : 0;
    for (int64_t tile = first; in_place > 0 && tile < end; ++tile) {
      const TileGrid::At at = grid_.at(tile);
      const T* image = data_ + at.n * strides_.n;
      for (int i = 0; i < kSize; ++i) {
        const int64_t h = at.h + low_h_ + i;
        const bool row_inside = h >= 0 && h < height_;
        for (int j = 0; j < kSize; ++j) {
          const int64_t w = at.w + low_w_ + j;
          const bool inside = row_inside && w >= 0 && w < width_;
          from[i * kSize + j] = inside ? image + h * strides_.h + w * strides_.w : zeros;
        }
      }
      for (int64_t c = 0; c < in_place; c += kWidth) use(from, c, c, tile);
    }
    for (int64_t c = in_place; c < channels_; c += kWidth) {
      for (int64_t tile = first; tile < end;) {
        const int64_t run = grid_.run_from(tile, end);
        fill(c, grid_.at(tile), run, stage);
        for (int64_t x = 0; x < run; ++x, ++tile) {
          for (int i = 0; i < kSize; ++i) {
            for (int j = 0; j < kSize; ++j) {
              from[i * kSize + j] = stage + (i * kColumns + x * kTileOut + j) * kWidth;
            }
          }
          use(from, 0, c, tile);
        }
      }
    }
  }

 private:
  // stage[i][x][lane]: what a run of tiles sees of channels [c, c + lanes).
  void fill(int64_t c, TileGrid::At at, int64_t run, T* stage) const {
    const int64_t channels = min_of(kWidth, channels_ - c);
    const int64_t w0 = at.w + low_w_, columns = run * kTileOut + kSize - kTileOut;
    const int64_t begin = min_of(columns, max_of(0, -w0));
    const int64_t end = max_of(begin, min_of(columns, width_ - w0));
    for (int i = 0; i < kSize; ++i, stage += kColumns * kWidth) {
      const int64_t h = at.h + low_h_ + i;
      if (h < 0 || h >= height_ || begin == end) {
        std::memset(stage, 0, columns * kWidth * sizeof(T));
        continue;
      }
      const T* from =
          data_ + at.n * strides_.n + c * strides_.c + h * strides_.h + (w0 + begin) * strides_.w;
      std::memset(stage, 0, begin * kWidth * sizeof(T));
      if (strides_.w == 1) {
        transpose_widened(from, strides_.c, end - begin, channels, kWidth, stage + begin * kWidth,
                          kWidth);
      } else {
        for (int64_t x = begin; x < end; ++x, from += strides_.w) {
          copy_widened(from, strides_.c, channels, stage + x * kWidth);
          for (int64_t lane = channels; lane < kWidth; ++lane) stage[x * kWidth + lane] = T(0);
        }
      }
      std::memset(stage + end * kWidth, 0, (columns - end) * kWidth * sizeof(T));
    }
  }

  const TileGrid& grid_;
  const T* data_;
  Strides4 strides_;
  int64_t channels_, height_, width_, low_h_, low_w_;
};

using ImageReader = TileReader<kTileIn>;

// B^T x B of one tile: to[product * product_step] for each of the 36 products.
inline void transform_image_tile(const float* const* from, int64_t offset, float* to,
                                 int64_t product_step) {
  Vec<float> half[kProducts];
#pragma GCC unroll 6
  for (int j = 0; j < kTileIn; ++j) {
    Vec<float> column[kTileIn];
#pragma GCC unroll 6
    for (int i = 0; i < kTileIn; ++i) column[i] = load(from[i * kTileIn + j] + offset);
    transform_image<float>(column, 1, half + j, kTileIn);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTileIn; ++i) {
    Vec<float> line[kTileIn];
    transform_image<float>(half + i * kTileIn, 1, line, 1);
#pragma GCC unroll 6
    for (int j = 0; j < kTileIn; ++j) store<float>(to + (i * kTileIn + j) * product_step, line[j]);
  }
}

}  // namespace
}  // namespace gdfast::cpu
