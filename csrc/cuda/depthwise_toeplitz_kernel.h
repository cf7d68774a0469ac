// The kernel of depthwise_toeplitz.cu.
#pragma once

#include "depthwise_boxes_ring.h"
#include "depthwise_toeplitz.h"

namespace gdfast::cuda {
namespace {

template <int kSize>
using ToeplitzRing = BoxesMemory<kSize, kToeplitzChannels, kToeplitzStages, kToeplitzWarps>;
static_assert(kToeplitzChannels * 7 * 7 * 2 <= kMadeRows * 1024, "filters fit");

// The right operands of matrix instructions: rows of filters as bands. Along the sum a lane with
// quarter t has pixels t and t + 4, t + 8 and t + 12 of a tile; column 2 i is of output i, column
// 2 i + 1 of output i + 4.
template <int kSize>
struct Bands {
  uint32_t rows[kWarpChannels][kSize][2];

  // Of filters that lie in shared memory as [channel][tap], from the warp's first one on.
  template <typename T>
  GDFAST_DEVICE void take(Bands& bands, const T* filters) {
    const int column = warp_lane() / 4, first = warp_lane() % 4 - column / 2 - column % 2 * 4;
    const auto* const bits = reinterpret_cast<const uint16_t*>(filters);
#pragma unroll
    for (int i = 0; i < kWarpChannels * kSize; ++i) {
      const auto number = [&](int tap) -> uint32_t {
        return tap >= 0 && tap < kSize ? bits[i * kSize + tap] : 0;
      };
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        bands.rows[i / kSize][i % kSize][half] =
            number(first + half * 8) | number(first + half * 8 + 4) << 16;
      }
    }
  }
};

// In steps that do not all wait for one another.
GDFAST_DEVICE float sum_of(const float (&sums)[kWarpChannels][4]) {
  float all = 0;
#pragma unroll
  for (const float (&of_channel)[4] : sums) {
    all += (of_channel[0] + of_channel[1]) + (of_channel[2] + of_channel[3]);
  }
  return all;
}

// kEnding: with a bias or an activation.
template <typename T, int kSize, bool kEnding>
GDFAST_KERNEL(kToeplitzThreads, 1)
depthwise_toeplitz_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                          const GDFAST_GRID_CONSTANT BoxesArguments boxes,
                          const GDFAST_GRID_CONSTANT Tensors<T> tensors) {
#if defined(GDFAST_HOPPER)
  using Memory = ToeplitzRing<kSize>;
  using Sum = float[4];
  constexpr int kChannels = kWarpChannels;
  const int first_channel = Memory::channel(boxes);
  if (threadIdx.x == 0) {
    const int warps = (a.C - first_channel + kChannels - 1) / kChannels;
    Memory::init_barriers(warps < kToeplitzWarps ? warps : kToeplitzWarps);
  }
  clear_behind(boxes, Memory::stage(boxes, 0), kToeplitzStages, 0, kToeplitzThreads);
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warp = shuffle(warp_index(), 0) - kBoxLoaders / kWarp;
  if (warp < 0) return Memory::move_rows(a, boxes, warp);
  take_registers<kToeplitzWorkerRegisters>();
  const auto sync = [] { sync_threads_of(1, kToeplitzWorkers); };
  const int thread = static_cast<int>(threadIdx.x) - kBoxLoaders;
  const int channel = warp * kChannels;
  auto* const filters = reinterpret_cast<T*>(Memory::made_row(boxes, 0));
  Diagonals<T, kSize, 1>::template share<kToeplitzChannels, kToeplitzWorkers>(
      a, tensors.weight, first_channel, filters, thread);
  sync();
  const bool exists = first_channel + channel < a.C;
  Bands<kSize> bands;
  Bands<kSize>::take(bands, filters + channel * kSize * kSize);
  float bias[kChannels] = {};
  if (kEnding && tensors.bias != nullptr && exists) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      bias[c] = to_float(tensors.bias[first_channel + channel + c]);
    }
  }
  sync();

  // Where this lane loads a pixel of each of its two tiles: eight slots on, chunks have changed
  // places alike. And where it puts sums.
  int load_at[2], sums_at[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const ToeplitzTile tile = ToeplitzTile::at(boxes, warp_lane() / 4 + i * 8);
    const int first = tile.column + warp_lane() % 4;
    load_at[i] = channels_of_slot(tile.image * boxes.pitch + first, channel);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = first + j * 4;
      sums_at[i][j] = tile.exists && column < boxes.strip
                          ? channels_of_slot(tile.image * boxes.strip + column, channel)
                          : -1;
    }
  }

  float zero = 0;  // unless a sum was not finite
  typename Memory::Stage stage;
  typename Memory::Row row;
  PackOf<T, 4> packs[2][4];
  const auto load = [&](bool there) {
    if (there) barrier_wait(Memory::full(stage.index), stage.parity);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int first = stage.index * boxes.stage + load_at[i / 4];
      const int at = i % 2 == 0 ? first : four_slots_on(first);
      packs[i / 4][i % 4] = load_pack<4>(
          reinterpret_cast<const T*>(Memory::stage(boxes, 0) + at + i % 4 / 2 * 8 * kHalfBoxRow));
    }
  };
  int pieces = pieces_of_block(boxes);
  const auto make = [&](const BoxesPiece& piece) {
    const int h = piece.p - a.pad_h, steps = piece.rows + kSize - 1;
    const bool last = --pieces == 0;
    Sum alive[kSize][kChannels] = {};
    // A row of pixels, for the output that sees it first and those that have begun. The next row is
    // loaded before the products are begun, unless an ending needs the registers; the first of
    // these are of the output that sees no more.
    const auto multiply = [&](int step, int u) {
      if (kEnding) load(true);
      uint32_t left[kChannels][4];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) left_operand(left[c], packs, c);
      sync_warp();
      if (warp_lane() == 0) barrier_arrive(Memory::empty(stage.index));
      Memory::Stage::advance(stage);
      if (!kEnding) load(!last || step + 1 < steps);
      const bool inside = static_cast<unsigned>(h + step) < static_cast<unsigned>(a.H);
      if (!inside) {
        // Zeros that the compiler knows are written to registers before it asks, for both ways.
        float none = 0;
        opaque(none);
#pragma unroll
        for (int i = 0; i < kChannels * 4; ++i) alive[u][i / 4][i % 4] = none;
        return;
      }
#pragma unroll
      for (int i = 0; i < kChannels * 4; ++i) alive[u][i / 4][i % 4] = 0;
#pragma unroll
      for (int r = kSize - 1; r >= 0; --r) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          mma_m16n8k16<T>(alive[(u - r + kSize) % kSize][c], left[c], bands.rows[c][r]);
        }
      }
    };
    // The output that sees a row last.
    const auto finish = [&](const Sum(&sums)[kChannels]) {
      zero += sum_of(sums) * 0;
      barrier_wait(Memory::written(row.index), row.parity ^ 1);
      unsigned char* const to = Memory::made_row(boxes, row.index);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float values[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) values[c] = sums[c][i];
        if constexpr (kEnding) {
#pragma unroll
          for (int c = 0; c < kChannels; ++c) values[c] += bias[c];
          activate(values, a.activation, static_cast<float>(a.negative_slope));
        }
        const int at = sums_at[i / 2][i % 2];
        if (at >= 0) store_values<kChannels>(reinterpret_cast<T*>(to + at), values);
      }
      sync_warp();
      if (warp_lane() == 0) barrier_arrive(Memory::made(row.index));
      Memory::Row::advance(row);
    };
