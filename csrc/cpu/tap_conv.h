// A convolution as a list of taps: what the forward pass and grad_input have in common.
//
//   dest[n, o, i, j] = activation(start[o] + sum over taps t and channels c of
//       weight[o, c, t] * source[n, c, i * step_h + t.dh, j * step_w + t.dw])
//
// The forward pass is one of these. grad_input of a strided convolution is stride_h * stride_w of
// them, one for each phase (h % stride_h, w % stride_w) of the image: all pixels of a phase see the
// same taps, so nothing is ever multiplied by a zero that the stride put there.
#pragma once

#include <cstdint>

#include "../conv2d_problem.h"
#include "simd.h"

namespace gdfast::cpu {
namespace {

struct Tap {
  int64_t dh, dw;
  int64_t weight;  // offset of this tap's weights
};

struct TapConv {
  int64_t batch, height, width;  // of the grid that dest is written on
  int64_t step_h, step_w;
  int64_t source_height, source_width;
  int64_t reduced, produced;  // channels in and out of one group
  int64_t groups;
  Strides4 source, dest;  // dest strides are those from one grid point to the next
  // Offsets from one channel, or one group, to the next.
  int64_t weight_reduced, weight_produced;
  int64_t source_group, dest_group, weight_group;
  const Tap* taps;
  int64_t tap_count;
  Activation activation = Activation::kNone;
  double negative_slope = 0;
  bool adds = false;  // to what dest holds

  int64_t pixels() const { return batch * height * width; }
};

// The forward pass of p; taps is room for R * S of them.
inline TapConv forward_tap_conv(const Conv2dProblem& p, Tap* taps) {
  for (int64_t r = 0; r < p.R; ++r) {
    for (int64_t s = 0; s < p.S; ++s) {
      taps[r * p.S + s] = {r * p.dilation_h - p.pad_h, s * p.dilation_w - p.pad_w,
                           r * p.weight.h + s * p.weight.w};
    }
  }
  TapConv conv;
  conv.batch = p.N;
  conv.height = p.P;
  conv.width = p.Q;
  conv.step_h = p.stride_h;
  conv.step_w = p.stride_w;
  conv.source_height = p.H;
  conv.source_width = p.W;
  conv.reduced = p.C / p.groups;
  conv.produced = p.K / p.groups;
  conv.groups = p.groups;
  conv.source = p.input;
  conv.dest = p.output;
  conv.weight_reduced = p.weight.c;
  conv.weight_produced = p.weight.n;
  conv.source_group = conv.reduced * p.input.c;
  conv.dest_group = conv.produced * p.output.c;
  conv.weight_group = conv.produced * p.weight.n;
  conv.taps = taps;
  conv.tap_count = p.R * p.S;
  conv.activation = p.activation;
  conv.negative_slope = p.negative_slope;
  return conv;
}

// Whether dest, of so many channels that lie side by side in whole vectors, is written past the
// caches: where a core's own would not hold all of it. To be read right afterwards it comes from
// memory, which still takes less time than reading what is about to be overwritten. Vectors are
// whole cache lines, or each line would be written in parts; SiLU goes over what was stored.
template <typename T>
bool writes_past_caches(const TapConv& conv, const T* dest, int64_t channels) {
  constexpr int64_t kBytes = 2 << 20;
  constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
  return kVectorBytes == 64 && kSize >= 4 && conv.pixels() * channels * kSize > kBytes &&
         channels % kLanes<T> == 0 && conv.dest.w == channels &&
         reinterpret_cast<uintptr_t>(dest) % kVectorBytes == 0 && conv.dest.h % kLanes<T> == 0 &&
         conv.dest.n % kLanes<T> == 0 && conv.activation != Activation::kSilu;
}

// Where a grid point lies, and how to go on to the next.
struct GridPoint {
  int64_t n, i, j;

  static GridPoint at(const TapConv& conv, int64_t pixel) {
    const int64_t line = pixel / conv.width;
    return {line / conv.height, line % conv.height, pixel % conv.width};
  }

  void advance(const TapConv& conv) {
    if (++j < conv.width) return;
    j = 0;
    if (++i < conv.height) return;
    i = 0;
    ++n;
  }
};

}  // namespace
}  // namespace gdfast::cpu
