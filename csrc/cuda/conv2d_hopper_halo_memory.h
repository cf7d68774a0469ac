// What the kernel of conv2d_hopper_halo.cu is told, and how a block's loaders and its consumers
// share its memory:
//
//   results    of each consumer, which are being written
//   weights    of all steps, where they stay; else a ring, with those of a step each
//   boxes      a ring, each with rows of zeros after it
//   barriers
#pragma once

#include "conv2d_hopper_ending.h"
#include "conv2d_hopper_ring.h"
#include "divisor.h"

namespace gdfast::cuda {
namespace {

constexpr int kMostBoxes = 4, kMostWeights = 8;  // stages

// Taps along one axis: the positions, in rows or columns, from a tile's first to what the first
// tap reads, and from one tap to the next.
struct HaloTaps {
  int count, shift, step;
};

// Where moments of the output go, if anywhere, and which positions of a tile are pixels of it.
struct HaloMoments {
  float* parts;    // [parts, 3, channels] as in moments.h, or null
  bool of_blocks;  // a part has all that a consumer sees: a block's tiles have the same channels
  int n, h, w;     // of the output
  Divisor pitch, image_h;  // positions from row to row, and rows from image to image
};

struct HaloArguments {
  TensorMap image, output, weight;
  HaloTaps rows, columns;
  const void* bias;
  int channels;  // of the output
  Divisor tiles_h, tiles_channels;
  int tiles;
  int tile_n, tile_h;                         // a tile's images and rows
  int sums;                                   // in units of kChannels
  int box_h, box_w;                           // where boxes begin: from the tile's rows, columns
  int pitch;                                  // positions from row to row
  int box_bytes, stage_bytes;                 // of a box; with the zeros after it
  int result_bytes;                           // of a consumer
  int weights_at, boxes_at, barriers_at;      // in shared memory
  int box_stages, weight_stages, kept_steps;  // steps whose weights stay: all, or none
  Ending ending;
  bool zero_below;
  float below, most;
  HaloMoments moments;
};

#if defined(GDFAST_HOPPER)

// The positions of a tile are the columns of its products, and channels their rows. Two consumers
// share the box of a tile of 128 channels, and take tiles of 64 in turn.
template <int kSharers>
struct HaloMemory {
  static constexpr int kMade = 64 * kSharers;
  static constexpr int kWeights = kMade * kBoxRow;  // of a step
  static constexpr int kTurns = kConsumers / kSharers;

  GDFAST_DEVICE unsigned char* box(const HaloArguments& a, const Stage& stage) {
    return shared_memory() + a.boxes_at + stage.index * a.stage_bytes;
  }
  GDFAST_DEVICE unsigned char* weights(const HaloArguments& a, int index) {
    return shared_memory() + a.weights_at + index * kWeights;
  }
  GDFAST_DEVICE uint64_t* barrier(const HaloArguments& a, int index) {
    return reinterpret_cast<uint64_t*>(shared_memory() + a.barriers_at) + index;
  }
  GDFAST_DEVICE uint64_t* box_full(const HaloArguments& a, const Stage& stage) {
    return barrier(a, stage.index);
  }
  GDFAST_DEVICE uint64_t* box_empty(const HaloArguments& a, const Stage& stage) {
    return barrier(a, kMostBoxes + stage.index);
  }
  GDFAST_DEVICE uint64_t* weights_full(const HaloArguments& a, const Stage& stage) {
    return barrier(a, 2 * kMostBoxes + stage.index);
  }
  GDFAST_DEVICE uint64_t* weights_empty(const HaloArguments& a, const Stage& stage) {
    return barrier(a, 2 * kMostBoxes + kMostWeights + stage.index);
  }
  // Says that a consumer may begin its next tile.
  GDFAST_DEVICE uint64_t* turn(const HaloArguments& a, int consumer) {
    return barrier(a, 2 * kMostBoxes + 2 * kMostWeights + consumer);
  }

  GDFAST_DEVICE void init_barriers(const HaloArguments& a) {
    for (int stage = 0; stage < kMostBoxes; ++stage) {
      barrier_init(box_full(a, {stage, 0}), 1);
      barrier_init(box_empty(a, {stage, 0}), 4 * kSharers);  // warps
    }
    for (int stage = 0; stage < kMostWeights; ++stage) {
      barrier_init(weights_full(a, {stage, 0}), 1);
      barrier_init(weights_empty(a, {stage, 0}), 4 * kSharers);
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) barrier_init(turn(a, consumer), 4);
    barriers_ready();
  }

  // The padding after a box's last row, and what positions read that are not written.
  GDFAST_DEVICE void zero_after_boxes(const HaloArguments& a) {
    for (int stage = 0; stage < a.box_stages; ++stage) {
      unsigned char* const to = box(a, {stage, 0});
      for (int at = a.box_bytes + 16 * static_cast<int>(threadIdx.x); at < a.stage_bytes;
           at += 16 * kThreads) {
        store_16(to + at, Pack16{});
      }
    }
    stores_ready();
  }
};
static_assert((2 * (kMostBoxes + kMostWeights) + kConsumers) * sizeof(uint64_t) <= kBarrierBytes,
              "one for each");

struct HaloPlace {
  int n, h, channel;  // the first of each
};

template <int kMade>
GDFAST_DEVICE HaloPlace halo_place(const HaloArguments& a, int index) {
  const Divided channels = divide(index, a.tiles_channels),
                h = divide(channels.quotient, a.tiles_h);
  return {h.quotient * a.tile_n, h.rest * a.tile_h, channels.rest * kMade};
}

template <typename Each>
GDFAST_DEVICE void for_each_halo_tile(const HaloArguments& a, Each&& each) {
  for (int index = static_cast<int>(blockIdx.x); index < a.tiles;
       index += static_cast<int>(gridDim.x)) {
    each(index);
  }
}

#endif

}  // namespace
}  // namespace gdfast::cuda
