// The kernel of conv2d_hopper_planes.cu: a block's loader and its consumers, and how they share its
// memory:
//
//   results    of the tiles that are being written
//   barriers
//   weights    of all steps, where they stay; else each stage has those of its step
//   stages     a ring, each with what one step multiplies
#pragma once

#include "conv2d_hopper_ending.h"
#include "conv2d_hopper_ring.h"
#include "divisor.h"

namespace gdfast::cuda {
namespace {

constexpr int kPart = kChannels * kBoxRow;  // bytes of 64 pixels of 64 channels

struct PlanesArguments {
  TensorMap image, output, weight;
  const void* bias;
  int channels;  // of the output
  Divisor tiles_pixels, tiles_channels;
  int tiles;
  int sums;  // in units of kChannels
  int stages, stage_bytes;
  int kept_steps;  // whose weights stay in memory: all, or none
  Ending ending;
  bool zero_below;
  float below, most;
};

// A tile has 128 channels, the rows of its products, by 128 pixels. A consumer has registers for
// all of its sums; consumers take tiles in turn.
constexpr int kMade = 128, kN = 128;
constexpr int kProducts = kMade / 64, kParts = kN / 64;

struct PlanesMemory {
  static constexpr int kPixelBytes = kParts * kPart;  // of one step
  static constexpr int kWeights = kMade * kBoxRow;    // likewise
  static constexpr int kResults = kMade * kN * 2;
  static constexpr int kBarriers = kConsumers * kResults;
  static constexpr int kKept = kBarriers + kBarrierBytes;  // weights, and then stages

#if defined(GDFAST_HOPPER)
  GDFAST_DEVICE unsigned char* pixels(const PlanesArguments& a, const Stage& stage) {
    return shared_memory() + kKept + a.kept_steps * kWeights + stage.index * a.stage_bytes;
  }
  GDFAST_DEVICE unsigned char* weights(const PlanesArguments& a, const Stage& stage, int step) {
    if (a.kept_steps == 0) return pixels(a, stage) + kPixelBytes;
    return shared_memory() + kKept + step * kWeights;
  }
  GDFAST_DEVICE uint64_t* barrier(int index) {
    return reinterpret_cast<uint64_t*>(shared_memory() + kBarriers) + index;
  }
  GDFAST_DEVICE uint64_t* full(const Stage& stage) { return barrier(stage.index); }
  GDFAST_DEVICE uint64_t* empty(const Stage& stage) { return barrier(kMostStages + stage.index); }
  // Says that a consumer may begin its next tile.
  GDFAST_DEVICE uint64_t* turn(int consumer) { return barrier(2 * kMostStages + consumer); }

