// The gradients in the weight and the bias in groups of few channels on Hopper (grouped_hopper.h).
// A warp sums 16 filters by 16 channels by nine taps, over the pixels of every second tile of its
// block; what its block's warps have summed is one split. Filters and channels of different groups
// are left out when sums are written, and splits added up as they are for other convolutions.
#include "conv2d.h"
#include "device.h"
#include "grouped_hopper.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";
constexpr int kTaps = 9, kStreams = 2;
constexpr int kConsumers = kStreams * kUnits, kThreads = (kConsumers + 1) * kWarp;
constexpr int kUnitThreads = kUnits * kWarp;

struct GroupedHopperWeightArguments {
  GroupedRing ring;
  TensorMap grad;
  int grad_at, grad_row_bytes, grad_pair_bytes, grad_bytes;  // in a slot
  int K, group;
  float* weight_sums;  // [splits, K, R, S, C / groups]
  float* bias_sums;    // [splits, K], or null
};

// The sums of a warp.
struct WeightSums {
  float weight[kTaps][2][4];
  float bias[2];  // of the filters of two rows, the positions of this lane
};
constexpr int kSums = kTaps * 8 + 2;
using FlatSums = float[kSums];

#if defined(GDFAST_HOPPER)

// The part of the slab's sums that a warp makes; of groups of 32 the block has one.
struct Unit {
  int filter, channel;
  bool sums_bias;
};

GDFAST_DEVICE Unit unit_of(const GroupedHopperWeightArguments& a) {
  const int index = warp_index() % kUnits;
  if (a.group <= kChannelsOfWarp) {
    return {index * kChannelsOfWarp, index * kChannelsOfWarp, a.bias_sums != nullptr};
  }
  const int first = static_cast<int>(blockIdx.z) * a.group;
  return {first + (index >> 1) * kChannelsOfWarp, first + (index & 1) * kChannelsOfWarp,
          a.bias_sums != nullptr && (index & 1) == 0};
}

// Of two filters, the positions that this lane has.
template <typename T>
GDFAST_DEVICE void add_to_bias(WeightSums& sums, const uint32_t (&grads)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float values[2];
    unpack<T, 2>({{grads[i]}}, values);
    sums.bias[i & 1] += values[0] + values[1];
  }
}

// Positions of a tile that exist, and of this lane's pair of columns which, as a mask.
struct Existing {
  int rows;
  uint32_t columns;
};

// Where a lane finds its pixels of a pair of rows, for ldmatrix.
struct PixelPlaces {
  int input[3];  // for each column of a filter
  int grad;
};

// A zero of grad for a position beyond the output does not undo an infinity of the input: where
// some of a tile's do not exist (kSome), there these are zeros too.
template <typename T, typename Band, bool kSome>
GDFAST_DEVICE void sum_tile(WeightSums& sums, const GroupedHopperWeightArguments& a,
                            const PixelPlaces& places, const BandTile& tile,
                            const Existing& existing, bool sums_bias) {
  constexpr int kPairs = Band::kPairs, kStep = Band::kTwins ? 1 : 2;
  const unsigned char* const grad = shared_memory() + tile.slot + a.grad_at +
                                    tile.band * Band::kRows * a.grad_row_bytes +
                                    tile.part * kTileBytes + places.grad;
  const unsigned char* const top = shared_memory() + tile.top;
  uint32_t grads[kPairs][4];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    ldmatrix_x4_transposed(grads[pair], grad + pair * kStep * a.grad_row_bytes);
    if (sums_bias) add_to_bias<T>(sums, grads[pair]);
  }
  const auto load = [&](uint32_t (&pixels)[4], const unsigned char* from) {
    ldmatrix_x4_transposed(pixels, from);
#pragma unroll
    for (uint32_t& word : pixels) word = kSome ? word & existing.columns : word;
  };
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int at = places.input[s];
    if constexpr (Band::kTwins) {
#pragma unroll
      for (int h = 0; h < Band::kRead; ++h) {
        uint32_t pixels[4];
        load(pixels, top + h * a.ring.row_bytes + at);
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          if (h - r < 0 || h - r >= kPairs) continue;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            mma_m16n8k16<T>(sums.weight[r * 3 + s][half], grads[h - r],
                            {pixels[half * 2], pixels[half * 2 + 1]});
          }
        }
      }
    } else {
      uint32_t pixels[Band::kRead][4];
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        load(pixels[pair], top + pair * 2 * a.ring.row_bytes + at);
      }
      load(pixels[kPairs], shared_memory() + tile.bottom + at);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        if (kSome && pair * 2 >= existing.rows) continue;
        const bool second = !kSome || pair * 2 + 1 < existing.rows;
        const uint32_t (&these)[4] = pixels[pair], (&next)[4] = pixels[pair + 1];
        const auto multiply = [&](int r, int half, uint32_t upper, uint32_t lower) {
          mma_m16n8k16<T>(sums.weight[r * 3 + s][half], grads[pair], {upper, second ? lower : 0});
        };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          multiply(0, half, these[half * 2], these[half * 2 + 1]);
          multiply(1, half, these[half * 2 + 1], next[half * 2]);
          multiply(2, half, next[half * 2], next[half * 2 + 1]);
        }
      }
    }
  }
}

