// The gradient in the weight of groups of up to 8 channels on wide images
// (grouped_whole_grad_weight.cu).
//
// A warp has eight channels of a block's images, in strips of 16 columns. Its instructions multiply
// eight filters of two rows of the gradient by eight channels of a row of the input, at once for
// two rows of a filter. Of the rows around the two, half of what they make is no tap.
#pragma once

#include "grouped_whole_weight.h"

namespace gdfast::cuda {
namespace {

template <int kGroup, int kSize, int kPitch, int kSlotRows, int kSlots>
struct StripWeights : SlabWeights<kGroup, kSize, kPitch, kSlotRows, kSlots, 1> {
  static constexpr int kStrips = kPitch / 16, kPairs = kSlotRows / 2;
  static constexpr int kShares = 1, kUnrolled = kPairs % 2 == 0 ? 1 : 2;  // pairs change places
  static_assert(kGroup <= 8 && kSlotRows % 2 == 0);
};
using Strip28Weights = StripWeights<8, 28, 32, 4, 6>;
using Strip56Weights = StripWeights<4, 56, 64, 4, 3>;

#if defined(GDFAST_HOPPER)

// By the row of the input, from the one above on: with the upper row of the gradient, and with the
// lower one.
struct StripSums {
  float weight[4][3][4];
  float bias[2];
};

// Two rows of a strip in registers, upper and lower.
struct StripRows {
  uint32_t input[3][4], grad[4];
};

// Where a lane finds its pixels of two rows, for ldmatrix.
template <typename Its>
struct StripPlaces {
  int input[Its::kStrips][3];  // for each column of a filter
  int grad;                    // of the first strip
};

template <typename Its>
GDFAST_DEVICE StripPlaces<Its> strip_places(int channel) {
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  StripPlaces<Its> places;
  places.grad = Its::kGradAt + (matrix & 1) * Its::kRowBytes +
                swizzled((matrix >> 1) * 8 + line, channel / 8);
#pragma unroll
  for (int strip = 0; strip < Its::kStrips; ++strip) {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      const int pixel = seen_pixel<Its>(strip * 16 + (matrix & 1) * 8 + line, s);
      places.input[strip][s] = (matrix >> 1) * Its::kRowBytes + swizzled(pixel, channel / 8);
    }
  }
  return places;
}

// Multiplies two rows by themselves and, with those before them, both ways.
template <typename Its>
GDFAST_DEVICE void sum_pair(StripSums& sums, const StripPlaces<Its>& places,
                            const unsigned char* from, StripRows (&its)[Its::kStrips],
                            const StripRows (&before)[Its::kStrips], bool is_first) {
  const auto multiply = [&](int row, const StripRows& of_grad, const StripRows& of_input,
                            int lower) {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      const uint32_t (&input)[4] = of_input.input[s];
      mma_m16n8k16<BFloat16>(sums.weight[row][s], of_grad.grad,
                             {input[lower * 2], input[lower * 2 + 1]});
    }
  };
#pragma unroll
  for (int strip = 0; strip < Its::kStrips; ++strip) {
    ldmatrix_x4_transposed(its[strip].grad, from + places.grad + strip * 16 * kBoxRow);
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      ldmatrix_x4_transposed(its[strip].input[s], from + places.input[strip][s]);
    }
    multiply(1, its[strip], its[strip], 0);
    multiply(2, its[strip], its[strip], 1);
  }
  if (is_first) return;
#pragma unroll
  for (int strip = 0; strip < Its::kStrips; ++strip) {
    multiply(0, its[strip], before[strip], 1);
    multiply(3, before[strip], its[strip], 0);
  }
}

template <int kGroup, int kSize, int kPitch, int kSlotRows, int kSlots>
GDFAST_DEVICE void sum_images(StripWeights<kGroup, kSize, kPitch, kSlotRows, kSlots>,
                              const WholeWeightArguments& a) {
  using Its = StripWeights<kGroup, kSize, kPitch, kSlotRows, kSlots>;
  const Unit unit{warp_index() * 8, warp_index() * 8, a.split.bias_sums != nullptr};
  const StripPlaces<Its> places = strip_places<Its>(unit.channel);
  StripSums sums;
  clear(sums);
  StripRows rows[2][Its::kStrips];
  for_each_slot<Its>(a, 0, [&](const unsigned char* slot, int i, bool is_top) {
#pragma unroll
    for (int pair = 0; pair < Its::kPairs; ++pair) {
      const int now = (i * Its::kPairs + pair) % 2;
      const unsigned char* const from = slot + pair * 2 * Its::kRowBytes;
      sum_pair<Its>(sums, places, from, rows[now], rows[now ^ 1], is_top && pair == 0);
    }
    if (!unit.sums_bias) return;
    // Apart from the products, which would wait for each other.
#pragma unroll
    for (int pair = 0; pair < Its::kPairs; ++pair) {
#pragma unroll
      for (int strip = 0; strip < Its::kStrips; ++strip) {
        uint32_t grads[4];
        ldmatrix_x4_transposed(
            grads, slot + pair * 2 * Its::kRowBytes + places.grad + strip * 16 * kBoxRow);
        add_to_bias<BFloat16>(sums, grads);
      }
    }
  });
  SumsOf<1, 1> all;
  all.bias[0] = sums.bias[0] + sums.bias[1];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const int r = tap / 3, s = tap % 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      all.weight[tap][0][i] = sums.weight[r][s][i] + sums.weight[r + 1][s][2 + i];
    }
  }
  write_block<Its>(all, a, unit, 0);
}

#endif

}  // namespace
}  // namespace gdfast::cuda
