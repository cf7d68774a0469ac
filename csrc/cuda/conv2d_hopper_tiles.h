// How the Hopper convolution divides its output: into boxes of pixels by groups of channels.
#pragma once

#include <cstdint>

#include "../conv2d_problem.h"

namespace gdfast::cuda {

constexpr int kMostPhases = 2;  // of a stride, along one axis

// Pixels and channels of the images that a pass reads and writes, in elements. A gradient swaps
// the two images, and the channels that are summed with those that are made.
struct HopperImage {
  int64_t N, channels, H, W;
  Strides4 strides;
};

// The taps along one axis that pixels of one phase sum: the weight's `tap + j tap_step` reads, for
// pixel i of the phase, row i stride + at + j at_step.
struct HopperTaps {
  int count, tap, tap_step, at, at_step;
};

// Rows or columns of a pass. Forward, windows step over the input; of a gradient the pixels fall
// into phases: those of one are all reached by the same taps, from neighbouring outputs.
struct HopperAxis {
  int in_phases, out_phases;  // one of them is the stride, the other 1
  HopperTaps taps[kMostPhases];
};

// How many phases an image has along its rows and columns.
struct HopperPhases {
  int h, w;
};

struct HopperPass {
  HopperImage in, out;
  HopperAxis rows, columns;

  HopperPhases in_phases() const { return {rows.in_phases, columns.in_phases}; }
  HopperPhases out_phases() const { return {rows.out_phases, columns.out_phases}; }
};

inline HopperAxis hopper_axis(int64_t stride, int64_t dilation, int64_t pad, int64_t taps,
                              bool gradient) {
  const auto small = [](int64_t value) { return static_cast<int>(value); };
  if (!gradient) return {small(stride), 1, {{small(taps), 0, 1, small(-pad), small(dilation)}}};
  HopperAxis axis{1, small(stride), {}};
  for (int64_t phase = 0; phase < stride; ++phase) {
    HopperTaps found{0, 0, 1, 0, 0};
    for (int64_t tap = 0; tap < taps; ++tap) {
      // Tap `tap` of output row o lies in input row o stride + tap dilation - pad.
      const int64_t ahead = phase + pad - tap * dilation;
      if (ahead % stride != 0) continue;
      if (found.count == 0) found.tap = small(tap), found.at = small(ahead / stride);
      if (found.count == 1) {
        found.tap_step = small(tap) - found.tap, found.at_step = small(ahead / stride) - found.at;
      }
      ++found.count;
    }
    axis.taps[phase] = found;
  }
  return axis;
}

// The pixels of an image that a stride from one of its first pixels meets.
inline HopperImage phase_image(const HopperImage& image, HopperPhases phases, int h, int w) {
  const Strides4& s = image.strides;
  return {image.N,
          image.channels,
          (image.H - h + phases.h - 1) / phases.h,
          (image.W - w + phases.w - 1) / phases.w,
          {s.n, s.c, s.h * phases.h, s.w * phases.w}};
}

// The phase of the output that has the most pixels.
inline HopperImage first_phase(const HopperPass& pass) {
  return phase_image(pass.out, pass.out_phases(), 0, 0);
}

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
                  hopper_axis(p.stride_h, p.dilation_h, p.pad_h, p.R, gradient),
                  hopper_axis(p.stride_w, p.dilation_w, p.pad_w, p.S, gradient)};
  HopperImage &in = pass.in, &out = pass.out;
  const bool pointwise = p.R == 1 && p.S == 1 && p.pad_h == 0 && p.pad_w == 0;
  // What a stride leaves of an image is smaller.
  if (pointwise && in.H == out.H && in.W == out.W && is_one_row(in) && is_one_row(out)) {
    // Then no tile has an edge but the last.
    make_one_row(in);
    make_one_row(out);
  }
  if (gradient) pass = {out, in, pass.rows, pass.columns};
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
  int64_t pixel_tiles, channels, steps, phases, multiprocessors;  // steps: of all phases

  int64_t of(int64_t tile_channels) const {
    const int64_t tiles = pixel_tiles * tiles_for(channels, tile_channels);
    // A step of 128 pixels and 64 summed channels takes 4 cycles for each channel made where
    // products do not wait for memory; small tiles do. Only shared tiles wait for their results to
    // be written.
    const int64_t step = tile_channels == 64 ? 6 * 64 : tile_channels == 128 ? 5 * 128 : 4 * 256;
    const int64_t writing = tile_channels == 256 ? 1000 : 0;
    return tiles_for(tiles, multiprocessors) * (steps * step + phases * writing);
  }

  int fastest() const {
    const int narrow = of(64) < of(128) ? 64 : 128;
    return of(256) < of(narrow) ? 256 : narrow;
  }
};

}  // namespace gdfast::cuda
