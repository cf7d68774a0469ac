// The kernel of conv2d_hopper_float32.cu: a block's loader and its consumers.
#pragma once

#include "bfloat16_parts.h"
#include "conv2d_hopper_kernel.h"
#include "vectors.h"

namespace gdfast::cuda {
namespace {

constexpr int kFloats = kBoxRow / 4;  // in a row of a box
constexpr int kDepth = 16;            // channels that one product sums

struct HopperFloat32Arguments : HopperArguments {
  float* output;
  Strides4 strides;
  int N, H, W;      // of the output
  int taps_across;  // columns of the weight
  int first_tile;   // of so many
};

// A tile of kPixels by kN channels, of which each consumer has half of the pixels. A stage has
// pixels as they are, in boxes of half the channels, and the weight's parts.
template <int kPixels, int kN>
struct HopperFloat32Tile {
  static constexpr int kProducts = kPixels / 64 / kConsumers;
  static constexpr int kPixelBox = kPixels * kBoxRow, kPixelBytes = kChannels / kFloats * kPixelBox;
  static constexpr int kWeightBox = kN * kBoxRow, kWeightBytes = kFloatParts * kWeightBox;
  static constexpr int kStage = kPixelBytes + kWeightBytes;
  static constexpr int kStages = (kBlockMemory - kBarrierBytes) / kStage;
  static constexpr int kBarriers = kStages * kStage;
  static constexpr int kSize = kBarriers + 2 * kStages * static_cast<int>(sizeof(uint64_t));
  static_assert(kStages >= 2 && kStages <= kMostStages, "one is loaded, one multiplied");

