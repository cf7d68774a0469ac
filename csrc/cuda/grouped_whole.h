// Convolution in groups on Hopper of small images, in bfloat16, by filters of 3 x 3 with stride 1
// and padding of 1: what its kernels share.
//
// A block takes some channels of some images, and all that it needs comes to shared memory at once:
// the filters that the first row meets, that row of all images, the other filters, and then one row
// after the other. A warp of its own has them loaded. What a row contributes to the three rows of
// results around it is added as soon as it is there, and a row of results leaves when it has the
// row below it. Warps wait for what is loaded, and never for one another.
#pragma once

#include "early.h"
#include "grouped_filters.h"
#include "grouped_hopper.h"

namespace gdfast::cuda {
namespace {

constexpr int kTaps = 9;

// Of results, that are stored at a time.
struct StoredBox {
  int images, rows, columns;
};

// kChannelCount channels of images of kRowCount rows and columns, which are kPitch pixels apart in
// shared memory, the first of them that of column kFirst. Its warps are those that multiply.
template <int kGroupChannels, int kChannelCount, int kImageCount, int kRowCount, int kPitch,
          int kFirst, int kWarpCount, int kResultCount>
struct WholeImages {
  static constexpr int kGroup = kGroupChannels, kChannels = kChannelCount;
  static constexpr int kImages = kImageCount, kRows = kRowCount;
  static constexpr int kColumns = kPitch, kFirstColumn = kFirst;
  static constexpr int kWarps = kWarpCount, kThreads = (kWarps + 1) * kWarp;
  static constexpr int kPixel = kChannels * 2;  // bytes
  static constexpr int kImageRow = kColumns * kPixel, kRowBytes = kImages * kImageRow;
  static constexpr int kTapBytes = kGroup * 2;  // of a filter, which lies in boxes of some taps
  static constexpr int kTapsOfBox = kBoxRow / kTapBytes;
  static constexpr int kBoxes = (kTaps + kTapsOfBox - 1) / kTapsOfBox;
  static constexpr int kBoxBytes = kChannels * kBoxRow;
  // Shared memory: barriers, rows, filters.
  static constexpr int kRowsAt = 1024, kFiltersAt = kRowsAt + kRows * kRowBytes;
  static constexpr int kBytes = kFiltersAt + kBoxes * kBoxBytes;
  static_assert(kBytes <= kHopperMemory && kRowBytes % 1024 == 0);
  static constexpr int kResults = kResultCount;  // rows that leave when all warps have made them
  static_assert((kRows + 2 + kResults) * sizeof(uint64_t) <= kRowsAt - kBoxRow, "barriers");
};

#if defined(GDFAST_HOPPER)

GDFAST_DEVICE uint64_t* row_barrier(int row) {
  return reinterpret_cast<uint64_t*>(shared_memory()) + row;
}

// Of the filters that the first row meets, and of those that rows meet from the second one on.
template <typename Its>
GDFAST_DEVICE uint64_t* filter_barrier(bool first) {
  return row_barrier(Its::kRows + (first ? 0 : 1));
}

template <typename Its>
GDFAST_DEVICE uint64_t* result_barrier(int row) {
  return row_barrier(Its::kRows + 2 + row);
}

// Where a tap has its 128 bytes of filters, and from which of these on.
template <typename Its>
GDFAST_DEVICE int box_of(int tap) {
  return Its::kFiltersAt + tap / Its::kTapsOfBox * Its::kBoxBytes;
}

template <typename Its>
GDFAST_DEVICE int byte_of(int tap) {
  return tap % Its::kTapsOfBox * Its::kTapBytes;
}

// By a thread beside the loader's, which has those of what the first row needs.
template <typename Its>
GDFAST_DEVICE void init_barriers() {
  for (int row = 1; row < Its::kRows; ++row) barrier_init(row_barrier(row), 1);
  barrier_init(filter_barrier<Its>(false), 1);
  for (int row = 0; row < Its::kResults; ++row) barrier_init(result_barrier<Its>(row), Its::kWarps);
  barriers_ready();
}

// Boxes with filters that the first row meets, or the others. No row of results is above that one,
// and the gradient has taps turned round.
template <typename Its, bool kGradient, typename Arguments>
GDFAST_DEVICE void load_some_filters(const Arguments& a, int first_channel, bool first) {
  constexpr int kFrom = kGradient ? 3 / Its::kTapsOfBox : 0;
  constexpr int kTo = kGradient ? Its::kBoxes : 5 / Its::kTapsOfBox + 1;
  const int boxes = first ? kTo - kFrom : Its::kBoxes - (kTo - kFrom);
  barrier_arrive_expecting(filter_barrier<Its>(first), boxes * Its::kBoxBytes);
#pragma unroll
  for (int box = 0; box < Its::kBoxes; ++box) {
    if ((box >= kFrom && box < kTo) != first) continue;
    load_box(shared_memory() + Its::kFiltersAt + box * Its::kBoxBytes, a.filters,
             {box * kBoxRow / 2, first_channel, 0, 0}, filter_barrier<Its>(first));
  }
}

template <typename Its, typename Arguments>
GDFAST_DEVICE void load_row(const Arguments& a, int first_channel, int first_image, int row) {
  barrier_arrive_expecting(row_barrier(row), Its::kRowBytes);
  load_box(shared_memory() + Its::kRowsAt + row * Its::kRowBytes, a.input,
           {first_channel, Its::kFirstColumn, row, first_image}, row_barrier(row));
}

// By one thread, before the block meets: what the first row needs. This one alone waits for the
// kernel before: what others write to the output waits for what is loaded here.
template <typename Its, bool kGradient, typename Arguments>
GDFAST_DEVICE void load_first(const Arguments& a, int first_channel, int first_image) {
  expect_boxes(a.filters), expect_boxes(a.input);
  barrier_init(filter_barrier<Its>(true), 1);
  barrier_init(row_barrier(0), 1);
  barriers_ready();
  wait_for_kernel_before();
  load_some_filters<Its, kGradient>(a, first_channel, true);
  load_row<Its>(a, first_channel, first_image, 0);
}

// And then the rest.
template <typename Its, bool kGradient, typename Arguments>
GDFAST_DEVICE void load_others(const Arguments& a, int first_channel, int first_image) {
  load_some_filters<Its, kGradient>(a, first_channel, false);
#pragma unroll 1
  for (int row = 1; row < Its::kRows; ++row) load_row<Its>(a, first_channel, first_image, row);
}

#endif

}  // namespace
}  // namespace gdfast::cuda
