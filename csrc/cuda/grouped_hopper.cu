// The forward pass in groups of few channels on Hopper (grouped_hopper.h), and the gradient in the
// input, as in grouped.cu. A warp has its filters in registers from beginning to end. Four warps
// make the 64 channels of the same pixels: these go to memory by the TMA unit, 128 bytes side by
// side, which takes a quarter of the requests that warps by themselves would make.
#include "conv2d.h"
#include "device.h"
#include "grouped_filters.h"
#include "grouped_hopper.h"
#include "grouped_sums.h"

namespace gdfast::cuda {
namespace {

constexpr int kTaps = 9;
constexpr int kResultBuffers = 3;  // of a stream
static_assert((2 * kMostSlots + 1) * sizeof(uint64_t) <= kRingAt, "a barrier more");

struct GroupedHopperArguments {
  GroupedRing ring;
  TensorMap results;
  int results_at, filters_at;  // in shared memory
  GroupedFilters filters;
  GroupedOutput output;
};

// kGroup: channels that sums go over, 8 for groups of fewer.
template <int kGroup, bool kIsOfTwins>
struct GroupedWarps {
  static constexpr bool kWide = kGroup >= 16, kTwins = kIsOfTwins;
  static constexpr int kSteps = kWide ? kGroup / 16 : 1;
  // Filters take 18, 36 and 72 registers. Where a quarter of a multiprocessor has one warp more
  // than these, the loader's, there are 96, 128 and 168 for a thread.
  static constexpr int kConsumers = kGroup == 32 ? 8 : kGroup == 16 ? 12 : 16;
  static constexpr int kThreads = (kConsumers + 1) * kWarp;

  using Band = BandShape<kTwins>;
  static constexpr int kResultBytes = Band::kPairs * 2 * kTileBytes;  // of a tile
  static constexpr int kResults = kResultBuffers * kConsumers / kUnits * kResultBytes;
  using Sums = PairSums[Band::kPairs];
  using Filters = uint32_t[kSteps][kTaps][4];
};

#if defined(GDFAST_HOPPER)

constexpr int kSlotsBeforeFilters = 2;

GDFAST_DEVICE uint64_t* filters_there() {
  return reinterpret_cast<uint64_t*>(shared_memory()) + 2 * kMostSlots;
}

// Sixteen channels further: two chunks, which is a bit of where they lie.
GDFAST_DEVICE int step_further(int pixel, int step) { return pixel ^ step * 32; }

// Adds two rows of 8 pixels, by the tap, to 16 channels of them: sums over 16 channels, or of
// narrower groups over both halves' own 8.
template <typename T, bool kWide>
GDFAST_DEVICE void multiply_tap(PairSums& sums, const uint32_t (&left)[4],
                                const uint32_t (&filters)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kWide) {
      mma_m16n8k16<T>(sums[half], left, {filters[half * 2], filters[half * 2 + 1]});
    } else {
      mma_m16n8k8<T>(sums[half], {left[half * 2], left[half * 2 + 1]}, filters[half]);
    }
  }
}

// Calls finish(pair) as soon as a pair of rows has its sums. `pixels`: of this lane, for each
// column of a filter.
template <typename T, typename Its, typename Finish>
GDFAST_DEVICE void multiply_twins(typename Its::Sums& sums, const GroupedRing& a,
                                  const BandTile& tile, const int (&pixels)[3],
                                  const typename Its::Filters& right, Finish&& finish) {
#pragma unroll
  for (int h = 0; h < Its::Band::kRead; ++h) {
    const unsigned char* const row = shared_memory() + tile.top + h * a.row_bytes;
#pragma unroll
    for (int s = 0; s < 3; ++s) {
#pragma unroll
      for (int step = 0; step < Its::kSteps; ++step) {
        uint32_t left[4];
        ldmatrix_x4(left, row + step_further(pixels[s], step));
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          if (h - r < 0 || h - r >= Its::Band::kPairs) continue;
          multiply_tap<T, Its::kWide>(sums[h - r], left, right[step][r * 3 + s]);
        }
      }
    }
    if (h >= 2) finish(h - 2);
  }
}

template <typename T, typename Its>
GDFAST_DEVICE void multiply_rows(typename Its::Sums& sums, const GroupedRing& a,
                                 const BandTile& tile, const int (&pixels)[3],
                                 const typename Its::Filters& right) {
  constexpr int kPairs = Its::Band::kPairs;
  const unsigned char* const top = shared_memory() + tile.top;
  const unsigned char* const bottom = shared_memory() + tile.bottom;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
#pragma unroll
    for (int step = 0; step < Its::kSteps; ++step) {
      const int at = step_further(pixels[s], step);
      // Of each pair both rows' first halves of channels, then their second ones.
      uint32_t left[kPairs + 1][4];
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        ldmatrix_x4(left[pair], top + pair * 2 * a.row_bytes + at);
      }
      ldmatrix_x4(left[kPairs], bottom + at);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const uint32_t (&these)[4] = left[pair], (&next)[4] = left[pair + 1];
        if constexpr (Its::kWide) {
          multiply_tap<T, true>(sums[pair], these, right[step][s]);
          const uint32_t between[4] = {these[1], next[0], these[3], next[2]};
          multiply_tap<T, true>(sums[pair], between, right[step][3 + s]);
        } else {
          // The 8 channels of two rows of the filter are 16 numbers too.
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = half * 2;
            mma_m16n8k16<T>(sums[pair][half], {these[i], these[i + 1], these[i + 1], next[i]},
                            {right[0][s][half], right[0][3 + s][half]});
          }
        }
        multiply_tap<T, Its::kWide>(sums[pair], next, right[step][6 + s]);
      }
    }
  }
}

