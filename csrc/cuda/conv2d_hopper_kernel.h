// The kernel of conv2d_hopper.cu: a block's loader, its consumers, and how they share its memory.
#pragma once

#include "activation.h"
#include "hopper.h"

namespace gdfast::cuda {
namespace {

constexpr int kPixels = 128;   // of a tile: two products of 64 rows
constexpr int kChannels = 64;  // summed per stage: one row of a box
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kPixelBytes = kPixels * kBoxRow;
constexpr int kWarpRows = 16;  // of a product, for each warp

// Registers of a thread: 65536 / 384 = 170 are 168 at launch, in units of 8.
constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kLoaderRegisters + kConsumers * kConsumerRegisters) <= 65536,
              "what a multiprocessor has");

struct HopperArguments {
  TensorMap image, weight;
  unsigned char* output;
  const void* bias;
  int64_t stride_n, stride_h, stride_w;  // of the output, in elements
  int N, H, W, channels;                 // of the output
  int box_n, box_h, box_w;
  int by_box_w, by_box_h;  // ceil(2^16 / box): exact for what is below 128
  int tiles_h, tiles_w, tiles_channels, tiles;
  int R, S, sums;  // sums: in units of kChannels
  int first_h, first_w, step_h, step_w;
  Activation activation;
  float negative_slope;
};

// A tile of kN channels: how consumers divide it, and what lies where in dynamic shared memory.
template <int kN>
struct HopperTile {
  // A consumer has registers for 128 sums a thread: all pixels of up to 128 channels, and then
  // consumers take tiles in turn, or half of the pixels of 256, and then they share each tile.
  static constexpr int kSharers = kN == 256 ? kConsumers : 1;
  static constexpr int kTurns = kConsumers / kSharers;
  static constexpr int kProducts = kPixels / 64 / kSharers;

  static constexpr int kStages = kN == 256 ? 4 : 6;
  static constexpr int kStage = kPixelBytes + kN * kBoxRow;
  static constexpr int kResults = kStages * kStage;  // 16 rows of 64 channels for each warp
  static constexpr int kWarpResults = kWarpRows * kBoxRow;
  static constexpr int kBarriers = kResults + kConsumers * 4 * kWarpResults;
  static constexpr int kBarrier = static_cast<int>(sizeof(uint64_t));
  static constexpr int kSize = kBarriers + (2 * kStages + kConsumers) * kBarrier;
  static_assert(kStage % 1024 == 0 && kSize <= 227 * 1024, "what a block may have");
};

#if defined(GDFAST_HOPPER)

struct Tile {
  int n, h, w, channel;  // the first of each
};

template <int kN>
GDFAST_DEVICE Tile tile_at(const HopperArguments& a, int index) {
  const int pixels = index / a.tiles_channels, row = pixels / a.tiles_w, image = row / a.tiles_h;
  return {image * a.box_n, (row - image * a.tiles_h) * a.box_h,
          (pixels - row * a.tiles_w) * a.box_w, (index - pixels * a.tiles_channels) * kN};
}

// The ring of stages and its barriers. Both sides count stages from the block's first; a barrier's
// phase is over once per turn of the ring.
template <int kN>
struct Ring {
  static constexpr unsigned kStages = HopperTile<kN>::kStages;

  GDFAST_DEVICE unsigned char* stage(unsigned position) {
    return shared_memory() + position % kStages * HopperTile<kN>::kStage;
  }
  GDFAST_DEVICE uint64_t* barrier(unsigned index) {
    return reinterpret_cast<uint64_t*>(shared_memory() + HopperTile<kN>::kBarriers) + index;
  }
  GDFAST_DEVICE uint64_t* full(unsigned position) { return barrier(position % kStages); }
  GDFAST_DEVICE uint64_t* empty(unsigned position) { return barrier(kStages + position % kStages); }
  // Says that a consumer may begin its next tile.
  GDFAST_DEVICE uint64_t* turn(int consumer) { return barrier(2 * kStages + consumer); }
  GDFAST_DEVICE int parity(unsigned position) { return static_cast<int>(position / kStages & 1); }
};

