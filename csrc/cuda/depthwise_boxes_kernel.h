// The kernel of depthwise_boxes.cu.
#pragma once

#include "depthwise_boxes_ring.h"

namespace gdfast::cuda {
namespace {

using BoxesRing = BoxesMemory<kBoxSize, kBoxChannels, kBoxStages, kBoxWarps>;
static_assert(kBoxChannels * kBoxSize * kBoxSize * 2 <= kMadeRows * kMadeBytes, "filters fit");

// kEnding: with a bias or an activation.
template <typename T, bool kEnding>
GDFAST_KERNEL(kBoxThreads, kBoxBlocks)
depthwise_boxes_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                       const GDFAST_GRID_CONSTANT BoxesArguments boxes,
                       const GDFAST_GRID_CONSTANT Tensors<T> tensors) {
#if defined(GDFAST_HOPPER)
  using Memory = BoxesRing;
  constexpr int kGroups = kBoxGroups, kTiles = kBoxTiles;
  using Filters = Diagonals<T, kBoxSize, kGroups>;
  if (threadIdx.x == 0) Memory::init_barriers(kBoxWarps);
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warp = shuffle(warp_index(), 0) - kBoxLoaders / kWarp;
  if (warp < 0) return Memory::move_rows(a, boxes, warp);
  take_registers<kWorkerRegisters>();
  const auto sync = [] { sync_threads_of(1, kBoxWorkers); };
  const int thread = static_cast<int>(threadIdx.x) - kBoxLoaders;
  const int first_channel = Memory::channel(boxes);
  auto* const filters = reinterpret_cast<T*>(Memory::made_row(boxes, 0));
  Filters::template share<kBoxChannels, kBoxWorkers>(a, tensors.weight, first_channel, filters,
                                                     thread);
  sync();
  // The channels of this warp.
  const int plane = warp * kGroups, quarter = warp_lane() % 4;
  const bool exists = first_channel + plane * 8 < a.C;
  Filters diagonals;
  Filters::take(diagonals, filters + plane * 8 * kBoxSize * kBoxSize);
  float bias[kGroups * 2] = {};  // of the channels that this lane has of a matrix's columns
  if (kEnding && tensors.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kGroups * 2; ++i) {
      const int k = first_channel + (plane + i / 2) * 8 + quarter * 2 + i % 2;
      if (k < a.K) bias[i] = to_float(tensors.bias[k]);
    }
  }
  sync();

  // Where this lane loads matrices: two columns of the filter at a time, of one group of channels,
  // or the last column of two. The next group's chunk has a place that differs by a bit; the next
  // tile is so many slots on, a multiple of eight.
  static_assert(kGroups == 2, "groups are two chunks side by side");
  const bool alone = boxes.images > 1;  // a tile has an image of its own
  const int next = (alone ? boxes.pitch : kTilePositions) * kBoxRow;
  const int matrix = warp_lane() / 8, slot = matrix % 2 * 8 + warp_lane() % 8;
  const auto chunk_at = [&](int chunk, int at) { return at * kBoxRow + (chunk ^ at % 8) * 16; };
  int load_at[kBoxSize / 2 + 1];
#pragma unroll
  for (int i = 0; i <= kBoxSize / 2; ++i) {
    load_at[i] = i == kBoxSize / 2 ? chunk_at(plane + matrix / 2, slot + 2 * i)
                                   : chunk_at(plane, slot + matrix / 2 + 2 * i);
  }
  // And where it puts sums: of two positions of each tile, if there are outputs of these.
  int sums_at[kTiles][2];
#pragma unroll
  for (int i = 0; i < kTiles * 2; ++i) {
    const int place = warp_lane() / 4 + i % 2 * 8, tile = i / 2;
    const int column = alone ? place : tile * kTilePositions + place;
    const int row = alone ? tile * boxes.strip + place : column;
    sums_at[tile][i % 2] = column < boxes.strip ? chunk_at(plane, row) + quarter * 4 : -1;
  }

