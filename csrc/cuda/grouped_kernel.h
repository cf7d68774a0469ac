// The kernel of grouped.cu.
#pragma once

#include "conv2d.h"
#include "grouped.h"
#include "grouped_filters.h"
#include "grouped_sums.h"

namespace gdfast::cuda {
namespace {

struct Arguments {
  GroupedPatch patch;
  GroupedTiles tiles;
  bool two_buffers;
  int32_t patches_at, patch_bytes;  // in shared memory, after the filters
  int32_t R, S;
  GroupedFilters filters;
  GroupedOutput output;
};

// Where a warp finds what it multiplies: 16 channels of the slab that it makes, 8 columns of them.
struct Operands {
  int pixels, row_bytes;  // in a patch, of this lane for ldmatrix
  FilterPlaces filters;
  int steps;  // of 16 channels that are summed over
};

template <bool kWide>
GDFAST_DEVICE Operands operands_of(const Arguments& a, int channel, int part) {
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  const int high = matrix >> 1, low = matrix & 1, group = a.filters.group;
  const int first_of_group = kWide ? channel / group * group : channel;
  const int columns = static_cast<int>(a.patch.columns.divisor);
  Operands at;
  at.row_bytes = columns * kPixelBytes;
  at.pixels = low * kPairs * a.patch.step_h * at.row_bytes +
              (part * kSide + line) * a.patch.step_w * kPixelBytes + first_of_group * 2 + high * 16;
  at.filters = filter_places<kWide>(a.filters, channel, first_of_group);
  at.steps = kWide ? group / 16 : 1;
  return at;
}

// Sixteen positions by sixteen channels: sums over 16 channels or, of groups that have fewer, over
// the eight that both halves of the sums have for themselves.
template <typename T, bool kWide>
GDFAST_DEVICE void multiply_add(float (&sums)[2][4], const uint32_t (&left)[4],
                                const uint32_t (&right)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kWide) {
      mma_m16n8k16<T>(sums[half], left, {right[half * 2], right[half * 2 + 1]});
    } else {
      mma_m16n8k8<T>(sums[half], {left[half * 2], left[half * 2 + 1]}, right[half]);
    }
  }
}

using Sums = PairSums[kPairs];

// Filters of three rows and stride 1: six pairs of rows of the input, each loaded once for all.
template <typename T, bool kWide>
GDFAST_DEVICE void multiply_three_rows(Sums& sums, const Arguments& a, const Operands& at,
                                       const unsigned char* patch, const unsigned char* filters) {
  constexpr int kRows = 3;
#pragma unroll 1
  for (int s = 0; s < a.S; ++s) {
#pragma unroll 1
    for (int step = 0; step < at.steps; ++step) {
      const unsigned char* const pixels = patch + (at.pixels + s * kPixelBytes + step * 32);
      uint32_t left[kPairs + kRows - 1][4];
#pragma unroll
      for (int h = 0; h < kPairs + kRows - 1; ++h) {
        ldmatrix_x4(left[h], pixels + h * at.row_bytes);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        uint32_t right[4];
        const int tap =
            at.filters.first + (r * a.S + s) * at.filters.tap_bytes + step * at.filters.step_bytes;
        load_filters(right, filters + tap, a.filters.gradient);
#pragma unroll
        for (int p = 0; p < kPairs; ++p) multiply_add<T, kWide>(sums[p], left[p + r], right);
      }
    }
  }
}

template <typename T, bool kWide>
GDFAST_DEVICE void multiply_any_rows(Sums& sums, const Arguments& a, const Operands& at,
                                     const unsigned char* patch, const unsigned char* filters) {
  const int pair_bytes = a.patch.step_h * at.row_bytes;
#pragma unroll 1
  for (int r = 0; r < a.R; ++r) {
#pragma unroll 1
    for (int s = 0; s < a.S; ++s) {
#pragma unroll 1
      for (int step = 0; step < at.steps; ++step) {
        const unsigned char* const pixels =
            patch + (at.pixels + r * at.row_bytes + s * kPixelBytes + step * 32);
        uint32_t right[4];
        const int tap =
            at.filters.first + (r * a.S + s) * at.filters.tap_bytes + step * at.filters.step_bytes;
        load_filters(right, filters + tap, a.filters.gradient);
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          uint32_t left[4];
          ldmatrix_x4(left, pixels + p * pair_bytes);
          multiply_add<T, kWide>(sums[p], left, right);
        }
      }
    }
  }
}

// One sum over the group's channels alone.
template <typename T>
GDFAST_DEVICE float sum_of_group(const Arguments& a, int row, int column, int channel,
                                 const unsigned char* patch, const unsigned char* filters) {
  const int columns = static_cast<int>(a.patch.columns.divisor), group = a.filters.group;
  const int first = channel / group * group;
  float sum = 0;
  for (int tap = 0; tap < a.filters.taps; ++tap) {
    const Divided at = divide(tap, a.filters.columns);
    const int pixel =
        (row * a.patch.step_h + at.quotient) * columns + column * a.patch.step_w + at.rest;
    for (int other = first; other < first + group; ++other) {
      sum += to_float(reinterpret_cast<const T*>(patch + pixel * kPixelBytes)[other]) *
             filter_element<T>(a.filters, channel, other, tap, filters);
    }
  }
  return sum;
}

template <typename T, bool kWide, bool kThreeRows>
GDFAST_KERNEL(kGroupedThreads, 2)
grouped_kernel(GDFAST_GRID_CONSTANT const Arguments a) {
  unsigned char* const filters = shared_memory();
  unsigned char* const patches = shared_memory() + a.patches_at;
  const auto first_channel = static_cast<int32_t>(blockIdx.y) * kSlab;
  const int channel = warp_index() % (kSlab / kChannelsOfWarp) * kChannelsOfWarp;
  const int part = warp_index() / (kSlab / kChannelsOfWarp);
  const Operands at = operands_of<kWide>(a, channel, part);
  const LaneOutput lane = lane_output(a.output, first_channel + channel, kPairs);
  stage_filters<T>(a.filters, first_channel, filters, static_cast<int>(blockDim.x));
  walk_tiles(
      a.tiles, a.two_buffers,
      [&](const GroupedTile& tile, int buffer) {
        stage_pixels(a.patch, tile, first_channel, patches + buffer * a.patch_bytes);
      },
      [&](const GroupedTile& tile, int buffer) {
        const unsigned char* const patch = patches + buffer * a.patch_bytes;
        Sums sums;
        float (&all)[kPairs * 8] = flat(sums);
#pragma unroll
        for (float& sum : all) sum = 0;
        if constexpr (kThreeRows) {
          multiply_three_rows<T, kWide>(sums, a, at, patch, filters);
        } else {
          multiply_any_rows<T, kWide>(sums, a, at, patch, filters);
        }
        if constexpr (!kWide) {
          if (a.filters.group < 8) {
            mend(all, [&](int pair, int second, int column, int within) {
              return sum_of_group<T>(a, pair + second * kPairs, part * kSide + column,
                                     channel + within, patch, filters);
            });
          }
        }
        end_sums<T>(all, a.output, first_channel + channel);
        write_sums<T>(sums, a.output, lane, tile.image, tile.row, tile.column + part * kSide);
      });
}

}  // namespace
}  // namespace gdfast::cuda
