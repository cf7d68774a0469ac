// Groups of 16 channels on images of 14 x 14 (grouped_whole.h). A block takes four groups of four
// images; each warp walks down one image for one group, and has its filters in registers.
//
// A row of results takes the place of that row of the input: of its channels no other warp reads
// any, and the warp that makes them has loaded the row before. One thread stores rows that all
// warps have made.
#pragma once

#include "grouped_sums.h"
#include "grouped_whole.h"

namespace gdfast::cuda {
namespace {

using Quads = WholeImages<16, kSlab, 4, 14, 16, -1, 4 * kUnits, 14>;
constexpr StoredBox kQuadBox{Quads::kImages, 1, Quads::kColumns};

struct QuadArguments {
  TensorMap input, filters, results;
};

#if defined(GDFAST_HOPPER)

using QuadFilters = uint32_t[kTaps][4];

// Those of the taps of some rows of a filter.
template <bool kGradient, int kFrom, int kTo>
GDFAST_DEVICE void load_quad_filters(QuadFilters& right, int unit) {
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  const int high = matrix >> 1, low = matrix & 1;
  const int filter = unit * Quads::kGroup + (kGradient ? low : high) * 8 + line;
  const int first = filter * kBoxRow, chunk = ((kGradient ? high : low) ^ line) * 16;
#pragma unroll
  for (int tap = kFrom * 3; tap < kTo * 3; ++tap) {
    const int turned = kGradient ? kTaps - 1 - tap : tap;
    load_filters(right[tap],
                 shared_memory() + box_of<Quads>(turned) + first + (chunk ^ byte_of<Quads>(turned)),
                 kGradient);
  }
}

// Of a lane: where in the first row its pixels lie, for ldmatrix, by the column of the filter, and
// where it writes results.
struct QuadLane {
  uint32_t pixels[3], results;
};

GDFAST_DEVICE QuadLane quad_lane() {
  const int image = warp_index() / kUnits, unit = warp_index() % kUnits, lane = warp_lane();
  const int matrix = lane / 8, chunk = unit * Quads::kGroup / 8;
  QuadLane places;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int column = (matrix & 1) * 8 + lane % 8 + s;
    // No result needs what lies beyond a row.
    const int inside = column < Quads::kColumns ? column : Quads::kColumns - 1;
    places.pixels[s] =
        Quads::kRowsAt + swizzled(image * Quads::kColumns + inside, chunk + (matrix >> 1));
    opaque(places.pixels[s]);
  }
  places.results =
      Quads::kRowsAt + image * Quads::kImageRow + swizzled(lane / 4, chunk) + lane % 4 * 4;
  opaque(places.results);
  return places;
}

template <bool kGradient>
GDFAST_DEVICE void multiply_quads(const QuadLane& places) {
  const int unit = warp_index() % kUnits, lane = warp_lane();
  QuadFilters right;
  uint32_t left[2][3][4];
  PairSums sums[Quads::kRows];
#pragma unroll
  for (float& sum : flat(sums)) sum = 0;
  const auto load = [&](int row) {
    barrier_wait(row_barrier(row), 0);
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      ldmatrix_x4(left[row % 2][s], shared_memory() + row * Quads::kRowBytes + places.pixels[s]);
    }
  };
  const auto finish = [&](int p) {
    uint32_t words[4];
    pack_sums<BFloat16>(words, sums[p]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = p * Quads::kRowBytes + (i >> 1) * kTileBytes + (places.results ^ (i & 1) * 16);
      *reinterpret_cast<uint32_t*>(shared_memory() + at) = words[i];
    }
    sync_warp();
    if (lane == 0) barrier_arrive(result_barrier<Quads>(p));
  };
  barrier_wait(filter_barrier<Quads>(true), 0);
  load_quad_filters<kGradient, 0, 2>(right, unit);
  load(0);
  sync_warp();  // all lanes have read the first row, as they have each later one at its results
#pragma unroll
  for (int row = 0; row < Quads::kRows; ++row) {
    if (row == 1) {
      barrier_wait(filter_barrier<Quads>(false), 0);
      load_quad_filters<kGradient, 2, 3>(right, unit);
    }
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      // The row of results that has all of its products now goes first.
#pragma unroll
      for (int r = 2; r >= 0; --r) {
        const int p = row + 1 - r;
        if (p < 0 || p >= Quads::kRows) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t (&filters)[4] = right[r * 3 + s];
          mma_m16n8k16<BFloat16>(sums[p][half], left[row % 2][s],
                                 {filters[half * 2], filters[half * 2 + 1]});
        }
      }
    }
    if (row + 1 < Quads::kRows) load(row + 1);
    if (row > 0) finish(row - 1);
  }
  finish(Quads::kRows - 1);
}

// By one thread.
GDFAST_DEVICE void store_quads(const QuadArguments& a, int first_channel, int first_image) {
#pragma unroll 1
  for (int p = 0; p < Quads::kRows; ++p) {
    barrier_wait(result_barrier<Quads>(p), 0);
    stores_ready();
    store_box(a.results, {first_channel, 0, p, first_image},
              shared_memory() + Quads::kRowsAt + p * Quads::kRowBytes);
    stores_commit();
  }
  stores_wait_read<0>();
}

#endif

template <bool kGradient>
GDFAST_KERNEL(Quads::kThreads, 1)
grouped_quads_kernel(GDFAST_GRID_CONSTANT const QuadArguments a) {
#if defined(GDFAST_HOPPER)
  let_next_begin();
  const int first_channel = static_cast<int>(blockIdx.y) * Quads::kChannels;
  const int first_image = static_cast<int>(blockIdx.x) * Quads::kImages;
  const bool loads = this_thread() == Quads::kWarps * kWarp;
  if (loads) load_first<Quads, kGradient>(a, first_channel, first_image);
  if (this_thread() == 0) init_barriers<Quads>();
  const QuadLane places = quad_lane();
  sync_block();
  if (loads) {
    load_others<Quads, kGradient>(a, first_channel, first_image);
    store_quads(a, first_channel, first_image);
  }
  if (warp_index() < Quads::kWarps) multiply_quads<kGradient>(places);
#else
  static_cast<void>(a);
#endif
}

}  // namespace
}  // namespace gdfast::cuda
