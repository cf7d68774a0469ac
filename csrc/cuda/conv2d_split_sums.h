// The second pass of the gradient in a weight: adds up what splits have summed, in order, and
// writes the gradient, or updates the weight by it.
#pragma once

#include "conv2d_launch.h"
#include "device.h"
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

constexpr int kSumThreads = 256;

struct SplitSums {
  const void* sums;  // [splits, count]
  int64_t count, splits;
  WeightPlaces places;
  int parts;  // threads of an element, which have every parts-th split: a power of two
};

// Few elements of many splits are shared, so that enough is under way to and from memory.
int sum_parts(int64_t count, int64_t splits) {
  constexpr int64_t kThreadsOfAll = 1 << 18, kMostParts = 8, kSplitsOfThread = 8;
  int64_t parts = 1;
  while (parts < kMostParts && 2 * parts * kSplitsOfThread <= splits &&
         count * parts < kThreadsOfAll) {
    parts *= 2;
  }
  return small(parts);
}

SplitSums split_sums(const void* sums, int64_t count, int64_t splits, const WeightPlaces& places) {
  return {sums, count, splits, places, sum_parts(count, splits)};
}

// The sum of an element, and its place; a negative one in threads that have none.
template <typename Sum>
GDFAST_DEVICE Sum sum_splits(const SplitSums& a, int64_t& place) {
  const int columns = kSumThreads / a.parts, part = this_thread() / columns;
  const int64_t index = int64_t{blockIdx.x} * columns + this_thread() % columns;
  Sum sum = 0;
  if (index < a.count) {
    const Sum* from = static_cast<const Sum*>(a.sums) + (part * a.count + index);
    const int64_t step = a.parts * a.count;
#pragma unroll 8
    for (int64_t split = part; split < a.splits; split += a.parts, from += step) sum += *from;
  }
  place = -1;
  if (a.parts > 1) {
    Sum* const sums = reinterpret_cast<Sum*>(shared_memory());
    sums[this_thread()] = sum;
    sync_block();
    if (part > 0) return sum;
    for (int other = 1; other < a.parts; ++other) sum += sums[other * columns + this_thread()];
  }
  if (index < a.count) {
    const Divided filter = divide(static_cast<int32_t>(index), a.places.taps);
    place = place_of(a.places, filter.quotient, filter.rest);
  }
  return sum;
}

template <typename T, typename Sum>
GDFAST_KERNEL(kSumThreads, 1)
sum_splits_kernel(GDFAST_GRID_CONSTANT const SplitSums a, void* to) {
  int64_t place;
  const Sum sum = sum_splits<Sum>(a, place);
  if (place >= 0) static_cast<T*>(to)[place] = from_float<T>(sum);
}

template <typename T, typename Sum>
GDFAST_KERNEL(kSumThreads, 1)
sum_splits_sgd_kernel(GDFAST_GRID_CONSTANT const SplitSums a,
                      GDFAST_GRID_CONSTANT const WeightUpdate<Sum> update) {
  int64_t place[1];
  const Sum gradient[] = {sum_splits<Sum>(a, place[0])};
  update_weight<T>(update, place, gradient);
}

// Launches one of them.
template <typename Sum, typename Kernel, typename... More>
void launch_sums(Kernel kernel, const SplitSums& a, const Where& where, const More&... more) {
  const int64_t columns = kSumThreads / a.parts;
  const size_t bytes = a.parts > 1 ? kSumThreads * sizeof(Sum) : 0;
  launch("conv2d_grad_weight", kernel, dim3(static_cast<unsigned>(blocks_for(a.count, columns))),
         kSumThreads, bytes, where.stream, a, more...);
}

}  // namespace
}  // namespace gdfast::cuda
