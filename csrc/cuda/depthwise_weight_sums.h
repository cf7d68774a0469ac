// Sums of the gradient in a depthwise convolution's weight: what threads and splits have, and the
// second pass, which joins the splits.
#pragma once

#include "depthwise.h"
#include "sums.h"

namespace gdfast::cuda {

// The taps that a thread has, of kVector filters side by side, and the sums of its outputs.
template <typename A, int kCount, int kVector>
struct WeightSums {
  A taps[kCount * kVector];
  A bias[kVector];

  GDFAST_DEVICE void join(WeightSums& to, const WeightSums& other) {
#pragma unroll
    for (int i = 0; i < kCount * kVector; ++i) to.taps[i] += other.taps[i];
#pragma unroll
    for (int i = 0; i < kVector; ++i) to.bias[i] += other.bias[i];
  }
};

// partial[split] is [K][R S] and, behind all of these, [K] of the bias.
template <typename A>
GDFAST_DEVICE A* partial_taps(A* partial, const DepthwiseArguments& a, int split, int k) {
  return partial + (int64_t{split} * a.K + k) * a.R * a.S;
}
template <typename A>
GDFAST_DEVICE A* partial_bias(A* partial, const DepthwiseArguments& a, int splits, int split,
                              int k) {
  return partial + int64_t{splits} * a.K * a.R * a.S + int64_t{split} * a.K + k;
}

template <typename A>
struct Total {
  A value;

  GDFAST_DEVICE void join(Total& to, const Total& other) { to.value += other.value; }
};

// Joins the splits of one table after the other: the weight's K R S sums, then the bias's K.
template <typename T>
GDFAST_KERNEL(kJoinChannels* kJoinThreads, 1)
join_splits_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a, int splits,
                   const SumOf<T>* partial, T* grad_weight, T* grad_bias) {
  using A = SumOf<T>;
  const int taps = a.R * a.S, weights = a.K * taps;
  const int index =
      static_cast<int>(blockIdx.x) * kJoinChannels + static_cast<int>(threadIdx.x) % kJoinChannels;
  const int thread = static_cast<int>(threadIdx.x) / kJoinChannels;
  const bool is_bias = index >= weights;
  const bool exists = index < (grad_bias == nullptr ? weights : weights + a.K);
  const int step = is_bias ? a.K : weights;
  const A* const from =
      is_bias ? partial + int64_t{splits} * weights + (index - weights) : partial + index;
  Total<A> total{};
  if (exists) {
#pragma unroll 8
    for (int split = thread; split < splits; split += kJoinThreads) {
      total.value += from[int64_t{split} * step];
    }
  }
  join_rows(total, thread, kJoinThreads, kJoinChannels);
  if (thread > 0 || !exists) return;
  if (is_bias) {
    grad_bias[index - weights] = from_float<T>(total.value);
  } else {
    const int k = index / taps, tap = index % taps;
    grad_weight[k * a.weight_k + tap / a.S * a.weight_r + tap % a.S * a.weight_s] =
        from_float<T>(total.value);
  }
}

// `partial` has `splits` parts; grad_bias may be null.
template <typename T>
void join_splits(const char* op, const DepthwiseArguments& a, int splits, const SumOf<T>* partial,
                 T* grad_weight, T* grad_bias, uintptr_t stream) {
  const int64_t weights = int64_t{a.K} * a.R * a.S;
  const int64_t sums = weights + (grad_bias == nullptr ? 0 : a.K);
  launch(op, join_splits_kernel<T>, dim3(static_cast<unsigned>(ceil_div(sums, kJoinChannels))),
         kJoinChannels * kJoinThreads, kJoinChannels * kJoinThreads * kValuesStep<Total<SumOf<T>>>,
         stream, a, splits, partial, grad_weight, grad_bias);
}

}  // namespace gdfast::cuda
