// The weights of a TapConv as panels of pairs: in the order tap, channel, two of which share a
// lane.
#pragma once

#include "bf16_pairs.h"
#include "tap_conv.h"

namespace gdfast::cpu {
namespace {

class WeightPairs {
 public:
  // A tap has `tap_channels` channels, of which those from conv.reduced on are zeros.
  WeightPairs(const TapConv& conv, int64_t tap_channels)
      : conv_(conv), tap_channels_(tap_channels) {}

  int64_t count() const { return ceil_div(conv_.tap_count * tap_channels_, 2); }

  // panel[x * width + o] = pair x of output channel first + o, zeros from conv.produced on.
  void pack(const BFloat16* weight, int64_t first, int64_t width, BFloat16Pair* panel) const {
    weight += first * conv_.weight_produced;
    const int64_t valid = min_of(width, conv_.produced - first);
    if (conv_.weight_produced == 1) {
      for (int64_t x = 0; x < count(); ++x, panel += width) {
        interleave(numbers_at(weight, 2 * x), numbers_at(weight, 2 * x + 1), valid, panel);
        std::memset(panel + valid, 0, (width - valid) * sizeof *panel);
      }
      return;
    }
    for (int64_t o = 0; o < width; o += kLanes<float>) {
      for (int64_t x = 0; x < count(); x += kStretch) {
        turn(weight + o * conv_.weight_produced, min_of(valid - o, kLanes<float>), x, width,
             panel + x * width + o);
      }
    }
  }

 private:
  static constexpr int64_t kStretch = 64;  // pairs: 16 rows of them take 4 KB

  // The numbers of all output channels at a place of the reduction; null for zeros.
  const BFloat16* numbers_at(const BFloat16* weight, int64_t place) const {
    const int64_t tap = place / tap_channels_, c = place % tap_channels_;
    if (tap >= conv_.tap_count || c >= conv_.reduced) return nullptr;
    return weight + conv_.taps[tap].weight + c * conv_.weight_reduced;
  }

  // Pairs [x, x + kStretch) of `valid` output channels, read channel by channel.
  void turn(const BFloat16* weight, int64_t valid, int64_t x, int64_t width,
            BFloat16Pair* to) const {
    constexpr int kWidth = kLanes<float>;
    BFloat16 rows[kWidth][2 * kStretch] = {};
    const int64_t places = min_of(2 * kStretch, conv_.tap_count * tap_channels_ - 2 * x);
    for (int64_t place = 0; place < places;) {
      const int64_t c = (2 * x + place) % tap_channels_;
      const int64_t run = min_of(places - place, tap_channels_ - c);
      const BFloat16* from = numbers_at(weight, 2 * x + place);
      const int64_t inside = min_of(run, conv_.reduced - c), step = conv_.weight_reduced;
      for (int64_t o = 0; o < valid && inside > 0; ++o, from += conv_.weight_produced) {
        if (step == 1) {
          std::memcpy(rows[o] + place, from, inside * sizeof *from);
        } else {
          for (int64_t i = 0; i < inside; ++i) rows[o][place + i] = from[i * step];
        }
      }
      place += run;
    }
    const int64_t pairs = min_of(kStretch, count() - x);
    for (int64_t begin = 0; begin < pairs; begin += kWidth) {
      Vec<uint32_t> square[kWidth];
      for (int i = 0; i < kWidth; ++i) std::memcpy(&square[i], rows[i] + 2 * begin, kVectorBytes);
      transpose<uint32_t>(square);
      const int64_t end = min_of(kWidth, pairs - begin);
      for (int64_t i = 0; i < end; ++i) {
        std::memcpy(to + (begin + i) * width, &square[i], kVectorBytes);
      }
    }
  }

  const TapConv& conv_;
  int64_t tap_channels_;
};

}  // namespace
}  // namespace gdfast::cpu
