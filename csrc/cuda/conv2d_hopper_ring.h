// What the kernel of the Hopper convolution is told, and how a block's loader and its consumers
// share shared memory:
//
//   results    of the tiles that are being written
//   barriers
//   weights    of all steps, where they stay; else each stage has those of its step
//   stages     a ring, each with what one step multiplies
#pragma once

#include <cmath>
#include <limits>

#include "conv2d_hopper_tiles.h"
#include "divisor.h"
#include "hopper.h"

namespace gdfast::cuda {
namespace {

constexpr int kChannels = 64;  // summed per step: one row of a box
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kWarpRows = 16;  // of a product, for each warp

// Registers of a thread: 65536 / 384 = 170 are 168 at launch, in units of 8.
constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kLoaderRegisters + kConsumers * kConsumerRegisters) <= 65536,
              "what a multiprocessor has");

constexpr int kBlockMemory = 227 * 1024;  // bytes, that a block may have
constexpr int kBarrierBytes = 1024;       // with what keeps boxes at multiples of that
constexpr int kMostStages = 12;
static_assert((2 * kMostStages + kConsumers) * sizeof(uint64_t) <= kBarrierBytes, "one for each");

// What is done to sums before they are written. Lines and silu begin with a bias; lines are below *
// z or 0 on one side of 0, and z up to a limit on the other.
enum class Ending { kNone, kLines, kSilu, kZero };

struct HopperArguments {
  TensorMap images[kMostPhases][kMostPhases];  // phases of rows, of columns
  TensorMap outputs[kMostPhases][kMostPhases];
  TensorMap weight;
  HopperAxis rows, columns;
  const void* bias;
  int channels;             // of the output
  int box_n, box_h, box_w;  // a tile's pixels
  Divisor tiles_h, tiles_w, tiles_channels;
  int tiles;
  int sums;  // in units of kChannels
  int stages, stage_bytes;
  int kept_steps;  // whose weights stay in memory: all, or none
  Ending ending;
  bool zero_below;
  float below, most;
};

inline void end_with(HopperArguments& a, Activation activation, double negative_slope) {
  using Kind = Activation;
  a.ending = activation == Kind::kSilu                        ? Ending::kSilu
             : activation == Kind::kNone && a.bias == nullptr ? Ending::kNone
                                                              : Ending::kLines;
  a.zero_below = activation == Kind::kRelu || activation == Kind::kRelu6;
  a.below = activation == Kind::kLeakyRelu ? static_cast<float>(negative_slope) : 1;
  a.most = activation == Kind::kRelu6 ? 6 : std::numeric_limits<float>::infinity();
}

// A tile of kPixels by kN channels: how consumers divide it, and what lies where in dynamic shared
// memory.
template <int kPixels, int kN>
struct HopperTile {
  // A consumer has registers for 128 sums a thread: all of a tile of up to 128 by 128, and then
  // consumers take tiles in turn, or half of the pixels of a larger one, and then they share each.
  static constexpr int kSharers = kPixels * kN > 128 * 128 ? kConsumers : 1;
  static constexpr int kTurns = kConsumers / kSharers;
  static constexpr int kProducts = kPixels / 64 / kSharers;
  static constexpr int kPixelBytes = kPixels * kBoxRow;  // of one step

  static constexpr int kParts = kN / kChannels;  // boxes of results
  static constexpr int kResults = kParts * kPixelBytes;
  static constexpr int kWeights = kN * kBoxRow;  // of one step
  static constexpr int kBarriers = kTurns * kResults;
  static constexpr int kKept = kBarriers + kBarrierBytes;  // weights, and then stages
};

#if defined(GDFAST_HOPPER)

struct Tile {
  int n, h, w, channel;  // the first of each
};

template <int kN>
GDFAST_DEVICE Tile tile_at(const HopperArguments& a, int index) {
  const Divided channels = divide(index, a.tiles_channels),
                w = divide(channels.quotient, a.tiles_w), h = divide(w.quotient, a.tiles_h);
  return {h.quotient * a.box_n, h.rest * a.box_h, w.rest * a.box_w, channels.rest * kN};
}

// Calls each(index, phase_h, phase_w) for what a block makes, one after the other: of every tile
// all phases, which read the same pixels and write among one another's.
template <typename Each>
GDFAST_DEVICE void for_each_tile(const HopperArguments& a, Each&& each) {
  for (int index = static_cast<int>(blockIdx.x); index < a.tiles;
       index += static_cast<int>(gridDim.x)) {
    for (int h = 0; h < a.rows.out_phases; ++h) {
      for (int w = 0; w < a.columns.out_phases; ++w) each(index, h, w);
    }
  }
}

// A place in the ring. Both sides count from the block's first step; a barrier's phase is over once
// per turn of the ring.
struct Stage {
  int index, parity;
};

GDFAST_DEVICE void advance(Stage& stage, int stages) {
  if (++stage.index == stages) stage = {0, stage.parity ^ 1};
}

GDFAST_DEVICE void advance(Stage& stage, int stages, int steps) {
  const int index = stage.index + steps, turns = index / stages;
  stage = {index - turns * stages, stage.parity ^ (turns & 1)};
}

template <typename Tile>
struct Ring {
  using Its = Tile;

  GDFAST_DEVICE unsigned char* pixels(const HopperArguments& a, const Stage& stage) {
    return shared_memory() + Its::kKept + a.kept_steps * Its::kWeights +
           stage.index * a.stage_bytes;
  }
  GDFAST_DEVICE unsigned char* weights(const HopperArguments& a, const Stage& stage, int step) {
    if (a.kept_steps == 0) return pixels(a, stage) + Its::kPixelBytes;
    return shared_memory() + Its::kKept + step * Its::kWeights;
  }

  GDFAST_DEVICE uint64_t* barrier(int index) {
    return reinterpret_cast<uint64_t*>(shared_memory() + Its::kBarriers) + index;
  }
  GDFAST_DEVICE uint64_t* full(const Stage& stage) { return barrier(stage.index); }
  GDFAST_DEVICE uint64_t* empty(const Stage& stage) { return barrier(kMostStages + stage.index); }
  // Says that a consumer may begin its next tile.
  GDFAST_DEVICE uint64_t* turn(int consumer) { return barrier(2 * kMostStages + consumer); }

  GDFAST_DEVICE void init_barriers() {
    for (int stage = 0; stage < kMostStages; ++stage) {
      barrier_init(full({stage, 0}), 1);
      barrier_init(empty({stage, 0}), 4 * Its::kSharers);  // warps
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) barrier_init(turn(consumer), 4);
    barriers_ready();
  }
};

#endif

}  // namespace
}  // namespace gdfast::cuda
