// The gradient in the weight in groups on Hopper of small images: which images a block has, and how
// they come to slots in shared memory.
//
//   Its::kSlots, kSlotBytes, kGradAt   slots; of the input and, from there on, of the gradient
//   Its::kParts, kSlotRows             slots of images, and the rows that each has of kImages
//   Its::kStreams                      of warps, which take slots in turns, or one that takes all
#pragma once

#include "early.h"
#include "grouped_hopper.h"
#include "grouped_weight_sums.h"

namespace gdfast::cuda {
namespace {

struct WholeWeightArguments {
  TensorMap input, grad;
  int rounds, rounds_of_block;  // of images that streams take at a time
  GroupedWeightSplit split;
};

// Rows of single images by slabs, kPitch pixels each, the input's from the column before the first
// on.
template <int kGroupChannels, int kSize, int kPitch, int kSlotRowCount, int kSlotCount,
          int kStreamCount>
struct SlabWeights {
  static constexpr int kGroup = kGroupChannels, kRows = kSize, kColumns = kSize;
  static constexpr int kChannels = kSlab, kPixel = kBoxRow, kImages = 1;
  static constexpr int kRowPixels = kPitch, kFirstColumn = -1;
  static constexpr int kSlotRows = kSlotRowCount, kSlots = kSlotCount, kParts = kRows / kSlotRows;
  static constexpr int kStreams = kStreamCount, kConsumers = 8;
  static constexpr int kRowBytes = kPitch * kPixel, kGradAt = kSlotRows * kRowBytes;
  static constexpr int kSlotBytes = 2 * kGradAt;
  static constexpr int kSumsAt = kRingAt + kSlots * kSlotBytes;
  static_assert(kGradAt % 1024 == 0);
  static_assert(kPitch % 16 == 0 && kPitch > kColumns + 1, "a row's last pixel is zero");
  static_assert(kParts * kSlotRows == kRows);
  static_assert(kSlots % kStreams == 0 && kSlots >= 2 * kStreams, "a slot is read, one comes");
};

// Shared memory: barriers, slots, and sums behind them or in their place.
template <typename Its>
constexpr int bytes_of() {
  constexpr int kSlotsEnd = kRingAt + Its::kSlots * Its::kSlotBytes;
  constexpr int kSums = Its::kStreams * Its::kChannels * (row_sums_of(Its::kGroup) + 1) * 4;
  constexpr int kBytes = Its::kSumsAt + kSums > kSlotsEnd ? Its::kSumsAt + kSums : kSlotsEnd;
  static_assert(kBytes <= kHopperMemory);
  static_assert(2 * kBytes > kHopperMemory, "a block has a multiprocessor to itself");
  return kBytes;
}

#if defined(GDFAST_HOPPER)

// Of images that the block has: which it begins with, and how often streams take some: at least
// once, of images that do not exist if there are no others.
struct Rounds {
  int first, count;
};

GDFAST_DEVICE Rounds rounds_of(const WholeWeightArguments& a) {
  const int first = static_cast<int>(blockIdx.y) * a.rounds_of_block, left = a.rounds - first;
  return {first, left < 1 ? 1 : left < a.rounds_of_block ? left : a.rounds_of_block};
}

template <typename Its>
GDFAST_DEVICE int first_channel_of() {
  return static_cast<int>(blockIdx.x) * Its::kChannels;
}

template <typename Its>
GDFAST_DEVICE int slots_of_block(const WholeWeightArguments& a) {
  return rounds_of(a).count * Its::kParts * Its::kStreams;
}

// Where the n-th rows of the block are.
template <typename Its>
GDFAST_DEVICE Slot slot_of(int n) {
  return {n % Its::kSlots, n / Its::kSlots & 1};
}

template <typename Its>
GDFAST_DEVICE unsigned char* slot_memory(const Slot& slot) {
  return shared_memory() + kRingAt + slot.index * Its::kSlotBytes;
}

// Has the n-th slot filled with what is of the input, or of the gradient.
template <typename Its>
GDFAST_DEVICE void load_slot(const WholeWeightArguments& a, int n, bool of_grad) {
  const Slot slot = slot_of<Its>(n);
  const int stream = n % Its::kStreams, part = n / Its::kStreams;
  const int round = rounds_of(a).first + part / Its::kParts;
  load_box(slot_memory<Its>(slot) + (of_grad ? Its::kGradAt : 0), of_grad ? a.grad : a.input,
           {first_channel_of<Its>(), of_grad ? 0 : Its::kFirstColumn,
            part % Its::kParts * Its::kSlotRows, (round * Its::kStreams + stream) * Its::kImages},
           full(slot));
}

// By one thread: has the n-th slot filled, if there is one, when its memory is free.
template <typename Its>
GDFAST_DEVICE void fill_slot(const WholeWeightArguments& a, int n) {
  if (n >= slots_of_block<Its>(a)) return;
  const Slot slot = slot_of<Its>(n);
  // In the first turn nobody has to leave a slot: the phase before the first is over.
  barrier_wait(empty(slot), slot.parity ^ 1);
  barrier_arrive_expecting(full(slot), Its::kSlotBytes);
  load_slot<Its>(a, n, false);
  load_slot<Its>(a, n, true);
}

template <typename Its>
GDFAST_DEVICE bool leads_stream() {
  return warp_lane() == 0 && warp_index() % (Its::kConsumers / Its::kStreams) == 0;
}

// By all threads: what a block begins with. Where there is one stream two lanes of a warp ask for
// each slot before anybody else knows of its barriers. Others' first threads do it afterwards:
// small images come sooner than one warp asks for all of them.
template <typename Its>
GDFAST_DEVICE void begin_block(const WholeWeightArguments& a) {
  let_next_begin();
  const int lane = warp_lane(), n = lane / 2;
  const bool fills = warp_index() == 0;
  if (fills && lane < Its::kSlots) {
    if (lane == 0) expect_boxes(a.input), expect_boxes(a.grad);
    barrier_init(full({lane, 0}), 1);
    barrier_init(empty({lane, 0}), Its::kConsumers / Its::kStreams);
    barriers_ready();
  }
  sync_warp();
  wait_for_kernel_before();
  static_assert(2 * Its::kSlots <= kWarp);
  if (Its::kStreams == 1 && fills && n < Its::kSlots && n < slots_of_block<Its>(a)) {
    const bool of_grad = lane % 2 != 0;
    if (!of_grad) barrier_arrive_expecting(full({n, 0}), Its::kSlotBytes);
    load_slot<Its>(a, n, of_grad);
  }
  sync_block();
}

// By all lanes of a warp: calls sum(slot's memory, i, is_top) for each slot of a stream, the i-th
// of Its::kUnrolled, which has the first rows of images or not.
template <typename Its, typename Sum>
GDFAST_DEVICE void for_each_slot(const WholeWeightArguments& a, int stream, Sum&& sum) {
  static_assert(Its::kParts % Its::kUnrolled == 0);
  const int slots = rounds_of(a).count * Its::kParts;
  const bool leads = leads_stream<Its>();
  int first = 0;
  do {
#pragma unroll
    for (int i = 0; i < Its::kUnrolled; ++i) {
      const int part = first + i, n = part * Its::kStreams + stream;
      const Slot slot = slot_of<Its>(n);
      barrier_wait(full(slot), slot.parity);
      sum(slot_memory<Its>(slot), i,
          Its::kParts == Its::kUnrolled ? i == 0 : part % Its::kParts == 0);
      leave(slot);
      // By now all others have left the slot before this one, or soon will.
      if (part > 0 && leads) fill_slot<Its>(a, n - Its::kStreams + Its::kSlots);
    }
    first += Its::kUnrolled;
  } while (first < slots);
}

// The pixel that a position sees in a column of a filter: of what is no position, a zero, since the
// gradient's zeros would not undo an infinity.
template <typename Its>
GDFAST_DEVICE int seen_pixel(int column, int s) {
  return column < Its::kColumns ? column + s - 1 - Its::kFirstColumn : Its::kRowPixels - 1;
}

template <typename Its, typename Sums>
GDFAST_DEVICE void write_block(Sums& sums, const WholeWeightArguments& a, const Unit& unit,
                               int stream) {
  write_sums<Its>(sums, a.split, unit, first_channel_of<Its>(), stream,
                  reinterpret_cast<float*>(shared_memory() + Its::kSumsAt));
}

#endif

}  // namespace
}  // namespace gdfast::cuda
