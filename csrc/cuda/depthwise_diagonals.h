// Products of pixels by filters on the diagonals of matrices (depthwise_tensor.h).
#pragma once

#include "depthwise_exact.h"

namespace gdfast::cuda {
namespace {

template <typename T>
struct Tensors {
  const T* input;
  const T* weight;
  const T* bias;
  T* output;
};

// The right operands of matrix instructions: of each tap eight channels' numbers on a diagonal. A
// lane has two neighbours of a column, which are zeros unless they lie on it.
template <typename T, int kSize, int kGroups>
struct Diagonals {
  static constexpr int kTaps = kSize * kSize;
  uint32_t taps[kGroups][kTaps];

  // To shared memory as [channel][tap]; all numbers are on their way at a time.
  template <int kChannels, int kThreads>
  GDFAST_DEVICE void share(const DepthwiseArguments& a, const T* weight, int first_channel,
                           T* filters, int thread) {
    constexpr int kNumbers = kChannels * kTaps, kEach = (kNumbers - 1) / kThreads + 1;
    T numbers[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int index = thread + i * kThreads;
      const int tap = index % kTaps, k = first_channel + index / kTaps;
      const int at = tap / kSize * a.weight_r + tap % kSize * a.weight_s;
      const bool exists = index < kNumbers && k < a.K;
      numbers[i] = exists ? weight[k * a.weight_k + at] : from_float<T>(0.f);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int index = thread + i * kThreads;
      if (index < kNumbers) filters[index] = numbers[i];
    }
  }

  GDFAST_DEVICE void take(Diagonals& diagonals, const T* filters) {
    const int column = warp_lane() / 4, shift = column % 2 * 16;
    const bool within = column / 2 == warp_lane() % 4;
    const auto* const bits = reinterpret_cast<const uint16_t*>(filters);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const uint32_t number = bits[(group * 8 + column) * kTaps + tap];
        diagonals.taps[group][tap] = within ? number << shift : 0;
      }
    }
  }
};

// Of a row of positions, as matrix instructions have them.
template <int kGroups>
using Sums = float[kGroups * 4];

// The zeros beside diagonals make NaN of a neighbour's infinities, as those around an image do of a
// filter's: what is NaN of a chunk that this thread has written is made again without them.
template <typename T, int kSize>
GDFAST_DEVICE void mend(const DepthwiseArguments& a, const Tensors<T>& tensors, T* chunk, int n,
                        int channel, int p, int q) {
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    if (to_float(chunk[i]) == to_float(chunk[i])) continue;
    chunk[i] = from_float<T>(
        exact_output<kSize>(a, tensors.input, tensors.weight, tensors.bias, n, channel + i, p, q));
  }
}

// What is multiplied by a filter's last column, of which a row has an odd number: pixels of eight
// and of eight more positions, for each group of channels.
template <int kGroups>
using LastColumn = uint32_t[kGroups * 2];

// Adds what a row of pixels gives to the outputs that see it, as row r of the filter those r above.
// Without pixels there is no such row; what the row before gives by the last column is left.
// load(group, s) tells a lane where it loads matrices: columns s and s + 1 of the filter, each for
// two times eight positions; or of the last column those of both groups.
template <typename T, int kSize, int kGroups, typename Load>
GDFAST_DEVICE void multiply_row(Sums<kGroups> (&alive)[kSize], int u, LastColumn<kGroups>& before,
                                const Diagonals<T, kSize, kGroups>& diagonals, bool inside,
                                Load&& load) {
  const auto sums = [&](int group, int r) -> float (&)[4] {
    return *reinterpret_cast<float (*)[4]>(&alive[(u - r + kSize) % kSize][group * 4]);
  };
  uint32_t now[4] = {0, 0, 0, 0};
  if (inside) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const auto& taps = diagonals.taps[group];
#pragma unroll
      for (int s = 0; s + 1 < kSize; s += 2) {
        uint32_t pixels[4];
        ldmatrix_x4(pixels, load(group, s));
#pragma unroll
        for (int r = 0; r < kSize; ++r) {
          mma_m16n8k16<T>(sums(group, r), pixels, {taps[r * kSize + s], taps[r * kSize + s + 1]});
        }
      }
    }
    ldmatrix_x4(now, load(0, kSize - 1));
  }
  // Two rows of the filter at a time: the upper one's pixels are those of the row before. Of 3 x 3
  // each row alone: products do not bound it, and registers are few.
  constexpr bool kInPairs = kSize > 3;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const auto tap = [&](int r) { return diagonals.taps[group][r * kSize + kSize - 1]; };
    uint32_t *const low = now + group * 2, *const high = before + group * 2;
#pragma unroll
    for (int r = 1; kInPairs && r < kSize; r += 2) {
      mma_m16n8k16<T>(sums(group, r), {low[0], low[1], high[0], high[1]}, {tap(r), tap(r - 1)});
    }
#pragma unroll
    for (int r = kInPairs ? kSize - 1 : 0; r < kSize; ++r) {
      mma_m16n8k8<T>(sums(group, r), {low[0], low[1]}, tap(r));
    }
    high[0] = low[0];
    high[1] = low[1];
  }
}

// The sum of what the threads of some warps have, in a part of shared memory that nobody uses;
// sync() lets them meet.
template <typename Sync>
GDFAST_DEVICE float sum_of_warps(float value, float* shared, int warp, int warps, Sync&& sync) {
#pragma unroll
  for (int distance = kWarp / 2; distance >= 1; distance /= 2) {
    value += shuffle_xor(value, distance);
  }
  if (warp_lane() == 0) shared[warp] = value;
  sync();
  float sum = 0;
  for (int i = 0; i < warps; ++i) sum += shared[i];
  return sum;
}

}  // namespace
}  // namespace gdfast::cuda
