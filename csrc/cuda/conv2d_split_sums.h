// The second pass of the gradient in a weight: adds up what splits have summed, in order, and
// writes the gradient, or updates the weight by it.
#pragma once

#include <type_traits>

#include "conv2d_launch.h"
#include "device.h"
#include "early.h"
#include "weight_update.h"

namespace gdfast::cuda {
namespace {

// Where the elements of a weight lie, counted in elements: [K, R, S, C / groups] in the order of
// their index.
struct WeightPlaces {
  Divisor taps;  // of one filter
  Taps places;
  int64_t filter_step;
};

WeightPlaces weight_places(const Conv2dProblem& p) {
  WeightPlaces all{Divisor::of(p.C / p.groups * p.R * p.S), weight_taps(p), p.weight.n};
  all.places.bytes = channel_steps(p.weight, 1);
  return all;
}

GDFAST_DEVICE int64_t place_of(const WeightPlaces& a, int64_t filter, int32_t tap) {
  return filter * a.filter_step + place_at(a.places, tap).offset;
}

constexpr int kSplitThreads = 256;
constexpr int kGroup = 4;  // elements of a thread, where they are channels of one tap

struct SplitSums {
  const void* sums;  // [splits, count]
  int64_t count, splits;
  WeightPlaces places;
  int64_t channel_step;  // between the elements of a group
  bool grouped, whole;   // whether groups lie side by side, at multiples of their elements
  int parts;             // threads of a group, which have every parts-th split: a power of two
};

// Few groups of many splits are shared, so that enough is under way to and from memory.
int sum_parts(int64_t groups, int64_t splits) {
  constexpr int64_t kThreadsOfAll = 1 << 17, kMostParts = 16;
  constexpr int64_t kSplitsOfThread = 8;  // that are read together
  int64_t parts = 1;
  while (parts < kMostParts && 2 * parts * kSplitsOfThread <= splits &&
         groups * parts < kThreadsOfAll) {
    parts *= 2;
  }
  return small(parts);
}

SplitSums weight_split_sums(const Conv2dProblem& p, const void* sums, int64_t splits) {
  const int64_t count = p.K * (p.C / p.groups) * p.R * p.S;
  const bool grouped = p.C / p.groups % kGroup == 0;
  const int64_t groups = grouped ? count / kGroup : count;
  const Strides4& at = p.weight;
  const bool whole = at.c == 1 && at.n % kGroup == 0 && (p.R == 1 || at.h % kGroup == 0) &&
                     (p.S == 1 || at.w % kGroup == 0);
  return {sums, count, splits, weight_places(p), at.c, grouped, whole, sum_parts(groups, splits)};
}

SplitSums bias_split_sums(const Conv2dProblem& p, const void* sums, int64_t splits) {
  return {sums, p.K,   splits, {Divisor::of(1), weight_taps(p), 1},
          0,    false, true,   sum_parts(p.K, splits)};
}

template <typename T, int kCount>
struct alignas(kCount == 1               ? sizeof(T)
               : sizeof(T) * kCount < 16 ? sizeof(T) * kCount
                                         : 16) Group {
  T values[kCount];
};

// A thread's group and the places of its elements; negative ones in threads that have none.
template <typename Sum, int kCount>
GDFAST_DEVICE void sum_splits(const SplitSums& a, Sum (&sums)[kCount], int64_t (&places)[kCount]) {
  using Sums = Group<Sum, kCount>;
  let_next_begin();
  const int columns = kSplitThreads / a.parts, part = this_thread() / columns;
  const int64_t index = (int64_t{blockIdx.x} * columns + this_thread() % columns) * kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = 0, places[i] = -1;
  // Where elements go is known before what they are.
  if (index < a.count && part == 0) {
    const Divided filter = divide(static_cast<int32_t>(index), a.places.taps);
    const int64_t first = place_of(a.places, filter.quotient, filter.rest);
#pragma unroll
    for (int i = 0; i < kCount; ++i) places[i] = first + i * a.channel_step;
  }
  wait_for_kernel_before();
  if (index < a.count) {
    const Sum* from = static_cast<const Sum*>(a.sums) + (part * a.count + index);
    const int64_t step = a.parts * a.count;
    const int splits = static_cast<int>(a.splits);
    int split = part;
    // So many are asked for before the first is waited for.
    const auto add = [&](auto together) {
      constexpr int kTogether = decltype(together)::value;
#pragma unroll 1
      for (; split + (kTogether - 1) * a.parts < splits; split += kTogether * a.parts) {
        Sums more[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j)
          more[j] = *reinterpret_cast<const Sums*>(from + j * step);
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) sums[i] += more[j].values[i];
        }
        from += kTogether * step;
      }
    };
    add(Constant<8>{});
    add(Constant<4>{});
    add(Constant<1>{});
  }
  if (a.parts > 1) {
    Sums* const shared = reinterpret_cast<Sums*>(shared_memory());
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared[this_thread()].values[i] = sums[i];
    sync_block();
    if (part > 0) return;
    for (int other = 1; other < a.parts; ++other) {
      const Sums more = shared[other * columns + this_thread()];
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += more.values[i];
    }
  }
}

