// The kernel of conv2d_hopper_float32_grad_weight.cu: a block's loader and its consumers.
#pragma once

#include "bfloat16_parts.h"
#include "conv2d_hopper_grad_weight_kernel.h"

namespace gdfast::cuda {
namespace {

constexpr int kStagePixels = 64;

struct HopperFloat32WeightArguments : HopperWeightArguments {
  TensorMap grads[kFloatParts];  // of grad_output, in the place of `grad`
};

// A tile of filters by columns, which are units of 64 channels of a tap. Consumers have so many
// units each, by all filters. A stage has units as they are, in boxes of half their channels, and
// then of each part of grad_output boxes of 64 filters.
template <int kFilters, int kColumns>
struct HopperFloat32WeightTile {
  static constexpr int kUnits = kColumns / kBlock, kFilterBlocks = kFilters / kBlock;
  static constexpr int kConsumers = kUnits == 3 ? 3 : 2, kProducts = kUnits / kConsumers;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kN = kFilters;

  static constexpr int kPixels = kStagePixels;
  static constexpr int kPart = kPixels * kBoxRow;
  static constexpr int kHalves = 2;  // boxes of a unit
  static constexpr int kUnitBoxes = kHalves * kUnits, kGradBoxes = kFloatParts * kFilterBlocks;
  static constexpr int kStage = (kUnitBoxes + kGradBoxes) * kPart;
  static constexpr int kStages = (226 * 1024) / kStage;
  static constexpr int kBarriers = kStages * kStage;
  static constexpr int kSize = kBarriers + 2 * kStages * static_cast<int>(sizeof(uint64_t));
  static_assert(kStages >= 2 && kSize <= 227 * 1024, "what a block may have");

  // Of a thread, in units of 8; together not more than a block is launched with.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kLoaderRegisters = kConsumers == 3 ? 56 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 152 : 232;
  static_assert(kLoaderRegisters + kConsumers * kConsumerRegisters <=
                    (1 + kConsumers) * kLaunchRegisters,
                "what a block has");

