// Groups of 8 channels on images of 28 x 28 and of 4 on 56 x 56, which are made up to 8 by zeros
// (grouped_whole.h). A block takes eight eights of channels of two images, or of one, whose rows
// come two at a time to a ring; each warp walks down 16 columns of an image for one eight, and has
// its filters in registers.
//
// A matrix instruction multiplies two taps of a column of the filter, one below the other, by two
// rows of pixels as they were loaded, which nothing has to be put together for: of the rows of
// results at a pair of rows of the input, the first has the lower two taps there and the upper one
// in the pair before, the second has the upper two there and the lowest in the pair behind.
#pragma once

#include "early.h"
#include "grouped_sums.h"
#include "grouped_whole.h"

namespace gdfast::cuda {
namespace {

constexpr int kWalkColumns = 16, kWalkStrips = 4;
constexpr int kEight = 8, kEights = kSlab / kEight;  // channels of a warp
constexpr int kWalkWarps = kWalkStrips * kEights, kWalkThreads = kWalkWarps * kWarp;
constexpr int kWalkBuffers = 4;  // of a strip's results: two are written to, two are read
static_assert((kWalkBuffers & (kWalkBuffers - 1)) == 0, "a mask");
constexpr StoredBox kWalkBox{1, 2, kWalkColumns};
constexpr int kWalkBoxBytes = kWalkBox.rows * kWalkColumns * kBoxRow;
constexpr int kPairsBetween = 2;  // that a warp may be behind before another one waits for it
constexpr int kPairsBeforeFilters = 2;

// Images of kRowCount rows and columns, in strips of 16 columns, from column -1 on.
template <int kGroupChannels, int kImageCount, int kRowCount>
struct WalkedImages {
  static constexpr int kGroup = kGroupChannels, kImages = kImageCount, kRows = kRowCount;
  static constexpr int kStripsOfImage = kWalkStrips / kImages;
  static constexpr int kColumns = kStripsOfImage * kWalkColumns;
  // Of a pair: images one after the other, and their two rows.
  static constexpr int kRowBytes = kColumns * kBoxRow, kPairBytes = kImages * 2 * kRowBytes;
  // The last pair is behind the image: zeros.
  static constexpr int kPairs = kRows / 2 + 1, kSlots = 8;
  // Shared memory: barriers, pairs, results, filters.
  static constexpr int kPairsAt = 1024, kResultsAt = kPairsAt + kSlots * kPairBytes;
  static constexpr int kFiltersAt = kResultsAt + kWalkStrips * kWalkBuffers * kWalkBoxBytes;
  static_assert(kRows % 2 == 0 && kRowBytes % 1024 == 0);
  static_assert(2 * kPairs * sizeof(uint64_t) <= kPairsAt, "barriers");
};
using Walks28 = WalkedImages<8, 2, 28>;
using Walks56 = WalkedImages<4, 1, 56>;

struct WalkArguments {
  TensorMap input, output;
  GroupedFilters filters;
};

#if defined(GDFAST_HOPPER)

// By column of the filter: of 16 pixels, the first row's and the second's.
using RowPair = uint32_t[3][4];
using TwoTaps = uint32_t[3][2];  // likewise, the upper one's and the lower one's filters

template <typename Its>
GDFAST_DEVICE uint64_t* gone_barrier(int pair) {
  return row_barrier(Its::kPairs + pair);
}

template <typename Its>
GDFAST_DEVICE void load_pair(const WalkArguments& a, int first_channel, int first_image, int pair) {
  barrier_arrive_expecting(row_barrier(pair), Its::kPairBytes);
  load_box(shared_memory() + Its::kPairsAt + pair % Its::kSlots * Its::kPairBytes, a.input,
           {first_channel, -1, pair * 2, first_image}, row_barrier(pair));
}

// What a warp walks down.
struct WalkStrip {
  int image, column, eight;
};

template <typename Its>
GDFAST_DEVICE WalkStrip walk_strip(int warp) {
  const int strip = warp / kEights;
  return {strip / Its::kStripsOfImage, strip % Its::kStripsOfImage * kWalkColumns, warp % kEights};
}

// One sum over the group's channels alone, of a row and column of results in this warp's strip.
template <typename Its>
GDFAST_DEVICE float sum_of_walk(const WalkArguments& a, int row, int column, int within) {
  const WalkStrip strip = walk_strip<Its>(computed_again(warp_index()));
  const int channel = strip.eight * kEight + within;
  const int first = channel / a.filters.group * a.filters.group;
  float sum = 0;
#pragma unroll 1
  for (int tap = 0; tap < kTaps; ++tap) {
    const int h = row - 1 + tap / 3;
    if (h < 0 || h >= Its::kRows) continue;
    const int at = Its::kPairsAt + h / 2 % Its::kSlots * Its::kPairBytes +
                   (strip.image * 2 + h % 2) * Its::kRowBytes;
#pragma unroll 1
    for (int other = first; other < first + a.filters.group; ++other) {
      const unsigned char* const chunk =
          shared_memory() + at + swizzled(strip.column + column + tap % 3, other / 8);
      sum += to_float(reinterpret_cast<const BFloat16*>(chunk)[other % 8]) *
             filter_element<BFloat16>(a.filters, channel, other, tap,
                                      shared_memory() + Its::kFiltersAt);
    }
  }
  return sum;
}

template <typename Its>
GDFAST_DEVICE void multiply_walk(const WalkArguments& a, int first_channel, int first_image) {
  const WalkStrip its = walk_strip<Its>(warp_index());
  const int strip = warp_index() / kEights, lane = warp_lane(), matrix = lane / 8;
  unsigned char* const filters = shared_memory() + Its::kFiltersAt;
  stage_filters<BFloat16>(a.filters, first_channel, filters, kWalkThreads);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  // Filters would come behind all rows that are asked for, and nothing begins without them.
  for (int pair = kPairsBeforeFilters; pair < Its::kSlots && this_thread() == 0; ++pair) {
    load_pair<Its>(a, first_channel, first_image, pair);
  }
  const int first_of_two = its.eight / 2 * kChannelsOfWarp;  // eights, as filters are loaded
  const FilterPlaces places = filter_places<false>(a.filters, first_of_two, first_of_two);
  TwoTaps upper, lower;  // of three
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    uint32_t both[4];
    load_filters(both, filters + places.first + tap * places.tap_bytes, a.filters.gradient);
    const uint32_t word = its.eight % 2 == 0 ? both[0] : both[1];
    if (tap < 6) upper[tap % 3][tap / 3] = word;
    if (tap >= 3) lower[tap % 3][tap / 3 - 1] = word;
  }
  int pixels[3];  // of this lane, for ldmatrix, by the column of the filter
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    // Beyond a row no result needs any: the last one.
    const int pixel = its.column + (matrix & 1) * 8 + lane % 8 + s;
    pixels[s] = Its::kPairsAt + (its.image * 2 + (matrix >> 1)) * Its::kRowBytes +
                swizzled(pixel < Its::kColumns ? pixel : Its::kColumns - 1, its.eight);
  }
  const int results = Its::kResultsAt + strip * kWalkBuffers * kWalkBoxBytes;
  // For stmatrix: of what was begun at the pair before, the second row, and of this one the first.
  const int before = 1 - (matrix >> 1);
  // What comes from a shuffle stays in its register; this would be computed anew for each pair.
  const int written = shuffle(
      results + (before * 2 + (matrix & 1)) * kTileBytes + swizzled(lane % 8, its.eight), lane);
  const bool leads = its.eight == 0 && lane == 0;
  const auto load = [&](RowPair& to, int pair) {
    const unsigned char* const from = shared_memory() + pair % Its::kSlots * Its::kPairBytes;
#pragma unroll
    for (int s = 0; s < 3; ++s) ldmatrix_x4(to[s], from + pixels[s]);
  };
  // The second row of results at the pair before, and the first one at this.
  const auto finish = [&](int pair, const RowPair& last, RowPair& these) {
    float sums[2][4] = {};
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      mma_m16n8k16<BFloat16>(sums[0], last[s], upper[s]);
      mma_m16n8k16<BFloat16>(sums[1], these[s], lower[s]);
      mma_m16n8k8<BFloat16>(sums[0], {these[s][0], these[s][1]}, lower[s][1]);
      mma_m16n8k8<BFloat16>(sums[1], {last[s][2], last[s][3]}, upper[s][0]);
    }
    float (&all)[8] = reinterpret_cast<float (&)[8]>(sums);
    if (Its::kGroup < kEight && any_of_warp(!are_finite(all))) {
      mend(all, [&](int, int second, int pixel, int within) {
        return sum_of_walk<Its>(a, pair * 2 - 1 + within / kEight, second * 8 + pixel,
                                within % kEight);
      });
      // Rather than to have registers for these and for that.
      sync_warp();
      load(these, pair);
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pixels)[4] = sums[i >> 1];
      words[i] = pack_two<BFloat16>(pixels[(i & 1) * 2], pixels[(i & 1) * 2 + 1]);
    }
    const int buffer = (pair - before) & (kWalkBuffers - 1);
    stmatrix_x4(shared_memory() + written + buffer * kWalkBoxBytes, words);
    // Whoever meets here may write to the next buffer: it has been read.
    if (leads) stores_wait_read<kWalkBuffers - 3>();
    sync_threads_of(1 + strip, kEights * kWarp);
    if (!leads || pair == 0) return;
    stores_ready();
    store_box(a.output, {first_channel, its.column, pair * 2 - 2, first_image + its.image},
              shared_memory() + results + (pair - 1) % kWalkBuffers * kWalkBoxBytes);
    stores_commit();
  };
  RowPair rows[2] = {};
