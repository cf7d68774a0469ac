// Convolution in groups on Hopper of small images, in bfloat16, by filters of 3 x 3 with stride 1
// and padding of 1: what its kernels share.
//
// A block takes a slab of 64 channels of some images, and all that it needs comes to shared memory
// at once: the filters, and then one row of all images after the other. What a row contributes to
// the three rows of results around it is added as soon as it is there, and a row of results leaves
// when it has the row below it. Nothing waits for what comes last.
#pragma once

#include "grouped_filters.h"
#include "grouped_hopper.h"

namespace gdfast::cuda {
namespace {

constexpr int kTaps = 9;

struct WholeArguments {
  TensorMap input, filters, output;
};

// Of results, that are stored at a time.
struct StoredBox {
  int images, rows, columns;
};

// Images of kRowCount rows and columns, which are kPitch pixels apart in shared memory, the first
// of them that of column kFirst, beside kResultBytes of results.
template <int kGroupChannels, int kImageCount, int kRowCount, int kPitch, int kFirst,
          int kResultBytes>
struct WholeImages {
  static constexpr int kGroup = kGroupChannels, kImages = kImageCount, kRows = kRowCount;
  static constexpr int kColumns = kPitch, kFirstColumn = kFirst;
  static constexpr int kImageRow = kColumns * kBoxRow, kRowBytes = kImages * kImageRow;
  static constexpr int kTapBytes = kGroup * 2;  // of a filter, which lies in boxes of some taps
  static constexpr int kTapsOfBox = kBoxRow / kTapBytes;
  static constexpr int kBoxes = (kTaps + kTapsOfBox - 1) / kTapsOfBox;
  static constexpr int kBoxBytes = kSlab * kBoxRow;
  // Shared memory: barriers, rows, results, filters.
  static constexpr int kRowsAt = 1024, kResultsAt = kRowsAt + kRows * kRowBytes;
  static constexpr int kFiltersAt = kResultsAt + kResultBytes;
  static constexpr int kBytes = kFiltersAt + kBoxes * kBoxBytes;
  static_assert(kBytes <= kHopperMemory);
  static_assert((kRows + 1) * sizeof(uint64_t) <= kRowsAt - kBoxRow, "barriers");
};

#if defined(GDFAST_HOPPER)

GDFAST_DEVICE uint64_t* row_barrier(int row) {
  return reinterpret_cast<uint64_t*>(shared_memory()) + row;
}

template <typename Its>
GDFAST_DEVICE uint64_t* filter_barrier() {
  return row_barrier(Its::kRows);
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

// Where a chunk of a pixel of the first row lies. Beyond a row no result needs any: the last one.
template <typename Its>
GDFAST_DEVICE int chunk_at(int pixel, int chunk) {
  constexpr int kLast = Its::kImages * Its::kColumns - 1;
  return Its::kRowsAt + swizzled(pixel < kLast ? pixel : kLast, chunk);
}

// By one thread.
template <typename Its>
GDFAST_DEVICE void load_whole(const WholeArguments& a, int first_channel, int first_image) {
  for (int i = 0; i <= Its::kRows; ++i) barrier_init(row_barrier(i), 1);
  barriers_ready();
  barrier_arrive_expecting(filter_barrier<Its>(), Its::kBoxes * Its::kBoxBytes);
  for (int box = 0; box < Its::kBoxes; ++box) {
    load_box(shared_memory() + Its::kFiltersAt + box * Its::kBoxBytes, a.filters,
             {box * kBoxRow / 2, first_channel, 0, 0}, filter_barrier<Its>());
  }
  for (int row = 0; row < Its::kRows; ++row) {
    barrier_arrive_expecting(row_barrier(row), Its::kRowBytes);
    load_box(shared_memory() + Its::kRowsAt + row * Its::kRowBytes, a.input,
             {first_channel, Its::kFirstColumn, row, first_image}, row_barrier(row));
  }
}

#endif

}  // namespace
}  // namespace gdfast::cuda