// whole: whether a group is written at once. Results are rounded to T, and stored as To.
template <typename T, typename To, typename Sum, int kCount>
GDFAST_KERNEL(kSplitThreads, 1)
sum_splits_kernel(GDFAST_GRID_CONSTANT const SplitSums a, void* to, bool whole) {
  Sum sums[kCount];
  int64_t places[kCount];
  sum_splits(a, sums, places);
  if (places[0] < 0) return;
  Group<To, kCount> results;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T rounded = from_float<T>(sums[i]);
    if constexpr (std::is_same_v<T, To>) {
      results.values[i] = rounded;
    } else {
      results.values[i] = to_float(rounded);
    }
  }
  if (whole) {
    *reinterpret_cast<Group<To, kCount>*>(static_cast<To*>(to) + places[0]) = results;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) static_cast<To*>(to)[places[i]] = results.values[i];
  }
}

template <typename T, typename Sum, int kCount>
GDFAST_KERNEL(kSplitThreads, 1)
sum_splits_sgd_kernel(GDFAST_GRID_CONSTANT const SplitSums a,
                      GDFAST_GRID_CONSTANT const WeightUpdate<Sum> update) {
  int64_t places[kCount];
  Sum gradients[kCount];
  sum_splits(a, gradients, places);
  update_weight<T>(update, places, gradients);
}

// Launches one of them, early: what made the sums takes most of the GPU to its end.
template <typename Sum, int kCount, typename Kernel, typename... More>
void launch_sums(Kernel kernel, const SplitSums& a, const Where& where, const More&... more) {
  const int64_t elements = kSplitThreads / a.parts * kCount;
  const size_t bytes = a.parts > 1 ? kSplitThreads * sizeof(Group<Sum, kCount>) : 0;
  launch_early("conv2d_grad_weight", kernel,
               dim3(static_cast<unsigned>(blocks_for(a.count, elements))), kSplitThreads, bytes,
               where.stream, a, more...);
}

template <typename T, typename Sum, typename To = T>
void launch_sum_splits(const SplitSums& a, void* to, const Where& where) {
  if (!a.grouped) return launch_sums<Sum, 1>(sum_splits_kernel<T, To, Sum, 1>, a, where, to, true);
  const bool whole = a.whole && reinterpret_cast<uintptr_t>(to) % 16 == 0;
  launch_sums<Sum, kGroup>(sum_splits_kernel<T, To, Sum, kGroup>, a, where, to, whole);
}

template <typename T, typename Sum>
void launch_sum_splits_sgd(const SplitSums& a, const SgdWeight& weight, const Where& where) {
  const WeightUpdate<Sum> update = weight_update<Sum>(weight);
  if (a.grouped) {
    launch_sums<Sum, kGroup>(sum_splits_sgd_kernel<T, Sum, kGroup>, a, where, update);
  } else {
    launch_sums<Sum, 1>(sum_splits_sgd_kernel<T, Sum, 1>, a, where, update);
  }
}

}  // namespace
}  // namespace gdfast::cuda
