// The activation at the end of a convolution, on sums that were stored a moment ago.
//
// Kernels call it for a tile or a line, which L1 then holds: a few loads and stores beside the
// sums' many products. So the choice of an activation is made once for a tile, and none of the
// micro-kernels has to be compiled for each of them.
#pragma once

#include "activation.h"
#include "tap_conv.h"

namespace gdfast::cpu {
namespace {

template <typename A>
__attribute__((noinline)) void activate_rows(Activation activation, A negative_slope,
                                             A* const* rows, int64_t count, int64_t width) {
  with_activation(activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    const Vec<A> slope = broadcast(negative_slope);
    for (int64_t i = 0; i < count; ++i) {
      A* row = rows[i];
      int64_t x = 0;
      for (; x + kLanes<A> <= width; x += kLanes<A>) {
        store<A>(row + x, activate<kActivation, A>(load(row + x), slope));
      }
      if (x == width) continue;
      A rest[kLanes<A>] = {};
      std::memcpy(rest, row + x, (width - x) * sizeof(A));
      store<A>(rest, activate<kActivation, A>(load(rest), slope));
      std::memcpy(row + x, rest, (width - x) * sizeof(A));
    }
  });
}

// rows[i][x] = activation(rows[i][x]) for i < count and x < width.
template <typename A>
GDFAST_INLINE void activate_rows(const TapConv& conv, A* const* rows, int64_t count,
                                 int64_t width) {
  if (conv.activation == Activation::kNone) return;
  activate_rows<A>(conv.activation, static_cast<A>(conv.negative_slope), rows, count, width);
}

// The same for rows that lie `step` apart, of which there are at most kMost.
template <int kMost, typename A>
GDFAST_INLINE void activate_rows(const TapConv& conv, A* first, int64_t step, int64_t count,
                                 int64_t width) {
  if (conv.activation == Activation::kNone) return;
  A* rows[kMost];
  for (int64_t i = 0; i < count; ++i) rows[i] = first + i * step;
  activate_rows(conv, rows, count, width);
}

}  // namespace
}  // namespace gdfast::cpu