  // With three sums of 64 numbers a thread has no registers for the fragments of two products.
  static constexpr int kFragments = kPixels * kN == 128 * 64 ? 2 : 1;
};

#if defined(GDFAST_HOPPER)

template <typename Its>
struct Float32Ring {
  GDFAST_DEVICE unsigned char* pixels(const Stage& stage) {
    return shared_memory() + stage.index * Its::kStage;
  }
  GDFAST_DEVICE unsigned char* weights(const Stage& stage) {
    return pixels(stage) + Its::kPixelBytes;
  }
  GDFAST_DEVICE uint64_t* full(const Stage& stage) {
    return reinterpret_cast<uint64_t*>(shared_memory() + Its::kBarriers) + stage.index;
  }
  GDFAST_DEVICE uint64_t* empty(const Stage& stage) { return full(stage) + Its::kStages; }
};

template <int kPixels, int kN>
GDFAST_DEVICE void load_float32_tiles(const HopperFloat32Arguments& a) {
  using Its = HopperFloat32Tile<kPixels, kN>;
  using Ring = Float32Ring<Its>;
  static_assert(kMostPhases == 2, "so that a shift divides by the phases, towards minus infinity");
  const int shift_h = a.rows.in_phases - 1, shift_w = a.columns.in_phases - 1;
  // A box always counts in full, also where it reaches beyond its tensor.
  const int bytes = kChannels / kFloats * a.box_n * a.box_h * a.box_w * kBoxRow + Its::kWeightBytes;
  Stage stage{0, 0};
  for_each_tile(a, [&](int index, int phase_h, int phase_w) {
    const HopperTaps &rows = a.rows.taps[phase_h], &columns = a.columns.taps[phase_w];
    const Tile tile = tile_at<kN>(a, a.first_tile + index);
    for (int i = 0; i < rows.count; ++i) {
      const int at_h = rows.at + i * rows.at_step, h = at_h >> shift_h;
      for (int j = 0; j < columns.count; ++j) {
        const int at_w = columns.at + j * columns.at_step, w = at_w >> shift_w;
        const TensorMap& image = a.images[at_h - h * (1 << shift_h)][at_w - w * (1 << shift_w)];
        const int tap =
            (rows.tap + i * rows.tap_step) * a.taps_across + columns.tap + j * columns.tap_step;
#pragma unroll 1
        for (int sum = 0; sum < a.sums; ++sum, advance(stage, Its::kStages)) {
          uint64_t* const full = Ring::full(stage);
          // In the first turn nobody has to leave a stage: the phase before the first is over.
          barrier_wait(Ring::empty(stage), stage.parity ^ 1);
          barrier_arrive_expecting(full, bytes);
#pragma unroll
          for (int half = 0; half < kChannels / kFloats; ++half) {
            load_box(Ring::pixels(stage) + half * Its::kPixelBox, image,
                     {sum * kChannels + half * kFloats, tile.w + w, tile.h + h, tile.n}, full);
          }
#pragma unroll
          for (int part = 0; part < kFloatParts; ++part) {
            load_box(Ring::weights(stage) + part * Its::kWeightBox, a.weight,
                     {sum * kChannels, tap, tile.channel, part}, full);
          }
        }
      }
    }
  });
}

// A lane's part of 16 rows by 16 channels, for the fragment: rows r and r + 8, of each four
// channels that lie side by side. Those take the fragment's places 2 t, 2 t + 1, 2 t + 8 and
// 2 t + 9, and have them in the weight too.
GDFAST_DEVICE void load_values(const unsigned char* from, uint32_t (&values)[4][2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const Pack16 four = load_16(from + row * 8 * kBoxRow);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[row + i / 2 * 2][i % 2] = four.words[i];
  }
}

// The row in each eight that a lane reads and makes. Of an access of 16 bytes eight lanes, of two
// fragment rows, are served at a time: rows r and r + 4 have no bank in common.
GDFAST_DEVICE int row_of_eight() { return warp_lane() / 8 + warp_lane() / 4 % 2 * 4; }

// Two of a lane's rows in a product, each from the pixel's first channel on.
template <int kN, Ending kEnding>
GDFAST_DEVICE void write_rows(const HopperFloat32Arguments& a, const float (&large)[kN / 2],
                              const float (&small)[kN / 2], int first_channel,
                              float* const (&rows)[2]) {
#pragma unroll
  for (int chunk = 0; chunk < kN / 8; ++chunk) {
    const int channel = first_channel + 8 * chunk + warp_lane() % 4 * 2;
    if (channel >= a.channels) return;  // which come in eights
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = sum_of_parts(large[4 * chunk + i], small[4 * chunk + i]);
    }
    if constexpr (kEnding != Ending::kNone) {
      float bias[2] = {0, 0};
      if (a.bias != nullptr) {
        const float* const from = static_cast<const float*>(a.bias) + channel;
        bias[0] = from[0], bias[1] = from[1];
      }
      finish<kEnding>(a, values, bias);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (rows[row] != nullptr) {
        store_pack<2>(rows[row] + channel,
                      {{bits_of(values[2 * row]), bits_of(values[2 * row + 1])}});
      }
    }
  }
}

template <int kPixels, int kN, int kProducts>
GDFAST_DEVICE void write_float32_tile(const HopperFloat32Arguments& a, int index, int phase_h,
                                      int phase_w, const float (&large)[kProducts][kN / 2],
                                      const float (&small)[kProducts][kN / 2], int first_row) {
  const Tile tile = tile_at<kN>(a, a.first_tile + index);
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
    float* rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = computed_again(first_row) + 64 * product + 8 * i;
      const int line = row / a.box_w, image = line / a.box_h;
      const int w = (tile.w + row - line * a.box_w) * a.columns.out_phases + phase_w;
      const int h = (tile.h + line - image * a.box_h) * a.rows.out_phases + phase_h;
      const int n = tile.n + image;
      const bool exists = image < a.box_n && n < a.N && h < a.H && w < a.W;
      rows[i] = exists ? a.output + (n * a.strides.n + h * a.strides.h + w * a.strides.w) : nullptr;
    }
    const auto write = [&](auto ending) {
      write_rows<kN, decltype(ending)::value>(a, large[product], small[product], tile.channel,
                                              rows);
    };
    if (a.ending == Ending::kNone) {
      write(std::integral_constant<Ending, Ending::kNone>{});
    } else if (a.ending == Ending::kLines) {
      write(std::integral_constant<Ending, Ending::kLines>{});
    } else {
      write(std::integral_constant<Ending, Ending::kSilu>{});
    }
  }
}

