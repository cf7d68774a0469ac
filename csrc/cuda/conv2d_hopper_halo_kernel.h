// The kernel of conv2d_hopper_halo.cu: a block's loaders and its consumers.
#pragma once

#include "conv2d_hopper_halo_memory.h"
#include "conv2d_hopper_halo_moments.h"

namespace gdfast::cuda {
namespace {

#if defined(GDFAST_HOPPER)

template <int kSharers>
GDFAST_DEVICE void load_boxes(const HaloArguments& a) {
  using Memory = HaloMemory<kSharers>;
  Stage stage{0, 0};
  for_each_halo_tile(a, [&](int index) {
    const HaloPlace place = halo_place<Memory::kMade>(a, index);
    for (int sum = 0; sum < a.sums; ++sum, advance(stage, a.box_stages)) {
      uint64_t* const full = Memory::box_full(a, stage);
      // In the first turn nobody has to leave a stage: the phase before the first is over.
      barrier_wait(Memory::box_empty(a, stage), stage.parity ^ 1);
      barrier_arrive_expecting(full, a.box_bytes);
      load_box(Memory::box(a, stage), a.image,
               {sum * kChannels, a.box_w, place.h + a.box_h, place.n}, full);
    }
  });
}

// Of kMade channels by kChannels that are summed, for each step in the order of consumers.
template <int kSharers, bool kGradient>
GDFAST_DEVICE void load_step_weights(const HaloArguments& a) {
  using Memory = HaloMemory<kSharers>;
  Stage stage{0, 0};
  for_each_halo_tile(a, [&](int index) {
    if (a.kept_steps > 0) {
      if (index != static_cast<int>(blockIdx.x)) return;
      barrier_arrive_expecting(Memory::weights_full(a, stage), a.kept_steps * Memory::kWeights);
    }
    const int channel = halo_place<Memory::kMade>(a, index).channel;
    int step = 0;
    for (int sum = 0; sum < a.sums; ++sum) {
      for (int r = 0; r < a.rows.count; ++r) {
        for (int s = 0; s < a.columns.count; ++s, ++step) {
          uint64_t* const full = Memory::weights_full(a, stage);
          if (a.kept_steps == 0) {
            barrier_wait(Memory::weights_empty(a, stage), stage.parity ^ 1);
            barrier_arrive_expecting(full, Memory::kWeights);
          }
          unsigned char* const to = Memory::weights(a, a.kept_steps > 0 ? step : stage.index);
          if constexpr (kGradient) {
            for (int part = 0; part < kSharers; ++part) {
              load_box(to + part * kChannels * kBoxRow, a.weight,
                       {channel + part * kChannels, s, r, sum * kChannels}, full);
            }
          } else {
            load_box(to, a.weight, {sum * kChannels, s, r, channel}, full);
          }
          if (a.kept_steps == 0) advance(stage, a.weight_stages);
        }
      }
    }
  });
}

template <typename T, int kN, bool kGradient>
GDFAST_DEVICE void multiply_step(float (&sums)[kN / 2], const unsigned char* weights,
                                 const unsigned char* pixels, bool accumulate) {
  constexpr int kStep = 16;  // channels of one instruction
  warpgroup_begin();
#pragma unroll
  for (int k = 0; k < kChannels; k += kStep) {
    const uint64_t a = kGradient ? columns_matrix(weights, k * kBoxRow, kChannels * kBoxRow)
                                 : rows_matrix(weights, 2 * k);
    warpgroup_multiply<T, kN, false, kGradient>(sums, a, rows_matrix(pixels, 2 * k),
                                                accumulate || k > 0);
  }
  warpgroup_commit();
}

// Leaves a warp's 16 channels of all positions in the rows of a box of results, and adds them to
// their moments.
template <typename T, int kN, Ending kEnding, bool kMoments>
GDFAST_DEVICE void keep_channels(const HaloArguments& a, const float (&sums)[kN / 2], int channel,
                                 unsigned char* results, uint64_t pixels, ChannelMoments& moments) {
  const int lane = warp_lane(), warp = warp_index() % 4;
  float bias[2] = {0, 0};
  if constexpr (kEnding != Ending::kNone) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = channel + warp * kWarpRows + lane / 4 + 8 * i;
      if (a.bias != nullptr && at < a.channels)
        bias[i] = to_float(static_cast<const T*>(a.bias)[at]);
    }
  }
  const int row = lane % 8, chunk = 2 * warp + lane / 8 % 2;
  unsigned char* const to = results + row * kBoxRow + (chunk ^ row) * 16;
#pragma unroll
  for (int eight = 0; eight < kN / 8; ++eight) {
    // Two positions of one channel, and of the one eight further on.
    float values[4] = {sums[4 * eight], sums[4 * eight + 2], sums[4 * eight + 1],
                       sums[4 * eight + 3]};
    if constexpr (kEnding != Ending::kNone) finish<kEnding>(a, values, bias);
    const uint32_t words[2] = {pack_two<T>(values[0], values[2]),
                               pack_two<T>(values[1], values[3])};
    stmatrix_x2_transposed(to + eight * 8 * kBoxRow, words[0], words[1]);
    if constexpr (kMoments) {
      if (eight == 0 && moments.count == 0) begin_moments<T>(words, moments);
      add_positions<T>(words, static_cast<uint32_t>(pixels >> 2 * eight) & 3, moments);
    }
  }
}

