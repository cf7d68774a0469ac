// Sums of pixels times gradients on the diagonals of matrices (depthwise_tensor_grad_weight.cu).
//
// A matrix instruction multiplies the pixels of two taps and 8 channels by the gradients of these
// channels, over 16 positions. Of each tap's 8 x 8 sums the diagonal is the filters'. A warp keeps
// the sums of all taps, and the gradients of all rows that see the row of the image which it loads.
#pragma once

#include "depthwise_exact.h"
#include "depthwise_weight_sums.h"

namespace gdfast::cuda {
namespace {

template <typename T>
struct Tensors {
  const T* grad_output;
  const T* input;
};

// Sums of a warp. Pairs of taps are two of a row; those of the last column are two of neighbouring
// rows, which the same gradients are multiplied by where the upper one's pixel is a row higher:
// pair i is of the rows 2 i + 1 and 2 i, and the last one of the filter's last row and of ones, for
// the bias.
template <int kSize>
struct TapSums {
  static constexpr int kPairs = kSize / 2;
  float pairs[kSize][kPairs][4];
  float last[kPairs + 1][4];
};

// What a warp keeps of 16 positions: gradients of the rows that see the row of the image, and the
// pixels that the row before had for the last column.
template <int kSize>
struct TapRows {
  uint32_t alive[kSize][2], before[2];
};

// Adds the products of a row of the image, which is the first one for gradients of row u. A row
// that is not inside of the image has no pixels, one that is not `graded` no gradients.
// pairs(s) tells a lane where it loads columns s and s + 1 of the filter, and `last` where it loads
// the last column's pixels and the gradients.
template <typename T, int kSize, typename Pairs>
GDFAST_DEVICE void multiply_taps(TapSums<kSize>& sums, TapRows<kSize>& rows, int u, bool inside,
                                 bool graded, Pairs&& pairs, const unsigned char* last) {
  const uint32_t ones = pack_two<T>(1.f, 1.f);
  auto& alive = rows.alive;
  auto& before = rows.before;
  uint32_t loaded[4];
  ldmatrix_x4_transposed(loaded, last);
  alive[u][0] = graded ? loaded[2] : 0;
  alive[u][1] = graded ? loaded[3] : 0;
  if (inside) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      uint32_t pair[4];
      ldmatrix_x4_transposed(pair, pairs(2 * i));
#pragma unroll
      for (int r = 0; r < kSize; ++r) {
        mma_m16n8k16<T>(sums.pairs[r][i], pair, alive[(u - r + kSize) % kSize]);
      }
    }
  }
  const uint32_t now[2] = {inside ? loaded[0] : 0, inside ? loaded[1] : 0};
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) {
    mma_m16n8k16<T>(sums.last[i], {now[0], before[0], now[1], before[1]},
                    alive[(u - 2 * i - 1 + kSize) % kSize]);
  }
  // The first gradients that have been multiplied by all rows.
  mma_m16n8k16<T>(sums.last[kSize / 2], {now[0], ones, now[1], ones}, alive[(u + 1) % kSize]);
  before[0] = now[0];
  before[1] = now[1];
}

// What this lane has of the diagonals of two taps.
struct Diagonal {
  int channel;  // of the group, or -1 for none
  int at;       // in the first of them; the second one is two further on

  GDFAST_DEVICE Diagonal of_lane() {
    const int row = warp_lane() / 4;
    return {row / 2 == warp_lane() % 4 ? row : -1, row % 2};
  }
};

// Writes a warp's sums to its part of shared memory, [channel][tap] and behind these [channel].
template <int kSlab, int kSize>
GDFAST_DEVICE void share_sums(const TapSums<kSize>& sums, float* to, int group) {
  constexpr int kTaps = kSize * kSize;
  const Diagonal diagonal = Diagonal::of_lane();
  if (warp_lane() < 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[kSlab * kTaps + group * 8 + warp_lane() * 2 + i] = sums.last[kSize / 2][2 + i];
    }
  }
  if (diagonal.channel < 0) return;
  float* const taps = to + (group * 8 + diagonal.channel) * kTaps;
  const auto first = [&](const float (&pair)[4]) { return diagonal.at == 0 ? pair[0] : pair[1]; };
  const auto second = [&](const float (&pair)[4]) { return diagonal.at == 0 ? pair[2] : pair[3]; };
#pragma unroll
  for (int r = 0; r < kSize; ++r) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      taps[r * kSize + 2 * i] = first(sums.pairs[r][i]);
      taps[r * kSize + 2 * i + 1] = second(sums.pairs[r][i]);
    }
    const auto& last = sums.last[r / 2];
    taps[r * kSize + kSize - 1] = r % 2 == 1 || r + 1 == kSize ? first(last) : second(last);
  }
}

// Writes a block's split of `partial`: made(channel, tap) is a sum of its slab, of the bias where
// tap is the number of taps. Zeros around an image, or beyond a row, make NaN of infinities:
// exact(k, r, s) is the sum without them.
template <int kSlab, int kSize, int kThreads, typename Made, typename Exact>
GDFAST_DEVICE void write_sums(const DepthwiseArguments& a, int first_channel, float* partial,
                              int splits, int split, int thread, Made&& made, Exact&& exact) {
  constexpr int kTaps = kSize * kSize;
  for (int i = thread; i < kSlab * (kTaps + 1); i += kThreads) {
    const bool is_bias = i >= kSlab * kTaps;
    const int tap = is_bias ? kTaps : i % kTaps, channel = is_bias ? i - kSlab * kTaps : i / kTaps;
    const int k = first_channel + channel;
    if (k >= a.K) continue;
    float sum = made(channel, tap);
    if (is_bias) {
      *partial_bias(partial, a, splits, split, k) = sum;
      continue;
    }
    if (sum != sum) sum = exact(k, tap / kSize, tap % kSize);
    partial_taps(partial, a, split, k)[tap] = sum;
  }
}

// What the warps of each channel, one behind the other, have shared (share_sums) of a tap, or of
// the bias.
template <int kSlab, int kSize>
GDFAST_DEVICE float shared_sum(const float* shared, int warps, int channel, int tap) {
  constexpr int kTaps = kSize * kSize;
  const int at = tap == kTaps ? kSlab * kTaps + channel : channel * kTaps + tap;
  float sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += shared[warp * kSlab * (kTaps + 1) + at];
  return sum;
}

}  // namespace
}  // namespace gdfast::cuda
