// Depthwise convolution of half types in channels_last on the tensor cores: what its kernels share.
//
// A filter of one channel is a matrix for eight of them, with its numbers on the diagonal: a matrix
// instruction multiplies 16 positions by two taps of 8 channels. One in eight of its products is
// none with a zero, but it makes as many of these as four instructions of floating point, and takes
// half types as they are.
//
// A block has a slab of channels and some positions side by side: outputs of a row, of several
// images where rows are short. It walks down their rows. What a row of the image gives to the
// outputs that see it is added up in registers, where so many rows of sums as the filter has are
// alive at a time: pixels are loaded from shared memory once for all rows of the filter. A batch of
// rows is multiplied while the next ones are copied to shared memory.
//
//   plane   8 channels of a slab in shared memory
//   slot    16 bytes of a plane, a pixel. Images lie `pitch` slots apart; an output's position is
//           the slot of the first column that it sees
//   step    a row of the image that a piece's outputs see, from 0; output p begins at step p
//   batch   kSize steps, after which everything is in the registers again where it was
#pragma once

#include "depthwise.h"

namespace gdfast::cuda {

// What a block makes at a time. A wide slab is 96 bytes of a pixel: what is side by side in memory
// decides how many requests a byte takes.
template <int kPlanesOfSlab, int kPositionsOfBlock>
struct TensorTile {
  static constexpr int kPlanes = kPlanesOfSlab, kSlab = 8 * kPlanes;
  static constexpr int kPositions = kPositionsOfBlock;
  static constexpr int kWarps = kPositions / 16;  // of each group of channels

  // Slots of a plane that has at least so many: of chunks that are written at a time few lie in the
  // same banks.
  GDFAST_HOST_DEVICE constexpr int slots(int least) {
    return kPlanes == 2 ? (least + 3) / 8 * 8 + 4 : least | 1;
  }
};
using WideTile = TensorTile<6, 32>;
using NarrowTile = TensorTile<2, 64>;

// Images side by side, and the rows of outputs that blocks share: of the first images' first strip
// of columns from top to bottom, then of the next strip, and at last of the next images.
struct TensorWalk {
  int images, strip;  // outputs of a row of each
  int rows, rows_of_block;
  Divisor pitch;  // slots of each image
  Divisor high, strips;
};

// Rows of outputs down from (p, q) of images from n on.
struct TensorPiece {
  int n, p, q, rows;
};

GDFAST_DEVICE TensorPiece piece_at(const DepthwiseArguments& a, const TensorWalk& walk, int row,
                                   int end) {
  const Divided column = divide(row, walk.high), strip = divide(column.quotient, walk.strips);
  const int left = end - row, below = a.P - column.rest;
  return {strip.quotient * walk.images, column.rest, strip.rest * walk.strip,
          left < below ? left : below};
}

// Which image a slot or a position is of, and which column among those of a piece.
struct TensorColumn {
  int image, column;
};

GDFAST_DEVICE TensorColumn column_at(const TensorWalk& walk, int slot) {
  const Divided image = divide(slot, walk.pitch);
  return {image.quotient, image.rest};
}

// Which of a batch's rows there are to be copied: of the next `left` ones from the h-th of an image
// on, those within it.
template <int kSize>
GDFAST_DEVICE uint32_t rows_within(int h, int left, int H) {
  uint32_t rows = 0;
#pragma unroll
  for (int u = 0; u < kSize; ++u) {
    if (u < left && static_cast<unsigned>(h + u) < static_cast<unsigned>(H)) rows |= 1u << u;
  }
  return rows;
}

// The chunks that a thread copies of each row of a slab.
template <int kPlanes, int kSlots, int kThreads>
struct TensorRows {
  static constexpr int kCount = (kPlanes * kSlots - 1) / kThreads + 1;
  uint32_t offsets[kCount];  // elements from the row's first one
  uint32_t exists, inside;   // a flag for each: whether there is a slot, and a pixel of the piece

  GDFAST_DEVICE TensorRows of(const ImageStrides& strides, const TensorWalk& walk) {
    TensorRows rows;
    rows.exists = rows.inside = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * kThreads;
      const TensorColumn at = column_at(walk, index / kPlanes);
      rows.offsets[i] = static_cast<uint32_t>(at.image) * static_cast<uint32_t>(strides.n) +
                        static_cast<uint32_t>(at.column * strides.w + index % kPlanes * 8);
      opaque(rows.offsets[i]);
      // Columns beyond the last output of gradients have no slots.
      if (at.image < walk.images && index < kPlanes * kSlots) rows.exists |= 1u << i;
    }
    opaque(rows.exists);
    return rows;
  }

