// How Winograd's convolution reads and writes its tiles: in runs, along a line of the image.
//
// Neighbouring tiles overlap by two columns of pixels. A run transforms each of its columns once,
// into a line of L1, and then goes along that line: a third less than tile by tile.
#pragma once

#include "../conv2d_problem.h"
#include "ending.h"
#include "pack.h"
#include "winograd_tiles.h"

namespace gdfast::cpu {
namespace {

// Columns of pixels that a run of tiles sees, and those of its outputs.
constexpr int64_t kRunColumns = (TileGrid::kRun - 1) * kTileOut + kTileIn;
constexpr int64_t kRunOutputs = TileGrid::kRun * kTileOut;

// Pixels from one tile of a run to the next: all have as many but for the last of an image's line.
inline int64_t tile_step_of(const TileGrid::At& at) {
  return at.columns == kTileOut ? kTileOut : kTileOut - 1;
}

// The pixels that a run of tiles sees, as vectors of channels. Row i begins at rows[i]; from one
// pixel to the next it is steps[i], 0 where the row lies outside of the image and is zeros.
template <int kSize>
struct Run {
  const float* rows[kSize];
  int64_t steps[kSize];
  int64_t begin, end, columns;  // pixels [begin, end) lie inside, the others of `columns` are zeros
  int64_t tiles;
  TileGrid::At at;  // the first of them
  int64_t tile_step;
  int64_t last_columns;  // outputs of the last tile
};

// Reads kSize rows of pixels, from (h + low_h, w + low_w) of a tile on, where they lie or from a
// stage that brings channels side by side.
template <int kSize>
class RunReader {
  using T = float;
  static constexpr int kWidth = kLanes<T>;

 public:
  static constexpr int64_t kStageSize = kSize * kRunColumns * kWidth;

  RunReader(const TileGrid& grid, const T* data, const Strides4& strides, int64_t channels,
            int64_t height, int64_t width, int64_t low_h, int64_t low_w)
      : grid_(grid),
        data_(data),
        strides_(strides),
        channels_(channels),
        height_(height),
        width_(width),
        low_h_(low_h),
        low_w_(low_w) {}

  // Calls use(run, c, tile) for the runs of tiles [first, end), of which `tile` is the first of
  // one, and each vector of channels. zeros is a vector.
  template <typename Use>
  void read(int64_t first, int64_t end, const T* zeros, T* stage, const Use& use) const {
    const int64_t in_place = strides_.c == 1 ? channels_ / kWidth * kWidth : 0;
    Run<kSize> run;
    for (int64_t tile = first; tile < end; tile += run.tiles) {
      run.tiles = grid_.run_from(tile, end);
      run.at = grid_.at(tile);
      run.tile_step = tile_step_of(run.at);
      run.last_columns = grid_.at(tile + run.tiles - 1).columns;
      run.columns = (run.tiles - 1) * run.tile_step + kSize;
      const int64_t w0 = run.at.w + low_w_;
      run.begin = min_of(run.columns, max_of(0, -w0));
      run.end = max_of(run.begin, min_of(run.columns, width_ - w0));
      const T* corner = data_ + run.at.n * strides_.n + w0 * strides_.w;
      for (int64_t c = 0; c < channels_; c += kWidth) {
        for (int i = 0; i < kSize; ++i) {
          const int64_t h = run.at.h + low_h_ + i;
          // Images overlap; of 4x4 pixels each belongs to one tile, and is zero for the others.
          const bool own = kSize != kTileOut || i < run.at.rows;
          const bool inside = own && h >= 0 && h < height_;
          run.rows[i] = zeros;
          run.steps[i] = 0;
          if (!inside) continue;
          const T* row = corner + h * strides_.h + c * strides_.c;
          if (c < in_place) {
            run.rows[i] = row;
            run.steps[i] = strides_.w;
          } else {
            T* to = stage + i * kRunColumns * kWidth;
            bring_together(row, run.begin, run.end, min_of(kWidth, channels_ - c), to);
            run.rows[i] = to;
            run.steps[i] = kWidth;
          }
        }
        use(run, c, tile);
      }
    }
  }

 private:
  // to[x][lane] of pixels [begin, end).
  void bring_together(const T* from, int64_t begin, int64_t end, int64_t channels, T* to) const {
    from += begin * strides_.w;
    if (strides_.w == 1) {
      transpose_widened(from, strides_.c, end - begin, channels, kWidth, to + begin * kWidth,
                        kWidth);
      return;
    }
    for (int64_t x = begin; x < end; ++x, from += strides_.w) {
      copy_widened(from, strides_.c, channels, to + x * kWidth);
      for (int64_t lane = channels; lane < kWidth; ++lane) to[x * kWidth + lane] = T(0);
    }
  }

