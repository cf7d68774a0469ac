// How the Hopper convolution divides its output: into boxes of pixels by groups of channels.
#pragma once

#include <cstdint>

#include "../conv2d_problem.h"

namespace gdfast::cuda {

// Pixels and channels of the images that a pass reads and writes, in elements. A gradient swaps
// the two images, and the channels that are summed with those that are made.
struct HopperImage {
  int64_t N, channels, H, W;
  Strides4 strides;
};

struct HopperPass {
  HopperImage in, out;
  // Output row h sums input rows first_h + h + step_h r over taps r; columns likewise.
  int64_t R, S, first_h, first_w, step_h, step_w;
};

// Whether the pixels of an image lie as those of one row would.
inline bool is_one_row(const HopperImage& image) {
  const Strides4& s = image.strides;
  return (image.H == 1 || s.h == image.W * s.w) && (image.N == 1 || s.n == image.H * image.W * s.w);
}

inline void make_one_row(HopperImage& image) {
  image.W *= image.H * image.N;
  image.H = image.N = 1;
}

inline HopperPass hopper_pass(const Conv2dProblem& p, bool gradient) {
  HopperPass pass{{p.N, p.C, p.H, p.W, p.input},
                  {p.N, p.K, p.P, p.Q, p.output},
                  p.R,
                  p.S,
                  -p.pad_h,
                  -p.pad_w,
                  p.dilation_h,
                  p.dilation_w};
  if (gradient) {
    // input[h] took part in output[h + pad - r dilation].
    pass = {pass.out, pass.in, p.R, p.S, p.pad_h, p.pad_w, -p.dilation_h, -p.dilation_w};
  }
  HopperImage &in = pass.in, &out = pass.out;
  const bool pointwise = p.R == 1 && p.S == 1 && p.pad_h == 0 && p.pad_w == 0;
  if (pointwise && in.H == out.H && in.W == out.W && is_one_row(in) && is_one_row(out)) {
    // Then no tile has an edge but the last.
    make_one_row(in);
    make_one_row(out);
  }
  return pass;
}

// The pixels of one tile.
struct PixelBox {
  int64_t n, h, w;
  int64_t rows() const { return n * h * w; }
};

inline int64_t tiles_for(int64_t size, int64_t of_tile) { return (size + of_tile - 1) / of_tile; }

inline int64_t pixel_tiles(const HopperImage& image, const PixelBox& box) {
  return tiles_for(image.N, box.n) * tiles_for(image.H, box.h) * tiles_for(image.W, box.w);
}

// The next larger box of an axis that needs fewer tiles; beyond the axis where one is enough.
inline int64_t next_box(int64_t size, int64_t box) {
  const int64_t tiles = tiles_for(size, box);
  return tiles == 1 ? size + 1 : tiles_for(size, tiles - 1);
}

// The box of at most `most` pixels that covers the images with the fewest tiles; among such, the
// one with the most neighbours, whose windows share pixels.
inline PixelBox choose_pixel_box(const HopperImage& image, int64_t most) {
  PixelBox best{1, 1, 1};
  int64_t fewest = pixel_tiles(image, best);
  for (int64_t w = 1; w <= most && w <= image.W; w = next_box(image.W, w)) {
    for (int64_t h = 1; w * h <= most && h <= image.H; h = next_box(image.H, h)) {
      const int64_t room = most / (w * h);
      const PixelBox box{image.N < room ? image.N : room, h, w};
      const int64_t tiles = pixel_tiles(image, box);
      if (tiles < fewest || (tiles == fewest && w * h >= best.w * best.h)) {
        fewest = tiles;
        best = box;
      }
    }
  }
  return best;
}

// What a pass takes with tiles of 64, 128 or 256 channels: a guess, in cycles.
struct HopperTileTime {
  int64_t pixel_tiles, channels, steps, multiprocessors;

  int64_t of(int64_t tile_channels) const {
    const int64_t tiles = pixel_tiles * tiles_for(channels, tile_channels);
    // A step of 128 pixels and 64 summed channels takes 4 cycles for each channel made where
    // products do not wait for memory; small tiles do. Only shared tiles wait for their results to
    // be written.
    const int64_t step = tile_channels == 64 ? 6 * 64 : tile_channels == 128 ? 5 * 128 : 4 * 256;
    const int64_t writing = tile_channels == 256 ? 2000 : 0;
    return tiles_for(tiles, multiprocessors) * (steps * step + writing);
  }

  int fastest() const {
    const int narrow = of(64) < of(128) ? 64 : 128;
    return of(256) < of(narrow) ? 256 : narrow;
  }
};

}  // namespace gdfast::cuda
