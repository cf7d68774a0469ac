// From global memory to shared: one tile of an operand for each step of a matrix product.
//
// A tile has the rows and columns of its operand's axes; 16 bytes of a row, a chunk, are the unit
// of all copies. Of an operand that is transposed, the columns are the product's rows or columns
// and the rows are what it sums over; of others the columns are what it sums over. The product
// steps along that axis: places on the other one are computed once.
#pragma once

#include "conv2d_arguments.h"
#include "device.h"

namespace gdfast::cuda {

constexpr int kStepBytes = 64;  // of one row of what is summed over in a step

// A tile in shared memory. Chunks of a row change places with its number, so that the eight rows
// that a warp reads at a time lie in different banks.
template <int kBytesOfElement, int kOuterSize, bool kIsTransposed>
struct SharedTile {
  static constexpr int kBytes = kBytesOfElement;
  static constexpr int kLanes = 16 / kBytes;  // elements of a chunk
  static constexpr int kOuter = kOuterSize;
  static constexpr int kDepth = kStepBytes / kBytes;
  static constexpr bool kTransposed = kIsTransposed;
  static constexpr int kRows = kTransposed ? kDepth : kOuter;
  static constexpr int kColumns = kTransposed ? kOuter : kDepth;
  static constexpr int kRowBytes = kColumns * kBytes;
  static constexpr int kSize = kRows * kRowBytes;
};

template <typename Tile>
GDFAST_DEVICE int chunk_offset(int row, int chunk) {
  // Rows of 64 bytes: two of them share the 32 banks. Of wider ones each begins at bank 0. Elements
  // of four bytes of a transposed tile are read one by one, from four rows and two chunks of each.
  const int turn = Tile::kRowBytes == 64 ? (row >> 1) & 3
                   : Tile::kBytes == 2   ? row & 7
                                         : (row & 3) * 2;
  return row * Tile::kRowBytes + (chunk ^ turn) * 16;
}

// The offset of the element at this place of the outer axis and of the one that is summed over.
template <typename Tile>
GDFAST_DEVICE int element_offset(int outer, int depth) {
  const int row = Tile::kTransposed ? depth : outer, column = Tile::kTransposed ? outer : depth;
  return chunk_offset<Tile>(row, column / Tile::kLanes) + column % Tile::kLanes * Tile::kBytes;
}

// Which chunks of a tile a thread copies: one column of them, every kRowsAtOnce-th row.
template <typename Tile, int kThreads>
struct Share {
  static constexpr int kChunks = Tile::kRowBytes / 16;
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static constexpr int kPasses = Tile::kRows / kRowsAtOnce;
  static_assert(kThreads % kChunks == 0 && Tile::kRows % kRowsAtOnce == 0,
                "every thread copies as many chunks");
  static_assert(kRowsAtOnce % (Tile::kTransposed && Tile::kBytes != 2 ? 4 : 8) == 0,
                "in all rows of a thread chunks change places alike");
  static_assert(kRowsAtOnce % (Tile::kTransposed && Tile::kBytes != 2 ? 4 : 8) == 0,
                "chunks of a thread's rows have changed places alike");
};

GDFAST_DEVICE int this_thread() { return static_cast<int>(threadIdx.x); }

// One operand of a block: what a thread knows of its places.
template <typename Tile, int kThreads, bool kChunked, typename Rows, typename Columns>
struct Staged {
  using Its = Share<Tile, kThreads>;
  Operand<Rows, Columns> from;
  int32_t outer;  // where the block begins on the outer axis
  // Along the outer axis: of each row, or of the column if that is the outer axis. Of chunks the
  // offsets begin at address 0: it is one addition less for each.
  Place fixed[Tile::kTransposed ? 1 : Its::kPasses];
};

template <typename Tile, int kThreads, bool kChunked, typename Rows, typename Columns>
GDFAST_DEVICE Staged<Tile, kThreads, kChunked, Rows, Columns> staged(
    const Operand<Rows, Columns>& from, int group, int32_t outer) {
  using Its = Share<Tile, kThreads>;
  Staged<Tile, kThreads, kChunked, Rows, Columns> operand;
  operand.from = from;
  operand.from.data += group * from.group_bytes;
  operand.outer = outer;
  const int chunk = this_thread() % Its::kChunks, row = this_thread() / Its::kChunks;
  if constexpr (Tile::kTransposed) {
    operand.fixed[0] = place_at(from.columns, outer + chunk * Tile::kLanes);
  } else {
#pragma unroll
    for (int pass = 0; pass < Its::kPasses; ++pass) {
      operand.fixed[pass] = place_at(from.rows, outer + row + pass * Its::kRowsAtOnce);
    }
  }
  if constexpr (kChunked) {
    for (Place& place : operand.fixed) place.offset += reinterpret_cast<int64_t>(operand.from.data);
  }
  return operand;
}

// The raw bits of one element.
template <int kBytes>
struct Bits;
template <>
struct Bits<2> {
  using Type = uint16_t;
};
template <>
struct Bits<4> {
  using Type = uint32_t;
};
template <>
struct Bits<8> {
  using Type = uint64_t;
};

// Begins to copy the tile that starts at `depth` of what is summed over. Chunks arrive some time
// before the cp_async_wait that covers them returns; single elements are there at the next barrier.
template <typename Tile, int kThreads, bool kChunked, typename Rows, typename Columns>
GDFAST_DEVICE void stage(const Staged<Tile, kThreads, kChunked, Rows, Columns>& operand,
                         unsigned char* tile, int32_t depth) {
  using Its = Share<Tile, kThreads>;
  const auto& from = operand.from;
  const int chunk = this_thread() % Its::kChunks, row = this_thread() / Its::kChunks;
  constexpr int kPassBytes = Its::kRowsAtOnce * Tile::kRowBytes;
  unsigned char* const to = tile + chunk_offset<Tile>(row, chunk);
  const int32_t first_column = (Tile::kTransposed ? operand.outer : depth) + chunk * Tile::kLanes;
  const auto row_place = [&](int pass) {
    if constexpr (Tile::kTransposed) {
      return place_at(from.rows, depth + row + pass * Its::kRowsAtOnce);
    } else {
      return operand.fixed[pass];
    }
  };
  if constexpr (kChunked) {
    Place column;
    if constexpr (Tile::kTransposed) {
      column = operand.fixed[0];
    } else {
      column = place_at(from.columns, first_column);
    }
#pragma unroll
    for (int pass = 0; pass < Its::kPasses; ++pass) {
      const Place place = row_place(pass);
      cp_async_16(to + pass * kPassBytes,
                  reinterpret_cast<const void*>(place.offset + column.offset),
                  is_inside(from.height, from.width, place.h + column.h, place.w + column.w));
    }
  } else {
    using Element = typename Bits<Tile::kBytes>::Type;
    union {
      Element elements[Tile::kLanes];
      Pack16 pack;
    } chunks[Its::kPasses];
    Place rows[Its::kPasses];
#pragma unroll
    for (int pass = 0; pass < Its::kPasses; ++pass) rows[pass] = row_place(pass);
#pragma unroll
    for (int lane = 0; lane < Tile::kLanes; ++lane) {
      const Place column = place_at(from.columns, first_column + lane);
#pragma unroll
      for (int pass = 0; pass < Its::kPasses; ++pass) {
        const Place place = rows[pass];
        const bool inside =
            is_inside(from.height, from.width, place.h + column.h, place.w + column.w);
        const unsigned char* address = from.data + (place.offset + column.offset);
        chunks[pass].elements[lane] =
            inside ? *reinterpret_cast<const Element*>(address) : Element{0};
      }
    }
#pragma unroll
    for (int pass = 0; pass < Its::kPasses; ++pass) {
      store_16(to + pass * kPassBytes, chunks[pass].pack);
    }
  }
}

}  // namespace gdfast::cuda
