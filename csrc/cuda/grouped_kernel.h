// The kernel of grouped.cu.
#pragma once

#include "activation.h"
#include "conv2d.h"
#include "grouped.h"

namespace gdfast::cuda {
namespace {

struct Arguments {
  GroupedPatch patch;
  GroupedTiles tiles;
  bool two_buffers, gradient;
  int32_t patches_at, patch_bytes;  // in shared memory, after the filters
  int32_t group;                    // its channels
  int32_t R, S;
  const unsigned char* weight;
  int64_t filter_bytes;
  Steps weight_bytes;  // of channel, row and column
  bool weight_in_chunks;
  Divisor filter_chunks, tap_chunks, columns;  // of a filter, of a tap; taps of a row
  int32_t weight_row_bytes;                    // of a filter in shared memory
  unsigned char* output;
  int64_t image_bytes;
  int32_t h_bytes, w_bytes, P, Q;
  const void* bias;
  Activation activation;
  double negative_slope;
};

// Begins to copy the slab's filters: rows of (tap, channel), where groups of less than 8 channels
// are made up to 8 by zeros in the place of their neighbours.
template <typename T>
GDFAST_DEVICE void stage_filters(const Arguments& a, int32_t first_filter, unsigned char* filters) {
  const int chunks = static_cast<int>(a.filter_chunks.divisor);
  for (int i = this_thread(); i < kSlab * chunks; i += static_cast<int>(blockDim.x)) {
    const Divided filter = divide(i, a.filter_chunks), tap = divide(filter.rest, a.tap_chunks);
    const Divided row = divide(tap.quotient, a.columns);
    const bool exists = first_filter + filter.quotient < a.patch.C;
    const unsigned char* const from =
        a.weight + ((first_filter + filter.quotient) * a.filter_bytes +
                    row.quotient * a.weight_bytes.h + row.rest * a.weight_bytes.w);
    unsigned char* const to = filters + filter.quotient * a.weight_row_bytes + filter.rest * 16;
    if (a.weight_in_chunks) {
      cp_async_16(to, from + tap.rest * 16, exists);
      continue;
    }
    const int before = a.group < 8 ? filter.quotient % 8 / a.group * a.group : 0;
    union {
      uint16_t elements[8];
      Pack16 pack;
    } values;
#pragma unroll
    for (int lane = 0; lane < 8; ++lane) {
      const int channel = tap.rest * 8 + lane - before;
      const bool valid = exists && channel >= 0 && channel < a.group;
      values.elements[lane] =
          valid ? *reinterpret_cast<const uint16_t*>(from + channel * a.weight_bytes.outer) : 0;
    }
    store_16(to, values.pack);
  }
}

// Where a warp finds what it multiplies: 16 channels of the slab that it makes, 8 columns of them.
struct Operands {
  int pixels, row_bytes;               // in a patch, of this lane for ldmatrix
  int filters, tap_bytes, step_bytes;  // in the filters
  int steps;                           // of 16 channels that are summed over
};

template <bool kWide>
GDFAST_DEVICE Operands operands_of(const Arguments& a, int channel, int part) {
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  const int high = matrix >> 1, low = matrix & 1;
  const int first_of_group = kWide ? channel / a.group * a.group : channel;
  const int columns = static_cast<int>(a.patch.columns.divisor);
  Operands at;
  at.row_bytes = columns * kPixelBytes;
  at.pixels = low * kPairs * a.patch.step_h * at.row_bytes +
              (part * kSide + line) * a.patch.step_w * kPixelBytes + first_of_group * 2 + high * 16;
  at.tap_bytes = static_cast<int>(a.tap_chunks.divisor) * 16;
  at.steps = kWide ? a.group / 16 : 1;
  int row = channel + low * 8 + line, chunk = 0;
  at.step_bytes = 32;
  if (kWide && a.gradient) {
    row = first_of_group + low * 8 + line;
    chunk = (channel - first_of_group) / 8 + high;
    at.step_bytes = 16 * a.weight_row_bytes;
  } else if (kWide) {
    row = channel + high * 8 + line;
    chunk = low;
  }
  at.filters = row * a.weight_row_bytes + chunk * 16;
  if (a.gradient) {
    at.filters += (a.R * a.S - 1) * at.tap_bytes;
    at.tap_bytes = -at.tap_bytes;
  }
  return at;
}

GDFAST_DEVICE void load_filters(uint32_t (&right)[4], const unsigned char* from, bool gradient) {
  if (gradient) {
    ldmatrix_x4_transposed(right, from);
  } else {
    ldmatrix_x4(right, from);
  }
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

using Sums = float[kPairs][2][4];

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
        const int tap = at.filters + (r * a.S + s) * at.tap_bytes + step * at.step_bytes;
        load_filters(right, filters + tap, a.gradient);
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
        const int tap = at.filters + (r * a.S + s) * at.tap_bytes + step * at.step_bytes;
        load_filters(right, filters + tap, a.gradient);
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
  const int columns = static_cast<int>(a.patch.columns.divisor), taps = a.R * a.S;
  const int first = channel / a.group * a.group;
  float sum = 0;
  for (int tap = 0; tap < taps; ++tap) {
    const Divided at = divide(tap, a.columns);
    const int pixel =
        (row * a.patch.step_h + at.quotient) * columns + column * a.patch.step_w + at.rest;
    for (int other = first; other < first + a.group; ++other) {
      const int filter = a.gradient ? other : channel, within = a.gradient ? channel : other;
      const int number = (a.gradient ? taps - 1 - tap : tap) * 8 + within % 8;
      sum += to_float(reinterpret_cast<const T*>(patch + pixel * kPixelBytes)[other]) *
             to_float(reinterpret_cast<const T*>(filters + filter * a.weight_row_bytes)[number]);
    }
  }
  return sum;
}

using FlatSums = float[kPairs * 8];

// The zeros between small groups make NaN of a neighbour's infinities: sums that are NaN are made
// again without them.
template <typename T>
GDFAST_DEVICE void mend(FlatSums& sums, const Arguments& a, int channel, int part,
                        const unsigned char* patch, const unsigned char* filters) {
  float zeros = 0;
#pragma unroll
  for (int i = 0; i < kPairs * 8; ++i) zeros += sums[i] * 0;
  if (zeros == 0) return;  // all are finite
  uint32_t wrong = 0;
#pragma unroll
  for (int i = 0; i < kPairs * 8; ++i) wrong |= sums[i] == sums[i] ? 0u : 1u << i;
  for (int i = 0; wrong != 0; ++i, wrong >>= 1) {
    if ((wrong & 1) == 0) continue;
    const float sum =
        sum_of_group<T>(a, i / 8 + (i >> 1) % 2 * kPairs, part * kSide + warp_lane() / 4,
                        channel + (i >> 2) % 2 * 8 + warp_lane() % 4 * 2 + i % 2, patch, filters);
#pragma unroll
    for (int j = 0; j < kPairs * 8; ++j) sums[j] = i == j ? sum : sums[j];
  }
}

// Of four lanes side by side, each has a word for each: these go to whom they are for.
GDFAST_DEVICE void exchange_words(uint32_t (&words)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (warp_lane() & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      uint32_t &low = words[i], &high = words[i + distance];
      const auto sent = static_cast<int>(upper ? low : high);
      const auto received = static_cast<uint32_t>(shuffle_xor(sent, distance));
      (upper ? low : high) = received;
    }
  }
}

template <typename T>
GDFAST_DEVICE void write_sums(const FlatSums& sums, const Arguments& a, const GroupedTile& tile,
                              int channel, int part) {
  const int quarter = warp_lane() % 4;  // of two pixels by sixteen channels
  const int32_t q = tile.column + part * kSide + warp_lane() / 4;
  const int32_t first = channel + (quarter & 1) * 8;
  unsigned char* const to = a.output + (tile.image * a.image_bytes + q * a.w_bytes + first * 2);
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = p * 8 + (i & 1) * 4 + (i >> 1) * 2;
      words[i] = pack_two<T>(sums[at], sums[at + 1]);
    }
    exchange_words(words);
    const int32_t row = tile.row + p + (quarter >> 1) * kPairs;
    if (row >= a.P || q >= a.Q || first >= a.patch.C) continue;
    store_16(to + row * a.h_bytes, {{words[0], words[1], words[2], words[3]}});
  }
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
  float bias[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t filter = first_channel + channel + (i >> 1) * 8 + warp_lane() % 4 * 2 + i % 2;
    if (a.bias == nullptr || filter >= a.patch.C) continue;
    bias[i] = to_float(static_cast<const T*>(a.bias)[filter]);
  }
  stage_filters<T>(a, first_channel, filters);
  walk_tiles(
      a.tiles, a.two_buffers,
      [&](const GroupedTile& tile, int buffer) {
        stage_pixels(a.patch, tile, first_channel, patches + buffer * a.patch_bytes);
      },
      [&](const GroupedTile& tile, int buffer) {
        const unsigned char* const patch = patches + buffer * a.patch_bytes;
        Sums sums;
        FlatSums& flat = reinterpret_cast<FlatSums&>(sums);
#pragma unroll
        for (float& sum : flat) sum = 0;
        if constexpr (kThreeRows) {
          multiply_three_rows<T, kWide>(sums, a, at, patch, filters);
        } else {
          multiply_any_rows<T, kWide>(sums, a, at, patch, filters);
        }
        if constexpr (!kWide) {
          if (a.group < 8) mend<T>(flat, a, channel, part, patch, filters);
        }
        if (a.bias != nullptr) {
#pragma unroll
          for (int i = 0; i < kPairs * 8; ++i) flat[i] += bias[(i >> 2) % 2 * 2 + i % 2];
        }
        activate(flat, a.activation, static_cast<float>(a.negative_slope));
        write_sums<T>(flat, a, tile, first_channel + channel, part);
      });
}

}  // namespace
}  // namespace gdfast::cuda
