// The micro-kernel of Strassen's algorithm, in Winograd's form: a square of 2 x 2 tiles of sums, by
// seven products of tiles instead of eight.
//
//   C11 C12     A11 A12   B11 B12     S1 = A21 + A22   S2 = S1 - A11    S3 = A11 - A21
//   C21 C22  =  A21 A22 x B21 B22     S4 = A12 - S2
//                                     T1 = B12 - B11   T2 = B22 - T1    T3 = B22 - B12
//                                     T4 = B21 - T2
//
//   C11 = A11 B11 + A12 B21                    U = A11 B11 + S2 T2
//   C21 = U + S3 T3 + A22 T4
//   C22 = U + S3 T3 + S1 T1
//   C12 = U         + S1 T1 + S4 B22
//
// A has two tiles of rows and two halves of the channels, B these halves and two panels. Sums of
// operands are made before, once for all squares that need them; those of products stay in
// registers, but for three that L1 keeps for a moment. The products come in the order
//   A11 B11, A12 B21, S2 T2, S3 T3, A22 T4, S1 T1, S4 B22.
#pragma once

#include "tile_column.h"

namespace gdfast::cpu {
namespace {

// Operands of the seven products, in their order: places in what sums of operands are stored in.
enum SquareRows { kA11, kA12, kS2, kS3, kA22, kS1, kS4 };
enum SquarePanels { kB11, kB21, kT2, kT3, kT4, kT1, kB22 };
constexpr int kSquareProducts = 7;
constexpr int kSquareRows = 2 * kTileRows;
constexpr int kSquareWidth = 2 * kPanelWidth<float>;

struct SquareArgs {
  const float* rows;    // [kSquareProducts][kTileRows][half]
  const float* panels;  // [kSquareProducts][half][panel width]
  int64_t half;         // channels of a half, a multiple of 64
  float* const* out;    // [kSquareRows]
  int64_t column;       // of out, where the sums begin
  const float* start;   // [kSquareWidth], or null to add to what out holds
  // [kSquareRows], each to 2 * half values that are fetched meanwhile; or null.
  const float* const* ahead;
  Ending<float> ending;
};

// What is done with the sums when a product has been added to them.
struct SquareStep {
  bool begins;              // with sums of 0, in front of the product
  bool adds_kept;           // the first of what is kept
  int keeps;                // as the first or the second; or -1
  int tile;                 // of the square, which they are; or -1
  bool and_second = false;  // together with the second of what is kept
};
constexpr SquareStep kSquareSteps[kSquareProducts] = {
    {true, false, 0, -1},       // A11 B11
    {false, false, -1, 0},      // C11
    {true, true, 0, -1},        // U
    {true, false, 1, -1},       // S3 T3
    {false, true, -1, 2},       // C21
    {true, true, -1, 3, true},  // C22
    {false, false, -1, 1},      // C12
};

// Not inlined, as multiply_column is not.
__attribute__((noinline)) void multiply_square(const SquareArgs& args) {
  using V = Vec<float>;
  constexpr int kVectors = kMaxVectors, kLane = kLanes<float>, kWidth = kPanelWidth<float>;
  constexpr int64_t kLine = 64 / sizeof(float), kLinesAtOnce = 4;
  alignas(64) float kept[2][kTileRows][kWidth];
  const int64_t half = args.half;
  const float *rows = args.rows, *panel = args.panels;
  // 4 lines at each of 7 * half / 16 moments are more than the 12 rows of 2 * half / 16 have.
  const float* const* ahead = args.ahead;
  const float* const* const ahead_end = ahead == nullptr ? nullptr : ahead + kSquareRows;
  int64_t ahead_at = 0;
  V sum[kTileRows][kVectors] = {};
  for (const SquareStep& square_step : kSquareSteps) {
    float* const* out = args.out + square_step.tile / 2 * kTileRows;
    const int64_t column = args.column + square_step.tile % 2 * kWidth;
    if (kFetchesMore && square_step.tile >= 0) {
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) prefetch_to_write(out[i] + column + j * kLane);
      }
    }
    if (square_step.begins) {
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = V{};
      }
    }
    const float* row[kTileRows];
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) row[i] = rows + i * half;
    rows += kTileRows * half;
    int64_t at = 0;
    const auto step = [&]() __attribute__((always_inline)) {
      V line[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) line[j] = load(panel + j * kLane);
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
        V value = broadcast(row[i][at]);
        keep_in_register<float>(value);  // see multiply_tile
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) add_product<float>(sum[i][j], value, line[j]);
      }
      ++at;
      panel += kWidth;
    };
    while (at < half) {
      if (ahead != ahead_end) {
#pragma GCC unroll 4
        for (int i = 0; i < kLinesAtOnce; ++i) __builtin_prefetch(*ahead + ahead_at + i * kLine);
        ahead_at += kLinesAtOnce * kLine;
        if (ahead_at == 2 * half) {
          ahead_at = 0;
          ++ahead;
        }
      }
#pragma GCC unroll 1
      for (int64_t x = 0; x < kLine; x += 2) {
        step();
        step();
      }
    }
    if (square_step.adds_kept) {
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] += load(kept[0][i] + j * kLane);
      }
    }
    if (square_step.keeps >= 0) {
      float (*const to)[kWidth] = kept[square_step.keeps];
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) store<float>(to[i] + j * kLane, sum[i][j]);
      }
    }
    if (square_step.tile < 0) continue;
    const float* const start =
        args.start == nullptr ? nullptr : args.start + square_step.tile % 2 * kWidth;
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      float* const to = out[i] + column;
      const float* const from = start == nullptr ? to : start;
      V value[1][kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        value[0][j] = sum[i][j];
        if (square_step.and_second) value[0][j] += load(kept[1][i] + j * kLane);
        value[0][j] += load(from + j * kLane);
      }
      finish_sums<1, kVectors>(args.ending, value);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) store<float>(to + j * kLane, value[0][j]);
    }
  }
  if (args.ending.activation == Activation::kSilu) {
    float* sums[kSquareRows];
    for (int i = 0; i < kSquareRows; ++i) sums[i] = args.out[i] + args.column;
    silu_rows(sums, kSquareRows, kSquareWidth);
  }
}

}  // namespace
}  // namespace gdfast::cpu
