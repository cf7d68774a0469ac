// The kernel of conv2d_hopper.cu: a block's loader and its consumers.
#pragma once

#include "conv2d_hopper_moments.h"
#include "conv2d_hopper_ring.h"

namespace gdfast::cuda {
namespace {

#if defined(GDFAST_HOPPER)

// A step's weights, of kN channels that are made by kChannels that are summed.
template <int kN, bool kGradient>
GDFAST_DEVICE void load_weights(const HopperArguments& a, unsigned char* to, int channel, int sum,
                                int r, int s, uint64_t* full) {
  if constexpr (kGradient) {
#pragma unroll 1
    for (int part = 0; part < kN / kChannels; ++part) {
      load_box(to + part * kChannels * kBoxRow, a.weight,
               {channel + part * kChannels, s, r, sum * kChannels}, full);
    }
  } else {
    load_box(to, a.weight, {sum * kChannels, s, r, channel}, full);
  }
}

template <int kPixels, int kN, bool kGradient>
GDFAST_DEVICE void load_tiles(const HopperArguments& a) {
  using Its = HopperTile<kPixels, kN>;
  static_assert(kMostPhases == 2, "so that a shift divides by the phases, towards minus infinity");
  const int shift_h = a.rows.in_phases - 1, shift_w = a.columns.in_phases - 1;
  // A box always counts in full, also where it reaches beyond its tensor.
  const int pixel_bytes = a.box_n * a.box_h * a.box_w * kBoxRow;
  Stage stage{0, 0};
  for_each_tile(a, [&](int index, int phase_h, int phase_w) {
    const HopperTaps &rows = a.rows.taps[phase_h], &columns = a.columns.taps[phase_w];
    const Tile tile = tile_at<kN>(a, index);
    // Weights that stay come with a block's first tile.
    const bool with_weights = a.kept_steps == 0 || index == static_cast<int>(blockIdx.x);
    const int bytes = pixel_bytes + (with_weights ? Its::kWeights : 0);
    int step = 0;
    for (int i = 0; i < rows.count; ++i) {
      const int at_h = rows.at + i * rows.at_step, h = at_h >> shift_h;
      for (int j = 0; j < columns.count; ++j) {
        const int at_w = columns.at + j * columns.at_step, w = at_w >> shift_w;
        const TensorMap& image = a.images[at_h - h * (1 << shift_h)][at_w - w * (1 << shift_w)];
#pragma unroll 1
        for (int sum = 0; sum < a.sums; ++sum, ++step, advance(stage, a.stages)) {
          uint64_t* const full = Ring<Its>::full(stage);
          // In the first turn nobody has to leave a stage: the phase before the first is over.
          barrier_wait(Ring<Its>::empty(stage), stage.parity ^ 1);
          barrier_arrive_expecting(full, bytes);
          load_box(Ring<Its>::pixels(a, stage), image,
                   {sum * kChannels, tile.w + w, tile.h + h, tile.n}, full);
          if (with_weights) {
            load_weights<kN, kGradient>(a, Ring<Its>::weights(a, stage, step), tile.channel, sum,
                                        rows.tap + i * rows.tap_step,
                                        columns.tap + j * columns.tap_step, full);
          }
        }
      }
    }
  });
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

// Leaves a warp's 16 rows of one product in the boxes of a tile's results, 64 channels each. Of
// each row four lanes have 16 bytes: no two of a warp's meet in a bank.
template <typename T, int kPixels, int kN, Ending kEnding>
GDFAST_DEVICE void keep_rows(const HopperArguments& a, const float (&sums)[kN / 2], int channel,
                             unsigned char* results, int first_row) {
  const int lane = computed_again(warp_lane()), row_of_8 = lane / 4;
  unsigned char* const to = results + (first_row + row_of_8) * kBoxRow + lane % 4 * 4;
#pragma unroll
  for (int chunk = 0; chunk < kN / 8; ++chunk) {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = kEnding == Ending::kZero ? 0 : sums[4 * chunk + i];
    if constexpr (kEnding == Ending::kLines || kEnding == Ending::kSilu) {
      const int at = channel + 8 * chunk + lane % 4 * 2;
      float bias[2] = {0, 0};
      if (a.bias != nullptr && at < a.channels) {  // which come in eights
        const T* const from = static_cast<const T*>(a.bias) + at;
        bias[0] = to_float(from[0]), bias[1] = to_float(from[1]);
      }
      finish<kEnding>(a, values, bias);
    }
    unsigned char* const place = to + chunk / 8 * kPixels * kBoxRow + (chunk % 8 ^ row_of_8) * 16;
    *reinterpret_cast<uint32_t*>(place) = pack_two<T>(values[0], values[1]);
    *reinterpret_cast<uint32_t*>(place + 8 * kBoxRow) = pack_two<T>(values[2], values[3]);
  }
}

// Writes a tile from the sums of those who share it. The unit goes on writing while they multiply
// the next one: memory is theirs again when it has been read.
template <typename T, int kPixels, int kN, bool kGradient, int kProducts>
GDFAST_DEVICE void write_tile(const HopperArguments& a, const TensorMap& output, int index,
                              const float (&sums)[kProducts][kN / 2], int consumer, bool zero) {
  using Its = HopperTile<kPixels, kN>;
  const int turn = consumer / Its::kSharers;
  unsigned char* const results = shared_memory() + turn * Its::kResults;
  const bool starts = consumer % Its::kSharers == 0 && threadIdx.x % kWarpgroup == 0;
  const auto meet = [turn] { sync_threads_of(1 + turn, Its::kSharers * kWarpgroup); };
  const Tile tile = tile_at<kN>(a, index);
  const int first_row = consumer % Its::kSharers * kProducts * 64 + warp_index() % 4 * kWarpRows;
  if (starts) stores_wait_read<0>();
  meet();
  const auto keep = [&](auto ending) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      keep_rows<T, kPixels, kN, decltype(ending)::value>(a, sums[product], tile.channel, results,
                                                         first_row + 64 * product);
    }
  };
  // Asked once for all: in most layers there is nothing to finish.
  if constexpr (kGradient) {
    if (zero) {  // pixels that no window meets
      keep(std::integral_constant<Ending, Ending::kZero>{});
    } else {
      keep(std::integral_constant<Ending, Ending::kNone>{});
    }
  } else if (a.ending == Ending::kNone) {
    keep(std::integral_constant<Ending, Ending::kNone>{});
  } else if (a.ending == Ending::kLines) {
    keep(std::integral_constant<Ending, Ending::kLines>{});
  } else {
    keep(std::integral_constant<Ending, Ending::kSilu>{});
  }
  stores_ready();
  meet();
  if (!starts) return;
  for (int part = 0; part < Its::kParts; ++part) {
    const int channel = tile.channel + part * kChannels;
    if (channel < a.channels) {
      store_box(output, {channel, tile.w, tile.h, tile.n}, results + part * Its::kPixelBytes);
    }
  }
  stores_commit();
}

template <typename T, int kPixels, int kN, bool kGradient>
GDFAST_DEVICE void multiply_tiles(const HopperArguments& a, int consumer) {
  using Its = HopperTile<kPixels, kN>;
  const auto arrive = [](uint64_t* barrier) {
    if (warp_lane() == 0) barrier_arrive(barrier);
  };
  const int first_row = consumer % Its::kSharers * Its::kProducts * 64;
  const int mine = consumer / Its::kSharers;
  int turn = mine ^ 1;  // who begins has not to wait in the first tile
  int number = 0;
  Stage stage{0, 0};
  float sums[Its::kProducts][kN / 2];
  // Those who take turns have time for a tile's moments while the others multiply. Those who share
  // tiles take them when the first products of the next one are under way.
  const bool with_moments = !kGradient && a.moments.parts != nullptr;
  int written = 0, written_last = 0;
  RunningMoments moments{};
  const auto take = [&] {
    if (with_moments && written > 0) {
      take_moments<T, Its>(a, written_last, consumer, written == 1, moments);
    }
  };
  for_each_tile(a, [&](int index, int phase_h, int phase_w) {
    const int steps = a.rows.taps[phase_h].count * a.columns.taps[phase_w].count * a.sums;
    if (Its::kTurns > 1 && (number++ & 1) != mine) return advance(stage, a.stages, steps);
    // Parities tell one turn of the ring from the next, not from the one after that: stages are
    // waited for in their order, by one consumer after the other.
    if constexpr (Its::kTurns > 1) barrier_wait(Ring<Its>::turn(consumer), turn);
    turn ^= 1;
    Stage before = stage;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(Ring<Its>::full(stage), stage.parity);
      multiply_stage<T, kN, kGradient>(sums, Ring<Its>::pixels(a, stage) + first_row * kBoxRow,
                                       Ring<Its>::weights(a, stage, step), step > 0);
      if (Its::kTurns == 1 && step == (steps > 1 ? 1 : 0)) take();
      // The products of the stage before are over when only these are under way.
      warpgroup_wait<1>();
      if (step > 0) arrive(Ring<Its>::empty(before));
      before = stage;
      advance(stage, a.stages);
    }
    if constexpr (Its::kTurns > 1) arrive(Ring<Its>::turn(consumer ^ 1));
    warpgroup_wait<0>();
#pragma unroll
    for (auto& product : sums) warpgroup_take(product);
    if (steps > 0) arrive(Ring<Its>::empty(before));
    write_tile<T, kPixels, kN, kGradient>(a, a.outputs[phase_h][phase_w], index, sums, consumer,
                                          steps == 0);
    ++written, written_last = index;
    if constexpr (Its::kTurns > 1) take();
  });
  if constexpr (Its::kTurns == 1) take();
  if (with_moments && a.moments.of_blocks) write_block_moments<Its>(a, consumer, moments);
  stores_wait<0>();
}

#endif

template <typename T, int kPixels, int kN, bool kGradient>
GDFAST_KERNEL(kThreads, 1)
conv2d_hopper_kernel(GDFAST_GRID_CONSTANT const HopperArguments a) {
#if defined(GDFAST_HOPPER)
  using Its = HopperTile<kPixels, kN>;
  if (threadIdx.x == 0) Ring<Its>::init_barriers();
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warpgroup = shuffle(warp_index() / 4, 0);
  if (warpgroup == 0) {
    give_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) load_tiles<kPixels, kN, kGradient>(a);
  } else {
    take_registers<kConsumerRegisters>();
    multiply_tiles<T, kPixels, kN, kGradient>(a, warpgroup - 1);
  }
#endif
}

}  // namespace
}  // namespace gdfast::cuda