// Sums of first parts are taken over 64 channels, and those of that added up in registers, where
// nothing is cut off. While a consumer makes fragments or adds up, the tensor cores have the other
// one's products.
template <int kPixels, int kN>
GDFAST_DEVICE void multiply_float32_tiles(const HopperFloat32Arguments& a, int consumer) {
  using Its = HopperFloat32Tile<kPixels, kN>;
  using Ring = Float32Ring<Its>;
  constexpr int kProducts = Its::kProducts, kFragments = Its::kFragments;
  const int first_row = consumer * kProducts * 64 + warp_index() % 4 * kWarpRows + row_of_eight();
  const int chunk = warp_lane() % 4 ^ row_of_eight();  // by the swizzle; then chunk ^ 4
  const int first_byte = first_row * kBoxRow + chunk * 16, to_second_half = chunk < 4 ? 64 : -64;
  const auto arrive = [](uint64_t* barrier) {
    if (warp_lane() == 0) barrier_arrive(barrier);
  };
  Stage stage{0, 0};
  float sums[kProducts][kN / 2], large[kProducts][kN / 2], small[kProducts][kN / 2];
  uint32_t fragments[kFragments][kFloatParts][4] = {};
  for_each_tile(a, [&](int index, int phase_h, int phase_w) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        sums[product][i] = large[product][i] = small[product][i] = 0;
      }
    }
    const int steps = a.rows.taps[phase_h].count * a.columns.taps[phase_w].count * a.sums;
    uint64_t* before = nullptr;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, advance(stage, Its::kStages)) {
      barrier_wait(Ring::full(stage), stage.parity);
      const unsigned char* const pixels = Ring::pixels(stage) + first_byte;
      const unsigned char* const weights = Ring::weights(stage);
#pragma unroll
      for (int number = 0; number < kChannels / kDepth * kProducts; ++number) {
        const int depth = number / kProducts * kDepth, product = number % kProducts;
        uint32_t values[4][2];
        load_values(pixels + depth / kFloats * Its::kPixelBox + product * 64 * kBoxRow +
                        (depth % kFloats == 0 ? 0 : to_second_half),
                    values);
        uint32_t (&fragment)[kFloatParts][4] = fragments[number % kFragments];
        // Products of the fragment that was here are over when only later ones are under way.
        constexpr int kLater = kFragments - 1;
        if (depth == 0) {
          warpgroup_wait<(kLater < kProducts ? kLater : kProducts - 1)>();
          warpgroup_take(large[product]);
          add_up(sums[product], large[product]);
        } else {
          warpgroup_wait<kLater>();
        }
        if (number == kLater && before != nullptr) arrive(before);
#pragma unroll
        for (auto& part : fragment) warpgroup_take(part);
        split_fragment(values, fragment);
        warpgroup_begin();
        multiply_parts<kN, false>(
            large[product], small[product], fragment,
            [&](int part) { return rows_matrix(weights + part * Its::kWeightBox, 2 * depth); },
            depth > 0);
        warpgroup_commit();
      }
      before = Ring::empty(stage);
    }
    warpgroup_wait<0>();
    if (before != nullptr) arrive(before);
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      warpgroup_take(large[product]);
      warpgroup_take(small[product]);
      add_up(sums[product], large[product]);
    }
    write_float32_tile<kPixels, kN>(a, index, phase_h, phase_w, sums, small, first_row);
  });
}

#endif

template <int kPixels, int kN>
GDFAST_KERNEL(kThreads, 1)
conv2d_hopper_float32_kernel(GDFAST_GRID_CONSTANT const HopperFloat32Arguments a) {
#if defined(GDFAST_HOPPER)
  using Its = HopperFloat32Tile<kPixels, kN>;
  using Ring = Float32Ring<Its>;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Its::kStages; ++stage) {
      barrier_init(Ring::full({stage, 0}), 1);
      barrier_init(Ring::empty({stage, 0}), 4 * kConsumers);  // warps
    }
    barriers_ready();
  }
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warpgroup = shuffle(warp_index() / 4, 0);
  if (warpgroup == 0) {
    give_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) load_float32_tiles<kPixels, kN>(a);
  } else {
    take_registers<kConsumerRegisters>();
    multiply_float32_tiles<kPixels, kN>(a, warpgroup - 1);
  }
#endif
}

}  // namespace
}  // namespace gdfast::cuda