  float zero = 0;  // unless a sum was not finite
  RingPlace<kBoxStages> stage;
  RingPlace<kMadeRows> row;
  for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
    const int h = piece.p - a.pad_h, steps = piece.rows + kBoxSize - 1;
    Sums<kGroups> alive[kTiles][kBoxSize] = {};
    LastColumn<kGroups> before[kTiles] = {};
    const auto multiply = [&](int step, int u) {
      const bool inside = exists && static_cast<unsigned>(h + step) < static_cast<unsigned>(a.H);
      const unsigned char* const pixels = Memory::stage(boxes, stage.index);
      barrier_wait(Memory::full(stage.index), stage.parity);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (float& sum : alive[i][u]) sum = 0;
        multiply_row<T, kBoxSize>(alive[i], u, before[i], diagonals, inside, [&](int group, int s) {
          return pixels + (load_at[s / 2] ^ group * 16) + i * next;
        });
      }
      sync_warp();
      if (warp_lane() == 0) barrier_arrive(Memory::empty(stage.index));
      RingPlace<kBoxStages>::advance(stage);
    };
    const auto finish = [&](int tile, Sums<kGroups>& sums) {
#pragma unroll
      for (float sum : sums) zero += sum * 0;
      if constexpr (kEnding) {
#pragma unroll
        for (int i = 0; i < kGroups * 4; ++i) sums[i] += bias[i / 4 * 2 + i % 2];
        activate(sums, a.activation, static_cast<float>(a.negative_slope));
      }
      unsigned char* const to = Memory::made_row(boxes, row.index);
#pragma unroll
      for (int i = 0; i < kGroups * 2; ++i) {
        const int at = sums_at[tile][i % 2];
        auto* const word = reinterpret_cast<PackOf<T, 2>*>(to + (at ^ i / 2 * 16));
        if (at >= 0) *word = {{pack_two<T>(sums[2 * i], sums[2 * i + 1])}};
      }
    };
    // Around what is put into a row of outputs.
    const auto begin_row = [&] { barrier_wait(Memory::written(row.index), row.parity ^ 1); };
    const auto end_row = [&] {
      if (!boxes.storer_fences) stores_ready();
      sync_warp();
      if (warp_lane() == 0) barrier_arrive(Memory::made(row.index));
      RingPlace<kMadeRows>::advance(row);
    };
#pragma unroll 1
    for (int step = 0; step < steps; step += kBoxSize) {
      if constexpr (kEnding) {
        // Activations are long: they are there once.
#pragma unroll 1
        for (int u = 0; u < kBoxSize && step + u < steps; ++u) {
          Sums<kGroups> sums[kTiles];
#pragma unroll
          for (int v = 0; v < kBoxSize; ++v) {
            if (u != v) continue;
            multiply(step + v, v);
#pragma unroll
            for (int i = 0; i < kTiles * kGroups * 4; ++i) {
              sums[i / (kGroups * 4)][i % (kGroups * 4)] =
                  alive[i / (kGroups * 4)][(v + 1) % kBoxSize][i % (kGroups * 4)];
            }
          }
          if (step + u < kBoxSize - 1) continue;
          begin_row();
#pragma unroll
          for (int i = 0; i < kTiles; ++i) finish(i, sums[i]);
          end_row();
        }
      } else {
#pragma unroll
        for (int u = 0; u < kBoxSize; ++u) {
          if (step + u >= steps) break;
          multiply(step + u, u);
          if (step + u < kBoxSize - 1) continue;
          begin_row();
#pragma unroll
          for (int i = 0; i < kTiles; ++i) finish(i, alive[i][(u + 1) % kBoxSize]);
          end_row();
        }
      }
    }
  });
  sync();
  const float all =
      sum_of_warps(zero, reinterpret_cast<float*>(Memory::stage(boxes, 0)), warp, kBoxWarps, sync);
  if (all != 0) Memory::mend_pieces(a, boxes, tensors, thread);
#endif
}

}  // namespace
}  // namespace gdfast::cuda