// Adds what warps of further streams have summed to the sums of the first one's.
GDFAST_DEVICE void join_streams(WeightSums& sums, int stream) {
  FlatSums& flat = reinterpret_cast<FlatSums&>(sums);
  float* const all =
      reinterpret_cast<float*>(shared_memory() + kRingAt) + this_thread() % kUnitThreads;
  for (int other = 1; other < kStreams; ++other) {
    sync_threads_of(1, kConsumers * kWarp);  // nobody reads what lay here any more
    if (stream == other) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) all[i * kUnitThreads] = flat[i];
    }
    sync_threads_of(1, kConsumers * kWarp);
    if (stream == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) flat[i] += all[i * kUnitThreads];
    }
  }
}

GDFAST_DEVICE void write_sums(const WeightSums& sums, const GroupedHopperWeightArguments& a,
                              const Unit& unit, int32_t first_channel) {
  const int64_t split = blockIdx.x;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int filter = unit.filter + row * 8 + warp_lane() / 4;
    if (first_channel + filter >= a.K) continue;
    const int64_t index = split * a.K + first_channel + filter;
    if (unit.sums_bias && warp_lane() % 4 == 0) a.bias_sums[index] = sums.bias[row];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Two channels side by side are of one group.
      const int channel = unit.channel + half * 8 + warp_lane() % 4 * 2;
      if (channel / a.group != filter / a.group) continue;
      float* const to = a.weight_sums + (index * kTaps * a.group + channel % a.group);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const float (&pair)[4] = sums.weight[tap][half];
        store_values<2>(to + tap * a.group, {pair[row * 2], pair[row * 2 + 1]});
      }
    }
  }
}

template <typename T, typename Band>
GDFAST_DEVICE void sum_tiles(const GroupedHopperWeightArguments& a, int32_t first_channel) {
  const int lane = warp_lane(), matrix = lane / 8, line = lane % 8, stream = warp_index() / kUnits;
  const Unit unit = unit_of(a);
  PixelPlaces places;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    places.input[s] =
        (matrix & 1) * a.ring.pair_bytes + swizzled(line + s, unit.channel / 8 + (matrix >> 1));
  }
  places.grad = (matrix >> 1) * a.grad_pair_bytes + swizzled(line, unit.filter / 8 + (matrix & 1));
  WeightSums sums;
#pragma unroll
  for (float& sum : reinterpret_cast<FlatSums&>(sums)) sum = 0;
  empty_ring(a.ring, stream, kStreams, [&](const BandTile& tile) {
    const int rows = a.ring.P - tile.row, left = a.ring.Q - tile.column;
    if ((Band::kTwins || rows >= Band::kRows) && left >= kSide) {
      sum_tile<T, Band, false>(sums, a, places, tile, {}, unit.sums_bias);
    } else {
      const int of_lane = left - lane % 4 * 2;
      const Existing existing{rows, of_lane > 1 ? ~0u : of_lane == 1 ? 0xffffu : 0u};
      sum_tile<T, Band, true>(sums, a, places, tile, existing, unit.sums_bias);
    }
  });
  join_streams(sums, stream);
  if (stream != 0) return;
  if (unit.sums_bias) {
#pragma unroll
    for (float& sum : sums.bias) {
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
    }
  }
  write_sums(sums, a, unit, first_channel);
}

#endif

