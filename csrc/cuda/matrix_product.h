// The product of two tiles in shared memory, added to sums in registers: on the tensor cores, or
// one multiplication at a time.
//
// Each way has
//   Element, Sum            what tiles hold, and what it sums up in
//   kThreads                of a block
//   Sums                    those of the block's sums that a thread has
//   multiply_add<TileA, TileB>(sums, a, b)
//   flat(sums)              them as one array
//   for_each_pair(sums, f)  f(row, column, sum, sum of the next column); f may change them
#pragma once

#include <cmath>
#include <type_traits>

#include "stage_tile.h"

namespace gdfast::cuda {

GDFAST_DEVICE float float_of(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both{bits};
  return both.value;
}

GDFAST_DEVICE uint32_t bits_of(float value) {
  union {
    float value;
    uint32_t bits;
  } both{value};
  return both.bits;
}

// The sums that a block makes, and how its warps share them.
template <int kRowCount, int kColumnCount, int kWarpRowCount, int kWarpColumnCount, int kStageCount>
struct BlockShape {
  static constexpr int kM = kRowCount, kN = kColumnCount;
  static constexpr int kWarpRows = kWarpRowCount, kWarpColumns = kWarpColumnCount;
  static constexpr int kStages = kStageCount;
  static constexpr int kThreads = kWarp * kWarpRows * kWarpColumns;
};

// --- Tensor cores -----------------------------------------------------------------------------

// How elements become operands of the matrix instruction. A 16 x 8 sum takes 32 bytes of both
// operands' depth; kTerms instructions of it make one product.
template <typename T>
struct HalfOperands {
  using Element = T;
  static constexpr int kTerms = 1;
  template <int kCount>
  GDFAST_DEVICE void convert(const uint32_t (&raw)[kCount], uint32_t (&operands)[1][kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) operands[0][i] = raw[i];
  }
  GDFAST_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[1][4],
                                  const uint32_t (&b)[1][2]) {
    mma_m16n8k16<T>(sum, a[0], b[0]);
  }
};

struct Tf32Operands {
  using Element = float;
  static constexpr int kTerms = 1;
  template <int kCount>
  GDFAST_DEVICE void convert(const uint32_t (&raw)[kCount], uint32_t (&operands)[1][kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) operands[0][i] = to_tf32(float_of(raw[i]));
  }
  GDFAST_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[1][4],
                                  const uint32_t (&b)[1][2]) {
    mma_m16n8k8_tf32(sum, a[0], b[0]);
  }
};

// Nearly float32: each number is the sum of two in TF32, and of their four products only that of
// the two rests, 2^-22 of the whole, is left out. Tensor cores cut off what does not fit a sum;
// over many steps that adds up, so that here they sum eight products and no more.
//
// A number that is not finite has no rest: corrections that it takes part in are left out, and the
// product of the larger parts is inf or NaN as float32's would be. Numbers within 2^-12 of the
// largest are infinite in TF32, and their products too.
struct Tf32x3Operands {
  using Element = float;
  static constexpr int kTerms = 2;
  template <int kCount>
  GDFAST_DEVICE void convert(const uint32_t (&raw)[kCount], uint32_t (&operands)[2][kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float value = float_of(raw[i]);
      operands[0][i] = to_tf32(value);
      operands[1][i] = to_tf32(value - float_of(operands[0][i]));
    }
  }
  GDFAST_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[2][4],
                                  const uint32_t (&b)[2][2]) {
    float part[4] = {0, 0, 0, 0};
    mma_m16n8k8_tf32(part, a[1], b[0]);
    mma_m16n8k8_tf32(part, a[0], b[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) part[i] = fabsf(part[i]) < INFINITY ? part[i] : 0;
    mma_m16n8k8_tf32(part, a[0], b[0]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }
};

// The same three products by fewer instructions, which is what bounds them: a number is rounded by
// an addition, and nobody looks for what is not finite. Of such a number the rest is NaN, and so is
// each sum that it takes part in. A block that finds a NaN sums again, with the operands above.
struct QuickTf32x3Operands {
  using Element = float;
  static constexpr int kTerms = 2;
  template <int kCount>
  GDFAST_DEVICE void convert(const uint32_t (&raw)[kCount], uint32_t (&operands)[2][kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      operands[0][i] = (raw[i] + 0x1000u) & 0xffffe000u;
      // Tensor cores cut the rest off after 11 of its 12 bits.
      operands[1][i] = bits_of(float_of(raw[i]) - float_of(operands[0][i]));
    }
  }
};

// How a loop multiplies first.
template <typename Operands>
struct FirstTry {
  using type = Operands;
};
template <>
struct FirstTry<Tf32x3Operands> {
  using type = QuickTf32x3Operands;
};

// sums[..][column + half] += left right[half]
template <typename Operands, int kRows, int kColumns>
GDFAST_DEVICE void multiply_add_pair(float (&sums)[kRows][kColumns][4], int column,
                                     const uint32_t (&left)[kRows][Operands::kTerms][4],
                                     const uint32_t (&right)[2][Operands::kTerms][2]) {
  if constexpr (std::is_same_v<Operands, QuickTf32x3Operands>) {
    // Each product waits for the one before it: those of four sums take turns.
    constexpr int kHalves = kRows > 2 ? 1 : 2;
#pragma unroll
    for (int first = 0; first < 2; first += kHalves) {
      float parts[kRows][kHalves][4] = {};
#pragma unroll
      for (int product = 0; product < 3; ++product) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            mma_m16n8k8_tf32(parts[i][half], left[i][product == 0],
                             right[first + half][product == 1]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][column + first + half][j] += parts[i][half][j];
        }
      }
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        Operands::multiply_add(sums[i][column + half], left[i], right[half]);
      }
    }
  }
}

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