  GDFAST_DEVICE void init_barriers() {
    for (int stage = 0; stage < kMostStages; ++stage) {
      barrier_init(full({stage, 0}), 1);
      barrier_init(empty({stage, 0}), 4);  // warps
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) barrier_init(turn(consumer), 4);
    barriers_ready();
  }
#endif
};

#if defined(GDFAST_HOPPER)

struct PlanesPlace {
  int n, pixel, channel;  // the first of each
};

// Tiles side by side in time have the same pixels.
GDFAST_DEVICE PlanesPlace planes_place(const PlanesArguments& a, int index) {
  const Divided channels = divide(index, a.tiles_channels),
                pixels = divide(channels.quotient, a.tiles_pixels);
  return {pixels.quotient, pixels.rest * kN, channels.rest * kMade};
}

template <typename Each>
GDFAST_DEVICE void for_each_planes_tile(const PlanesArguments& a, Each&& each) {
  for (int index = static_cast<int>(blockIdx.x); index < a.tiles;
       index += static_cast<int>(gridDim.x)) {
    each(index);
  }
}

template <bool kGradient>
GDFAST_DEVICE void load_planes(const PlanesArguments& a) {
  using Memory = PlanesMemory;
  Stage stage{0, 0};
  for_each_planes_tile(a, [&](int index) {
    const PlanesPlace place = planes_place(a, index);
    // Weights that stay come with a block's first tile.
    const bool with_weights = a.kept_steps == 0 || index == static_cast<int>(blockIdx.x);
    for (int sum = 0; sum < a.sums; ++sum, advance(stage, a.stages)) {
      uint64_t* const full = Memory::full(stage);
      unsigned char* const pixels = Memory::pixels(a, stage);
      // In the first turn nobody has to leave a stage: the phase before the first is over.
      barrier_wait(Memory::empty(stage), stage.parity ^ 1);
      barrier_arrive_expecting(full, Memory::kPixelBytes + (with_weights ? Memory::kWeights : 0));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        load_box(pixels + part * kPart, a.image,
                 {place.pixel + 64 * part, sum * kChannels, place.n, 0}, full);
      }
      if (!with_weights) continue;
      unsigned char* const weights = Memory::weights(a, stage, sum);
      if constexpr (kGradient) {
#pragma unroll 1
        for (int part = 0; part < kMade / kChannels; ++part) {
          load_box(weights + part * kPart, a.weight,
                   {place.channel + part * kChannels, 0, 0, sum * kChannels}, full);
        }
      } else {
        load_box(weights, a.weight, {sum * kChannels, 0, 0, place.channel}, full);
      }
    }
  });
}

// weights: the first of a consumer's in the stage.
template <typename T, bool kGradient>
GDFAST_DEVICE void multiply_planes(float (&sums)[kProducts][kN / 2], const unsigned char* weights,
                                   const unsigned char* pixels, bool accumulate) {
  constexpr int kStep = 16;  // channels of one instruction
  warpgroup_begin();
#pragma unroll
  for (int k = 0; k < kChannels; k += kStep) {
    const uint64_t b = columns_matrix(pixels, k * kBoxRow, kPart);
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      const unsigned char* const from = weights + product * kPart;
      const uint64_t a =
          kGradient ? columns_matrix(from, k * kBoxRow, kPart) : rows_matrix(from, 2 * k);
      warpgroup_multiply<T, kN, true, kGradient>(sums[product], a, b, accumulate || k > 0);
    }
  }
  warpgroup_commit();
}

// Leaves a warp's 16 channels of one product in its boxes of results, 64 pixels each. Of each row
// four lanes have 16 bytes: no two of a warp's meet in a bank.
template <typename T, Ending kEnding>
GDFAST_DEVICE void keep_planes(const PlanesArguments& a, const float (&sums)[kN / 2], int channel,
                               unsigned char* results) {
  const int lane = computed_again(warp_lane()), row_of_8 = lane / 4;
  const int row = warp_index() % 4 * kWarpRows + row_of_8;
  float bias[2] = {0, 0};
  if constexpr (kEnding != Ending::kNone) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = channel + row + 8 * i;
      if (a.bias != nullptr && at < a.channels) {
        bias[i] = to_float(static_cast<const T*>(a.bias)[at]);
      }
    }
  }
  unsigned char* const to = results + row * kBoxRow + lane % 4 * 4;
#pragma unroll
  for (int chunk = 0; chunk < kN / 8; ++chunk) {
    // Two pixels of one channel, and of the one eight further on.
    float values[4] = {sums[4 * chunk], sums[4 * chunk + 2], sums[4 * chunk + 1],
                       sums[4 * chunk + 3]};
    if constexpr (kEnding != Ending::kNone) finish<kEnding>(a, values, bias);
    unsigned char* const place = to + chunk / 8 * kPart + (chunk % 8 ^ row_of_8) * 16;
    *reinterpret_cast<uint32_t*>(place) = pack_two<T>(values[0], values[2]);
    *reinterpret_cast<uint32_t*>(place + 8 * kBoxRow) = pack_two<T>(values[1], values[3]);
  }
}

