// The gradients in the weight and the bias in groups of few channels on Hopper (grouped_hopper.h).
// A warp sums (grouped_weight_sums.h) the pixels of every second or third tile of its block.
#include "conv2d.h"
#include "device.h"
#include "early.h"
#include "grouped_hopper.h"
#include "grouped_weight_sums.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";

// Sums take 74 registers, and gradients of twins 28. Where a quarter of a multiprocessor has one
// warp more than these, the loader's, there are 168 or 128 for a thread.
// Groups of 32 channels (kWide) have twice as many parts of 16 by 16.
template <bool kIsOfTwins, bool kIsWide>
struct WeightWarps {
  static constexpr bool kTwins = kIsOfTwins, kWide = kIsWide;
  static constexpr int kParts = kWide ? 2 * kUnits : kUnits;
  static constexpr int kStreams = kWide ? 1 : kTwins ? 2 : 3;
  static constexpr int kChannels = kSlab, kGroup = 0;
  static constexpr int kConsumers = kStreams * kParts, kThreads = (kConsumers + 1) * kWarp;
  static_assert(kChannels % kChannelsOfWarp == 0 && kGroup == 0, "several groups");
};

struct GroupedHopperWeightArguments {
  GroupedRing ring;
  TensorMap grad;
  int grad_at, grad_row_bytes, grad_pair_bytes, grad_bytes;  // in a slot
  GroupedWeightSplit split;
};

#if defined(GDFAST_HOPPER)

template <typename Its>
GDFAST_DEVICE Unit unit_of(const GroupedHopperWeightArguments& a) {
  const int index = warp_index() % Its::kParts;
  if (!Its::kWide) {
    return {index * kChannelsOfWarp, index * kChannelsOfWarp, a.split.bias_sums != nullptr};
  }
  const int group = index >> 2;
  return {(index >> 1) * kChannelsOfWarp, (group * 2 + (index & 1)) * kChannelsOfWarp,
          a.split.bias_sums != nullptr && (index & 1) == 0};
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
  constexpr int kPairs = Band::kPairs;
  const unsigned char* const grad = shared_memory() + tile.slot + a.grad_at +
                                    tile.band * Band::kRows * a.grad_row_bytes +
                                    tile.part * kTileBytes + places.grad;
  const unsigned char* const top = shared_memory() + tile.top;
  const auto load_grad = [&](uint32_t (&grads)[4], int row) {
    ldmatrix_x4_transposed(grads, grad + row * a.grad_row_bytes);
    if (sums_bias) add_to_bias<T>(sums, grads);
  };
  const auto load = [&](uint32_t (&pixels)[4], const unsigned char* from) {
    ldmatrix_x4_transposed(pixels, from);
#pragma unroll
    for (uint32_t& word : pixels) word = kSome ? word & existing.columns : word;
  };
  const auto multiply = [&](int tap, int half, const uint32_t (&grads)[4], uint32_t upper,
                            uint32_t lower) {
    mma_m16n8k16<T>(sums.weight[tap][half], grads, {upper, lower});
  };
  if constexpr (Band::kTwins) {
    uint32_t grads[kPairs][4];
#pragma unroll
    for (int h = 0; h < Band::kRead; ++h) {
      if (h < kPairs) load_grad(grads[h], h);
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        uint32_t pixels[4];
        load(pixels, top + h * a.ring.row_bytes + places.input[s]);
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          if (h - r < 0 || h - r >= kPairs) continue;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            multiply(r * 3 + s, half, grads[h - r], pixels[half * 2], pixels[half * 2 + 1]);
          }
        }
      }
    }
  } else {
    const unsigned char* const bottom = shared_memory() + tile.bottom;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (kSome && pair * 2 >= existing.rows) continue;
      const bool second = !kSome || pair * 2 + 1 < existing.rows;
      uint32_t grads[4];
      load_grad(grads, pair * 2);
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        uint32_t these[4], next[4];
        load(these, top + pair * 2 * a.ring.row_bytes + places.input[s]);
        const bool is_last = pair + 1 == kPairs;
        load(next, (is_last ? bottom : top + (pair + 1) * 2 * a.ring.row_bytes) + places.input[s]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = half * 2;
          multiply(s, half, grads, these[i], second ? these[i + 1] : 0);
          multiply(3 + s, half, grads, these[i + 1], second ? next[i] : 0);
          multiply(6 + s, half, grads, next[i], second ? next[i + 1] : 0);
        }
      }
    }
  }
}

