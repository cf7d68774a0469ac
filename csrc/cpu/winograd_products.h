// The products of Winograd's convolution for blocks of tiles that its caches hold: micro-kernels
// like tile.h's, for operands a constant step apart and so short that every instruction counts.
#pragma once

#include "tile.h"

namespace gdfast::cpu {
namespace {

// Calls run with the number of a panel's vectors, 1 to kMaxVectors, as a type.
template <typename Run>
GDFAST_INLINE void with_vectors(int vectors, const Run& run) {
  if (vectors == 1) return run(std::integral_constant<int, 1>());
  if (vectors == 2) return run(std::integral_constant<int, 2>());
  if constexpr (kMaxVectors >= 4) {
    if (vectors == 3) return run(std::integral_constant<int, 3>());
    run(std::integral_constant<int, 4>());
  }
}

// Memory to be fetched into L2 during products: `size` values for each tile, `offset` from where it
// begins.
struct Ahead {
  const float* const* begin = nullptr;
  int64_t offset = 0, size = 0;

  // Cache line `index` of the values, if there are so many.
  Ahead line(int64_t index) const {
    return {begin, offset + index * 16, min_of(16, size - index * 16)};
  }

  GDFAST_INLINE void fetch(int64_t tile, int64_t end) const {
    if (size == 0) return;
    for (; tile < end; ++tile) {
      const float* from = begin[tile] + offset;
      for (int64_t x = 0; x < size; x += 16) __builtin_prefetch(from + x, 0, 2);
    }
  }
};

// As in multiply_tile, where several vectors share a broadcast value. With AVX-512 a product of one
// broadcasts it on its way from memory, in two thirds of the time that both take one by one.
template <int kVectors>
GDFAST_INLINE void keep_shared(Vec<float>& value) {
  if constexpr (kVectors > 1) keep_in_register<float>(value);
}

// sums[i * step + o] (+)= sum[i][o].
template <int kRows, int kVectors>
GDFAST_INLINE void store_sums(const Vec<float> (&sum)[kRows][kVectors], bool accumulate,
                              float* sums, int64_t step) {
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* to = sums + i * step + j * kLanes<float>;
      store<float>(to, accumulate ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// sums[i][o] (+)= sum over c of rows[i][c] * panel[c][o] for kRows tiles. Where kFetches is set,
// what lies `next` beyond the rows is fetched into L2 meanwhile.
template <int kRows, int kVectors, bool kFetches = false>
GDFAST_INLINE void multiply_lines(const float* rows, int64_t row_step, int64_t channels,
                                  const float* panel, int64_t panel_step, bool accumulate,
                                  float* sums, int64_t sums_step, int64_t next = 0) {
  using T = float;
  constexpr int kWidth = kLanes<T>;
  Vec<T> sum[kRows][kVectors] = {};
  for (int64_t c = 0; c < channels; c += kWidth) {
    if (kFetches && c % 16 == 0) {
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(rows + i * row_step + c + next, 0, 2);
    }
#pragma GCC unroll 4
    for (int lane = 0; lane < kWidth; ++lane) {
      Vec<T> weights[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) weights[j] = load(panel + j * kWidth);
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        Vec<T> value = broadcast(rows[i * row_step + c + lane]);
        keep_shared<kVectors>(value);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] += value * weights[j];
      }
      panel += panel_step;
    }
  }
  store_sums(sum, accumulate, sums, sums_step);
}

// For any number of tiles, whose sums lie as far apart as their images: up to kTileRows - 1 more
// are read and written.
template <int kVectors>
__attribute__((noinline)) void multiply_block(const float* rows, int64_t line, int64_t tiles,
                                              int64_t channels, const float* panel, bool accumulate,
                                              float* sums, const Ahead& ahead) {
  for (int64_t tile = 0; tile < tiles; tile += kTileRows, rows += kTileRows * line) {
    ahead.fetch(tile, tile + kTileRows);
    multiply_lines<kTileRows, kVectors>(rows, line, channels, panel, kVectors * kLanes<float>,
                                        accumulate, sums + tile * line, line);
  }
}

// Whether registers hold the weights of a vector of channels and one of sums, beside the sums.
constexpr bool kHoldsWeights = kLanes<float> + kTileRows + 1 < kVectorRegisters;

// multiply_block for such weights, whose lines are of one vector.
__attribute__((noinline)) inline void multiply_block_held(const float* rows, int64_t tiles,
                                                          const float* panel, float* sums,
                                                          const Ahead& ahead) {
  using T = float;
  constexpr int kWidth = kLanes<T>;
  Vec<T> weights[kWidth];
#pragma GCC unroll 16
  for (int c = 0; c < kWidth; ++c) {
    weights[c] = load(panel + c * kWidth);
    keep_in_register<T>(weights[c]);
  }
  constexpr int64_t kStep = kTileRows * kWidth;
  for (int64_t tile = 0; tile < tiles; tile += kTileRows, rows += kStep, sums += kStep) {
    ahead.fetch(tile, tile + kTileRows);
    Vec<T> sum[kTileRows] = {};
#pragma GCC unroll 16
    for (int c = 0; c < kWidth; ++c) {
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) sum[i] += broadcast(rows[i * kWidth + c]) * weights[c];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) store<T>(sums + i * kWidth, sum[i]);
  }
}

// For any number of tiles and of panels side by side. Tiles go by 4 to 6, as evenly as that can be:
// up to kRowsBeyond rows more are read and written than there are. Calls each() before each call of
// the micro-kernel, which fetches what lies `next` beyond its rows.
constexpr int kRowsBeyond = 3;
template <typename Each>
void multiply_lines(int vectors, int64_t panels, int64_t tiles, const float* rows, int64_t row_step,
                    int64_t channels, const float* weights, bool accumulate, float* sums,
                    int64_t next, const Each& each) {
  with_vectors(vectors, [&](auto count) {
    constexpr int kVectors = decltype(count)::value;
    constexpr int64_t kWidth = kVectors * kLanes<float>;
    const int64_t line = panels * kWidth;
    for (int64_t calls = ceil_div(tiles, kTileRows); calls > 0; --calls) {
      const int64_t own = max_of(4, ceil_div(tiles, calls));
      const auto multiply = own == 4   ? multiply_lines<4, kVectors, true>
                            : own == 5 ? multiply_lines<5, kVectors, true>
                                       : multiply_lines<6, kVectors, true>;
      for (int64_t o = 0; o < line; o += kWidth) {
        each();
        multiply(rows, row_step, channels, weights + o, line, accumulate, sums + o, line, next);
      }
      rows += own * row_step;
      sums += own * line;
      tiles -= own;
    }
  });
}

// sum[i][o] += image[tile][i] * grads[tile][o] for kRows channels and tiles [begin, end), whose
// lines lie image_step and grads_step apart. Calls each(tile) before each.
template <int kRows, int kVectors, typename Each>
GDFAST_INLINE void add_tiles(const float*& image, int64_t image_step, const float*& grads,
                             int64_t grads_step, int64_t begin, int64_t end, const Each& each,
                             Vec<float> (&sum)[kRows][kVectors]) {
#pragma GCC unroll 2
  for (int64_t tile = begin; tile < end; ++tile, image += image_step, grads += grads_step) {
    each(tile);
    Vec<float> line[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) line[j] = load(grads + j * kLanes<float>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      Vec<float> value = broadcast(image[i]);
      keep_shared<kVectors>(value);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] += value * line[j];
    }
  }
}