// Writes a consumer's part of a tile. The unit goes on writing while it multiplies the next one:
// memory is the consumer's again when it has been read.
template <typename T, int kN, int kSharers, bool kGradient>
GDFAST_DEVICE void write_positions(const HaloArguments& a, int index, const float (&sums)[kN / 2],
                                   int consumer, uint64_t pixels, ChannelMoments& moments) {
  const bool with_moments = !kGradient && a.moments.parts != nullptr;
  unsigned char* const results = shared_memory() + consumer * a.result_bytes;
  const bool starts = threadIdx.x % kWarpgroup == 0;
  const auto meet = [consumer] { sync_threads_of(1 + consumer, kWarpgroup); };
  const HaloPlace place = halo_place<HaloMemory<kSharers>::kMade>(a, index);
  const int channel = place.channel + consumer % kSharers * kChannels;
  if (starts) stores_wait_read<0>();
  meet();
  const auto keep = [&](auto ending, auto with_moments) {
    constexpr bool kMoments = decltype(with_moments)::value;
    if constexpr (kMoments) pixels = pixels_of_tile(a, place, pixels);
    keep_channels<T, kN, decltype(ending)::value, kMoments>(a, sums, channel, results, pixels,
                                                            moments);
    if constexpr (kMoments) moments.count += count_pixels(a, place);
  };
  using Without = std::false_type;
  if (with_moments) {  // of a bias at most
    using With = std::bool_constant<!kGradient>;
    if (a.ending == Ending::kNone) {
      keep(std::integral_constant<Ending, Ending::kNone>{}, With{});
    } else {
      keep(std::integral_constant<Ending, Ending::kLines>{}, With{});
    }
    if (!a.moments.of_blocks) {
      write_moments(a, divide(index, a.tiles_channels).quotient, channel, moments);
      moments.count = 0;
    }
  } else if (kGradient || a.ending == Ending::kNone) {
    keep(std::integral_constant<Ending, Ending::kNone>{}, Without{});
  } else if (a.ending == Ending::kLines) {
    keep(std::integral_constant<Ending, Ending::kLines>{}, Without{});
  } else {
    keep(std::integral_constant<Ending, Ending::kSilu>{}, Without{});
  }
  stores_ready();
  meet();
  // Positions in the padding lie outside of the output.
  if (!starts || channel >= a.channels) return;
  store_box(a.output, {channel, 0, place.h, place.n}, results);
  stores_commit();
}