  // Those inside are so many images, and columns from the first to the last one, of `channels`.
  GDFAST_DEVICE void begin(TensorRows& rows, const TensorWalk& walk, int images, int first,
                           int last, int channels) {
    rows.inside = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int index = static_cast<int>(threadIdx.x) + i * kThreads;
      const TensorColumn at = column_at(walk, index / kPlanes);
      const bool inside = at.image < images && at.column >= first && at.column <= last &&
                          index % kPlanes * 8 < channels;
      if (inside) rows.inside |= 1u << i;
    }
  }

  // Begins to copy those of kSize rows from `from` on, `step` elements apart, that have a flag.
  template <int kSize, int kRowBytes, typename T>
  GDFAST_DEVICE void copy(const TensorRows& rows, const T* from, int step, uint32_t flags,
                          unsigned char* planes) {
    const int thread = static_cast<int>(threadIdx.x);
    unsigned char* const first = planes + (thread % kPlanes * kSlots + thread / kPlanes) * 16;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((rows.exists >> i & 1u) == 0) continue;
      const T* pixel = from + rows.offsets[i];
      const bool inside = (rows.inside >> i & 1u) != 0;
      unsigned char* const to = first + i * (kThreads / kPlanes) * 16;
#pragma unroll
      for (int u = 0; u < kSize; ++u) {
        if (flags >> u & 1u) cp_async_16(to + u * kRowBytes, pixel, inside);
        pixel += step;
      }
    }
  }

  // Zeros in the slots behind the images', which nothing is copied to.
  GDFAST_DEVICE void clear(const TensorWalk& walk, unsigned char* planes) {
    const int used = walk.images * static_cast<int>(walk.pitch.divisor), behind = kSlots - used;
    for (int i = static_cast<int>(threadIdx.x); i < kPlanes * behind; i += kThreads) {
      const int slot = i / behind * kSlots + used + i % behind;
      store_16(planes + slot * 16, {{0, 0, 0, 0}});
    }
  }
};

// `blocks` are those that run at a time.
template <typename Tile, int kSize>
TensorWalk tensor_walk(const DepthwiseArguments& a, int64_t blocks) {
  const int64_t strips = ceil_div(a.Q, Tile::kPositions), strip = ceil_div(a.Q, strips);
  const int64_t pitch = strip + kSize - 1, images = 1 + (Tile::kPositions - strip) / pitch;
  TensorWalk walk{};
  walk.images = static_cast<int>(images < a.N ? images : a.N);
  // Offsets among the images side by side have 32 bits.
  const auto reach = [&](const ImageStrides& strides) { return walk.images * strides.n; };
  if (reach(a.input) >= 1 << 30 || reach(a.output) >= 1 << 30) walk.images = 1;
  walk.pitch = Divisor::of(pitch);
  walk.strip = static_cast<int>(strip);
  walk.rows = static_cast<int>(ceil_div(a.N, walk.images) * strips * a.P);
  walk.high = Divisor::of(a.P);
  walk.strips = Divisor::of(strips);
  // Each slab has as many blocks; a piece's first rows are read for the piece above too.
  const int64_t slabs = ceil_div(a.C, Tile::kSlab), at_once = blocks > slabs ? blocks / slabs : 1;
  const int64_t share = ceil_div(walk.rows, at_once);
  walk.rows_of_block = static_cast<int>(share < kSize ? kSize : share);
  return walk;
}

template <typename Tile>
dim3 tensor_grid(const DepthwiseArguments& a, const TensorWalk& walk) {
  return dim3(static_cast<unsigned>(ceil_div(a.C, Tile::kSlab)),
              static_cast<unsigned>(ceil_div(walk.rows, walk.rows_of_block)));
}

// The kernels' launchers, for addresses that 16 divides and what there is nothing against, in tiles
// that are wide or narrow.
void depthwise_tensor(DType dtype, const DepthwiseArguments& arguments, bool wide,
                      const void* input, const void* weight, const void* bias, void* output,
                      uintptr_t stream);

// In how many splits `partial` gets the sums (depthwise_weight_sums.h).
int depthwise_tensor_splits(const DepthwiseArguments& arguments, bool wide);
void depthwise_tensor_grad_weight(DType dtype, const DepthwiseArguments& arguments, bool wide,
                                  const void* grad_output, const void* input, void* partial,
                                  uintptr_t stream);

}  // namespace gdfast::cuda
