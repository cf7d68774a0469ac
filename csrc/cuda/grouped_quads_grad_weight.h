// The gradient in the weight of groups of 16 channels on images of 14 x 14
// (grouped_whole_grad_weight.cu). A warp has a group, and walks down every second image of a block:
// each row of the input and of the gradient is loaded to registers once, where it meets the row
// before it.
#pragma once

#include "grouped_whole_weight.h"

namespace gdfast::cuda {
namespace {

struct QuadWeights : SlabWeights<16, 14, 16, 7, 6, 2> {
  // Registers of two blocks, where memory is for one: the kernel that adds up splits begins beside.
  static constexpr int kShares = 2;
  // An odd number of rows ends with the registers that the next slot begins with.
  static constexpr int kUnrolled = kParts;
  static constexpr int kSumsAt = kRingAt;  // in the place of slots
};

#if defined(GDFAST_HOPPER)

// Where a lane finds its pixels of a slot's first row, for ldmatrix.
struct QuadPlaces {
  int input[3];  // for each column of a filter
  int grad;
};

GDFAST_DEVICE QuadPlaces quad_places(int channel) {
  using Its = QuadWeights;
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  QuadPlaces places;
  places.grad = Its::kGradAt + swizzled((matrix >> 1) * 8 + line, channel / 8 + (matrix & 1));
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int pixel = seen_pixel<Its>((matrix & 1) * 8 + line, s);
    places.input[s] = swizzled(pixel, channel / 8 + (matrix >> 1));
  }
  return places;
}

struct QuadRow {
  uint32_t input[3][4], grad[4];
};

GDFAST_DEVICE void multiply_quad(WeightSums& sums, int tap, const uint32_t (&grads)[4],
                                 const uint32_t (&pixels)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mma_m16n8k16<BFloat16>(sums.weight[tap][half], grads, {pixels[half * 2], pixels[half * 2 + 1]});
  }
}

// Multiplies a row by itself and, with the row before it, both ways.
GDFAST_DEVICE void sum_quad_row(WeightSums& sums, const QuadPlaces& places,
                                const unsigned char* row, QuadRow& its, const QuadRow& before,
                                bool is_first) {
  ldmatrix_x4_transposed(its.grad, row + places.grad);
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    ldmatrix_x4_transposed(its.input[s], row + places.input[s]);
    multiply_quad(sums, 3 + s, its.grad, its.input[s]);
    if (is_first) continue;
    multiply_quad(sums, s, its.grad, before.input[s]);
    multiply_quad(sums, 6 + s, before.grad, its.input[s]);
  }
}

GDFAST_DEVICE void sum_images(QuadWeights, const WholeWeightArguments& a) {
  using Its = QuadWeights;
  const int channel = warp_index() % kUnits * Its::kGroup, stream = warp_index() / kUnits;
  const Unit unit{channel, channel, a.split.bias_sums != nullptr};
  const QuadPlaces places = quad_places(channel);
  WeightSums sums;
  clear(sums);
  for (int n = stream; leads_stream<Its>() && n < Its::kSlots; n += Its::kStreams) {
    fill_slot<Its>(a, n);
  }
  QuadRow rows[2] = {};
  for_each_slot<Its>(a, stream, [&](const unsigned char* slot, int i, bool is_top) {
#pragma unroll
    for (int h = 0; h < Its::kSlotRows; ++h) {
      const int now = (i * Its::kSlotRows + h) % 2;
      sum_quad_row(sums, places, slot + h * Its::kRowBytes, rows[now], rows[now ^ 1],
                   is_top && h == 0);
    }
    if (!unit.sums_bias) return;
    // Apart from the products, which would wait for each other at every row.
#pragma unroll
    for (int h = 0; h < Its::kSlotRows; ++h) {
      uint32_t grads[4];
      ldmatrix_x4_transposed(grads, slot + h * Its::kRowBytes + places.grad);
      add_to_bias<BFloat16>(sums, grads);
    }
  });
  sync_threads_of(1, Its::kConsumers * kWarp);
  write_block<Its>(sums, a, unit, stream);
}

#endif

}  // namespace
}  // namespace gdfast::cuda