// sums[i][o] (+)= sum over `tiles` of them. `ahead` is a cache line at most.
template <int kRows, int kVectors>
void multiply_tiles(const float* image, int64_t image_step, const float* grads, int64_t grads_step,
                    int64_t tiles, bool accumulate, const Ahead& ahead, float* sums) {
  Vec<float> sum[kRows][kVectors] = {};
  const auto fetch = [&](int64_t tile) __attribute__((always_inline)) {
    if (ahead.size > 0) __builtin_prefetch(ahead.begin[tile] + ahead.offset, 0, 2);
  };
  add_tiles(image, image_step, grads, grads_step, 0, tiles, fetch, sum);
  store_sums(sum, accumulate, sums, kVectors * kLanes<float>);
}

// Channels that a call of multiply_tiles takes at most. Calls that fetch ahead should be few among
// them: memory answers no more than so many at once.
constexpr int channels_at_once(int vectors) {
  return kVectorRegisters == 32 && vectors == 1 ? 8 : kTileRows;
}

// `rows` is 4, 5, 6 or channels_at_once(vectors).
inline void multiply_tiles(int64_t rows, int vectors, const float* image, int64_t image_step,
                           const float* grads, int64_t grads_step, int64_t tiles, bool accumulate,
                           const Ahead& ahead, float* sums) {
  with_vectors(vectors, [&](auto count) {
    constexpr int kVectors = decltype(count)::value;
    const auto multiply = rows == 4   ? multiply_tiles<4, kVectors>
                          : rows == 5 ? multiply_tiles<5, kVectors>
                          : rows == 6 ? multiply_tiles<6, kVectors>
                                      : multiply_tiles<channels_at_once(kVectors), kVectors>;
    multiply(image, image_step, grads, grads_step, tiles, accumulate, ahead, sums);
  });
}

}  // namespace
}  // namespace gdfast::cpu