template <typename T, typename Its>
GDFAST_DEVICE void sum_tiles(const GroupedHopperWeightArguments& a, int32_t first_channel) {
  const int lane = warp_lane(), matrix = lane / 8, line = lane % 8,
            stream = warp_index() / Its::kParts;
  using Band = BandShape<Its::kTwins>;
  const Unit unit = unit_of<Its>(a);
  PixelPlaces places;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    places.input[s] =
        (matrix & 1) * a.ring.pair_bytes + swizzled(line + s, unit.channel / 8 + (matrix >> 1));
  }
  places.grad = (matrix >> 1) * a.grad_pair_bytes + swizzled(line, unit.filter / 8 + (matrix & 1));
  WeightSums sums;
  clear(sums);
  empty_ring(a.ring, stream, Its::kStreams, [&](const BandTile& tile) {
    const int rows = a.ring.P - tile.row, left = a.ring.Q - tile.column;
    if ((Band::kTwins || rows >= Band::kRows) && left >= kSide) {
      sum_tile<T, Band, false>(sums, a, places, tile, {}, unit.sums_bias);
    } else {
      const int of_lane = left - lane % 4 * 2;
      const Existing existing{rows, of_lane > 1 ? ~0u : of_lane == 1 ? 0xffffu : 0u};
      sum_tile<T, Band, true>(sums, a, places, tile, existing, unit.sums_bias);
    }
  });
  sync_threads_of(1, Its::kConsumers * kWarp);
  write_sums<Its>(sums, a.split, unit, first_channel, stream,
                  reinterpret_cast<float*>(shared_memory() + kRingAt));
}

#endif

template <typename T, bool kTwins, bool kWide>
GDFAST_KERNEL((WeightWarps<kTwins, kWide>::kThreads), 1)
grouped_hopper_grad_weight_kernel(GDFAST_GRID_CONSTANT const GroupedHopperWeightArguments a) {
#if defined(GDFAST_HOPPER)
  const auto first_channel = static_cast<int32_t>(blockIdx.x) * kSlab;
  using Its = WeightWarps<kTwins, kWide>;
  constexpr int kConsumers = Its::kConsumers;
  let_next_begin();
  if (warp_index() == 0) init_ring(a.ring, kConsumers);
  sync_block();
  wait_for_kernel_before();
  if (warp_index() < kConsumers) return sum_tiles<T, Its>(a, first_channel);
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

GroupedHopperSplit split_of(const Conv2dProblem& p) {
  return grouped_hopper_split(p, grouped_hopper_plan(p, true), ceil_div(p.C, kSlab),
                              multiprocessors(kOp));
}

template <typename T, bool kTwins, bool kWide>
void start(const Conv2dProblem& p, const GroupedHopperPlan& plan, const void* grad_output,
           const void* input, void* workspace, bool with_bias, int64_t splits, const Where& where) {
  using Its = WeightWarps<kTwins, kWide>;
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
      grouped_weight_split(p, workspace, splits, with_bias)};
  const int64_t in_ring = int64_t{ring.slots} * ring.slot_bytes;
  const int64_t joined = joined_bytes(p, kSlab, Its::kStreams);
  // Neighbours have slabs of the same images: pixels that lie side by side.
  const dim3 grid(static_cast<unsigned>(ceil_div(p.C, kSlab)), static_cast<unsigned>(splits));
  launch_early(kOp, grouped_hopper_grad_weight_kernel<T, kTwins, kWide>, grid, Its::kThreads,
               static_cast<size_t>(kRingAt + (in_ring > joined ? in_ring : joined)), where.stream,
               a);
}

}  // namespace

int64_t grouped_hopper_splits(const Conv2dProblem& p) { return split_of(p).blocks; }

void conv2d_grad_weight_grouped_hopper(const Conv2dProblem& p, const void* grad_output,
                                       const void* input, void* grad_weight, void* grad_bias,
                                       void* workspace, int64_t splits, const Where& where) {
  const DeviceGuard guard(kOp, where.device);
  const GroupedHopperPlan plan = grouped_hopper_plan(p, true);
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    const auto narrow = plan.twins ? start<T, true, false> : start<T, false, false>;
    const auto wide = plan.twins ? start<T, true, true> : start<T, false, true>;
    const auto chosen = p.C / p.groups > kChannelsOfWarp ? wide : narrow;
    chosen(p, plan, grad_output, input, workspace, grad_bias != nullptr, splits, where);
  };
  p.dtype == DType::kBFloat16 ? with_type(BFloat16{}) : with_type(Half{});
  if (grad_weight == nullptr && grad_bias == nullptr) return;
  const Conv2dWay way{Precision::kIeee, BlockTile::k64x64};
  conv2d_grad_weight(p, way, nullptr, nullptr, grad_weight, grad_bias, workspace, splits, where);
}

}  // namespace gdfast::cuda