  // With three sums of 64 numbers a thread has no registers for the fragments of two products.
  static constexpr int kFragments = kProducts * kN == 64 ? 2 : 1;
};

#if defined(GDFAST_HOPPER)

// By one warp: each lane has one of the boxes of a stage. What is the same for all stages of an
// item is found once.
template <int kFilters, int kColumns>
GDFAST_DEVICE void load_float32_items(const HopperFloat32WeightArguments& a) {
  using Its = HopperFloat32WeightTile<kFilters, kColumns>;
  using Ring = WeightRing<Its>;
  static_assert(Its::kUnitBoxes + Its::kGradBoxes <= kWarp, "a box for each lane");
  constexpr int kFloats = kBlock / Its::kHalves;
  const int box_bytes = a.box_n * a.box_h * a.box_w * kBoxRow, lane = warp_lane();
  Place place{0, 0};
  for (int index = static_cast<int>(blockIdx.x); index < a.items;
       index += static_cast<int>(gridDim.x)) {
    const WeightItem item = item_at<kFilters, kColumns>(a, index);
    // What lies beyond the last filter or unit is not loaded: what is made of it is not written.
    const int filter_blocks = least((a.K - item.filter + kBlock - 1) / kBlock, Its::kFilterBlocks);
    const int units = least(a.units - item.unit, Its::kUnits);
    const int bytes = (Its::kHalves * units + kFloatParts * filter_blocks) * box_bytes;
    const bool has_unit = lane < Its::kUnitBoxes;
    const int grad_box = lane - Its::kUnitBoxes, part = grad_box / Its::kFilterBlocks;
    const int filter_block = grad_box - part * Its::kFilterBlocks;
    const bool has_box =
        has_unit ? lane / Its::kHalves < units : part < kFloatParts && filter_block < filter_blocks;
    const int unit = has_unit ? item.unit + lane / Its::kHalves : 0;
    const int block = unit / a.taps, tap = unit - block * a.taps, r = tap / a.S;
    // A stride of two meets the even or the odd rows of the image, the phase of a tap, which are a
    // tensor of their own: there windows take single steps. A shift rounds down.
    const int at_h = a.first_h + r * a.step_h, at_w = a.first_w + (tap - r * a.S) * a.step_w;
    const TensorMap& map =
        has_unit ? a.images[at_h & a.by_two_h][at_w & a.by_two_w] : a.grads[has_box ? part : 0];
    const int channel = has_unit ? block * kBlock + lane % Its::kHalves * kFloats
                                 : item.filter + filter_block * kBlock;
    const int ahead_h = has_unit ? at_h >> a.by_two_h : 0;
    const int ahead_w = has_unit ? at_w >> a.by_two_w : 0;
    const int line = item.first_box / a.boxes_w;
    int n = line / a.boxes_h, h = line - n * a.boxes_h, w = item.first_box - line * a.boxes_w;
    for (int box = item.first_box; box < item.end_box; ++box, Ring::advance(place)) {
      // In the first turn nobody has to leave a stage: the phase before the first is over.
      barrier_wait(Ring::empty(place), place.parity ^ 1);
      uint64_t* const full = Ring::full(place);
      if (lane == 0) barrier_arrive_expecting(full, bytes);
      sync_warp();
      if (has_box) {
        load_box(Ring::memory(place) + lane * Its::kPart, map,
                 {channel, w * a.box_w + ahead_w, h * a.box_h + ahead_h, n * a.box_n}, full);
      }
      if (++w < a.boxes_w) continue;
      w = 0;
      if (++h < a.boxes_h) continue;
      h = 0;
      ++n;
    }
  }
}

// Where the first of a lane's numbers of a fragment lies in a unit. A fragment's rows are channels,
// and its depth goes over pixels, down the rows of a box. Lanes that read at the same time have
// four pixels, each in two chunks of the swizzle that no other has.
GDFAST_DEVICE int first_number(int box_bytes) {
  const int lane = warp_lane(), warp = warp_index() % 4;
  const int pixel = lane % 4 * 2, channel = warp % 2 * 16 + lane / 4;
  return warp / 2 * box_bytes + pixel * kBoxRow + (channel / 4 ^ pixel) * 16 + channel % 4 * 4;
}

// Its numbers are in two pixels below each other and two more that are 8 further down, in two
// channels that are 8 apart. The swizzle has the next pixel's chunks one apart, by an exclusive or,
// and those of the channel that is 8 further on two.
GDFAST_DEVICE void load_fragment(const unsigned char* from, int first, uint32_t (&values)[4][2]) {
#pragma unroll
  for (int below = 0; below < 2; ++below) {
#pragma unroll
    for (int further = 0; further < 2; ++further) {
      const int at = (first ^ below * 16 ^ further * 32) + below * kBoxRow;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        values[further + 2 * half][below] =
            *reinterpret_cast<const uint32_t*>(from + at + half * 8 * kBoxRow);
      }
    }
  }
}

// Writes what a warp has of one unit: 16 channels by all filters of the tile. Lanes of the same
// filter have eight channels side by side.
template <int kN>
GDFAST_DEVICE void write_float32_sums(const HopperWeightArguments& a, const float (&large)[kN / 2],
                                      const float (&small)[kN / 2], int split, int first_filter,
                                      int unit) {
  const int lane = computed_again(warp_lane());
  const int block = unit / a.taps, tap = unit - block * a.taps;
  const int channel = block * kBlock + warp_index() % 4 * 16 + lane / 4;
  const int filter = first_filter + lane % 4 * 2;
  const int row = a.taps * a.C;
  float* const to = a.sums + (int64_t{split} * a.K + filter) * row + (tap * a.C + channel);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const int ahead = i / 4 * 8 + i % 2, further = i / 2 % 2 * 8;
    if (filter + ahead < a.K && channel + further < a.C) {
      to[ahead * row + further] = sum_of_parts(large[i], small[i]);
    }
  }
}

// Sums of first parts are taken over 64 pixels, and those of that added up in registers, where
// nothing is cut off. While a consumer makes fragments or adds up, the tensor cores have the
// others' products.
template <int kFilters, int kColumns>
GDFAST_DEVICE void multiply_float32_items(const HopperFloat32WeightArguments& a, int consumer) {
  using Its = HopperFloat32WeightTile<kFilters, kColumns>;
  using Ring = WeightRing<Its>;
  constexpr int kProducts = Its::kProducts, kFragments = Its::kFragments, kN = Its::kN;
  const int my_units = consumer * kProducts;
  const int first = first_number(Its::kPart);
  const auto arrive = [](uint64_t* barrier) {
    if (warp_lane() == 0) barrier_arrive(barrier);
  };
  const auto before = [](const Place& place) {
    return Place{(place.stage == 0 ? Its::kStages : place.stage) - 1, 0};
  };
  Place place{0, 0};
  float sums[kProducts][kN / 2], large[kProducts][kN / 2], small[kProducts][kN / 2];
  uint32_t fragments[kFragments][kFloatParts][4] = {};
  for (int index = static_cast<int>(blockIdx.x); index < a.items;
       index += static_cast<int>(gridDim.x)) {
    const WeightItem item = item_at<kFilters, kColumns>(a, index);
    if (item.unit + my_units >= a.units) {
      for (int box = item.first_box; box < item.end_box; ++box, Ring::advance(place)) {
        barrier_wait(Ring::full(place), place.parity);
        arrive(Ring::empty(place));
      }
      continue;
    }
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        sums[product][i] = large[product][i] = small[product][i] = 0;
      }
    }