template <typename T, bool kTwins>
GDFAST_KERNEL(kThreads, 1)
grouped_hopper_grad_weight_kernel(GDFAST_GRID_CONSTANT const GroupedHopperWeightArguments a) {
#if defined(GDFAST_HOPPER)
  const auto first_channel = static_cast<int32_t>(blockIdx.y) * kSlab;
  if (warp_index() == 0) init_ring(a.ring, kConsumers);
  sync_block();
  if (warp_index() < kConsumers) return sum_tiles<T, BandShape<kTwins>>(a, first_channel);
  if (warp_lane() != 0) return;
  fill_ring(a.ring, [&](const Strip& strip, int row, bool has_band, const Slot& slot) {
    barrier_arrive_expecting(full(slot), a.ring.input_bytes + (has_band ? a.grad_bytes : 0));
    load_input(a.ring, strip, row, first_channel, slot);
    if (!has_band) return;
    load_box(shared_memory() + slot_at(a.ring, slot) + a.grad_at, a.grad,
             {first_channel, strip.column, row, strip.image}, full(slot));
  });
#else
  static_cast<void>(a);
#endif
}

// Blocks for the same pixels: slabs, or of groups of 32 half of them.
int64_t halves_of_slab(const Conv2dProblem& p) { return p.C / p.groups == 32 ? 2 : 1; }

GroupedHopperSplit split_of(const Conv2dProblem& p) {
  const int64_t blocks = ceil_div(p.C, kSlab) * halves_of_slab(p);
  return grouped_hopper_split(p, grouped_hopper_plan(p, true), blocks, multiprocessors(kOp));
}

template <typename T>
void start(const Conv2dProblem& p, const void* grad_output, const void* input, float* weight_sums,
           float* bias_sums, int64_t splits, const Where& where) {
  const GroupedHopperPlan plan = grouped_hopper_plan(p, true);
  GroupedHopperSplit split = split_of(p);
  split.blocks = splits;
  const int64_t row_bytes = plan.columns * kBoxRow, image_bytes = plan.grad_rows * row_bytes;
  const int64_t grad_bytes = plan.images * image_bytes;
  const GroupedRing ring = grouped_ring<T>(kOp, p, plan, input, split, grad_bytes, 0);
  const GroupedHopperWeightArguments a{
      ring,
      channels_first<T>(kOp, grad_output, {p.N, p.K, p.P, p.Q, p.output},
                        {plan.images, plan.grad_rows, plan.columns}),
      ring.input_bytes,
      small(row_bytes),
      small(plan.images > 1 ? image_bytes : row_bytes),
      small(grad_bytes),
      small(p.K),
      small(p.C / p.groups),
      weight_sums,
      bias_sums};
  const int64_t in_ring = int64_t{ring.slots} * ring.slot_bytes;
  constexpr int64_t kJoined = kSums * kUnitThreads * 4;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(ceil_div(p.C, kSlab)),
                  static_cast<unsigned>(halves_of_slab(p)));
  const auto kernel = plan.twins ? grouped_hopper_grad_weight_kernel<T, true>
                                 : grouped_hopper_grad_weight_kernel<T, false>;
  launch(kOp, kernel, grid, kThreads,
         static_cast<size_t>(kRingAt + (in_ring > kJoined ? in_ring : kJoined)), where.stream, a);
}

}  // namespace

int64_t grouped_hopper_splits(const Conv2dProblem& p) { return split_of(p).blocks; }

void conv2d_grad_weight_grouped_hopper(const Conv2dProblem& p, const void* grad_output,
                                       const void* input, void* grad_weight, void* grad_bias,
                                       void* workspace, int64_t splits, const Where& where) {
  const DeviceGuard guard(kOp, where.device);
  auto* const weight_sums = static_cast<float*>(workspace);
  auto* const bias_sums =
      grad_bias == nullptr ? nullptr : weight_sums + splits * p.K * kTaps * (p.C / p.groups);
  const auto chosen = p.dtype == DType::kBFloat16 ? start<BFloat16> : start<Half>;
  chosen(p, grad_output, input, weight_sums, bias_sums, splits, where);
  if (grad_weight == nullptr && grad_bias == nullptr) return;
  const Conv2dWay way{Precision::kIeee, BlockTile::k64x64};
  conv2d_grad_weight(p, way, nullptr, nullptr, grad_weight, grad_bias, workspace, splits, where);
}

}  // namespace gdfast::cuda