template <typename T, int kN, int kSharers, bool kGradient>
GDFAST_DEVICE void multiply_halo_tiles(const HaloArguments& a, int consumer) {
  using Memory = HaloMemory<kSharers>;
  const auto arrive = [](uint64_t* barrier) {
    if (warp_lane() == 0) barrier_arrive(barrier);
  };
  const bool kept = a.kept_steps > 0;
  const int mine = consumer / kSharers, part = consumer % kSharers * kChannels * kBoxRow;
  const int box_steps = a.rows.count * a.columns.count;
  int turn = mine ^ 1;  // who begins has not to wait in the first tile
  int number = 0;
  Stage box{0, 0}, weights{0, 0};
  float sums[kN / 2];
  const bool with_moments = !kGradient && a.moments.parts != nullptr;
  const uint64_t pixels = with_moments ? pixels_of_lane(a, kN) : 0;
  ChannelMoments moments{};
  if (kept) barrier_wait(Memory::weights_full(a, weights), 0);
  for_each_halo_tile(a, [&](int index) {
    if (Memory::kTurns > 1 && (number++ & 1) != mine) {
      advance(box, a.box_stages, a.sums);
      if (!kept) advance(weights, a.weight_stages, a.sums * box_steps);
      return;
    }
    // Parities tell one turn of a ring from the next, not from the one after that: stages are
    // waited for in their order, by one consumer after the other.
    if constexpr (Memory::kTurns > 1) barrier_wait(Memory::turn(a, consumer), turn);
    turn ^= 1;
    Stage box_before = box, weights_before = weights;
    int step = 0;
    for (int sum = 0; sum < a.sums; ++sum) {
      barrier_wait(Memory::box_full(a, box), box.parity);
      for (int r = 0; r < a.rows.count; ++r) {
        for (int s = 0; s < a.columns.count; ++s, ++step) {
          if (!kept) barrier_wait(Memory::weights_full(a, weights), weights.parity);
          const int shift =
              (a.rows.shift + r * a.rows.step) * a.pitch + a.columns.shift + s * a.columns.step;
          multiply_step<T, kN, kGradient>(sums,
                                          Memory::weights(a, kept ? step : weights.index) + part,
                                          Memory::box(a, box) + shift * kBoxRow, step > 0);
          // The products of the step before are over when only these are under way.
          warpgroup_wait<1>();
          if (step > 0) {
            if (!kept) arrive(Memory::weights_empty(a, weights_before));
            if (r + s == 0) arrive(Memory::box_empty(a, box_before));
          }
          weights_before = weights;
          if (!kept) advance(weights, a.weight_stages);
        }
      }
      box_before = box;
      advance(box, a.box_stages);
    }
    if constexpr (Memory::kTurns > 1) arrive(Memory::turn(a, consumer ^ 1));
    warpgroup_wait<0>();
    warpgroup_take(sums);
    if (!kept) arrive(Memory::weights_empty(a, weights_before));
    arrive(Memory::box_empty(a, box_before));
    write_positions<T, kN, kSharers, kGradient>(a, index, sums, consumer, pixels, moments);
  });
  if (with_moments && a.moments.of_blocks) {
    const Divided block = divide(static_cast<int>(blockIdx.x), a.tiles_channels);
    const int channel = block.rest * Memory::kMade + consumer % kSharers * kChannels;
    write_moments(a, block.quotient * Memory::kTurns + mine, channel, moments);
  }
  stores_wait<0>();
}

#endif

template <typename T, int kN, int kSharers, bool kGradient>
GDFAST_KERNEL(kThreads, 1)
conv2d_halo_kernel(GDFAST_GRID_CONSTANT const HaloArguments a) {
#if defined(GDFAST_HOPPER)
  using Memory = HaloMemory<kSharers>;
  if (threadIdx.x == 0) Memory::init_barriers(a);
  Memory::zero_after_boxes(a);
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warp = shuffle(warp_index(), 0);
  if (warp < 4) {
    give_registers<kLoaderRegisters>();
    if (warp_lane() != 0) return;
    if (warp == 0) load_boxes<kSharers>(a);
    if (warp == 1) load_step_weights<kSharers, kGradient>(a);
  } else {
    take_registers<kConsumerRegisters>();
    multiply_halo_tiles<T, kN, kSharers, kGradient>(a, warp / 4 - 1);
  }
#endif
}

}  // namespace
}  // namespace gdfast::cuda