template <int kN, bool kGradient>
GDFAST_DEVICE void load_tiles(const HopperArguments& a) {
  // A box always counts in full, also where it reaches beyond its tensor.
  const int bytes = a.box_n * a.box_h * a.box_w * kBoxRow + kN * kBoxRow;
  unsigned position = 0;
  for (int index = static_cast<int>(blockIdx.x); index < a.tiles;
       index += static_cast<int>(gridDim.x)) {
    const Tile tile = tile_at<kN>(a, index);
    for (int r = 0; r < a.R; ++r) {
      for (int s = 0; s < a.S; ++s) {
        const int h = tile.h + a.first_h + r * a.step_h, w = tile.w + a.first_w + s * a.step_w;
        for (int sum = 0; sum < a.sums; ++sum, ++position) {
          unsigned char* const stage = Ring<kN>::stage(position);
          uint64_t* const full = Ring<kN>::full(position);
          // In the first turn nobody has to leave a stage: the phase before the first is over.
          barrier_wait(Ring<kN>::empty(position), Ring<kN>::parity(position) ^ 1);
          barrier_arrive_expecting(full, bytes);
          load_box(stage, a.image, {sum * kChannels, w, h, tile.n}, full);
          if constexpr (kGradient) {
            for (int part = 0; part < kN / kChannels; ++part) {
              load_box(stage + kPixelBytes + part * kChannels * kBoxRow, a.weight,
                       {tile.channel + part * kChannels, s, r, sum * kChannels}, full);
            }
          } else {
            load_box(stage + kPixelBytes, a.weight, {sum * kChannels, s, r, tile.channel}, full);
          }
        }
      }
    }
  }
}

// pixels: the first of a consumer's in the stage.
template <typename T, int kN, bool kGradient, int kProducts>
GDFAST_DEVICE void multiply_stage(float (&sums)[kProducts][kN / 2], const unsigned char* pixels,
                                  const unsigned char* weights, bool accumulate) {
  constexpr int kStep = 16;  // channels of one instruction
  constexpr int kNext = kChannels * kBoxRow;
  warpgroup_begin();
#pragma unroll
  for (int k = 0; k < kChannels; k += kStep) {
    const uint64_t b =
        kGradient ? columns_matrix(weights, k * kBoxRow, kNext) : rows_matrix(weights, 2 * k);
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      const uint64_t a = rows_matrix(pixels + product * 64 * kBoxRow, 2 * k);
      warpgroup_multiply<T, kN, kGradient>(sums[product], a, b, accumulate || k > 0);
    }
  }
  warpgroup_commit();
}

// Adds the bias to a thread's sums of 64 channels and applies the activation.
template <typename T>
GDFAST_DEVICE void finish(const HopperArguments& a, int first_channel, float* sums) {
  constexpr int kCount = kChannels / 2;
  float values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = sums[i];
  if (a.bias != nullptr) {
    // Of every eight channels, four lanes have two each, in two rows.
    const T* const bias = static_cast<const T*>(a.bias) + first_channel + warp_lane() % 4 * 2;
#pragma unroll
    for (int chunk = 0; chunk < kCount / 4; ++chunk) {
      const bool inside = first_channel + 8 * chunk < a.channels;  // which come in eights
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = inside ? to_float(bias[8 * chunk + i]) : 0;
        values[4 * chunk + i] += value, values[4 * chunk + 2 + i] += value;
      }
    }
  }
  activate(values, a.activation, a.negative_slope);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = values[i];
}

// Asks once for all sums of a product what there is to do: most layers have neither.
template <typename T, int kCount>
GDFAST_DEVICE void finish_all(const HopperArguments& a, int first_channel, float (&sums)[kCount]) {
  if (a.bias == nullptr && a.activation == Activation::kNone) return;
  constexpr int kPart = kChannels / 2;
#pragma unroll
  for (int part = 0; part < kCount / kPart; ++part) {
    finish<T>(a, first_channel + part * kChannels, sums + part * kPart);
  }
}

// Writes a warp's 16 rows of one product, 64 channels at a time by way of shared memory, so that
// eight lanes write the 128 bytes of a pixel. Chunks change places there as in a box: neither the
// registers' way of writing nor the rows' way of reading meets itself in a bank.
template <typename T, int kN>
GDFAST_DEVICE void write_rows(const HopperArguments& a, const Tile& tile,
                              const float (&sums)[kN / 2], int first_row, unsigned char* results) {
  constexpr int kPack = 16 / sizeof(T);
  const int lane = computed_again(warp_lane());
  unsigned char* pixels[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + 4 * i + lane / 8;
    const int line = row * a.by_box_w >> 16, image = line * a.by_box_h >> 16;
    const int n = tile.n + image, h = tile.h + line - image * a.box_h,
              w = tile.w + row - line * a.box_w;
    const bool inside = image < a.box_n && n < a.N && h < a.H && w < a.W;
    const int64_t offset = n * a.stride_n + h * a.stride_h + w * a.stride_w;
    pixels[i] = inside ? a.output + offset * static_cast<int64_t>(sizeof(T)) : nullptr;
  }
#pragma unroll
  for (int part = 0; part < kN / kChannels; ++part) {
    const int first_channel = tile.channel + part * kChannels;
    sync_warp();
#pragma unroll
    for (int chunk = 0; chunk < 8; ++chunk) {
      const float* const values = sums + 32 * part + 4 * chunk;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4 + 8 * i;
        *reinterpret_cast<uint32_t*>(results + row * kBoxRow + (chunk ^ row % 8) * 16 +
                                     lane % 4 * 4) = pack_two<T>(values[2 * i], values[2 * i + 1]);
      }
    }
    sync_warp();
    const int channel = first_channel + lane % 8 * kPack;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * i + lane / 8;
      if (pixels[i] == nullptr || channel >= a.channels) continue;
      const unsigned char* const from = results + row * kBoxRow + (lane % 8 ^ row % 8) * 16;
      store_16(pixels[i] + channel * sizeof(T), load_16(from));
    }
  }
}

