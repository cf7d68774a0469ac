// Convolution in groups of few channels on Hopper, by filters of 3 x 3 with stride 1, in half
// types: what its kernels share.
//
// A block takes a slab of 64 channels and walks down strips of images, a band of rows at a time.
// One thread has the TMA unit copy rows to the slots of a ring; what lies outside of images arrives
// as zeros. Warps multiply what has arrived, each at its own pace: 8 columns of a band. Of these
// the matrix instruction takes 16 pixels at a time, 8 columns of two rows.
//
//   RowBand    Four rows of an image. A row is copied once: a band reads the four rows of its slot
//              and the first two of the next one; or small images are a slot each, with all their
//              bands. The instruction takes neighbouring rows: three pairs of them are loaded, and
//              what it takes for the rows of a filter is put together in registers.
//   TwinBand   Seven rows of two small images, whose rows it takes together: no part of it is idle
//              where an image has 7 or 14 rows. A slot has a band and the rows around it.
#pragma once

#include "conv2d_hopper_images.h"
#include "divisor.h"
#include "grouped.h"
#include "hopper.h"

namespace gdfast::cuda {
namespace {

// Two rows that lie together are a pair.
template <bool kIsOfTwins>
struct BandShape {
  static constexpr bool kTwins = kIsOfTwins;
  static constexpr int kRows = kTwins ? 7 : 4;
  static constexpr int kPairs = kTwins ? kRows : kRows / 2;
  // Of the input: neighbouring ones have one row in common, twins are a row further each.
  static constexpr int kRead = kTwins ? kPairs + 2 : kPairs + 1;
};
using RowBand = BandShape<false>;
using TwinBand = BandShape<true>;

constexpr int kTileBytes = kSide * kBoxRow;  // 8 columns of a row
constexpr int kMostSlots = 24;
constexpr int kRingAt = 1024;  // in shared memory, after the barriers
static_assert(2 * kMostSlots * sizeof(uint64_t) <= kRingAt, "two for each slot");
constexpr int64_t kHopperMemory = 227 * 1024;  // bytes, that a block may have
constexpr int kUnits = kSlab / kChannelsOfWarp;

struct GroupedRing {
  TensorMap input;
  bool whole;                                    // whether a slot has all that its bands read
  int slots, slot_bytes, row_bytes, pair_bytes;  // between two rows, and those of a pair
  int input_bytes;                               // of a slot
  int pad_h, pad_w, P, Q;
  int rows, columns;          // of a strip, at most
  int band_rows, images;      // of a band; of a strip
  Divisor of_image, of_rows;  // strips of an image, or of twins; of the same rows
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
  const int bands = ((left < a.rows ? left : a.rows) + RowBand::kRows - 1) / RowBand::kRows;
  return {image.quotient * a.images, row, rows.rest * a.columns, a.whole ? 1 : bands};
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

// By a warp, before the block meets.
GDFAST_DEVICE void init_ring(const GroupedRing& a, int consumers) {
  static_assert(kMostSlots <= kWarp, "one for each lane");
  const int slot = warp_lane();
  if (slot >= a.slots) return;
  barrier_init(full({slot, 0}), 1);
  barrier_init(empty({slot, 0}), consumers);
  barriers_ready();
}

// By one thread: calls load(strip, row, has_band, slot) for all slots of the block, which is the
// y-th of its slab's, when their memory is free. A strip's last slot has rows for the band before
// it alone.
template <typename Load>
GDFAST_DEVICE void fill_ring(const GroupedRing& a, Load&& load) {
  Slot slot{0, 0};
  for (int index = static_cast<int>(blockIdx.y); index < a.strips;
       index += static_cast<int>(gridDim.y)) {
    const Strip strip = strip_at(a, index);
    const int count = strip.slots + (a.whole ? 0 : 1);
    for (int i = 0; i < count; ++i, slot = next_slot(a, slot)) {
      // In the first turn nobody has to leave a slot: the phase before the first is over.
      barrier_wait(empty(slot), slot.parity ^ 1);
      load(strip, strip.row + i * a.band_rows, i < strip.slots, slot);
    }
  }
}

GDFAST_DEVICE void load_input(const GroupedRing& a, const Strip& strip, int row, int channel,
                              const Slot& slot) {
  load_box(shared_memory() + slot_at(a, slot), a.input,
           {channel, strip.column - a.pad_w, row - a.pad_h, strip.image}, full(slot));
}

// Eight columns of a band: where they lie in the image, and what they read in shared memory: from
// which row on, and where that of row 4 begins.
struct BandTile {
  int image, row, column, top, bottom;
  int slot, band, part;  // of its slot; of the band
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
  for (int index = static_cast<int>(blockIdx.y); index < a.strips;
       index += static_cast<int>(gridDim.y)) {
    const Strip strip = strip_at(a, index);
    for (int i = 0; i < strip.slots; ++i) {
      const Slot after = next_slot(a, slot);
      barrier_wait(full(slot), slot.parity);
      if (!a.whole) barrier_wait(full(after), after.parity);
      for (; next < a.tiles; next += streams) {
        const Divided at = divide(next, a.tiles_of_band);
        const int part = at.rest * kTileBytes;
        const int top = slot_at(a, slot) + at.quotient * a.band_rows * a.row_bytes + part;
        const int bottom = a.whole ? top + a.band_rows * a.row_bytes : slot_at(a, after) + part;
        multiply(BandTile{strip.image, strip.row + (i + at.quotient) * a.band_rows,
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

// The same in a box whose rows have 64 bytes: within each 512 bytes, with the pair of pixels.
GDFAST_DEVICE int half_swizzled(int pixel, int chunk) {
  return pixel * kHalfBoxRow + ((chunk ^ (pixel >> 1 & 3)) << 4);
}

#endif

// --- From a problem ---------------------------------------------------------------------------

struct GroupedHopperPlan {
  bool twins, whole;
  int64_t columns, column_strips, pitch;  // of a strip; pixels of a row in a slot
  int64_t band_rows, bands;               // of an image
  int64_t box_rows, grad_rows;            // of a slot, for each image
  int64_t images;                         // of a slot
};

// Of half types.
inline int64_t output_bytes(const Conv2dProblem& p) { return p.N * p.K * p.P * p.Q * 2; }

inline int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

inline GroupedHopperPlan grouped_hopper_plan(const Conv2dProblem& p, bool may_be_twins) {
  constexpr int64_t kMostColumns = 56, kMostWhole = 40 * 1024;
  GroupedHopperPlan plan{};
  plan.column_strips = p.Q <= kMostColumns ? 1 : ceil_div(p.Q, kMostColumns);
  plan.columns = round_up(ceil_div(p.Q, plan.column_strips), kSide);
  const bool one = plan.column_strips == 1;
  plan.pitch = round_up((one ? p.Q : plan.columns) + 2, kSide);
  // The last column that is read may be the first one of the next row, if both are padding.
  const int64_t less = round_up(p.Q + 1, kSide);
  const bool shares = one && less < plan.pitch && p.pad_w >= 1 && less - p.pad_w >= p.W;
  const int64_t pitch = shares ? less : plan.pitch, rows = p.P + 2 + (shares ? 1 : 0);
  plan.whole = one && rows * pitch * kBoxRow <= kMostWhole;
  if (plan.whole) plan.pitch = pitch;
  // Narrower groups are not bound by products.
  const bool worth = may_be_twins && p.C / p.groups >= kChannelsOfWarp;
  const bool twins = worth && plan.whole && p.N > 1 && p.P % TwinBand::kRows == 0;
  plan.twins = twins;
  plan.images = twins ? 2 : 1;
  plan.band_rows = twins ? TwinBand::kRows : RowBand::kRows;
  plan.bands = ceil_div(p.P, plan.band_rows);
  plan.grad_rows = plan.whole && !twins ? plan.bands * plan.band_rows : plan.band_rows;
  plan.box_rows = plan.grad_rows + (plan.whole ? 2 : 0);
  // And so the last row's neighbour is.
  if (shares && (twins || plan.box_rows < rows)) ++plan.box_rows;
  return plan;
}

// Blocks of a slab, of which there are so many, and how many bands their strips have: what takes
// the fewest slots one after the other.
struct GroupedHopperSplit {
  int64_t blocks, bands;
};

inline GroupedHopperSplit grouped_hopper_split(const Conv2dProblem& p,
                                               const GroupedHopperPlan& plan, int64_t slabs,
                                               int64_t multiprocessors) {
  const int64_t most = multiprocessors < slabs ? 1 : multiprocessors / slabs;
  const int64_t images = ceil_div(p.N, plan.images) * plan.column_strips;
  int64_t best = plan.bands, strips = images, least = 0;
  if (plan.twins) best = 1, strips = images * plan.bands;
  for (int64_t parts = 1; parts <= plan.bands && !plan.whole; ++parts) {
    const int64_t bands = ceil_div(plan.bands, parts), all = images * ceil_div(plan.bands, bands);
    const int64_t time = ceil_div(all, most) * (bands + 1);
    if (parts > 1 && time >= least) continue;
    least = time, best = bands, strips = all;
  }
  // No more blocks than take as long: each leaves sums of a weight's gradient to be added up.
  return {ceil_div(strips, ceil_div(strips, most)), best};
}

// What lies in slots beside the input, and in memory beside the ring.
template <typename T>
GroupedRing grouped_ring(const char* op, const Conv2dProblem& p, const GroupedHopperPlan& plan,
                         const void* input, const GroupedHopperSplit& split, int64_t more_bytes,
                         int64_t beside) {
  const int64_t image_bytes = plan.box_rows * plan.pitch * kBoxRow;
  const int64_t input_bytes = plan.images * image_bytes, slot_bytes = input_bytes + more_bytes;
  const int64_t slots = (kHopperMemory - kRingAt - beside) / slot_bytes;
  // A band that is not the whole image is read with the one below it.
  if (slots < (plan.whole ? 1 : 2)) {
    throw std::logic_error(std::string(op) + ": a block's memory has no room for its rows");
  }
  const int64_t row_strips = ceil_div(plan.bands, split.bands), row_bytes = plan.pitch * kBoxRow;
  const int64_t bands_of_slot = plan.grad_rows / plan.band_rows, tiles = plan.columns / kSide;
  return {channels_first<T>(op, input, {p.N, p.C, p.H, p.W, p.input},
                            {plan.images, plan.box_rows, plan.pitch}),
          plan.whole,
          small(slots < kMostSlots ? slots : kMostSlots),
          small(slot_bytes),
          small(row_bytes),
          small(plan.images > 1 ? image_bytes : row_bytes),
          small(input_bytes),
          small(p.pad_h),
          small(p.pad_w),
          small(p.P),
          small(p.Q),
          small(split.bands * plan.band_rows),
          small(plan.columns),
          small(plan.band_rows),
          small(plan.images),
          Divisor::of(row_strips * plan.column_strips),
          Divisor::of(plan.column_strips),
          small(ceil_div(p.N, plan.images) * row_strips * plan.column_strips),
          small(tiles * bands_of_slot),
          Divisor::of(tiles)};
}

}  // namespace
}  // namespace gdfast::cuda
