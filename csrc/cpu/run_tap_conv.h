// Picks the algorithm for a TapConv, from its shape and layout alone.
#pragma once

#include "pointwise.h"
#include "strassen.h"
#include "tap_conv_channels.h"
#include "tap_conv_few.h"
#include "tap_conv_pixels.h"
#include "tap_conv_planes.h"
#include "winograd.h"

namespace gdfast::cpu {
namespace {

template <typename T>
void run_tap_conv(Algorithm algorithm, const TapConv& conv, const T* source, const T* weight,
                  const T* bias, T* dest, int threads) {
  using A = typename Accumulator<T>::type;
  if (conv.pixels() == 0) return;
  if constexpr (kSame<T, float>) {
    if (algorithm == Algorithm::kWinograd && winograd_fits<T>(conv)) {
      run_winograd(conv, source, weight, bias, dest, threads);
      return;
    }
  }
  // Few channels leave most lanes of a panel of channels empty.
  const bool channels_fill_lanes = 2 * conv.produced >= kLanes<A>;
  if (conv.tap_count > 0 && conv.reduced <= 8 && conv.dest.c == 1 && channels_fill_lanes) {
    FewChannels<T> few(conv, source, weight, bias, dest, threads);
    if (few.image_bytes() <= kMostPlaneBytes) {
      few.run();
      return;
    }
  }
  if (conv.tap_count > 0 && (conv.reduced <= 8 || conv.produced <= 4)) {
    PlaneTiles<T> planes(conv, source, weight, bias, dest, threads);
    if (planes.image_bytes() <= kMostPlaneBytes) {
      planes.run();
      return;
    }
  }
  if constexpr (kSame<T, float>) {
    if (is_pointwise(conv) && channels_fill_lanes) {
      if (algorithm == Algorithm::kStrassen && strassen_fits(conv)) {
        Strassen(conv, source, weight, bias, dest, threads).run();
        return;
      }
      Pointwise(conv, source, weight, bias, dest, threads).run();
      return;
    }
  }
  if (conv.dest.c == 1 && channels_fill_lanes) {
    PixelTiles<T>(conv, source, weight, bias, dest, threads).run();
  } else {
    ChannelTiles<T>(conv, source, weight, bias, dest, threads).run();
  }
}

}  // namespace
}  // namespace gdfast::cpu
