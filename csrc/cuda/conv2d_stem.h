// Convolution of images with few channels, a model's first layer: what its kernels share.
//
// A block makes a tile of output positions, rows x columns of one image. It copies the part of the
// input under their windows to shared memory, each number once, in rows of (column, channel): what
// one row of a filter sees of it is one stretch of S C numbers, whatever their layout was. Of each
// row of a filter that stretch, made up to 16 bytes, is what the product is summed over: for 7x7x3
// 7 x 24 numbers for the 147 that there are, where channels made up to 16 bytes would be 7 x 7 x 8.
#pragma once

#include "conv2d_launch.h"

namespace gdfast::cuda {

constexpr int kStemRows = 8, kStemColumns = 16, kStemPositions = kStemRows * kStemColumns;
constexpr int kStemFilters = 64;
using StemBlock = BlockShape<kStemPositions, kStemFilters, 2, 2, 1>;

struct StemTiles {
  Divisor of_image, columns;
  int32_t P, Q, total;
};

// Where a tile begins.
struct StemTile {
  int32_t image, p, q;
};

GDFAST_DEVICE StemTile tile_at(const StemTiles& tiles, int32_t index) {
  const Divided image = divide(index, tiles.of_image);
  const Divided row = divide(image.rest, tiles.columns);
  return {image.quotient, row.quotient * kStemRows, row.rest * kStemColumns};
}

// The positions of a tile in a tensor.
struct StemPositions {
  StemTile tile;
  int32_t P, Q;
  Steps bytes;
};

GDFAST_DEVICE bool exists(const StemPositions& a, int32_t index) {
  return a.tile.p + index / kStemColumns < a.P && a.tile.q + index % kStemColumns < a.Q;
}

GDFAST_DEVICE Place place_at(const StemPositions& a, int32_t index) {
  if (!exists(a, index)) return {0, kOutside, 0};
  const int32_t p = a.tile.p + index / kStemColumns, q = a.tile.q + index % kStemColumns;
  return {a.tile.image * a.bytes.outer + p * a.bytes.h + q * a.bytes.w, p, q};
}

// The part of the input under a tile's windows.
struct StemPatch {
  const unsigned char* input;
  Steps bytes;
  int64_t channel_bytes;
  Divisor channels;
  int32_t H, W, stride_h, stride_w, pad_h, pad_w;
  int32_t rows, row_values, row_bytes;
  int32_t step_bytes;  // from a position to its right neighbour
  int32_t copy_bytes;  // of all rows
};

// Copies it, with zeros outside of the image; what is between rows stays as it is. A second copy
// begins one number later. Each thread asks for several numbers before it waits for the first: of
// some rows, whose columns it works out once.
template <typename Element, int kThreads, int kCopies>
GDFAST_DEVICE void stage_patch(const StemPatch& a, const StemTile& tile, unsigned char* patch) {
  using Raw = typename Bits<sizeof(Element)>::Type;
  constexpr int kWarps = kThreads / kWarp, kRowsAtOnce = 8, kColumnsAtOnce = 2;
  const int32_t top = tile.p * a.stride_h - a.pad_h, left = tile.q * a.stride_w - a.pad_w;
  const unsigned char* const image = a.input + tile.image * a.bytes.outer;
  for (int first = warp_index(); first < a.rows; first += kWarps * kRowsAtOnce) {
    for (int index = warp_lane(); index < a.row_values; index += kWarp * kColumnsAtOnce) {
      Raw values[kColumnsAtOnce][kRowsAtOnce];
#pragma unroll
      for (int j = 0; j < kColumnsAtOnce; ++j) {
        const Divided column = divide(index + j * kWarp, a.channels);
        const int32_t w = left + column.quotient;
        const unsigned char* const from = image + (w * a.bytes.w + column.rest * a.channel_bytes);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          const int row = first + i * kWarps;
          const bool inside = row < a.rows && is_inside(a.H, a.W, top + row, w);
          values[j][i] =
              inside ? *reinterpret_cast<const Raw*>(from + (top + row) * a.bytes.h) : Raw{0};
        }
      }
#pragma unroll
      for (int j = 0; j < kColumnsAtOnce; ++j) {
        const int at = index + j * kWarp;
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          const int row = first + i * kWarps;
          if (row >= a.rows || at >= a.row_values) continue;
          Raw* const to = reinterpret_cast<Raw*>(patch + row * a.row_bytes) + at;
          to[0] = values[j][i];
          if constexpr (kCopies == 2) {
            reinterpret_cast<Raw*>(reinterpret_cast<unsigned char*>(to) + a.copy_bytes)[1] =
                values[j][i];
          }
        }
      }
    }
  }
}

// --- From a problem ---------------------------------------------------------------------------

inline StemTiles stem_tiles(const Conv2dProblem& p) {
  const int64_t rows = blocks_for(p.P, kStemRows), columns = blocks_for(p.Q, kStemColumns);
  return {Divisor::of(rows * columns), Divisor::of(columns), small(p.P), small(p.Q),
          small(p.N * rows * columns)};
}

// Of one row of a filter: its numbers, made up to a multiple of `lanes`.
inline int64_t stem_row(const Conv2dProblem& p, int64_t lanes) {
  return blocks_for(p.S * p.C, lanes) * lanes;
}

inline StemPatch stem_patch(const Conv2dProblem& p, const void* input) {
  const int64_t bytes = bytes_of(p.dtype), rows = (kStemRows - 1) * p.stride_h + p.R;
  const int64_t columns = (kStemColumns - 1) * p.stride_w;
  // Of the last position's stretch what makes it up lies within the row too, and room for the
  // second copy; rows begin at words.
  const int64_t row_bytes = blocks_for((columns * p.C + stem_row(p, 8) + 1) * bytes, 4) * 4;
  // Half of the banks away, the second copy answers while the first one does.
  const int64_t copy_bytes = blocks_for(rows * row_bytes, 128) * 128 + 64;
  return {static_cast<const unsigned char*>(input),
          image_steps(p.input, bytes),
          p.input.c * bytes,
          Divisor::of(p.C),
          small(p.H),
          small(p.W),
          small(p.stride_h),
          small(p.stride_w),
          small(p.pad_h),
          small(p.pad_w),
          small(rows),
          small((columns + p.S) * p.C),
          small(row_bytes),
          small(p.stride_w * p.C * bytes),
          small(copy_bytes)};
}

// Calls launch with the operands of what a problem is multiplied in.
template <typename Launch>
void with_operands(DType dtype, Precision precision, Launch&& launch) {
  if (dtype == DType::kBFloat16) return launch(HalfOperands<BFloat16>{});
  if (dtype == DType::kFloat16) return launch(HalfOperands<Half>{});
  if (precision == Precision::kTf32) return launch(Tf32Operands{});
  launch(Tf32x3Operands{});
}

}  // namespace gdfast::cuda
