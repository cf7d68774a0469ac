// The gradient in the weight of groups of 32 channels on images of 7 x 7
// (grouped_whole_grad_weight.cu).
//
// What an instruction sums over is one pixel of 16 images: no product is with a pixel outside of an
// image, and each pixel is loaded to registers once, where it meets those around it. A block has a
// group of 16 images, and of that a warp 16 filters by 8 channels: no warp's sums are added to
// another's. All rows of these images come to shared memory at once, the first of them first.
#pragma once

#include "grouped_whole_weight.h"

namespace gdfast::cuda {
namespace {

struct OctetWeights {
  static constexpr int kGroup = 32, kChannels = kGroup, kPixel = kHalfBoxRow;
  static constexpr int kRows = 7, kColumns = 7, kRowPixels = kColumns, kSlotRows = 1;
  static constexpr int kFirstColumn = 0, kImages = 16, kSlots = kRows, kParts = kRows;
  static constexpr int kStreams = 1, kConsumers = 8, kShares = 2;
  static constexpr int kFilters = kChannelsOfWarp, kInputs = 8;  // of a warp
  static_assert(kGroup / kFilters * (kGroup / kInputs) == kConsumers);
  static constexpr int kGradAt = kImages * kColumns * kPixel, kSlotBytes = 2 * kGradAt;
  static constexpr int kSumsAt = kRingAt + kSlots * kSlotBytes;
  static_assert(kGradAt % 1024 == 0);
};

#if defined(GDFAST_HOPPER)

// Where a lane finds its pixels of a row, for ldmatrix: of 8 channels those of two columns.
struct OctetPlaces {
  int input[(OctetWeights::kColumns + 1) / 2], grad[OctetWeights::kColumns];
};

GDFAST_DEVICE OctetPlaces octet_places(const Unit& unit) {
  using Its = OctetWeights;
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  const auto pixel = [&](int half, int column) {
    return (half * 8 + line) * Its::kColumns + (column < Its::kColumns ? column : 0);
  };
  OctetPlaces places;
#pragma unroll
  for (int pair = 0; pair < (Its::kColumns + 1) / 2; ++pair) {
    const int column = pair * 2 + (matrix >> 1);
    places.input[pair] = half_swizzled(pixel(matrix & 1, column), unit.channel / 8);
  }
#pragma unroll
  for (int column = 0; column < Its::kColumns; ++column) {
    const int chunk = unit.filter / 8 + (matrix & 1);
    places.grad[column] = Its::kGradAt + half_swizzled(pixel(matrix >> 1, column), chunk);
  }
  return places;
}

// A row of images in registers.
struct OctetRow {
  uint32_t input[(OctetWeights::kColumns + 1) / 2][4], grad[OctetWeights::kColumns][4];
};

GDFAST_DEVICE void multiply_octet(SumsOf<2, 1>& sums, int tap, const uint32_t (&grad)[4],
                                  const OctetRow& row, int column) {
  const uint32_t (&inputs)[4] = row.input[column / 2];
  const int first = column % 2 * 2;
  mma_m16n8k16<BFloat16>(sums.weight[tap][0], grad, {inputs[first], inputs[first + 1]});
}

// Loads a row, and multiplies it by itself and, with the row before it, both ways.
GDFAST_DEVICE void sum_octet_row(SumsOf<2, 1>& sums, const OctetPlaces& places,
                                 const unsigned char* from, OctetRow& its, const OctetRow& before,
                                 bool is_first) {
  constexpr int kColumns = OctetWeights::kColumns;
  ldmatrix_x4_transposed(its.input[0], from + places.input[0]);
  ldmatrix_x4_transposed(its.grad[0], from + places.grad[0]);
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    // What the next column needs.
    if (column + 1 < kColumns) {
      ldmatrix_x4_transposed(its.grad[column + 1], from + places.grad[column + 1]);
    }
    if (column % 2 == 0 && column + 2 < kColumns) {
      ldmatrix_x4_transposed(its.input[column / 2 + 1], from + places.input[column / 2 + 1]);
    }
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      const int of_input = column + s - 1;
      if (of_input < 0 || of_input >= kColumns) continue;
      multiply_octet(sums, 3 + s, its.grad[column], its, of_input);
      if (is_first) continue;
      multiply_octet(sums, s, its.grad[column], before, of_input);
      multiply_octet(sums, 6 + s, before.grad[column], its, of_input);
    }
  }
}

GDFAST_DEVICE void sum_images(OctetWeights, const WholeWeightArguments& a) {
  using Its = OctetWeights;
  const int octet = warp_index() / 2;
  const Unit unit{warp_index() % 2 * Its::kFilters, octet * Its::kInputs,
                  a.split.bias_sums != nullptr && octet == 0};
  const OctetPlaces places = octet_places(unit);
  SumsOf<2, 1> sums;
  clear(sums);
  const int rounds = rounds_of(a).count;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const auto sum_row = [&](int row, OctetRow& its, const OctetRow& before, bool is_first) {
      const Slot slot{row, round & 1};
      barrier_wait(full(slot), slot.parity);
      sum_octet_row(sums, places, slot_memory<Its>(slot), its, before, is_first);
      leave(slot);
      if (unit.sums_bias) {
#pragma unroll
        for (const auto& grads : its.grad) add_to_bias<BFloat16>(sums, grads);
      }
      if (leads_stream<Its>()) fill_slot<Its>(a, (round + 1) * Its::kRows + row);
    };
    OctetRow even, odd;
    sum_row(0, even, odd, true);
#pragma unroll 1
    for (int row = 1; row < Its::kRows; row += 2) {
      sum_row(row, odd, even, false);
      sum_row(row + 1, even, odd, false);
    }
  }
  write_block<Its>(sums, a, unit, 0);
}

#endif

}  // namespace
}  // namespace gdfast::cuda