// One sum over the group's channels alone.
template <typename T>
GDFAST_DEVICE float sum_of_group(const GroupedHopperArguments& a, const BandTile& tile, int row,
                                 int column, int channel) {
  const int group = a.filters.group, first = channel / group * group;
  float sum = 0;
  for (int tap = 0; tap < kTaps; ++tap) {
    const int h = row + tap / 3, after = h - a.ring.band_rows;
    const int from =
        after < 0 ? tile.top + h * a.ring.row_bytes : tile.bottom + after * a.ring.row_bytes;
    for (int other = first; other < first + group; ++other) {
      const unsigned char* const chunk =
          shared_memory() + from + swizzled(column + tap % 3, other / 8);
      sum += to_float(reinterpret_cast<const T*>(chunk)[other % 8]) *
             filter_element<T>(a.filters, channel, other, tap, shared_memory() + a.filters_at);
    }
  }
  return sum;
}

template <typename T, int kGroup, bool kTwins>
GDFAST_DEVICE void multiply_tiles(const GroupedHopperArguments& a, int32_t first_channel) {
  using Its = GroupedWarps<kGroup, kTwins>;
  const int channel = warp_index() % kUnits * kChannelsOfWarp;
  const int first_of_group = Its::kWide ? channel / kGroup * kGroup : channel;
  unsigned char* const filters = shared_memory() + a.filters_at;
  stage_filters<T>(a.filters, first_channel, filters, Its::kConsumers * kWarp);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads_of(1, Its::kConsumers * kWarp);
  if (warp_lane() == 0) barrier_arrive(filters_there());
  const FilterPlaces places = filter_places<Its::kWide>(a.filters, channel, first_of_group);
  typename Its::Filters right;
#pragma unroll
  for (int step = 0; step < Its::kSteps; ++step) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      load_filters(right[step][tap],
                   filters + places.first + tap * places.tap_bytes + step * places.step_bytes,
                   a.filters.gradient);
    }
  }
  // Of this lane, for ldmatrix: its pixel of a pair of rows, for each column of a filter.
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  int pixels[3];
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    pixels[s] =
        (matrix & 1) * a.ring.pair_bytes + swizzled(line + s, first_of_group / 8 + (matrix >> 1));
  }
  // And where it writes results, of its two channels and the first half, to one of two buffers.
  const int stream = warp_index() / kUnits;
  const bool leads = warp_index() % kUnits == 0 && warp_lane() == 0;
  const int written = swizzled(warp_lane() / 4, channel / 8) + warp_lane() % 4 * 4;
  unsigned char* const first_result =
      shared_memory() + a.results_at + stream * kResultBuffers * Its::kResultBytes;
  int buffer = 0;
  empty_ring(a.ring, stream, Its::kConsumers / kUnits, [&](const BandTile& tile) {
    unsigned char* const results = first_result + buffer * Its::kResultBytes;
    typename Its::Sums sums;
#pragma unroll
    for (float& sum : flat(sums)) sum = 0;
    const auto write = [&](int pair) {
      uint32_t words[4];
      pack_sums<T>(words, sums[pair]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int second = i >> 1,
                  row = Its::kTwins ? second * Its::Band::kRows + pair : pair * 2 + second;
        *reinterpret_cast<uint32_t*>(results + row * kTileBytes + (written ^ (i & 1) * 16)) =
            words[i];
      }
    };
    if constexpr (Its::kTwins) {
      multiply_twins<T, Its>(sums, a.ring, tile, pixels, right, write);
    } else {
      multiply_rows<T, Its>(sums, a.ring, tile, pixels, right);
      if constexpr (!Its::kWide) {
        if (a.filters.group < 8) {
          mend(flat(sums), [&](int pair, int second, int column, int within) {
            return sum_of_group<T>(a, tile, pair * 2 + second, column, channel + within);
          });
        }
      }
      end_sums<T>(flat(sums), a.output, first_channel + channel);
#pragma unroll
      for (int pair = 0; pair < Its::Band::kPairs; ++pair) write(pair);
    }
    stores_ready();
    // Whoever meets here may write to the next buffer: it has been read.
    if (leads) stores_wait_read<kResultBuffers - 2>();
    sync_threads_of(2 + stream, kUnits * kWarp);
    if (leads) {
      store_box(a.results, {first_channel, tile.column, tile.row, tile.image}, results);
      stores_commit();
    }
    buffer = buffer + 1 == kResultBuffers ? 0 : buffer + 1;
  });
  if (leads) stores_wait<0>();
}