template <typename T, int kN, bool kGradient>
GDFAST_DEVICE void multiply_tiles(const HopperArguments& a, int consumer) {
  using Its = HopperTile<kN>;
  const int warp = warp_index() % 4;
  unsigned char* const results =
      shared_memory() + Its::kResults + (4 * consumer + warp) * Its::kWarpResults;
  const int first_row = consumer % Its::kSharers * Its::kProducts * 64;
  const unsigned steps = static_cast<unsigned>(a.R * a.S * a.sums);
  const auto arrive = [](uint64_t* barrier) {
    if (warp_lane() == 0) barrier_arrive(barrier);
  };
  const int mine = consumer / Its::kSharers;
  int turn = mine ^ 1;  // who begins has not to wait in the first tile
  float sums[Its::kProducts][kN / 2];
  const int grid = static_cast<int>(gridDim.x);
  unsigned first = static_cast<unsigned>(mine) * steps;
  for (int index = static_cast<int>(blockIdx.x) + mine * grid; index < a.tiles;
       index += Its::kTurns * grid, first += Its::kTurns * steps, turn ^= 1) {
    // Parities tell one turn of the ring from the next, not from the one after that: stages are
    // waited for in their order, by one consumer after the other.
    if constexpr (Its::kTurns > 1) barrier_wait(Ring<kN>::turn(consumer), turn);
    for (unsigned step = 0; step < steps; ++step) {
      const unsigned position = first + step;
      const unsigned char* const stage = Ring<kN>::stage(position);
      barrier_wait(Ring<kN>::full(position), Ring<kN>::parity(position));
      multiply_stage<T, kN, kGradient>(sums, stage + first_row * kBoxRow, stage + kPixelBytes,
                                       step > 0);
      // The products of the stage before are over when only these are under way.
      warpgroup_wait<1>();
      if (step > 0) arrive(Ring<kN>::empty(position - 1));
    }
    if constexpr (Its::kTurns > 1) arrive(Ring<kN>::turn(consumer ^ 1));
    warpgroup_wait<0>();
#pragma unroll
    for (auto& product : sums) warpgroup_take(product);
    arrive(Ring<kN>::empty(first + steps - 1));

    const Tile tile = tile_at<kN>(a, index);
#pragma unroll
    for (int product = 0; product < Its::kProducts; ++product) {
      if constexpr (!kGradient) finish_all<T>(a, tile.channel, sums[product]);
      write_rows<T, kN>(a, tile, sums[product], first_row + 64 * product + kWarpRows * warp,
                        results);
    }
  }
}

#endif

template <typename T, int kN, bool kGradient>
GDFAST_KERNEL(kThreads, 1)
conv2d_hopper_kernel(GDFAST_GRID_CONSTANT const HopperArguments a) {
#if defined(GDFAST_HOPPER)
  using Its = HopperTile<kN>;
  if (threadIdx.x == 0) {
    for (unsigned stage = 0; stage < Ring<kN>::kStages; ++stage) {
      barrier_init(Ring<kN>::full(stage), 1);
      barrier_init(Ring<kN>::empty(stage), 4 * Its::kSharers);  // warps
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      barrier_init(Ring<kN>::turn(consumer), 4);
    }
    barriers_ready();
  }
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warpgroup = shuffle(warp_index() / 4, 0);
  if (warpgroup == 0) {
    give_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) load_tiles<kN, kGradient>(a);
  } else {
    take_registers<kConsumerRegisters>();
    multiply_tiles<T, kN, kGradient>(a, warpgroup - 1);
  }
#endif
}

}  // namespace
}  // namespace gdfast::cuda
