// Convolution in groups of few channels, of half types in channels_last: what its kernels share.
//
// A block takes a slab of 64 channels, some groups side by side, and walks over tiles of positions:
// 8 rows by 8 or 16 columns. Pixels that a tile reads are copied to shared memory while the tile
// before it is multiplied. A warp multiplies 8 x 8 positions. Of these the matrix instruction takes
// 16 at a time: 8 of a row, and those 4 rows below. So what is loaded once for such a pair of rows
// of the input serves all rows of a filter, whose pairs of positions lie one higher each.
#pragma once

#include "stage_tile.h"
#include "vectors.h"

namespace gdfast::cuda {

constexpr int kSlab = 64;  // channels
constexpr int kSide = 8;   // of the positions of a warp
constexpr int kPairs = kSide / 2;
// An odd number of chunks: eight neighbours that are read at a time lie in different banks.
constexpr int kPixelBytes = kSlab * 2 + 16;
constexpr int kGroupedThreads = 256;
constexpr int kChannelsOfWarp = 16;
// What a block may have on every GPU from compute capability 8.0 on; 8.6 has no more.
constexpr int64_t kGroupedMemory = 99 * 1024;

// A tile's rows are kSide, its columns `parts` times as many.
struct GroupedTiles {
  Divisor of_image, columns;
  int32_t parts, total;
};

// Where a tile begins.
struct GroupedTile {
  int32_t image, row, column;
};

GDFAST_DEVICE GroupedTile tile_at(const GroupedTiles& tiles, int32_t index) {
  const Divided image = divide(index, tiles.of_image);
  const Divided row = divide(image.rest, tiles.columns);
  return {image.quotient, row.quotient * kSide, row.rest * kSide * tiles.parts};
}

// The pixels that a tile reads; offsets within an image have 32 bits.
struct GroupedPatch {
  const unsigned char* data;
  int64_t image_bytes;
  int32_t h_bytes, w_bytes;
  int32_t H, W, C;
  int32_t step_h, step_w, pad_h, pad_w;
  Divisor columns;
  int32_t half_rows, half_pixels;
};

// Begins to copy a slab of them, with zeros outside of the image and beyond its channels. Most of
// the work is to tell where a pixel is: a thread copies two in a column, half of the rows apart.
GDFAST_DEVICE void stage_pixels(const GroupedPatch& a, const GroupedTile& tile,
                                int32_t first_channel, unsigned char* patch) {
  constexpr int kChunks = kSlab / 8;
  const int chunk = this_thread() % kChunks, threads = static_cast<int>(blockDim.x);
  const int32_t channel = first_channel + chunk * 8;
  const int32_t top = tile.row * a.step_h - a.pad_h, left = tile.column * a.step_w - a.pad_w;
  const unsigned char* const image = a.data + (tile.image * a.image_bytes + channel * 2);
  const int32_t height = channel < a.C ? a.H : 0;
  for (int pixel = this_thread() / kChunks; pixel < a.half_pixels; pixel += threads / kChunks) {
    const Divided row = divide(pixel, a.columns);
    const int32_t h = top + row.quotient, w = left + row.rest;
    unsigned char* const to = patch + (pixel * kPixelBytes + chunk * 16);
    const unsigned char* const from = image + (h * a.h_bytes + w * a.w_bytes);
    cp_async_16(to, from, is_inside(height, a.W, h, w));
    cp_async_16(to + a.half_pixels * kPixelBytes, from + a.half_rows * a.h_bytes,
                is_inside(height, a.W, h + a.half_rows, w));
  }
}

// Calls multiply(tile, buffer) for every gridDim.x-th tile; stage(tile, buffer) begins to copy what
// it takes: a tile ahead where there are two buffers.
template <typename Stage, typename Multiply>
GDFAST_DEVICE void walk_tiles(const GroupedTiles& tiles, bool two_buffers, Stage&& stage,
                              Multiply&& multiply) {
  const int64_t first = blockIdx.x, step = gridDim.x;
  int buffer = 0;
  for (int64_t index = two_buffers ? first - step : first; index < tiles.total; index += step) {
    const int64_t ahead = two_buffers ? index + step : index;
    if (ahead < tiles.total) stage(tile_at(tiles, static_cast<int32_t>(ahead)), buffer);
    cp_async_commit();
    if (two_buffers) {
      buffer ^= 1;
      if (index < first) continue;
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    sync_block();
    multiply(tile_at(tiles, static_cast<int32_t>(index)), buffer);
    sync_block();  // nobody reads the buffer any more
  }
}

// --- From a problem ---------------------------------------------------------------------------

// Tiles of so many parts over the positions of an output.
inline GroupedTiles grouped_tiles(const Conv2dProblem& p, int64_t parts) {
  const int64_t rows = ceil_div(p.P, kSide), columns = ceil_div(p.Q, kSide * parts);
  return {Divisor::of(rows * columns), Divisor::of(columns), small(parts),
          small(p.N * rows * columns)};
}

// More than one part halves what tiles read twice, where there are as many columns.
inline int64_t most_parts(const Conv2dProblem& p) { return p.Q > kSide ? 2 : 1; }

inline int64_t window_columns(const Conv2dProblem& p, int64_t parts) {
  return (kSide * parts - 1) * p.stride_w + p.S;
}

// In two halves, the second of which may end a row later than what is read.
inline int64_t half_of_window(const Conv2dProblem& p) {
  return ceil_div((kSide - 1) * p.stride_h + p.R, 2);
}

inline int64_t window_bytes(const Conv2dProblem& p, int64_t parts) {
  return 2 * half_of_window(p) * window_columns(p, parts) * kPixelBytes;
}

// Of so much shared memory and so many threads, with the registers that kernels may have.
inline int64_t grouped_blocks_of_multiprocessor(int64_t bytes, int64_t threads) {
  constexpr int64_t kMemory = 200 * 1024, kThreads = 2 * kGroupedThreads;
  const int64_t by_memory = kMemory / bytes, by_threads = kThreads / threads;
  const int64_t blocks = by_memory < by_threads ? by_memory : by_threads;
  return blocks < 1 ? 1 : blocks;
}

inline GroupedPatch window_patch(const Conv2dProblem& p, const void* input, int64_t parts) {
  return {static_cast<const unsigned char*>(input),
          p.input.n * 2,
          small(p.input.h * 2),
          small(p.input.w * 2),
          small(p.H),
          small(p.W),
          small(p.C),
          small(p.stride_h),
          small(p.stride_w),
          small(p.pad_h),
          small(p.pad_w),
          Divisor::of(window_columns(p, parts)),
          small(half_of_window(p)),
          small(half_of_window(p) * window_columns(p, parts))};
}

}  // namespace gdfast::cuda
