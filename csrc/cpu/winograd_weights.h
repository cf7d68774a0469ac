// The weights of Winograd's convolution: read in the order of a 3x3 grid and transformed.
#pragma once

#include "tap_conv_pixels.h"
#include "winograd_transforms.h"

namespace gdfast::cpu {
namespace {

// The nine taps of a TapConv that winograd_fits in the order of their grid, whichever way the pass
// runs over it.
struct TapGrid {
  int64_t low_h, low_w;  // of the first one
  Tap taps[9];

  explicit TapGrid(const TapConv& conv) : low_h(conv.taps[0].dh), low_w(conv.taps[0].dw) {
    for (int t = 1; t < 9; ++t) {
      low_h = min_of(low_h, conv.taps[t].dh);
      low_w = min_of(low_w, conv.taps[t].dw);
    }
    for (int t = 0; t < 9; ++t) {
      const Tap& tap = conv.taps[t];
      taps[(tap.dh - low_h) * 3 + tap.dw - low_w] = tap;
    }
  }
};

// to[product * product_step + c * width + o] = G w G^T for the channels c of [first, first +
// channels) and the outputs o of a panel; lanes past either are zeros. packed has room for
// 9 x channels x width.
inline void transform_weights(TapConv conv, const TapGrid& grid, const float* weight,
                              const Panels<float>& panels, int64_t panel, int64_t first,
                              int64_t channels, float* packed, float* to, int64_t product_step) {
  using T = float;
  const int64_t width = panels.width;
  conv.taps = grid.taps;
  conv.reduced = min_of(channels, conv.reduced - first);
  pack_weight_panel(conv, weight + first * conv.weight_reduced, panel * width, width, packed);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t o = 0; o < width; o += kLanes<T>) {
      Vec<T> filter[9], half[18], line[kTileIn];
      for (int t = 0; t < 9; ++t) {
        filter[t] = c < conv.reduced ? load(packed + (t * conv.reduced + c) * width + o) : Vec<T>{};
      }
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) transform_filter<T>(filter + s, 3, half + s, 3);
#pragma GCC unroll 6
      for (int i = 0; i < kTileIn; ++i) {
        transform_filter<T>(half + i * 3, 1, line, 1);
#pragma GCC unroll 6
        for (int j = 0; j < kTileIn; ++j) {
          store<T>(to + (i * kTileIn + j) * product_step + c * width + o, line[j]);
        }
      }
    }
  }
}

// to[(c * 9 + t) * width + o] of the weights for channels [first, first + channels) and the outputs
// o of a panel; lanes past either are zeros.
inline void pack_filters(const TapConv& conv, const TapGrid& grid, const float* weight,
                         const Panels<float>& panels, int64_t panel, int64_t first,
                         int64_t channels, float* to) {
  const int64_t width = panels.width, output = panel * width;
  const int64_t outputs = min_of(width, conv.produced - output);
  const int64_t valid = min_of(channels, conv.reduced - first);
  const int64_t reduced = conv.weight_reduced, produced = conv.weight_produced;
  const float* from = weight + first * reduced + output * produced;
  std::memset(to + valid * 9 * width, 0, (channels - valid) * 9 * width * sizeof(float));
  if (reduced == 1) {
    for (int t = 0; t < 9; ++t) {
      transpose_widened(from + grid.taps[t].weight, produced, valid, outputs, width, to + t * width,
                        9 * width);
    }
    return;
  }
  // In a contiguous KCRS tensor the taps of one filter follow each other, this way or the other.
  const bool onward = grid.taps[8].weight == 8, follow = onward || grid.taps[0].weight == 8;
  if (follow && produced > 1) {
    const int64_t together = reduced == 9 ? valid : 1;
    for (int64_t c = 0; c < valid; c += together, from += reduced) {
      transpose_lines<float>(from, produced, together * 9, outputs, width, [&](int64_t x) {
        return to + (c * 9 + (onward ? x : x / 9 * 9 + 8 - x % 9)) * width;
      });
    }
    return;
  }
  for (int64_t c = 0; c < valid; ++c, from += reduced) {
    for (int t = 0; t < 9; ++t, to += width) {
      __builtin_prefetch(from + 8 * reduced + grid.taps[t].weight);
      copy_widened(from + grid.taps[t].weight, produced, outputs, to);
      for (int64_t o = outputs; o < width; ++o) to[o] = 0;
    }
  }
}

// Line i of G w G^T: to[j * product_step + c * width + o] of packed filters.
inline void transform_filter_line(const float* packed, int i, int64_t channels, int64_t width,
                                  float* to, int64_t product_step) {
  using T = float;
  Vec<T> unit[3] = {}, line[kTileIn];
  T factors[3];
  for (int r = 0; r < 3; ++r) {
    unit[r] += T(1);
    transform_filter<T>(unit, 1, line, 1);
    factors[r] = line[i][0];
    unit[r] = Vec<T>{};
  }
  for (int64_t c = 0; c < channels; ++c, packed += 9 * width) {
    for (int64_t o = 0; o < width; o += kLanes<T>, to += kLanes<T>) {
      Vec<T> half[3];
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        const T* from = packed + s * width + o;
        half[s] = factors[0] * load(from) + factors[1] * load(from + 3 * width) +
                  factors[2] * load(from + 6 * width);
      }
      transform_filter<T>(half, 1, line, 1);
#pragma GCC unroll 6
      for (int j = 0; j < kTileIn; ++j) store<T>(to + j * product_step, line[j]);
    }
  }
}

}  // namespace
}  // namespace gdfast::cpu
