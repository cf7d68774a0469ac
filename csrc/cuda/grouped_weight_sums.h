// The gradients in the weight and the bias in groups of few channels on Hopper: what a warp sums,
// 16 filters by 16 channels by nine taps, and how what a block's warps have summed becomes one
// split. Filters and channels of different groups are left out when sums are written, and splits
// added up as they are for other convolutions.
//
// Its::kStreams warps have the same sums of different pixels, Its::kConsumers are all that sum, and
// Its::kChannels and kGroup those of a block and a group, 0 where a kernel takes several.
#pragma once

#include "divisor.h"
#include "grouped.h"
#include "hopper.h"

namespace gdfast::cuda {
namespace {

constexpr int kTaps = 9;

// Where the sums of a block go.
struct GroupedWeightSplit {
  int K, group;
  Divisor pairs_of_filter;  // of sums
  float* weight_sums;       // [splits, K, R, S, C / groups]
  float* bias_sums;         // [splits, K], or null
};

// Of a filter in shared memory: those that are written at a time lie in different banks.
GDFAST_HOST_DEVICE constexpr int row_sums_of(int group) {
  return kTaps * group + (group >= 16 ? 8 : 0);
}

// In a workspace that begins with all splits of the weight's sums.
inline GroupedWeightSplit grouped_weight_split(const Conv2dProblem& p, void* workspace,
                                               int64_t splits, bool with_bias) {
  const int64_t group = p.C / p.groups;
  auto* const weight_sums = static_cast<float*>(workspace);
  return {small(p.K), small(group), Divisor::of(kTaps * group / 2), weight_sums,
          with_bias ? weight_sums + splits * p.K * kTaps * group : nullptr};
}

// What the sums of a block take in shared memory, of so many filters in so many streams.
inline int64_t joined_bytes(const Conv2dProblem& p, int64_t filters, int64_t streams) {
  return streams * filters * (row_sums_of(small(p.C / p.groups)) + 1) * 4;
}

// The sums of a warp, of so many eights of filters and of channels.
template <int kFilterEights, int kChannelEights>
struct SumsOf {
  static constexpr int kFilters = kFilterEights, kChannels = kChannelEights;
  float weight[kTaps][kChannels][2 * kFilters];
  float bias[kFilters];  // the positions of this lane
};
using WeightSums = SumsOf<2, 2>;

#if defined(GDFAST_HOPPER)

// The part of a block's sums that a warp makes.
struct Unit {
  int filter, channel;
  bool sums_bias;
};

// Of two filters, the positions that this lane has.
template <typename T, typename Sums>
GDFAST_DEVICE void add_to_bias(Sums& sums, const uint32_t (&grads)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float values[2];
    unpack<T, 2>({{grads[i]}}, values);
    sums.bias[i & 1] += values[0] + values[1];
  }
}

template <typename Sums>
GDFAST_DEVICE void clear(Sums& sums) {
  using Flat = float[sizeof(Sums) / sizeof(float)];
#pragma unroll
  for (float& sum : reinterpret_cast<Flat&>(sums)) sum = 0;
}

// Of four lanes, which have different positions.
template <typename Sums>
GDFAST_DEVICE void sum_bias_of_lanes(Sums& sums, const Unit& unit) {
  if (!unit.sums_bias) return;
#pragma unroll
  for (float& sum : sums.bias) {
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
  }
}

// Adds up what streams have summed, and writes it in the order in which it lies in shared memory,
// from `all` on, where nobody reads any more: whole lines.
template <typename Its, typename Sums>
GDFAST_DEVICE void write_sums(Sums& sums, const GroupedWeightSplit& a, const Unit& unit,
                              int first_channel, int stream, float* all) {
  constexpr int kStreams = Its::kStreams, kConsumers = Its::kConsumers;
  constexpr int filters = Its::kChannels;
  const int group = Its::kGroup > 0 ? Its::kGroup : a.group;
  const int of_filter = kTaps * group, row_sums = row_sums_of(group);
  float* const bias = all + kStreams * filters * row_sums;
  sum_bias_of_lanes(sums, unit);
#pragma unroll
  for (int row = 0; row < Sums::kFilters; ++row) {
    const int filter = unit.filter + row * 8 + warp_lane() / 4, at = stream * filters + filter;
    if (unit.sums_bias && warp_lane() % 4 == 0) bias[at] = sums.bias[row];
#pragma unroll
    for (int half = 0; half < Sums::kChannels; ++half) {
      // Two channels side by side are of one group.
      const int channel = unit.channel + half * 8 + warp_lane() % 4 * 2;
      if (channel / group != filter / group) continue;
      float* const to = all + at * row_sums + channel % group;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const float* const pair = sums.weight[tap][half] + row * 2;
        store_values<2>(to + tap * group, {pair[0], pair[1]});
      }
    }
  }
  sync_threads_of(1, kConsumers * kWarp);
  const int64_t index = int64_t{blockIdx.y} * a.K + first_channel;
  const int rest = a.K - first_channel, existing = rest < filters ? rest : filters;
  const auto add_streams = [&](auto& sums, const float* from, int step) {
    constexpr int kCount = sizeof sums / sizeof(float);
    load_values<kCount>(from, sums);
#pragma unroll
    for (int stream = 1; stream < kStreams; ++stream) {
      float more[kCount];
      load_values<kCount>(from + stream * step, more);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += more[i];
    }
  };
  constexpr int kTogether = Its::kGroup > 0 ? 4 : 2, kThreads = kConsumers * kWarp;
  // So often a thread loads before it writes the first, where that is known.
  constexpr int kAll = filters * kTaps * Its::kGroup / kTogether;
  constexpr int kTurns = kStreams == 1 && kAll > 0 && kAll % kThreads == 0 ? kAll / kThreads : 1;
  const int count = existing * of_filter / kTogether;
  const auto write = [&](auto turns, int first) {
    constexpr int kCount = decltype(turns)::value;
    float together[kCount][kTogether];
#pragma unroll
    for (int turn = 0; turn < kCount; ++turn) {
      const int i = first + turn * kThreads;
      const int filter =
          Its::kGroup > 0 ? i / (of_filter / kTogether) : divide(i, a.pairs_of_filter).quotient;
      const int at = i * kTogether - filter * of_filter;
      add_streams(together[turn], all + filter * row_sums + at, filters * row_sums);
    }
    float* const to = a.weight_sums + (index * of_filter + first * kTogether);
#pragma unroll
    for (int turn = 0; turn < kCount; ++turn) {
      store_values<kTogether>(to + turn * kThreads * kTogether, together[turn]);
    }
  };
  if (kTurns > 1 && count == kAll) {
    write(Constant<kTurns>{}, this_thread());
  } else {
#pragma unroll 1
    for (int i = this_thread(); i < count; i += kThreads) write(Constant<1>{}, i);
  }
  if (a.bias_sums == nullptr) return;
  for (int i = this_thread(); i < existing; i += kConsumers * kWarp) {
    float one[1];
    add_streams(one, bias + i, filters);
    a.bias_sums[index + i] = one[0];
  }
}

#endif

}  // namespace
}  // namespace gdfast::cuda
