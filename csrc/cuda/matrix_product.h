// The product of two tiles in shared memory, added to sums in registers: on the tensor cores, or
// one multiplication at a time.
//
// Each way has
//   Element, Sum            what tiles hold, and what it sums up in
//   kThreads                of a block
//   Sums                    those of the block's sums that a thread has
//   multiply_add<TileA, TileB>(sums, a, b)
//   kMayRepeat              whether NaN among the sums may be wrong: then, all of them are made
//                           again by multiply_add<TileA, TileB, Careful>
//   flat(sums)              them as one array
//   for_each_pair(sums, f)  f(row, column, sum, sum of the next column); f may change them
#pragma once

#include "operands.h"
#include "stage_tile.h"

namespace gdfast::cuda {

// The sums that a block makes, and how its warps share them.
template <int kRowCount, int kColumnCount, int kWarpRowCount, int kWarpColumnCount, int kStageCount>
struct BlockShape {
  static constexpr int kM = kRowCount, kN = kColumnCount;
  static constexpr int kWarpRows = kWarpRowCount, kWarpColumns = kWarpColumnCount;
  static constexpr int kStages = kStageCount;
  static constexpr int kThreads = kWarp * kWarpRows * kWarpColumns;
};

// --- Tensor cores -----------------------------------------------------------------------------

// Four registers of operands: two halves of eight along the outer axis, two of 16 bytes along the
// depth. Those of a left operand count the outer half first, those of a right one the depth. They
// are the index-th 16 from `first` on along the outer axis.
template <typename Tile, bool kLeft>
GDFAST_DEVICE void load_operands(uint32_t (&raw)[4], const unsigned char* tile, int first,
                                 int index, int chunk) {
  const int lane = warp_lane(), outer = first + index * 16;
  if constexpr (Tile::kTransposed && Tile::kBytes == 4) {
    // ldmatrix transposes pairs of bytes alone.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int outer_half = kLeft ? i & 1 : i >> 1, depth_half = kLeft ? i >> 1 : i & 1;
      const int at = element_offset<Tile>(outer + outer_half * 8 + lane / 4,
                                          (chunk + depth_half) * Tile::kLanes + lane % 4);
      raw[i] = *reinterpret_cast<const uint32_t*>(tile + at);
    }
  } else {
    const int matrix = lane / 8, line = lane % 8;
    const int outer_half = kLeft ? matrix & 1 : matrix >> 1;
    const int depth_half = kLeft ? matrix >> 1 : matrix & 1;
    if constexpr (Tile::kTransposed) {
      const int row = (chunk + depth_half) * Tile::kLanes + line;
      const int column = outer / Tile::kLanes + outer_half;
      ldmatrix_x4_transposed(raw, tile + chunk_offset<Tile>(row, column));
    } else {
      // Sixteen rows on, chunks have changed places alike.
      const int at = chunk_offset<Tile>(first + outer_half * 8 + line, chunk + depth_half);
      ldmatrix_x4(raw, tile + at + index * 16 * Tile::kRowBytes);
    }
  }
}

template <typename Operands, typename Shape>
struct TensorCores {
  using Element = typename Operands::Element;
  using Sum = float;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr int kM = Shape::kM, kN = Shape::kN, kStages = Shape::kStages;
  static constexpr int kRows = kM / Shape::kWarpRows, kColumns = kN / Shape::kWarpColumns;
  static constexpr int kTerms = Operands::kTerms;
  using First = typename FirstTry<Operands>::type;
  using Careful = Operands;
  static constexpr bool kMayRepeat = !std::is_same_v<First, Operands>;

  struct Sums {
    float values[kRows / 16][kColumns / 8][4];
  };

  GDFAST_DEVICE int first_row() { return warp_index() / Shape::kWarpColumns * kRows; }
  GDFAST_DEVICE int first_column() { return warp_index() % Shape::kWarpColumns * kColumns; }

  using Flat = float[kRows * kColumns / kWarp];
  GDFAST_DEVICE Flat& flat(Sums& sums) { return reinterpret_cast<Flat&>(sums.values); }

  // `By` is First or, where that may have gone wrong, Operands.
  template <typename TileA, typename TileB, typename By = First>
  GDFAST_DEVICE void multiply_add(Sums& sums, const unsigned char* a, const unsigned char* b) {
    // Registers for what comes next there are not where many sums take several terms.
    [[maybe_unused]] constexpr int kAtOnce = kTerms == 1 || kRows <= 32 ? 2 : 1;
#pragma unroll kAtOnce
    for (int chunk = 0; chunk < kStepBytes / 16; chunk += 2) {
      uint32_t left[kRows / 16][kTerms][4];
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
        uint32_t raw[4];
        load_operands<TileA, true>(raw, a, first_row(), i, chunk);
        By::convert(raw, left[i]);
      }
#pragma unroll
      for (int j = 0; j < kColumns / 16; ++j) {
        uint32_t raw[4];
        load_operands<TileB, false>(raw, b, first_column(), j, chunk);
        uint32_t right[2][kTerms][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t pair[2] = {raw[half * 2], raw[half * 2 + 1]};
          By::convert(pair, right[half]);
        }
        multiply_add_pair<By>(sums.values, j * 2, left, right);
      }
    }
  }

  template <typename F>
  GDFAST_DEVICE void for_each_pair(Sums& sums, F&& f) {
    const int row = first_row() + warp_lane() / 4, column = first_column() + warp_lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
        float (&sum)[4] = sums.values[i][j];
        f(row + i * 16, column + j * 8, sum[0], sum[1]);
        f(row + i * 16 + 8, column + j * 8, sum[2], sum[3]);
      }
    }
  }
};

// --- Without them -----------------------------------------------------------------------------

// In the elements' own type: float64, and float32 that has to be just that.
template <typename T>
struct Plain {
  using Element = T;
  using Sum = T;
  static constexpr int kThreads = 256;
  static constexpr int kM = 64, kN = 64, kStages = 2;
  static constexpr int kSide = 16;  // threads along each axis
  static constexpr int kRows = kM / kSide, kPairs = kN / kSide / 2;
  static constexpr bool kMayRepeat = false;

  struct Sums {
    T values[kRows][kPairs][2];
  };

  GDFAST_DEVICE int first_row() { return this_thread() / kSide; }
  GDFAST_DEVICE int first_column() { return this_thread() % kSide * 2; }

  using Flat = T[kRows * kPairs * 2];
  GDFAST_DEVICE Flat& flat(Sums& sums) { return reinterpret_cast<Flat&>(sums.values); }

  template <typename Tile>
  GDFAST_DEVICE T element(const unsigned char* tile, int outer, int depth) {
    return *reinterpret_cast<const T*>(tile + element_offset<Tile>(outer, depth));
  }

  template <typename TileA, typename TileB>
  GDFAST_DEVICE void multiply_add(Sums& sums, const unsigned char* a, const unsigned char* b) {
#pragma unroll 2
    for (int depth = 0; depth < TileA::kDepth; ++depth) {
      T left[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) left[i] = element<TileA>(a, first_row() + i * kSide, depth);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const T right = element<TileB>(b, first_column() + j * 2 * kSide + half, depth);
#pragma unroll
          for (int i = 0; i < kRows; ++i) sums.values[i][j][half] += left[i] * right;
        }
      }
    }
  }

  template <typename F>
  GDFAST_DEVICE void for_each_pair(Sums& sums, F&& f) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        f(first_row() + i * kSide, first_column() + j * 2 * kSide, sums.values[i][j][0],
          sums.values[i][j][1]);
      }
    }
  }
};

}  // namespace gdfast::cuda
