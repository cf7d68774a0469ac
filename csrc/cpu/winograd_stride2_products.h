// The micro-kernel of winograd_stride2.h: sums of tiles x outputs, held in registers, over the
// channels of one to four products whose filters lie anywhere.
#pragma once

#include "memory_ahead.h"
#include "winograd_products.h"

namespace gdfast::cpu {
namespace {

struct Stride2Products {
  static constexpr int kMost = 4;  // products of a sum

  int count;
  const float* rows;                         // of the first tile, the first product's
  int64_t row_step, product_step;            // from tile to tile, and from product to product
  int64_t stretches, stretch, stretch_step;  // of channels; a stretch lies side by side
  const float* panels[kMost];                // [channels][width]: the filter of each product
  int64_t next;  // from `rows` to where the next call finds its own, which are fetched ahead
  bool accumulate;
  float* sums;  // [tiles][width]

  Stride2Products from_tile(int64_t tile, int64_t width) const {
    Stride2Products to = *this;
    to.rows += tile * row_step;
    to.sums += tile * width;
    return to;
  }
};

// Tiles of a call at most: accumulators, a line of the panel and a value in registers. With 6 rows
// of one vector loading would take longer than multiplying.
constexpr int stride2_rows(int vectors) { return vectors == 1 ? 2 * kTileRows : kTileRows; }

template <int kRows, int kVectors>
__attribute__((noinline)) void multiply_stride2(const Stride2Products& products) {
  using T = float;
  constexpr int kWidth = kLanes<T>, kAtOnce = 4, kFours = (kRows + 3) / 4;
  Vec<T> sum[kRows][kVectors] = {};
  const int64_t row_step = products.row_step;
  int64_t three_rows = 3 * row_step;
  forget_origin(three_rows);
  const int64_t next = products.next;
  for (int product = 0; product < products.count; ++product) {
    const T* panel = products.panels[product];
    for (int64_t i = 0; i < products.stretches; ++i) {
      // Four rows by one address, which instructions add up to two steps from each other.
      const T* four[kFours];
      const T* rows = products.rows + product * products.product_step + i * products.stretch_step;
#pragma GCC unroll 3
      for (int part = 0; part < kFours; ++part) four[part] = rows + 4 * part * row_step;
      // Those of the next call.
      for (int64_t x = 0; x < products.stretch; x += 64 / sizeof(T)) {
#pragma GCC unroll 12
        for (int row = 0; row < kRows; ++row) {
          const T* from = four[row / 4] + (row % 4 == 3 ? three_rows : row % 4 * row_step);
          __builtin_prefetch(from + next + x);
        }
      }
      for (int64_t left = products.stretch; left > 0; left -= kAtOnce) {
#pragma GCC unroll 4
        for (int x = 0; x < kAtOnce; ++x) {
          Vec<T> line[kVectors];
#pragma GCC unroll 4
          for (int j = 0; j < kVectors; ++j) {
            line[j] = load(panel + (x * kVectors + j) * kWidth);
          }
#pragma GCC unroll 12
          for (int row = 0; row < kRows; ++row) {
            const T* from = four[row / 4] + (row % 4 == 3 ? three_rows : row % 4 * row_step);
            Vec<T> value = broadcast(from[x]);
            keep_shared<kVectors>(value);
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) sum[row][j] += value * line[j];
          }
        }
        panel += kAtOnce * kVectors * kWidth;
#pragma GCC unroll 3
        for (int part = 0; part < kFours; ++part) {
          four[part] += kAtOnce;
          forget_origin(four[part]);
        }
      }
    }
  }
  store_sums(sum, products.accumulate, products.sums, kVectors * kWidth);
}

// For `rows` tiles, 1 to kRows.
template <int kRows, int kVectors>
GDFAST_INLINE void multiply_stride2_rows(int64_t rows, const Stride2Products& products) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_stride2_rows<kRows - 1, kVectors>(rows, products);
  }
  multiply_stride2<kRows, kVectors>(products);
}

// For any number of tiles, by calls of as many each as that can be.
template <int kVectors>
void multiply_stride2_tiles(int64_t tiles, const Stride2Products& products, MemoryAhead& ahead) {
  constexpr int kRows = stride2_rows(kVectors);
  const int64_t calls = ceil_div(tiles, kRows);
  for (int64_t call = 0; call < calls; ++call) {
    const int64_t tile = tiles * call / calls;
    const int64_t end = tiles * (call + 1) / calls;
    Stride2Products own = products.from_tile(tile, kVectors * kLanes<float>);
    own.next = end < tiles ? (end - tile) * own.row_step : own.next - tile * own.row_step;
    ahead.fetch();
    multiply_stride2_rows<kRows, kVectors>(end - tile, own);
  }
}

// sums[i][o] (+)= sum over tiles of image[tile][i] * grads[tile][o] for kRows channels.
template <int kRows, int kVectors>
__attribute__((noinline)) void multiply_stride2_grads(const float* image, int64_t image_step,
                                                      const float* grads, int64_t tiles,
                                                      bool accumulate, MemoryAhead& ahead,
                                                      float* sums) {
  constexpr int64_t kLine = kVectors * kLanes<float>;
  constexpr int64_t kAtOnce = 16;  // tiles, from one fetch ahead to the next
  Vec<float> sum[kRows][kVectors] = {};
  for (int64_t tile = 0; tile < tiles; tile += kAtOnce) {
    ahead.fetch();
    add_tiles(
        image, image_step, grads, kLine, tile, min_of(tiles, tile + kAtOnce),
        [](int64_t) __attribute__((always_inline)) {}, sum);
  }
  store_sums(sum, accumulate, sums, kLine);
}

// For 4 to 16 channels, a multiple of 4, in calls of 4, 5, 6 or 8: 16 are 8 + 8 or 6 + 5 + 5.
template <int kVectors>
void multiply_stride2_grads(int64_t channels, const float* image, int64_t image_step,
                            const float* grads, int64_t tiles, bool accumulate, MemoryAhead& ahead,
                            float* sums) {
  constexpr int kMost = 8 * kVectors + kVectors + 1 <= kVectorRegisters ? 8 : 6;
  const int64_t calls = ceil_div(channels, kMost);
  for (int64_t call = 0; call < calls; ++call) {
    const int64_t c = channels * call / calls, rows = channels * (call + 1) / calls - c;
    const auto multiply = rows == 4   ? multiply_stride2_grads<4, kVectors>
                          : rows == 5 ? multiply_stride2_grads<5, kVectors>
                          : rows == 6 ? multiply_stride2_grads<6, kVectors>
                                      : multiply_stride2_grads<kMost, kVectors>;
    multiply(image + c, image_step, grads, tiles, accumulate, ahead,
             sums + c * kVectors * kLanes<float>);
  }
}

}  // namespace
}  // namespace gdfast::cpu
