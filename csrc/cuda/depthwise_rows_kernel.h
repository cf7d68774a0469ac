// The kernel of depthwise_rows.cu.
#pragma once

#include "depthwise_rows.h"

namespace gdfast::cuda {
namespace {

template <typename T>
struct Tensors {
  const T* input;
  const T* weight;
  T* output;
};

#if defined(GDFAST_HOPPER)

// Adds what a thread's pixels of a row give to the outputs that see them: it is the first row for
// sums[u], and the last one for sums[u + 1], counted round.
template <typename T>
GDFAST_DEVICE void add_row(float (&sums)[kRowSize][kRowColumns * 2],
                           const float (&weights)[kRowTaps][2], int u, const unsigned char* pixels,
                           int pitch) {
  constexpr int kWide = kRowColumns + kRowSize - 1;
  PackOf<T, 2> packs[kWide];
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    packs[j] = *reinterpret_cast<const PackOf<T, 2>*>(pixels + j * pitch);
  }
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    float pixel[2];
    unpack<T, 2>(packs[j], pixel);
#pragma unroll
    for (int s = 0; s < kRowSize; ++s) {
      const int column = j - s;
      if (column < 0 || column >= kRowColumns) continue;
#pragma unroll
      for (int r = 0; r < kRowSize; ++r) {
        float* const sum = &sums[(u - r + kRowSize) % kRowSize][column * 2];
#pragma unroll
        for (int i = 0; i < 2; ++i) sum[i] += weights[r * kRowSize + s][i] * pixel[i];
      }
    }
  }
}

#endif

template <typename T>
GDFAST_KERNEL(kRowThreads, 1)
depthwise_rows_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                      const GDFAST_GRID_CONSTANT RowsWalk walk,
                      const GDFAST_GRID_CONSTANT Tensors<T> tensors) {
#if defined(GDFAST_HOPPER)
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) init_row_barriers(walk);
  sync_block();
  if (thread >= walk.workers) {
    if (warp_lane() == 0) load_rows<T>(a, walk, tensors.input, nullptr);
    return;
  }
  clear_rows(walk, 0, a.pad_w * walk.pitch);
  clear_rows(walk, (a.pad_w + a.W) * walk.pitch, walk.row - (a.pad_w + a.W) * walk.pitch);

  const int strip = thread / walk.pairs, channel = thread % walk.pairs * 2;
  const int q = strip < walk.strips ? strip * kRowColumns : 0;
  const int left = strip < walk.strips ? a.Q - q : 0;  // columns, of this thread's and further on
  float weights[kRowTaps][2], zero = 0;
#pragma unroll
  for (int tap = 0; tap < kRowTaps; ++tap) {
    const int at = tap / kRowSize * a.weight_r + tap % kRowSize * a.weight_s;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weights[tap][i] = to_float(tensors.weight[(channel + i) * a.weight_k + at]);
      zero += weights[tap][i] * 0;
    }
  }
  sync_workers(walk);

  const unsigned char* const pixels = shared_memory() + kRowBarriers + q * walk.pitch + channel * 2;
  const int64_t step_q = int64_t{a.output.w} * 2;  // bytes
  RowStage stage;
  for_each_piece(a, walk, [&](const RowsPiece& piece) {
    auto* to = reinterpret_cast<unsigned char*>(tensors.output + piece.n * a.output.n +
                                                int64_t{piece.p} * a.output.h +
                                                int64_t{q} * a.output.w + channel);
    float sums[kRowSize][kRowColumns * 2] = {};
    const int steps = piece.rows + kRowSize - 1, h = piece.p - a.pad_h;
    const auto add = [&](int step, int u) {
#pragma unroll
      for (float& sum : sums[u]) sum = 0;
      barrier_wait(row_full(stage), stage.parity);
      if (static_cast<unsigned>(h + step) < static_cast<unsigned>(a.H)) {
        add_row<T>(sums, weights, u, pixels + stage.index * walk.stage, walk.pitch);
      }
      leave_row(stage);
      RowStage::advance(stage, walk);
    };
    const auto write = [&](const float (&made)[kRowColumns* 2]) {
      const auto store = [&](int j) {
        *reinterpret_cast<PackOf<T, 2>*>(to + j * step_q) = {
            {pack_two<T>(made[2 * j], made[2 * j + 1])}};
      };
      if (left >= kRowColumns) {
#pragma unroll
        for (int j = 0; j < kRowColumns; ++j) store(j);
      } else {
#pragma unroll
        for (int j = 0; j < kRowColumns; ++j) {
          if (j < left) store(j);
        }
      }
      to += int64_t{a.output.h} * 2;
    };
#pragma unroll 1
    for (int step = 0; step < steps; step += kRowSize) {
#pragma unroll
      for (int u = 0; u < kRowSize; ++u) {
        if (step + u >= steps) break;
        add(step + u, u);
        if (step + u >= kRowSize - 1) write(sums[(u + 1) % kRowSize]);
      }
    }
  });
  if (zero == 0) return;
  for_each_piece(a, walk, [&](const RowsPiece& piece) {
#pragma unroll 1
    for (int i = 0; i < piece.rows * kRowColumns * 2; ++i) {
      const int p = piece.p + i / (kRowColumns * 2), j = i / 2 % kRowColumns, k = channel + i % 2;
      if (j >= left) continue;
      const float sum = exact_output<kRowSize, T>(a, tensors.input, tensors.weight, nullptr,
                                                  piece.n, k, p, q + j);
      tensors.output[piece.n * a.output.n + int64_t{p} * a.output.h + int64_t{q + j} * a.output.w +
                     k] = from_float<T>(sum);
    }
  });
#endif
}

}  // namespace
}  // namespace gdfast::cuda