// Writes a consumer's part of a tile. The unit goes on writing while it multiplies the next one:
// memory is the consumer's again when it has been read.
template <typename T, bool kGradient>
GDFAST_DEVICE void write_planes(const PlanesArguments& a, int index,
                                const float (&sums)[kProducts][kN / 2], int consumer) {
  constexpr int kProductBytes = kParts * kPart;
  unsigned char* const results = shared_memory() + consumer * kProducts * kProductBytes;
  const bool starts = threadIdx.x % kWarpgroup == 0;
  const auto meet = [consumer] { sync_threads_of(1 + consumer, kWarpgroup); };
  const PlanesPlace place = planes_place(a, index);
  if (starts) stores_wait_read<0>();
  meet();
  const auto keep = [&](auto ending) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      keep_planes<T, decltype(ending)::value>(a, sums[product], place.channel + product * kChannels,
                                              results + product * kProductBytes);
    }
  };
  if (kGradient || a.ending == Ending::kNone) {
    keep(std::integral_constant<Ending, Ending::kNone>{});
  } else if (a.ending == Ending::kLines) {
    keep(std::integral_constant<Ending, Ending::kLines>{});
  } else {
    keep(std::integral_constant<Ending, Ending::kSilu>{});
  }
  stores_ready();
  meet();
  if (!starts) return;
  for (int product = 0; product < kProducts; ++product) {
    const int channel = place.channel + product * kChannels;
    if (channel >= a.channels) continue;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      store_box(a.output, {place.pixel + 64 * part, channel, place.n, 0},
                results + product * kProductBytes + part * kPart);
    }
  }
  stores_commit();
}

template <typename T, bool kGradient>
GDFAST_DEVICE void multiply_planes_tiles(const PlanesArguments& a, int consumer) {
  using Memory = PlanesMemory;
  const auto arrive = [](uint64_t* barrier) {
    if (warp_lane() == 0) barrier_arrive(barrier);
  };
  int turn = consumer ^ 1;  // who begins has not to wait in the first tile
  int number = 0;
  Stage stage{0, 0};
  float sums[kProducts][kN / 2];
  for_each_planes_tile(a, [&](int index) {
    if ((number++ & 1) != consumer) return advance(stage, a.stages, a.sums);
    // Parities tell one turn of the ring from the next, not from the one after that: stages are
    // waited for in their order, by one consumer after the other.
    barrier_wait(Memory::turn(consumer), turn);
    turn ^= 1;
    Stage before = stage;
    for (int step = 0; step < a.sums; ++step) {
      barrier_wait(Memory::full(stage), stage.parity);
      multiply_planes<T, kGradient>(sums, Memory::weights(a, stage, step), Memory::pixels(a, stage),
                                    step > 0);
      // The products of the stage before are over when only these are under way.
      warpgroup_wait<1>();
      if (step > 0) arrive(Memory::empty(before));
      before = stage;
      advance(stage, a.stages);
    }
    arrive(Memory::turn(consumer ^ 1));
    warpgroup_wait<0>();
#pragma unroll
    for (auto& product : sums) warpgroup_take(product);
    arrive(Memory::empty(before));
    write_planes<T, kGradient>(a, index, sums, consumer);
  });
  stores_wait<0>();
}

#endif

template <typename T, bool kGradient>
GDFAST_KERNEL(kThreads, 1)
conv2d_planes_kernel(GDFAST_GRID_CONSTANT const PlanesArguments a) {
#if defined(GDFAST_HOPPER)
  if (threadIdx.x == 0) PlanesMemory::init_barriers();
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warpgroup = shuffle(warp_index() / 4, 0);
  if (warpgroup == 0) {
    give_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) load_planes<kGradient>(a);
  } else {
    take_registers<kConsumerRegisters>();
    multiply_planes_tiles<T, kGradient>(a, warpgroup - 1);
  }
#endif
}

}  // namespace
}  // namespace gdfast::cuda
