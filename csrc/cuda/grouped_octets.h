// Groups of 32 channels on images of 7 x 7 (grouped_whole.h).
//
// A block takes two groups of eight images, and a warpgroup each of the groups: 8 columns of 8
// images are the 64 rows of a product by warpgroups, whose right operand are a tap's filters as
// they lie in shared memory. A row of the input is loaded to registers once, for the three rows of
// the output that see it.
//
// An eighth column lies outside of each image: its zeros are the neighbours of the first column
// too, of the next image's.
#pragma once

#include "grouped_whole.h"
#include "hopper_narrow.h"

namespace gdfast::cuda {
namespace {

using Octets = WholeImages<32, 8, 7, kSide, 0, 7 * 8 * kTileBytes>;
constexpr StoredBox kOctetBox{8, 1, kSide};
constexpr int kOctetSteps = Octets::kGroup / 16;
constexpr int kOctetThreads = kSlab / Octets::kGroup * kWarpgroup;

#if defined(GDFAST_HOPPER)

using OctetFragments = uint32_t[3][kOctetSteps][4];  // by the column of the filter
using OctetSums = float[Octets::kGroup / 2];

// What a tap multiplies 16 channels of the group by.
template <bool kGradient>
GDFAST_DEVICE uint64_t octet_filters(int group, int tap, int step) {
  const int turned = kGradient ? kTaps - 1 - tap : tap;
  const int at =
      box_of<Octets>(turned) + group * Octets::kGroup * kBoxRow + byte_of<Octets>(turned);
  // Of the gradient the sum goes over filters.
  return kGradient ? columns_matrix(shared_memory(), at + step * 16 * kBoxRow, 0)
                   : rows_matrix(shared_memory(), at + step * 32);
}

// A row of the input by all taps, for the rows of the output that it touches.
template <bool kGradient>
GDFAST_DEVICE void multiply_octet_row(OctetSums (&sums)[Octets::kRows], const OctetFragments& left,
                                      int group, int row) {
#pragma unroll
  for (int s = 0; s < 3; ++s) {
#pragma unroll
    for (int step = 0; step < kOctetSteps; ++step) {
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        const int p = row + 1 - r;
        if (p < 0 || p >= Octets::kRows) continue;
        // The first of all is with the row above, or the first row.
        const bool is_first = s == 0 && step == 0 && (r == 0 || row == 0);
        warpgroup_multiply_32<kGradient>(
            sums[p], left[s][step], octet_filters<kGradient>(group, r * 3 + s, step), !is_first);
      }
    }
  }
}

template <bool kGradient>
GDFAST_DEVICE void multiply_octets(const WholeArguments& a, int first_channel, int first_image) {
  const int group = warp_index() / 4, lane = warp_lane();
  // Of this lane, for ldmatrix: its pixel, of one of the warp's two images, by the column of the
  // filter; and where it writes results, of the first image.
  const int image = warp_index() % 4 * 2, matrix = lane / 8,
            first_chunk = group * Octets::kGroup / 8;
  int pixels[3];
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    pixels[s] = Octets::kRowsAt + swizzled((image + (matrix & 1)) * kSide + lane % 8 + s - 1,
                                           first_chunk + (matrix >> 1));
  }
  const int written =
      Octets::kResultsAt + swizzled(image * kSide + lane / 4, first_chunk) + lane % 4 * 4;
  OctetSums sums[Octets::kRows];
  OctetFragments left[2];
  const auto load = [&](int row) {
    barrier_wait(row_barrier(row), 0);
#pragma unroll
    for (int s = 0; s < 3; ++s) {
#pragma unroll
      for (int step = 0; step < kOctetSteps; ++step) {
        ldmatrix_x4(left[row % 2][s][step],
                    shared_memory() + row * Octets::kRowBytes + (pixels[s] ^ step * 32));
      }
    }
  };
  const auto take = [&](int row) {
#pragma unroll
    for (auto& column : left[row % 2]) {
#pragma unroll
      for (auto& fragment : column) warpgroup_take(fragment);
    }
  };
  const auto finish = [&](int p) {
    warpgroup_take(sums[p]);
    unsigned char* const to = shared_memory() + p * Octets::kRowBytes;
#pragma unroll
    for (int i = 0; i < Octets::kGroup / 4; ++i) {
      const uint32_t word = pack_two<BFloat16>(sums[p][i * 2], sums[p][i * 2 + 1]);
      // Pairs of sums go by image, then by eight channels.
      const int at = (written ^ (i >> 1) * 16) + (i & 1) * kTileBytes;
      *reinterpret_cast<uint32_t*>(to + at) = word;
    }
    stores_ready();
    sync_block();
    if (this_thread() != 0) return;
    store_box(a.output, {first_channel, 0, p, first_image}, to + Octets::kResultsAt);
    stores_commit();
  };
  load(0);
  barrier_wait(filter_barrier<Octets>(), 0);
#pragma unroll
  for (int row = 0; row < Octets::kRows; ++row) {
    warpgroup_begin();
    multiply_octet_row<kGradient>(sums, left[row % 2], group, row);
    warpgroup_commit();
    if (row > 0) {
      warpgroup_wait<1>();
      take(row - 1);
    }
    if (row > 1) finish(row - 2);
    if (row + 1 < Octets::kRows) load(row + 1);
  }
  warpgroup_wait<0>();
  take(Octets::kRows - 1);
  finish(Octets::kRows - 2);
  finish(Octets::kRows - 1);
  if (this_thread() == 0) stores_wait<0>();
}

#endif

template <bool kGradient>
GDFAST_KERNEL(kOctetThreads, 1)
grouped_octets_kernel(GDFAST_GRID_CONSTANT const WholeArguments a) {
#if defined(GDFAST_HOPPER)
  const int first_channel = static_cast<int>(blockIdx.y) * kSlab;
  const int first_image = static_cast<int>(blockIdx.x) * Octets::kImages;
  if (this_thread() == 0) load_whole<Octets>(a, first_channel, first_image);
  // Before the first image there is none.
  if (this_thread() >= kOctetThreads - kBoxRow / 4) {
    reinterpret_cast<uint32_t*>(shared_memory() + Octets::kRowsAt)[this_thread() - kOctetThreads] =
        0;
  }
  sync_block();
  multiply_octets<kGradient>(a, first_channel, first_image);
#else
  static_cast<void>(a);
#endif
}

}  // namespace
}  // namespace gdfast::cuda
