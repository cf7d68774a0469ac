// What the sums of a convolution end with: the activation, before or right after they are stored.
//
// relu, relu6 and leaky_relu are a few instructions for each vector: every micro-kernel has them
// in front of its stores, in registers, chosen once for a tile. SiLU is long: it goes over a tile
// or a line that was stored a moment ago, which L1 holds, and is compiled once.
#pragma once

#include "activation.h"
#include "tap_conv.h"

namespace gdfast::cpu {
namespace {

template <typename A>
struct Ending {
  Activation activation = Activation::kNone;
  A negative_slope = 0;

  static Ending of(const TapConv& conv) {
    return {conv.activation, static_cast<A>(conv.negative_slope)};
  }
};

template <Activation kActivation, int kRows, int kCount, typename A>
GDFAST_INLINE void activate_each(Vec<A> (*sums)[kCount], Vec<A> negative_slope) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) {
      sums[i][j] = activate<kActivation, A>(sums[i][j], negative_slope);
    }
  }
}

// kRows x kCount sums, still in registers.
template <int kRows, int kCount, typename A>
GDFAST_INLINE void finish_sums(const Ending<A>& ending, Vec<A> (*sums)[kCount]) {
  if (ending.activation == Activation::kNone) return;
  const Vec<A> unused{};
  if (ending.activation == Activation::kRelu) {
    activate_each<Activation::kRelu, kRows, kCount, A>(sums, unused);
  } else if (ending.activation == Activation::kRelu6) {
    activate_each<Activation::kRelu6, kRows, kCount, A>(sums, unused);
  } else if (ending.activation == Activation::kLeakyRelu) {
    const Vec<A> slope = broadcast(ending.negative_slope);
    activate_each<Activation::kLeakyRelu, kRows, kCount, A>(sums, slope);
  }
}

template <typename A>
__attribute__((noinline)) void silu_rows(A* const* rows, int64_t count, int64_t width) {
  const Vec<A> unused{};
  for (int64_t i = 0; i < count; ++i) {
    A* row = rows[i];
    int64_t x = 0;
    for (; x + kLanes<A> <= width; x += kLanes<A>) {
      store<A>(row + x, activate<Activation::kSilu, A>(load(row + x), unused));
    }
    if (x == width) continue;
    A rest[kLanes<A>] = {};
    std::memcpy(rest, row + x, (width - x) * sizeof(A));
    store<A>(rest, activate<Activation::kSilu, A>(load(rest), unused));
    std::memcpy(row + x, rest, (width - x) * sizeof(A));
  }
}

// Stored sums of `count` rows.
template <typename A>
GDFAST_INLINE void finish_rows(const Ending<A>& ending, A* const* rows, int64_t count,
                               int64_t width) {
  if (ending.activation == Activation::kSilu) silu_rows(rows, count, width);
}

// The same for rows that lie `step` apart, of which there are at most kMost.
template <int kMost, typename A>
GDFAST_INLINE void finish_rows(const Ending<A>& ending, A* first, int64_t step, int64_t count,
                               int64_t width) {
  if (ending.activation != Activation::kSilu) return;
  A* rows[kMost];
  for (int64_t i = 0; i < count; ++i) rows[i] = first + i * step;
  silu_rows(rows, count, width);
}

}  // namespace
}  // namespace gdfast::cpu