#pragma unroll 1
  for (int first = 0; first < Its::kPairs; first += 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pair = first + i, gone = pair - 1 - kPairsBetween;
      if (pair >= Its::kPairs) break;
      if (gone >= 0 && gone + Its::kSlots < Its::kPairs && this_thread() == 0) {
        barrier_wait(gone_barrier<Its>(gone), 0);
        load_pair<Its>(a, first_channel, first_image, gone + Its::kSlots);
      }
      barrier_wait(row_barrier(pair), 0);
      load(rows[i], pair);
      finish(pair, rows[i ^ 1], rows[i]);
      // Until here a sum might have been made again.
      sync_warp();
      if (pair > 0 && lane == 0) barrier_arrive(gone_barrier<Its>(pair - 1));
    }
  }
  if (leads) stores_wait<0>();
}

#endif

template <typename Its>
GDFAST_KERNEL(kWalkThreads, 1)
grouped_walks_kernel(GDFAST_GRID_CONSTANT const WalkArguments a) {
#if defined(GDFAST_HOPPER)
  const int first_channel = static_cast<int>(blockIdx.x) * kSlab;
  const int first_image = static_cast<int>(blockIdx.y) * Its::kImages;
  if (this_thread() == 0) {
    for (int pair = 0; pair < Its::kPairs; ++pair) {
      barrier_init(row_barrier(pair), 1);
      barrier_init(gone_barrier<Its>(pair), kWalkWarps);
    }
    barriers_ready();
    expect_boxes(a.input);
  }
  let_next_begin();
  wait_for_kernel_before();
  for (int pair = 0; pair < kPairsBeforeFilters && this_thread() == 0; ++pair) {
    load_pair<Its>(a, first_channel, first_image, pair);
  }
  multiply_walk<Its>(a, first_channel, first_image);
#else
  static_cast<void>(a);
#endif
}

}  // namespace
}  // namespace gdfast::cuda
