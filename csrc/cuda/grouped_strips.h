// Groups of 8 channels on images of 28 x 28 (grouped_whole.h). A block takes eight groups of two
// images; each warp walks down 16 columns of one of them for two groups, and has their filters in
// registers. It has the last three rows of the input there too; two taps of a column, one below the
// other, are multiplied at a time.
#pragma once

#include "grouped_sums.h"
#include "grouped_whole.h"

namespace gdfast::cuda {
namespace {

constexpr int kStripColumns = 16, kStripsOfImage = 2;
constexpr int kStripBuffers = 3;  // of a strip's results
constexpr StoredBox kStripBox{1, 2, kStripColumns};
constexpr int kStripBoxBytes = kStripBox.rows * kStripColumns * kBoxRow;
using Strips = WholeImages<8, 2, 28, kStripsOfImage * kStripColumns, -1,
                           2 * kStripsOfImage * kStripBuffers * kStripBoxBytes, 20>;
constexpr int kStripThreads = Strips::kImages * kStripsOfImage * kUnits * kWarp;
constexpr int kRowsBetween = 3;  // that a warp may be behind before another one waits for it

#if defined(GDFAST_HOPPER)

using StripFilters = uint32_t[kTaps][2];  // of each half of 16 channels
using StripRow = uint32_t[3][4];          // by the column of the filter

template <bool kGradient>
GDFAST_DEVICE void load_strip_filters(StripFilters& right, int unit) {
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  const int first = (unit * kChannelsOfWarp + (matrix & 1) * 8 + line) * kBoxRow;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const int turned = kGradient ? kTaps - 1 - tap : tap;
    uint32_t both[4];
    load_filters(
        both,
        shared_memory() + box_of<Strips>(turned) + first + (line * 16 ^ byte_of<Strips>(turned)),
        kGradient);
    right[tap][0] = both[0];
    right[tap][1] = both[1];
  }
}

// A row of results, of the rows of the input above, in and below it, of which the first and the
// last may be missing.
GDFAST_DEVICE void multiply_strip(PairSums& sums, const StripRow& above, const StripRow& here,
                                  const StripRow& below, const StripFilters& right, int row) {
  const bool has_above = row > 0, has_below = row + 1 < Strips::kRows;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = half * 2;
      const auto two = [&](const StripRow& upper, const StripRow& lower, int r) {
        mma_m16n8k16<BFloat16>(sums[half],
                               {upper[s][i], upper[s][i + 1], lower[s][i], lower[s][i + 1]},
                               {right[r * 3 + s][half], right[r * 3 + 3 + s][half]});
      };
      if (!has_above) {
        two(here, below, 1);
        continue;
      }
      two(above, here, 0);
      if (!has_below) continue;
      mma_m16n8k8<BFloat16>(sums[half], {below[s][i], below[s][i + 1]}, right[6 + s][half]);
    }
  }
}

template <bool kGradient>
GDFAST_DEVICE void multiply_strips(const WholeArguments& a, int first_channel, int first_image) {
  const int strip = warp_index() / kUnits, unit = warp_index() % kUnits, lane = warp_lane();
  const int image = strip / kStripsOfImage, column = strip % kStripsOfImage * kStripColumns;
  const int matrix = lane / 8, chunk = unit * kChannelsOfWarp / 8;
  int pixels[3];  // of this lane, for ldmatrix, by the column of the filter
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    pixels[s] = chunk_at<Strips>(
        image * Strips::kColumns + column + (matrix & 1) * 8 + lane % 8 + s, chunk + (matrix >> 1));
  }
  unsigned char* const results =
      shared_memory() + Strips::kResultsAt + strip * kStripBuffers * kStripBoxBytes;
  const int written = swizzled(lane / 4, chunk) + lane % 4 * 4;
  const bool leads = unit == 0 && lane == 0;
  barrier_wait(filter_barrier<Strips>(), 0);
  StripFilters right;
  load_strip_filters<kGradient>(right, unit);
  StripRow rows[Strips::kRows];
  const auto finish = [&](int p) {
    PairSums sums{};
    multiply_strip(sums, rows[p > 0 ? p - 1 : 0], rows[p], rows[p + 1 < Strips::kRows ? p + 1 : p],
                   right, p);
    unsigned char* const to = results + p / kStripBox.rows % kStripBuffers * kStripBoxBytes;
    uint32_t words[4];
    pack_sums<BFloat16>(words, sums);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (p % kStripBox.rows * 2 + (i >> 1)) * kTileBytes + (written ^ (i & 1) * 16);
      *reinterpret_cast<uint32_t*>(to + at) = words[i];
    }
    if (p % kStripBox.rows + 1 < kStripBox.rows) return;
    stores_ready();
    // Whoever meets here may write to the next buffer: it has been read.
    if (leads) stores_wait_read<kStripBuffers - 2>();
    sync_threads_of(1 + strip, kUnits * kWarp);
    if (!leads) return;
    store_box(a.output, {first_channel, column, p + 1 - kStripBox.rows, first_image + image}, to);
    stores_commit();
  };
#pragma unroll
  for (int row = 0; row < Strips::kRows; ++row) {
    const int gone = row - kRowsBetween;
    if (gone >= 0 && gone < Strips::kAgain && this_thread() == 0) {
      barrier_wait(gone_barrier<Strips>(gone), 0);
      load_row<Strips>(a, first_channel, first_image, gone + Strips::kSlots);
    }
    barrier_wait(row_barrier(row), 0);
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      ldmatrix_x4(rows[row][s],
                  shared_memory() + row % Strips::kSlots * Strips::kRowBytes + pixels[s]);
    }
    if (row > 0) finish(row - 1);
    if (row < Strips::kAgain) {
      sync_warp();
      if (lane == 0) barrier_arrive(gone_barrier<Strips>(row));
    }
  }
  finish(Strips::kRows - 1);
  if (leads) stores_wait<0>();
}

#endif

template <bool kGradient>
GDFAST_KERNEL(kStripThreads, 1)
grouped_strips_kernel(GDFAST_GRID_CONSTANT const WholeArguments a) {
#if defined(GDFAST_HOPPER)
  const int first_channel = static_cast<int>(blockIdx.y) * kSlab;
  const int first_image = static_cast<int>(blockIdx.x) * Strips::kImages;
  if (this_thread() == 0) {
    load_whole<Strips, kStripThreads / kWarp>(a, first_channel, first_image);
  }
  sync_block();
  multiply_strips<kGradient>(a, first_channel, first_image);
#else
  static_cast<void>(a);
#endif
}

}  // namespace
}  // namespace gdfast::cuda
