// Sums of the gradient in a depthwise convolution's weight: what threads and splits have.
#pragma once

#include "depthwise.h"
#include "early.h"
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
GDFAST_HOST_DEVICE A* partial_bias(A* partial, const DepthwiseArguments& a, int splits, int split,
                                   int k) {
  return partial + int64_t{splits} * a.K * a.R * a.S + int64_t{split} * a.K + k;
}

}  // namespace gdfast::cuda
