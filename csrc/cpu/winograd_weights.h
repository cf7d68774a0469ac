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

// packed[(c * 9 + t) * width + o] of the weights for channels [first, first + channels) and outputs
// [output, output + width); lanes past either are zeros.
inline void pack_filters(const TapConv& conv, const TapGrid& grid, const float* weight,
                         int64_t output, int64_t width, int64_t first, int64_t channels,
                         float* packed) {
  using T = float;
  const int64_t outputs = min_of(width, conv.produced - output);
  const int64_t valid = min_of(channels, conv.reduced - first);
  const int64_t reduced = conv.weight_reduced, produced = conv.weight_produced;
  std::memset(packed + valid * 9 * width, 0, (channels - valid) * 9 * width * sizeof(T));
  weight += first * reduced + output * produced;
  const auto tap = [&](int t) { return weight + grid.taps[t].weight; };
  if (reduced == 1) {
    for (int t = 0; t < 9; ++t) {
      transpose_widened(tap(t), produced, valid, outputs, width, packed + t * width, 9 * width);
    }
    return;
  }
  // In a contiguous KCRS tensor the taps of a filter follow each other, one way or the other.
  bool onward = produced > 1, backward = produced > 1;
  for (int t = 0; t < 9; ++t) {
    onward = onward && grid.taps[t].weight == t;
    backward = backward && grid.taps[t].weight == 8 - t;
  }
  if (onward && reduced == 9) {
    transpose_widened(weight, produced, valid * 9, outputs, width, packed, width);
    return;
  }
  const bool in_vectors = produced == 1 && outputs == width;
  for (int64_t c = 0; c < valid; ++c, weight += reduced, packed += 9 * width) {
    int t = 0, end = 9;  // of the taps that go one by one
    if (onward || backward) {
      transpose_lines<T>(weight, produced, 8, outputs, width,
                         [&](int64_t x) { return packed + (onward ? x : 8 - x) * width; });
      t = onward ? 8 : 0;
      end = t + 1;
    }
    for (; t < end; ++t) {
      T* to = packed + t * width;
      for (int64_t o = 0; in_vectors && o < width; o += kLanes<T>) {
        if (o % 16 == 0) __builtin_prefetch(tap(t) + o + 8 * reduced);
        store<T>(to + o, load(tap(t) + o));
      }
      if (in_vectors) continue;
      copy_widened(tap(t), produced, outputs, to);
      for (int64_t o = outputs; o < width; ++o) to[o] = T(0);
    }
  }
}

// Lines i of G w G^T go in pairs, which have most of their arithmetic in common.
constexpr int kFilterPairs = 3;
constexpr int kFilterLines[kFilterPairs][2] = {{1, 2}, {3, 4}, {0, 5}};

// to[x * line_step + j * product_step + c * width + o] for lines x of a pair and their products j.
template <int kPair>
void transform_filter_pair(const float* packed, int64_t channels, int64_t width, float* to,
                           int64_t line_step, int64_t product_step) {
  using T = float;
  for (int64_t c = 0; c < channels; ++c, packed += 9 * width) {
    for (int64_t o = 0; o < width; o += kLanes<T>, to += kLanes<T>) {
      Vec<T> row[2][3];
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        Vec<T> column[3], products[kTileIn];
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) column[r] = load(packed + (r * 3 + s) * width + o);
        transform_filter<T>(column, 1, products, 1);
        row[0][s] = products[kFilterLines[kPair][0]];
        row[1][s] = products[kFilterLines[kPair][1]];
      }
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        T* at = to + x * line_step;
        Vec<T> products[kTileIn];
        transform_filter<T>(row[x], 1, products, 1);
#pragma GCC unroll 6
        for (int j = 0; j < kTileIn; ++j, at += product_step) store<T>(at, products[j]);
      }
    }
  }
}

inline void transform_filter_pair(int pair, const float* packed, int64_t channels, int64_t width,
                                  float* to, int64_t line_step, int64_t product_step) {
  const auto transform = pair == 0   ? transform_filter_pair<0>
                         : pair == 1 ? transform_filter_pair<1>
                                     : transform_filter_pair<2>;
  transform(packed, channels, width, to, line_step, product_step);
}

// All of it: to[product * product_step + c * width + o].
inline void transform_weights(const TapConv& conv, const TapGrid& grid, const float* weight,
                              int64_t output, int64_t width, int64_t channels, float* packed,
                              float* to, int64_t product_step) {
  pack_filters(conv, grid, weight, output, width, 0, channels, packed);
  for (int pair = 0; pair < kFilterPairs; ++pair) {
    const int line = kFilterLines[pair][0], step = kFilterLines[pair][1] - line;
    transform_filter_pair(pair, packed, channels, width, to + line * kTileIn * product_step,
                          step * kTileIn * product_step, product_step);
  }
}

}  // namespace
}  // namespace gdfast::cpu
