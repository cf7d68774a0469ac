// The forward pass in groups of few channels on Hopper (grouped_hopper.h), and the gradient in the
// input, as in grouped.cu. A warp has its filters in registers from beginning to end.
#include "conv2d.h"
#include "device.h"
#include "grouped_filters.h"
#include "grouped_hopper.h"
#include "grouped_sums.h"

namespace gdfast::cuda {
namespace {

constexpr int kTaps = 9;

struct GroupedHopperArguments {
  GroupedRing ring;
  int filters_at;  // in shared memory
  GroupedFilters filters;
  GroupedOutput output;
};

// kGroup: channels that sums go over, 8 for groups of fewer.
template <int kGroup>
struct GroupedWarps {
  static constexpr bool kWide = kGroup >= 16;
  static constexpr int kSteps = kWide ? kGroup / 16 : 1;
  // Filters take 18, 36 and 72 registers. Where a quarter of a multiprocessor has one warp more
  // than these, which may be the loader's, there are 96, 128 and 168 for a thread.
  static constexpr int kConsumers = kGroup == 32 ? 8 : kGroup == 16 ? 12 : 16;
  static constexpr int kStreams = kConsumers / kUnits;
  static constexpr int kThreads = (kConsumers + 1) * kWarp;
};

using BandPairs = RowPairs<kPairsOfBand, 2, 1>;

#if defined(GDFAST_HOPPER)

template <int kGroup>
using FilterRegisters = uint32_t[GroupedWarps<kGroup>::kSteps][kTaps][4];

// One column of a filter and 16 channels, or of narrower groups both halves' own 8.
template <typename T, int kGroup>
GDFAST_DEVICE void multiply_column(BandPairs::Sums& sums, const ReadPairs& left,
                                   const FilterRegisters<kGroup>& right, int s, int step) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int pair = 0; pair < kPairsOfBand; ++pair) {
      const uint32_t (&these)[4] = left[pair], (&next)[4] = left[pair + 1];
      float (&sum)[4] = sums[pair][half];
      if constexpr (GroupedWarps<kGroup>::kWide) {
        const auto filter = [&](int r) -> const uint32_t (&)[4] { return right[step][r * 3 + s]; };
        const int at = half * 2;
        mma_m16n8k16<T>(sum, these, {filter(0)[at], filter(0)[at + 1]});
        mma_m16n8k16<T>(sum, {these[1], next[0], these[3], next[2]},
                        {filter(1)[at], filter(1)[at + 1]});
        mma_m16n8k16<T>(sum, next, {filter(2)[at], filter(2)[at + 1]});
      } else {
        // The 8 channels of two rows of the filter are 16 numbers too.
        const int at = half * 2;
        mma_m16n8k16<T>(sum, {these[at], these[at + 1], these[at + 1], next[at]},
                        {right[0][s][half], right[0][3 + s][half]});
        mma_m16n8k8<T>(sum, {next[at], next[at + 1]}, right[0][6 + s][half]);
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
    const int h = row + tap / 3;
    const int from =
        h < kBand ? tile.top + h * a.ring.row_bytes : tile.bottom + (h - kBand) * a.ring.row_bytes;
    for (int other = first; other < first + group; ++other) {
      const unsigned char* const chunk =
          shared_memory() + from + swizzled(column + tap % 3, other / 8);
      sum += to_float(reinterpret_cast<const T*>(chunk)[other % 8]) *
             filter_element<T>(a.filters, channel, other, tap, shared_memory() + a.filters_at);
    }
  }
  return sum;
}

template <typename T, int kGroup>
GDFAST_DEVICE void multiply_tiles(const GroupedHopperArguments& a, int32_t first_channel) {
  using Its = GroupedWarps<kGroup>;
  const int channel = warp_index() % kUnits * kChannelsOfWarp;
  const int first_of_group = Its::kWide ? channel / kGroup * kGroup : channel;
  const LaneOutput lane = lane_output<BandPairs>(a.output, first_channel + channel);
  float bias[4];
  load_bias<T>(bias, a.output, first_channel + channel);
  unsigned char* const filters = shared_memory() + a.filters_at;
  stage_filters<T>(a.filters, first_channel, filters, Its::kConsumers * kWarp);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads_of(1, Its::kConsumers * kWarp);
  const FilterPlaces places = filter_places<Its::kWide>(a.filters, channel, first_of_group);
  FilterRegisters<kGroup> right;
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
        (matrix & 1) * a.ring.row_bytes + swizzled(line + s, first_of_group / 8 + (matrix >> 1));
  }
  empty_ring(a.ring, warp_index() / kUnits, Its::kStreams, [&](const BandTile& tile) {
    BandPairs::Sums sums;
    BandPairs::Flat& flat = reinterpret_cast<BandPairs::Flat&>(sums);
#pragma unroll
    for (float& sum : flat) sum = 0;
#pragma unroll
    for (int s = 0; s < 3; ++s) {
#pragma unroll
      for (int step = 0; step < Its::kSteps; ++step) {
        // Sixteen channels further: two chunks, which is a bit of where they lie.
        const int at = pixels[s] ^ step * 32;
        ReadPairs left;
        ldmatrix_x4(left[0], shared_memory() + tile.top + at);
        ldmatrix_x4(left[1], shared_memory() + tile.top + 2 * a.ring.row_bytes + at);
        ldmatrix_x4(left[2], shared_memory() + tile.bottom + at);
        multiply_column<T, kGroup>(sums, left, right, s, step);
      }
    }
    if constexpr (!Its::kWide) {
      if (a.filters.group < 8) {
        mend<BandPairs>(flat, [&](int row, int column, int within) {
          return sum_of_group<T>(a, tile, row, column, channel + within);
        });
      }
    }
    write_sums<T, BandPairs>(flat, a.output, lane, bias, tile.image, tile.row, tile.column);
  });
}