#pragma unroll 1
    for (int box = item.first_box; box < item.end_box; ++box, Ring::advance(place)) {
      barrier_wait(Ring::full(place), place.parity);
      const unsigned char* const units = Ring::memory(place) + my_units * Its::kHalves * Its::kPart;
      const unsigned char* const grads = Ring::memory(place) + Its::kUnitBoxes * Its::kPart;
#pragma unroll
      for (int number = 0; number < Its::kPixels / kDepth * kProducts; ++number) {
        const int pixel = number / kProducts * kDepth, product = number % kProducts;
        uint32_t values[4][2];
        load_fragment(units + product * Its::kHalves * Its::kPart + pixel * kBoxRow,
                      computed_again(first), values);
        uint32_t (&fragment)[kFloatParts][4] = fragments[number % kFragments];
        // Products of the fragment that was here are over when only later ones are under way.
        constexpr int kLater = kFragments - 1;
        if (pixel == 0) {
          warpgroup_wait<(kLater < kProducts ? kLater : kProducts - 1)>();
          warpgroup_take(large[product]);
          add_up(sums[product], large[product]);
        } else {
          warpgroup_wait<kLater>();
        }
        if (number == kLater && box > item.first_box) arrive(Ring::empty(before(place)));
#pragma unroll
        for (auto& part : fragment) warpgroup_take(part);
        split_fragment(values, fragment);
        warpgroup_begin();
        multiply_parts<kN, true>(
            large[product], small[product], fragment,
            [&](int part) {
              return columns_matrix(grads + part * Its::kFilterBlocks * Its::kPart, pixel * kBoxRow,
                                    Its::kPart);
            },
            pixel > 0);
        warpgroup_commit();
      }
    }
    warpgroup_wait<0>();
    if (item.end_box > item.first_box) arrive(Ring::empty(before(place)));
    // Found again, rather than kept in registers.
    const WeightItem done = item_at<kFilters, kColumns>(a, computed_again(index));
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      warpgroup_take(large[product]);
      warpgroup_take(small[product]);
      add_up(sums[product], large[product]);
      const int unit = done.unit + my_units + product;
      if (unit < a.units) {
        write_float32_sums<kN>(a, sums[product], small[product], done.split, done.filter, unit);
      }
    }
  }
}

#endif

template <int kFilters, int kColumns>
GDFAST_KERNEL((HopperFloat32WeightTile<kFilters, kColumns>::kThreads), 1)
conv2d_hopper_float32_grad_weight_kernel(
    GDFAST_GRID_CONSTANT const HopperFloat32WeightArguments a) {
#if defined(GDFAST_HOPPER)
  using Its = HopperFloat32WeightTile<kFilters, kColumns>;
  using Ring = WeightRing<Its>;
  if (threadIdx.x == 0) {
    for (Place place{0, 0}; place.parity == 0; Ring::advance(place)) {
      barrier_init(Ring::full(place), 1);
      barrier_init(Ring::empty(place), 4 * Its::kConsumers);  // warps
    }
    barriers_ready();
  }
  clear_rest<Its>(a.box_n * a.box_h * a.box_w);
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warpgroup = shuffle(warp_index() / 4, 0);
  if (warpgroup == 0) {
    give_registers<Its::kLoaderRegisters>();
    if (warp_index() == 0) load_float32_items<kFilters, kColumns>(a);
  } else {
    take_registers<Its::kConsumerRegisters>();
    multiply_float32_items<kFilters, kColumns>(a, warpgroup - 1);
  }
#endif
}

}  // namespace
}  // namespace gdfast::cuda
