// Convolution in groups of few channels on Hopper, by filters of 3 x 3 with stride 1, in half
// types: what its kernels share.
//
// A block takes a slab of 64 channels and walks down strips of images, a band of four rows at a
// time. One thread has the TMA unit copy rows to the slots of a ring; what lies outside of images
// arrives as zeros. Warps multiply what has arrived, each at its own pace. A row is copied once: a
// band reads the four rows of its slot and the first two of the next one. Small images are a slot
// each, with all their bands.
//
// A warp multiplies 8 columns of a band. Of these the matrix instruction takes 16 pixels at a time,
// of two rows. What is loaded of three pairs of rows of the input are six rows' halves of such
// operands, from which those of all rows of a filter are put together in registers.
#pragma once

#include "conv2d_hopper_images.h"
#include "divisor.h"
#include "grouped.h"
#include "hopper.h"

namespace gdfast::cuda {
namespace {

constexpr int kBand = 4;  // rows
constexpr int kPairsOfBand = kBand / 2, kPairsRead = kPairsOfBand + 1;
constexpr int kTileBytes = kSide * kBoxRow;  // 8 columns of a row
constexpr int kMostSlots = 24;
constexpr int kRingAt = 1024;  // in shared memory, after the barriers
static_assert(2 * kMostSlots * sizeof(uint64_t) <= kRingAt, "two for each slot");
constexpr int64_t kHopperMemory = 227 * 1024;  // bytes, that a block may have
constexpr int kUnits = kSlab / kChannelsOfWarp;

struct GroupedRing {
  TensorMap input;
  bool whole;  // whether a slot has all bands of an image
  int slots, slot_bytes, row_bytes;
  int input_bytes;  // of a slot
  int pad_h, pad_w, P, Q;
  int rows, columns;          // of a strip, at most
  Divisor of_image, of_rows;  // strips of an image, of the same rows
  int strips;
  int tiles;  // of a slot
  Divisor tiles_of_band;
};

#if defined(GDFAST_HOPPER)

// What one block walks down: where it begins, and how many slots have bands of it.
struct Strip {
  int image, row, column, slots;
};

GDFAST_DEVICE Strip strip_at(const GroupedRing& a, int index) {
  const Divided image = divide(index, a.of_image), rows = divide(image.rest, a.of_rows);
  const int row = rows.quotient * a.rows, left = a.P - row;
  const int bands = ((left < a.rows ? left : a.rows) + kBand - 1) / kBand;
  return {image.quotient, row, rows.rest * a.columns, a.whole ? 1 : bands};
}

// A place in the ring. Both sides go through it from the block's first to its last.
struct Slot {
  int index, parity;
};

GDFAST_DEVICE Slot next_slot(const GroupedRing& a, const Slot& slot) {
  if (slot.index + 1 < a.slots) return {slot.index + 1, slot.parity};
  return {0, slot.parity ^ 1};
}

GDFAST_DEVICE int slot_at(const GroupedRing& a, const Slot& slot) {
  return kRingAt + slot.index * a.slot_bytes;
}

GDFAST_DEVICE uint64_t* full(const Slot& slot) {
  return reinterpret_cast<uint64_t*>(shared_memory()) + slot.index;
}

GDFAST_DEVICE uint64_t* empty(const Slot& slot) { return full(slot) + kMostSlots; }

// By one thread, before the block meets.
GDFAST_DEVICE void init_ring(const GroupedRing& a, int consumers) {
  for (int slot = 0; slot < a.slots; ++slot) {
    barrier_init(full({slot, 0}), 1);
    barrier_init(empty({slot, 0}), consumers);
  }
  barriers_ready();
}

// By one thread: calls load(strip, row, has_band, slot) for all slots of the block, when their
// memory is free. A strip's last slot has rows for the band before it alone.
template <typename Load>
GDFAST_DEVICE void fill_ring(const GroupedRing& a, Load&& load) {
  Slot slot{0, 0};
  for (int index = static_cast<int>(blockIdx.x); index < a.strips;
       index += static_cast<int>(gridDim.x)) {
    const Strip strip = strip_at(a, index);
    const int count = strip.slots + (a.whole ? 0 : 1);
    for (int i = 0; i < count; ++i, slot = next_slot(a, slot)) {
      // In the first turn nobody has to leave a slot: the phase before the first is over.
      barrier_wait(empty(slot), slot.parity ^ 1);
      load(strip, strip.row + i * kBand, i < strip.slots, slot);
    }
  }
}

GDFAST_DEVICE void load_input(const GroupedRing& a, const Strip& strip, int row, int channel,
                              const Slot& slot) {
  load_box(shared_memory() + slot_at(a, slot), a.input,
           {channel, strip.column - a.pad_w, row - a.pad_h, strip.image}, full(slot));
}

// Eight columns of a band: where they lie in the image, and what they read in shared memory, the
// first four rows and those that follow. `band` is that of the slot.
struct BandTile {
  int image, row, column, top, bottom;
  int slot, band, part;  // of its slot; the part of the band
};

GDFAST_DEVICE void leave(const Slot& slot) {
  sync_warp();
  if (warp_lane() == 0) barrier_arrive(empty(slot));
}

// By all lanes of a warp: calls multiply(tile) for every `streams`-th tile of the block.
template <typename Multiply>
GDFAST_DEVICE void empty_ring(const GroupedRing& a, int stream, int streams, Multiply&& multiply) {
  Slot slot{0, 0};
  int next = stream;  // of the tiles of this slot and those after it
  for (int index = static_cast<int>(blockIdx.x); index < a.strips;
       index += static_cast<int>(gridDim.x)) {
    const Strip strip = strip_at(a, index);
    for (int i = 0; i < strip.slots; ++i) {
      const Slot after = next_slot(a, slot);
      barrier_wait(full(slot), slot.parity);
      if (!a.whole) barrier_wait(full(after), after.parity);
      for (; next < a.tiles; next += streams) {
        const Divided at = divide(next, a.tiles_of_band);
        const int part = at.rest * kTileBytes;
        const int top = slot_at(a, slot) + at.quotient * kBand * a.row_bytes + part;
        const int bottom = a.whole ? top + kBand * a.row_bytes : slot_at(a, after) + part;
        multiply(BandTile{strip.image, strip.row + (i + at.quotient) * kBand,
                          strip.column + at.rest * kSide, top, bottom, slot_at(a, slot),
                          at.quotient, at.rest});
      }
      next -= a.tiles;
      leave(slot);
      slot = after;
    }
    if (!a.whole) {
      leave(slot);
      slot = next_slot(a, slot);
    }
  }
}

// The place of a chunk of a pixel: within each 1024 bytes, chunks change places with the pixel.
GDFAST_DEVICE int swizzled(int pixel, int chunk) {
  return pixel * kBoxRow + ((chunk ^ (pixel & 7)) << 4);
}

// Three pairs of rows: four registers are the two rows' first halves of what is summed over, and
// their second halves, or as they lie in `at`, by kWithin.
using ReadPairs = uint32_t[kPairsRead][4];

#endif

// --- From a problem ---------------------------------------------------------------------------

struct GroupedHopperPlan {
  bool whole;
  int64_t columns, column_strips, pitch;  // of a strip; pixels of a row in a slot
  int64_t bands, box_rows;                // of an image; of a box
};

inline int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

inline GroupedHopperPlan grouped_hopper_plan(const Conv2dProblem& p) {
  constexpr int64_t kMostColumns = 56, kMostWhole = 40 * 1024;
  GroupedHopperPlan plan{};
  plan.bands = ceil_div(p.P, kBand);
  plan.column_strips = p.Q <= kMostColumns ? 1 : ceil_div(p.Q, kMostColumns);
  plan.columns = round_up(ceil_div(p.Q, plan.column_strips), kSide);
  const bool one = plan.column_strips == 1;
  plan.pitch = round_up((one ? p.Q : plan.columns) + 2, kSide);
  // The last column that is read may be the first one of the next row, if both are padding.
  const int64_t less = round_up(p.Q + 1, kSide);
  const bool shares = one && less < plan.pitch && p.pad_w >= 1 && less - p.pad_w >= p.W;
  const int64_t rows = plan.bands * kBand + 2, and_next = p.P + 3;
  const int64_t whole_rows = shares && rows < and_next ? and_next : rows;
  const int64_t whole_pitch = shares ? less : plan.pitch;
  plan.whole = one && whole_rows * whole_pitch * kBoxRow <= kMostWhole && whole_rows <= 256;
  if (plan.whole) plan.pitch = whole_pitch;
  plan.box_rows = plan.whole ? whole_rows : kBand;
  return plan;
}

// Blocks of a slab, of which there are so many, and in how many parts these cut images: what takes
// the fewest slots one after the other.
struct GroupedHopperSplit {
  int64_t blocks, bands;  // of a strip
};

inline GroupedHopperSplit grouped_hopper_split(const Conv2dProblem& p,
                                               const GroupedHopperPlan& plan, int64_t slabs,
                                               int64_t multiprocessors) {
  const int64_t most = multiprocessors < slabs ? 1 : multiprocessors / slabs;
  int64_t best = plan.bands, strips = p.N * plan.column_strips;
  int64_t least = ceil_div(strips, most) * (plan.bands + 1);
  for (int64_t parts = 2; parts <= plan.bands && !plan.whole; ++parts) {
    const int64_t bands = ceil_div(plan.bands, parts);
    const int64_t all = p.N * plan.column_strips * ceil_div(plan.bands, bands);
    const int64_t time = ceil_div(all, most) * (bands + 1);
    if (time >= least) continue;
    least = time, best = bands, strips = all;
  }
  return {strips < most ? strips : most, best};
}

// What lies in slots beside the input, and in memory beside the ring.
template <typename T>
GroupedRing grouped_ring(const char* op, const Conv2dProblem& p, const void* input,
                         const GroupedHopperSplit& split, int64_t more_bytes, int64_t beside) {
  const GroupedHopperPlan plan = grouped_hopper_plan(p);
  const int64_t input_bytes = plan.box_rows * plan.pitch * kBoxRow;
  const int64_t slot_bytes = input_bytes + more_bytes;
  const int64_t slots = (kHopperMemory - kRingAt - beside) / slot_bytes;
  const int64_t row_strips = ceil_div(plan.bands, split.bands);
  const int64_t tiles = plan.columns / kSide;
  return {
      channels_first<T>(op, input, {p.N, p.C, p.H, p.W, p.input}, {1, plan.box_rows, plan.pitch}),
      plan.whole,
      small(slots < kMostSlots ? slots : kMostSlots),
      small(slot_bytes),
      small(plan.pitch * kBoxRow),
      small(input_bytes),
      small(p.pad_h),
      small(p.pad_w),
      small(p.P),
      small(p.Q),
      small(split.bands * kBand),
      small(plan.columns),
      Divisor::of(row_strips * plan.column_strips),
      Divisor::of(plan.column_strips),
      small(p.N * row_strips * plan.column_strips),
      small(plan.whole ? tiles * plan.bands : tiles),
      Divisor::of(tiles)};
}

}  // namespace
}  // namespace gdfast::cuda
