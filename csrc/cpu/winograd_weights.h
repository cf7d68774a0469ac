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

}  // namespace
}  // namespace gdfast::cpu
