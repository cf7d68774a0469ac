// Groups of 32 channels on images of 7 x 7 (grouped_whole.h).
//
// A block takes one group of 16 images, and a warpgroup eight of these: 8 columns of 8 images are
// the 64 rows of a product by warpgroups, whose right operand are a tap's filters as they lie in
// shared memory. A row of the input is loaded to registers once, for the three rows of the output
// that see it; results leave from registers, 64 bytes of a pixel side by side.
//
// An eighth column lies outside of each image: its zeros are the neighbours of the first column
// too, of the next image's.
#pragma once

#include "grouped_sums.h"
#include "grouped_whole.h"
#include "hopper_narrow.h"

namespace gdfast::cuda {
namespace {

using Octets = WholeImages<32, 32, 16, 7, kSide, 0, 8, 0>;
constexpr int kOctetSteps = Octets::kGroup / 16;

struct OctetArguments {
  TensorMap input, filters;
  unsigned char* output;
  int64_t image_bytes, row_bytes, pixel_bytes;
  int images;
};

#if defined(GDFAST_HOPPER)

using OctetFragments = uint32_t[3][kOctetSteps][4];  // by the column of the filter
using OctetSums = float[Octets::kGroup / 2];

// What a tap multiplies 16 channels of the group by, so many bytes from the first filter on.
template <bool kGradient>
GDFAST_DEVICE int octet_filters(int tap, int step) {
  const int turned = kGradient ? kTaps - 1 - tap : tap;
  // Of the gradient the sum goes over filters.
  return box_of<Octets>(turned) - Octets::kFiltersAt + byte_of<Octets>(turned) +
         step * (kGradient ? 16 * kBoxRow : 32);
}

// The same matrix elsewhere. Its address, in units of 16 bytes, comes first, and does not overflow
// where shared memory does not.
GDFAST_DEVICE uint64_t bytes_further(uint64_t matrix, int bytes) {
  const uint32_t address = static_cast<uint32_t>(matrix) + static_cast<uint32_t>(bytes / 16);
  return (matrix >> 32 << 32) | address;
}

// A row of the input by all taps, for the rows of the output that it touches.
template <bool kGradient>
GDFAST_DEVICE void multiply_octet_row(OctetSums (&sums)[Octets::kRows], const OctetFragments& left,
                                      uint64_t filters, int row) {
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
            sums[p], left[s][step],
            bytes_further(filters, octet_filters<kGradient>(r * 3 + s, step)), !is_first);
      }
    }
  }
}

// Of a lane: where in the first row its pixels lie, for ldmatrix, by the column of the filter;
// where it writes results, eight channels of a pixel, and of how many of its warp's images.
struct OctetLane {
  uint32_t pixels[3];
  unsigned char* results;
  int images;
};

GDFAST_DEVICE OctetLane octet_lane(const OctetArguments& a, int first_channel, int first_image) {
  const int lane = warp_lane(), matrix = lane / 8, image = warp_index() * 2;
  OctetLane places;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    places.pixels[s] =
        Octets::kRowsAt +
        half_swizzled((image + (matrix & 1)) * kSide + lane % 8 + s - 1, matrix >> 1);
    opaque(places.pixels[s]);
  }
  const int column = lane / 4, channel = first_channel + lane % 4 * 8;
  places.images = column < Octets::kRows ? a.images - first_image - image : 0;
  places.results = a.output + ((first_image + image) * a.image_bytes + column * a.pixel_bytes +
                               channel * int64_t{2});
  return places;
}

// Filters as a matrix, from the first one on.
template <bool kGradient>
GDFAST_DEVICE void multiply_octets(const OctetArguments& a, const OctetLane& places,
                                   uint64_t filters) {
  OctetSums sums[Octets::kRows];
  OctetFragments left[2];
  const auto load = [&](int row) {
    barrier_wait(row_barrier(row), 0);
#pragma unroll
    for (int s = 0; s < 3; ++s) {
#pragma unroll
      for (int step = 0; step < kOctetSteps; ++step) {
        ldmatrix_x4(left[row % 2][s][step],
                    shared_memory() + row * Octets::kRowBytes + (places.pixels[s] ^ step * 32));
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
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = pack_two<BFloat16>(sums[p][j * 4 + i * 2], sums[p][j * 4 + i * 2 + 1]);
      }
      exchange_words(words);
      if (i >= places.images) continue;
      store_16_global(places.results + (i * a.image_bytes + p * a.row_bytes),
                      {{words[0], words[1], words[2], words[3]}});
    }
  };
  barrier_wait(filter_barrier<Octets>(true), 0);
  load(0);
#pragma unroll
  for (int row = 0; row < Octets::kRows; ++row) {
    if (row == 1) barrier_wait(filter_barrier<Octets>(false), 0);
    warpgroup_begin();
    multiply_octet_row<kGradient>(sums, left[row % 2], filters, row);
    warpgroup_commit();
    if (row > 0) {
      warpgroup_wait<1>();
      take(row - 1);
    }
    if (row + 1 < Octets::kRows) load(row + 1);
    if (row > 1) finish(row - 2);
  }
  warpgroup_wait<0>();
  take(Octets::kRows - 1);
  finish(Octets::kRows - 2);
  finish(Octets::kRows - 1);
}

#endif

template <bool kGradient>
GDFAST_KERNEL(Octets::kThreads, 1)
grouped_octets_kernel(GDFAST_GRID_CONSTANT const OctetArguments a) {
#if defined(GDFAST_HOPPER)
  let_next_begin();
  const int first_channel = static_cast<int>(blockIdx.y) * Octets::kChannels;
  const int first_image = static_cast<int>(blockIdx.x) * Octets::kImages;
  const bool loads = this_thread() == Octets::kWarps * kWarp;
  if (loads) load_first<Octets, kGradient>(a, first_channel, first_image);
  if (this_thread() == 0) init_barriers<Octets>();
  // Before the first image there is none.
  const int zero = this_thread() - kWarpgroup;
  if (zero >= 0 && zero < Octets::kPixel / 4) {
    reinterpret_cast<uint32_t*>(shared_memory() + Octets::kRowsAt - Octets::kPixel)[zero] = 0;
  }
  const OctetLane places = octet_lane(a, first_channel, first_image);
  const uint64_t filters = rows_matrix(shared_memory(), Octets::kFiltersAt);
  sync_block();
  if (loads) load_others<Octets, kGradient>(a, first_channel, first_image);
  if (warp_index() < Octets::kWarps) multiply_octets<kGradient>(a, places, filters);
#else
  static_cast<void>(a);
#endif
}

}  // namespace
}  // namespace gdfast::cuda