#pragma unroll 1
    for (int step = 0; step < steps; step += kSize) {
      if constexpr (kEnding) {
        // Activations are long: they are there once.
#pragma unroll 1
        for (int u = 0; u < kSize && step + u < steps; ++u) {
          Sum sums[kChannels];
#pragma unroll
          for (int v = 0; v < kSize; ++v) {
            if (u != v) continue;
            multiply(step + v, v);
#pragma unroll
            for (int i = 0; i < kChannels * 4; ++i) {
              sums[i / 4][i % 4] = alive[(v + 1) % kSize][i / 4][i % 4];
            }
          }
          if (step + u >= kSize - 1) finish(sums);
        }
      } else {
#pragma unroll
        for (int u = 0; u < kSize; ++u) {
          if (step + u >= steps) break;
          multiply(step + u, u);
          if (step + u >= kSize - 1) finish(alive[(u + 1) % kSize]);
        }
      }
    }
  };
  if (exists) {
    if (!kEnding) load(true);
    for_each_box_piece(a, boxes, make);
  }
  sync();
  const float all = sum_of_warps(zero, reinterpret_cast<float*>(Memory::stage(boxes, 0)), warp,
                                 kToeplitzWarps, sync);
  if (all != 0) Memory::mend_pieces(a, boxes, tensors, thread);
#endif
}

}  // namespace
}  // namespace gdfast::cuda
