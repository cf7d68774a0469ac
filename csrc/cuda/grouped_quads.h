// Groups of 16 channels on images of 14 x 14 (grouped_whole.h). A block takes four groups of four
// images; each warp walks down one image for one group, and has its filters in registers.
#pragma once

#include "grouped_sums.h"
#include "grouped_whole.h"

namespace gdfast::cuda {
namespace {

constexpr int kQuadBuffers = 4;  // of an image's results
constexpr StoredBox kQuadBox{1, 2, 16};
using Quads = WholeImages<16, 4, 14, 16, -1, 4 * kQuadBuffers * kQuadBox.rows * 16 * kBoxRow>;
constexpr int kQuadBufferBytes = kQuadBox.rows * Quads::kImageRow;
constexpr int kQuadThreads = Quads::kImages * kUnits * kWarp;

#if defined(GDFAST_HOPPER)

using QuadFilters = uint32_t[kTaps][4];

template <bool kGradient>
GDFAST_DEVICE void load_quad_filters(QuadFilters& right, int unit) {
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  const int high = matrix >> 1, low = matrix & 1;
  const int filter = unit * Quads::kGroup + (kGradient ? low : high) * 8 + line;
  const int first = filter * kBoxRow, chunk = ((kGradient ? high : low) ^ line) * 16;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const int turned = kGradient ? kTaps - 1 - tap : tap;
    load_filters(right[tap],
                 shared_memory() + box_of<Quads>(turned) + first + (chunk ^ byte_of<Quads>(turned)),
                 kGradient);
  }
}

template <bool kGradient>
GDFAST_DEVICE void multiply_quads(const WholeArguments& a, int first_channel, int first_image) {
  const int image = warp_index() / kUnits, unit = warp_index() % kUnits, lane = warp_lane();
  const int matrix = lane / 8, chunk = unit * Quads::kGroup / 8;
  int pixels[3];  // of this lane, for ldmatrix, by the column of the filter
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    pixels[s] = chunk_at<Quads>(image * Quads::kColumns + (matrix & 1) * 8 + lane % 8 + s,
                                chunk + (matrix >> 1));
  }
  unsigned char* const results =
      shared_memory() + Quads::kResultsAt + image * kQuadBuffers * kQuadBufferBytes;
  const int written = swizzled(lane / 4, chunk) + lane % 4 * 4;
  const bool leads = unit == 0 && lane == 0;
  barrier_wait(filter_barrier<Quads>(), 0);
  QuadFilters right;
  load_quad_filters<kGradient>(right, unit);
  PairSums sums[Quads::kRows];
#pragma unroll
  for (float& sum : flat(sums)) sum = 0;
  const auto finish = [&](int p) {
    unsigned char* const to = results + p / kQuadBox.rows % kQuadBuffers * kQuadBufferBytes;
    uint32_t words[4];
    pack_sums<BFloat16>(words, sums[p]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at =
          p % kQuadBox.rows * Quads::kImageRow + (i >> 1) * kTileBytes + (written ^ (i & 1) * 16);
      *reinterpret_cast<uint32_t*>(to + at) = words[i];
    }
    if (p % kQuadBox.rows + 1 < kQuadBox.rows) return;
    stores_ready();
    // Whoever meets here may write to the next buffer: it has been read.
    if (leads) stores_wait_read<kQuadBuffers - 2>();
    sync_threads_of(1 + image, kUnits * kWarp);
    if (!leads) return;
    store_box(a.output, {first_channel, 0, p + 1 - kQuadBox.rows, first_image + image}, to);
    stores_commit();
  };
#pragma unroll
  for (int row = 0; row < Quads::kRows; ++row) {
    barrier_wait(row_barrier(row), 0);
    uint32_t left[3][4];
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      ldmatrix_x4(left[s], shared_memory() + row * Quads::kRowBytes + pixels[s]);
    }
#pragma unroll
    for (int s = 0; s < 3; ++s) {
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        const int p = row + 1 - r;
        if (p < 0 || p >= Quads::kRows) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t (&filters)[4] = right[r * 3 + s];
          mma_m16n8k16<BFloat16>(sums[p][half], left[s],
                                 {filters[half * 2], filters[half * 2 + 1]});
        }
      }
    }
    if (row > 0) finish(row - 1);
  }
  finish(Quads::kRows - 1);
  if (leads) stores_wait<0>();
}

#endif

template <bool kGradient>
GDFAST_KERNEL(kQuadThreads, 1)
grouped_quads_kernel(GDFAST_GRID_CONSTANT const WholeArguments a) {
#if defined(GDFAST_HOPPER)
  const int first_channel = static_cast<int>(blockIdx.y) * kSlab;
  const int first_image = static_cast<int>(blockIdx.x) * Quads::kImages;
  if (this_thread() == 0) load_whole<Quads>(a, first_channel, first_image);
  sync_block();
  multiply_quads<kGradient>(a, first_channel, first_image);
#else
  static_cast<void>(a);
#endif
}

}  // namespace
}  // namespace gdfast::cuda