  const TileGrid& grid_;
  const T* data_;
  Strides4 strides_;
  int64_t channels_, height_, width_, low_h_, low_w_;
};

// B^T x B of a run of tiles: to[tile * tile_step + product * product_step]; with kStream past the
// caches, where each vector is aligned.
template <bool kStream = false>
void transform_image_run(const Run<kTileIn>& run, float* to, int64_t tile_step,
                         int64_t product_step) {
  constexpr int kWidth = kLanes<float>, kColumn = kTileIn * kWidth;
  alignas(64) float half[kRunColumns * kColumn];
  std::memset(half, 0, run.begin * kColumn * sizeof(float));
  std::memset(half + run.end * kColumn, 0, (run.columns - run.end) * kColumn * sizeof(float));
  const float* rows[kTileIn];
#pragma GCC unroll 6
  for (int i = 0; i < kTileIn; ++i) rows[i] = run.rows[i] + run.begin * run.steps[i];
  for (int64_t x = run.begin; x < run.end; ++x) {
    Vec<float> column[kTileIn], products[kTileIn];
#pragma GCC unroll 6
    for (int i = 0; i < kTileIn; ++i) {
      column[i] = load(rows[i]);
      rows[i] += run.steps[i];
    }
    transform_image<float>(column, 1, products, 1);
#pragma GCC unroll 6
    for (int i = 0; i < kTileIn; ++i) store<float>(half + x * kColumn + i * kWidth, products[i]);
  }
  const float* from = half;
  for (int64_t tile = 0; tile < run.tiles; ++tile, from += run.tile_step * kColumn) {
    float* line = to + tile * tile_step;
#pragma GCC unroll 6
    for (int i = 0; i < kTileIn; ++i) {
      Vec<float> row[kTileIn], products[kTileIn];
#pragma GCC unroll 6
      for (int j = 0; j < kTileIn; ++j) row[j] = load(from + j * kColumn + i * kWidth);
      transform_image<float>(row, 1, products, 1);
#pragma GCC unroll 6
      for (int j = 0; j < kTileIn; ++j, line += product_step) {
        forget_origin(line);
        put_vector(line, products[j], kStream);
      }
    }
  }
}

// A y A^T of a run of tiles: to[tile * tile_step + product * product_step]. Adds up the pixels,
// too. Products go column by column, and those of a pair of points together: four values of each
// fit the registers from the loads to the stores.
template <bool kStream = false>
Vec<float> transform_grad_run(const Run<kTileOut>& run, float* to, int64_t tile_step,
                              int64_t product_step) {
  using T = float;
  using P = Points<T>;
  constexpr int kWidth = kLanes<T>;
  Vec<T> total{};
  for (int64_t tile = 0; tile < run.tiles; ++tile, to += tile_step) {
    const T* rows[kTileOut];
    int64_t steps[kTileOut];
    for (int i = 0; i < kTileOut; ++i) {
      steps[i] = run.steps[i];
      rows[i] = run.rows[i] + tile * run.tile_step * steps[i];
    }
    const int64_t columns = tile + 1 < run.tiles ? run.at.columns : run.last_columns;
    alignas(64) T own[kTileOut * kTileOut * kWidth];  // what is left of a narrow tile, and zeros
    if (columns < kTileOut) {
      std::memset(own, 0, sizeof own);
      for (int i = 0; i < kTileOut; ++i) {
        T* row = own + i * kTileOut * kWidth;
        for (int64_t j = 0; j < columns; ++j) {
          store<T>(row + j * kWidth, load(rows[i] + j * steps[i]));
        }
        rows[i] = row;
        steps[i] = kWidth;
      }
    }
    const auto write = [&](const Vec<T>* column, int product) {
      Vec<T> products[kTileIn];
      transform_grad_output<T>(column, 1, products, 1);
      T* line = to + product * product_step;
#pragma GCC unroll 6
      for (int i = 0; i < kTileIn; ++i, line += kTileIn * product_step) {
        forget_origin(line);
        put_vector(line, products[i], kStream);
      }
    };
    Vec<T> column[kTileOut], minus[kTileOut];
#pragma GCC unroll 4
    for (int i = 0; i < kTileOut; ++i) column[i] = load(rows[i]);
    write(column, 0);
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {
      const T point = pair == 0 ? P::a : P::b, square = pair == 0 ? P::a2 : P::b2;
#pragma GCC unroll 4
      for (int i = 0; i < kTileOut; ++i) {
        const Vec<T> y0 = load(rows[i]), y1 = load(rows[i] + steps[i]);
        const Vec<T> y2 = load(rows[i] + 2 * steps[i]), y3 = load(rows[i] + 3 * steps[i]);
        if (pair == 0) total += (y0 + y1) + (y2 + y3);
        const Vec<T> even = y0 + square * y2, odd = y1 + square * y3;
        column[i] = even + point * odd;
        minus[i] = even - point * odd;
      }
      write(column, 1 + 2 * pair);
      write(minus, 2 + 2 * pair);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTileOut; ++i) column[i] = load(rows[i] + 3 * steps[i]);
    write(column, kTileIn - 1);
  }
  return total;
}

// Where the outputs of a tile go, as vectors of channels.
struct TileOutputs {
  float* to;
  int64_t row_step, column_step;
  int64_t rows, columns;
  bool stream;  // past the caches
};

// activation(A^T m A + bias) of one tile; m[product * product_step]. Even columns of outputs come
// from sums of the products at +-a and +-b, odd ones from differences: either half of them stays in
// registers from the loads to the stores.
inline void transform_sums(const float* m, int64_t product_step, Vec<float> bias,
                           const Ending<float>& ending, const TileOutputs& outputs) {
  using T = float;
  constexpr int kHalf = kTileOut / 2;
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {
    Vec<T> half[kHalf][kTileIn];
    const float* line = m;
#pragma GCC unroll 6
    for (int i = 0; i < kTileIn; ++i, line += kTileIn * product_step) {
      forget_origin(line);
      Vec<T> row[kTileIn];
#pragma GCC unroll 6
      for (int j = odd; j < kTileIn - 1 + odd; ++j) row[j] = load(line + j * product_step);
      if (odd == 0) {
        transform_output_even<T>(row, 1, half[0][i], half[1][i]);
      } else {
        transform_output_odd<T>(row, 1, half[0][i], half[1][i]);
      }
    }
#pragma GCC unroll 2
    for (int x = 0; x < kHalf; ++x) {
      Vec<T> out[1][kTileOut];
      transform_output<T>(half[x], 1, out[0], 1);
#pragma GCC unroll 4
      for (int i = 0; i < kTileOut; ++i) out[0][i] += bias;
      finish_sums<1, kTileOut>(ending, out);
      const int64_t column = 2 * x + odd;
      if (column >= outputs.columns) continue;
      float* to = outputs.to + column * outputs.column_step;
#pragma GCC unroll 4
      for (int i = 0; i < kTileOut; ++i, to += outputs.row_step) {
        if (i < outputs.rows) put_vector(to, out[0][i], outputs.stream);
      }
    }
  }
  if (ending.activation != Activation::kSilu) return;
  for (int64_t i = 0; i < outputs.rows; ++i) {
    float* row = outputs.to + i * outputs.row_step;
    finish_rows<kTileOut>(ending, row, outputs.column_step, outputs.columns, kLanes<T>);
  }
}

// Writes [i][x][lane], the outputs of a run of tiles, to where their channels lie apart.
inline void bring_apart(const float* stage, int64_t channels, const TileGrid::At& at,
                        int64_t columns, const Strides4& strides, float* to) {
  for (int64_t i = 0; i < at.rows; ++i, to += strides.h, stage += kRunOutputs * kLanes<float>) {
    if (strides.w == 1) {
      transpose_widened(stage, kLanes<float>, channels, columns, columns, to, strides.c);
      continue;
    }
    for (int64_t x = 0; x < columns; ++x) {
      copy_narrowed(stage + x * kLanes<float>, channels, to + x * strides.w, strides.c);
    }
  }
}

// Transforms the sums of tiles [first, end) back and writes their outputs: `channels` of them, the
// first of which is that of dest and biases. sums[(tile - first) * tile_step + product *
// product_step] and biases are whole vectors; stage has room for those of a run. With `stream` past
// the caches, where vectors of channels are aligned.
inline void write_tiles(const TileGrid& grid, int64_t first, int64_t end, const float* sums,
                        int64_t tile_step, int64_t product_step, int64_t channels,
                        const float* biases, const Ending<float>& ending, float* stage,
                        const Strides4& strides, float* dest, bool stream = false) {
  constexpr int kWidth = kLanes<float>;
  const int64_t whole = strides.c == 1 ? channels / kWidth * kWidth : 0;
  int64_t count;
  for (int64_t tile = first; tile < end; tile += count) {
    count = grid.run_from(tile, end);
    const TileGrid::At at = grid.at(tile), last = grid.at(tile + count - 1);
    const int64_t step = tile_step_of(at);
    float* corner = dest + at.n * strides.n + at.h * strides.h + at.w * strides.w;
    for (int64_t c = 0; c < channels; c += kWidth) {
      const bool in_place = c < whole;
      float* to = in_place ? corner + c : stage;
      const int64_t row_step = in_place ? strides.h : kRunOutputs * kWidth;
      const int64_t column_step = in_place ? strides.w : kWidth;
      const Vec<float> bias = load(biases + c);
      for (int64_t x = 0; x < count; ++x) {
        transform_sums(sums + (tile - first + x) * tile_step + c, product_step, bias, ending,
                       {to + x * step * column_step, row_step, column_step, at.rows,
                        x + 1 < count ? at.columns : last.columns, in_place && stream});
      }
      if (!in_place) {
        bring_apart(stage, min_of(kWidth, channels - c), at, last.w + last.columns - at.w, strides,
                    corner + c * strides.c);
      }
    }
  }
}

}  // namespace
}  // namespace gdfast::cpu