#endif

template <typename T, int kGroup, bool kTwins>
GDFAST_KERNEL((GroupedWarps<kGroup, kTwins>::kThreads), 1)
grouped_hopper_kernel(GDFAST_GRID_CONSTANT const GroupedHopperArguments a) {
#if defined(GDFAST_HOPPER)
  using Its = GroupedWarps<kGroup, kTwins>;
  const auto first_channel = static_cast<int32_t>(blockIdx.x) * kSlab;
  if (warp_index() == 0) init_ring(a.ring, Its::kConsumers);
  if (this_thread() == 0) barrier_init(filters_there(), Its::kConsumers), barriers_ready();
  sync_block();
  if (warp_index() < Its::kConsumers) return multiply_tiles<T, kGroup, kTwins>(a, first_channel);
  if (warp_lane() != 0) return;
  int loaded = 0;
  fill_ring(a.ring, [&](const Strip& strip, int row, bool, const Slot& slot) {
    // Filters would come last of all that is asked for, and nothing begins without them.
    if (kTwins && loaded++ == kSlotsBeforeFilters) barrier_wait(filters_there(), 0);
    barrier_arrive_expecting(full(slot), a.ring.input_bytes);
    load_input(a.ring, strip, row, first_channel, slot);
  });
#else
  static_cast<void>(a);
#endif
}

template <typename T, int kGroup, bool kTwins>
void start(const char* op, const Conv2dProblem& p, const GroupedHopperPlan& plan, bool gradient,
           const void* input, const void* weight, const void* bias, void* output,
           const Where& where) {
  using Its = GroupedWarps<kGroup, kTwins>;
  const int64_t slabs = ceil_div(p.C, kSlab), filter_bytes = kSlab * filter_row_bytes(p);
  const GroupedHopperSplit split = grouped_hopper_split(p, plan, slabs, multiprocessors(op));
  const GroupedRing ring =
      grouped_ring<T>(op, p, plan, input, split, 0, Its::kResults + filter_bytes);
  const int results_at = kRingAt + ring.slots * ring.slot_bytes;
  const int filters_at = results_at + Its::kResults;
  const GroupedHopperArguments a{ring,
                                 channels_first<T>(op, output, {p.N, p.C, p.P, p.Q, p.output},
                                                   {plan.images, plan.band_rows, kSide}),
                                 results_at,
                                 filters_at,
                                 grouped_filters(p, weight, gradient),
                                 grouped_output(p, bias, output)};
  launch(op, grouped_hopper_kernel<T, kGroup, kTwins>,
         dim3(static_cast<unsigned>(slabs), static_cast<unsigned>(split.blocks)),
         static_cast<unsigned>(Its::kThreads), static_cast<size_t>(filters_at + filter_bytes),
         where.stream, a);
}

void run(const char* op, const Conv2dProblem& p, bool gradient, const void* input,
         const void* weight, const void* bias, void* output, const Where& where) {
  const DeviceGuard guard(op, where.device);
  const int64_t group = p.C / p.groups;
  // Seven times the code of an activation would be in the way.
  const bool ends = bias != nullptr || p.activation != Activation::kNone;
  const GroupedHopperPlan plan = grouped_hopper_plan(p, !ends);
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    const auto wide = plan.twins ? start<T, 32, true> : start<T, 32, false>;
    const auto narrow = plan.twins ? start<T, 16, true> : start<T, 16, false>;
    const auto chosen = group == 32 ? wide : group == 16 ? narrow : start<T, 8, false>;
    chosen(op, p, plan, gradient, input, weight, bias, output, where);
  };
  p.dtype == DType::kBFloat16 ? with_type(BFloat16{}) : with_type(Half{});
}

}  // namespace

std::string grouped_hopper_why_not(const Conv2dProblem& p, GroupedPass pass) {
  if (const std::string reason = grouped_why_not(p, pass); !reason.empty()) return reason;
  if (p.R != 3 || p.S != 3) return "it takes filters of 3 x 3";
  if (p.stride_h != 1 || p.stride_w != 1) return "it takes stride 1";
  if (p.N == 0) return "it takes at least one image";
  if (p.N > 1 << 30) return "it takes fewer images at a time";
  for (const auto& [name, image] :
       {std::pair{"input", HopperImage{p.N, p.C, p.H, p.W, p.input}},
        std::pair{"output", HopperImage{p.N, p.K, p.P, p.Q, p.output}}}) {
    if (const std::string reason = image_why_not(name, image); !reason.empty()) {
      return "it takes " + reason;
    }
  }
  return "";
}

void conv2d_grouped_hopper(const Conv2dProblem& p, const void* input, const void* weight,
                           const void* bias, void* output, const Where& where) {
  run("conv2d", p, false, input, weight, bias, output, where);
}

void conv2d_grad_input_grouped_hopper(const Conv2dProblem& p, const void* grad_output,
                                      const void* weight, void* grad_input, const Where& where) {
  run("conv2d_grad_input", turned(p), true, grad_output, weight, nullptr, grad_input, where);
}

}  // namespace gdfast::cuda