#endif

template <typename T, int kGroup>
GDFAST_KERNEL(GroupedWarps<kGroup>::kThreads, 1)
grouped_hopper_kernel(GDFAST_GRID_CONSTANT const GroupedHopperArguments a) {
#if defined(GDFAST_HOPPER)
  using Its = GroupedWarps<kGroup>;
  const auto first_channel = static_cast<int32_t>(blockIdx.y) * kSlab;
  if (threadIdx.x == 0) init_ring(a.ring, Its::kConsumers);
  sync_block();
  if (warp_index() < Its::kConsumers) return multiply_tiles<T, kGroup>(a, first_channel);
  if (warp_lane() != 0) return;
  fill_ring(a.ring, [&](const Strip& strip, int row, bool, const Slot& slot) {
    barrier_arrive_expecting(full(slot), a.ring.input_bytes);
    load_input(a.ring, strip, row, first_channel, slot);
  });
#else
  static_cast<void>(a);
#endif
}

template <typename T, int kGroup>
void start(const char* op, const Conv2dProblem& p, bool gradient, const void* input,
           const void* weight, const void* bias, void* output, const Where& where) {
  const int64_t slabs = ceil_div(p.C, kSlab);
  const GroupedHopperSplit split =
      grouped_hopper_split(p, grouped_hopper_plan(p), slabs, multiprocessors(op));
  const int64_t filter_bytes = kSlab * filter_row_bytes(p);
  const GroupedRing ring = grouped_ring<T>(op, p, input, split, 0, filter_bytes);
  const int filters_at = kRingAt + ring.slots * ring.slot_bytes;
  const GroupedHopperArguments a{ring, filters_at, grouped_filters(p, weight, gradient),
                                 grouped_output(p, bias, output)};
  launch(op, grouped_hopper_kernel<T, kGroup>,
         dim3(static_cast<unsigned>(split.blocks), static_cast<unsigned>(slabs)),
         GroupedWarps<kGroup>::kThreads, static_cast<size_t>(filters_at + filter_bytes),
         where.stream, a);
}

void run(const char* op, const Conv2dProblem& p, bool gradient, const void* input,
         const void* weight, const void* bias, void* output, const Where& where) {
  const DeviceGuard guard(op, where.device);
  const int64_t group = p.C / p.groups;
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    const auto chosen = group == 32 ? start<T, 32> : group == 16 ? start<T, 16> : start<T, 8>;
    chosen(op, p, gradient, input, weight, bias, output, where);
  };
  p.dtype == DType::kBFloat16 ? with_type(BFloat16{}) : with_type(Half{});
}

}  // namespace

std::string grouped_hopper_why_not(const Conv2dProblem& p, GroupedPass pass) {
  if (const std::string reason = grouped_why_not(p, pass); !reason.empty()) return reason;
  if (p.R != 3 || p.S != 3) return "it takes filters of 3 x 3";
  if (p.stride_h != 1 || p.stride_w != 1) return "it takes stride 1";
  if (p.N == 0) return "it takes at least one image";
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
