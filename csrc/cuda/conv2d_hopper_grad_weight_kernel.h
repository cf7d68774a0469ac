// The kernel of conv2d_hopper_grad_weight.cu: a block's loader, its consumers, and how they share
// its memory.
#pragma once

#include "conv2d_hopper_tiles.h"
#include "hopper.h"

namespace gdfast::cuda {
namespace {

constexpr int kBlock = 64;  // filters or channels: one row of a box
constexpr int kDepth = 16;  // pixels that one product sums over

struct HopperWeightArguments {
  TensorMap grad, images[kMostPhases][kMostPhases];  // by phases of rows and columns
  float* sums;                                       // [splits, K, R, S, C]
  int K, C, S, taps;
  int units;  // blocks of channels times taps, taps first
  int box_n, box_h, box_w;
  int boxes_h, boxes_w, boxes;
  int by_two_h, by_two_w;                // 1 for a stride of 2, 0 for 1
  int first_h, first_w, step_h, step_w;  // of the first tap, and from one to the next
  int row_tiles, tiles, items;           // tiles of filters; of a split; of all splits
  int splits;
};

// What does not depend on how operands are held; boxes divide `out`, and a tile has filters by
// columns.
inline HopperWeightArguments hopper_weight_arguments(const Conv2dProblem& p, const HopperImage& out,
                                                     const PixelBox& box, int filters, int columns,
                                                     int64_t splits) {
  const auto small = [](int64_t value) { return static_cast<int>(value); };
  HopperWeightArguments a{};
  a.by_two_h = small(p.stride_h - 1), a.by_two_w = small(p.stride_w - 1);
  a.K = small(p.K), a.C = small(p.C), a.S = small(p.S), a.taps = small(p.R * p.S);
  a.units = small(tiles_for(p.C, kBlock) * p.R * p.S);
  a.box_n = small(box.n), a.box_h = small(box.h), a.box_w = small(box.w);
  a.boxes_h = small(tiles_for(out.H, box.h)), a.boxes_w = small(tiles_for(out.W, box.w));
  a.boxes = small(pixel_tiles(out, box));
  a.first_h = small(-p.pad_h), a.first_w = small(-p.pad_w);
  a.step_h = small(p.dilation_h), a.step_w = small(p.dilation_w);
  a.row_tiles = small(tiles_for(p.K, filters));
  a.tiles = a.row_tiles * small(tiles_for(int64_t{a.units} * kBlock, columns));
  a.items = small(a.tiles * splits), a.splits = small(splits);
  return a;
}

// In how many parts to sum so many boxes for each tile: a guess, from the cycles that a box takes
// and a part's writing, by each multiprocessor, and its reading, by all.
inline int64_t fastest_splits(int64_t boxes, int64_t tiles, int64_t step, int64_t writing,
                              int64_t reading, int64_t multiprocessors) {
  constexpr int64_t kMostSplits = 256, kLeastBoxes = 4;
  int64_t best = 1, least = 0;
  for (int64_t splits = 1; splits <= kMostSplits; ++splits) {
    if (splits > 1 && boxes < splits * kLeastBoxes) break;
    const int64_t each = tiles_for(boxes, splits) * step + writing;
    const int64_t time = tiles_for(tiles * splits, multiprocessors) * each + splits * reading;
    if (splits > 1 && time >= least) continue;
    best = splits, least = time;
  }
  return best;
}

// A tile of filters by columns, which are units of 64 channels of a tap: how consumers divide it,
// and what lies where in dynamic shared memory.
template <int kFilters, int kColumns>
struct HopperWeightTile {
  // Two consumers have half of the filters each, three a third of the columns.
  static constexpr bool kAcross = kColumns > 256;
  static constexpr int kConsumers = kAcross ? 3 : 2;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kN = kAcross ? kColumns / kConsumers : kColumns;
  static constexpr int kProducts = kFilters / kBlock / (kAcross ? 1 : kConsumers);
  static constexpr int kFilterBlocks = kFilters / kBlock, kUnits = kColumns / kBlock;

  static constexpr int kPixels = kAcross ? 32 : 64;  // of a stage
  static constexpr int kPart = kPixels * kBoxRow;    // 64 filters or channels of them
  static constexpr int kStage = (kFilterBlocks + kUnits) * kPart;
  static constexpr int kBarrier = static_cast<int>(sizeof(uint64_t));
  static constexpr int kStages = (226 * 1024) / kStage;
  static constexpr int kBarriers = kStages * kStage;
  static constexpr int kSize = kBarriers + 2 * kStages * kBarrier;
  static_assert(kStages >= 4 && kSize <= 227 * 1024, "what a block may have");

  // Registers of a thread, in units of 8. Who takes more waits for those that were given back: all
  // together must not be more than a block is launched with.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kLoaderRegisters = 56, kConsumerRegisters = kAcross ? 152 : 224;
  static_assert(kLoaderRegisters + kConsumers * kConsumerRegisters <=
                    (1 + kConsumers) * kLaunchRegisters,
                "what a block has");
};

#if defined(GDFAST_HOPPER)

// A place in the ring of stages: both sides go through it from the block's first to its last, and
// a barrier's phase is over once per turn.
struct Place {
  int stage, parity;
};

template <typename Its>
struct WeightRing {
  GDFAST_DEVICE unsigned char* memory(const Place& place) {
    return shared_memory() + place.stage * Its::kStage;
  }
  GDFAST_DEVICE uint64_t* full(const Place& place) {
    return reinterpret_cast<uint64_t*>(shared_memory() + Its::kBarriers) + place.stage;
  }
  GDFAST_DEVICE uint64_t* empty(const Place& place) { return full(place) + Its::kStages; }
  GDFAST_DEVICE void advance(Place& place) {
    if (++place.stage < Its::kStages) return;
    place.stage = 0;
    place.parity ^= 1;
  }
};

// One tile of one split: its first filter and unit, and its boxes of pixels.
struct WeightItem {
  int split, filter, unit, first_box, end_box;
};

GDFAST_DEVICE int least(int a, int b) { return a < b ? a : b; }

GDFAST_DEVICE int first_box_of(const HopperWeightArguments& a, int split) {
  return static_cast<int>(int64_t{split} * a.boxes / a.splits);
}

// Blocks that run at the same time have tiles of the same pixels, which they find in the cache.
template <int kFilters, int kColumns>
GDFAST_DEVICE WeightItem item_at(const HopperWeightArguments& a, int index) {
  const int split = index / a.tiles, tile = index - split * a.tiles;
  const int column = tile / a.row_tiles, row = tile - column * a.row_tiles;
  return {split, row * kFilters, column * (kColumns / kBlock), first_box_of(a, split),
          first_box_of(a, split + 1)};
}

// By one warp: each lane has one of the boxes of a stage, first those of filters, then those of
// units. What is the same for all stages of an item is found once.
template <int kFilters, int kColumns, bool kPlanes>
GDFAST_DEVICE void load_items(const HopperWeightArguments& a) {
  using Its = HopperWeightTile<kFilters, kColumns>;
  using Ring = WeightRing<Its>;
  static_assert(Its::kFilterBlocks + Its::kUnits <= kWarp, "a box for each lane");
  const int box_bytes = a.box_n * a.box_h * a.box_w * kBoxRow, lane = warp_lane();
  Place place{0, 0};
  for (int index = static_cast<int>(blockIdx.x); index < a.items;
       index += static_cast<int>(gridDim.x)) {
    const WeightItem item = item_at<kFilters, kColumns>(a, index);
    // What lies beyond the last filter or unit is not loaded: what is made of it is not written.
    const int filter_blocks = least((a.K - item.filter + kBlock - 1) / kBlock, Its::kFilterBlocks);
    const int units = least(a.units - item.unit, Its::kUnits);
    const int bytes = (filter_blocks + units) * box_bytes;
    const bool has_filters = lane < Its::kFilterBlocks;
    const bool has_box = has_filters ? lane < filter_blocks : lane - Its::kFilterBlocks < units;
    const int unit = has_filters ? 0 : item.unit + lane - Its::kFilterBlocks;
    const int block = unit / a.taps, tap = unit - block * a.taps, r = tap / a.S;
    // A stride of two meets the even or the odd rows of the image, the phase of a tap, which are a
    // tensor of their own: there windows take single steps. A shift rounds down.
    const int at_h = a.first_h + r * a.step_h, at_w = a.first_w + (tap - r * a.S) * a.step_w;
    const TensorMap& map = has_filters ? a.grad : a.images[at_h & a.by_two_h][at_w & a.by_two_w];
    const int channel = has_filters ? item.filter + lane * kBlock : block * kBlock;
    const int ahead_h = has_filters ? 0 : at_h >> a.by_two_h;
    const int ahead_w = has_filters ? 0 : at_w >> a.by_two_w;
    const int line = item.first_box / a.boxes_w;
    int n = line / a.boxes_h, h = line - n * a.boxes_h, w = item.first_box - line * a.boxes_w;
    for (int box = item.first_box; box < item.end_box; ++box, Ring::advance(place)) {
      // In the first turn nobody has to leave a stage: the phase before the first is over.
      barrier_wait(Ring::empty(place), place.parity ^ 1);
      uint64_t* const full = Ring::full(place);
      if (lane == 0) barrier_arrive_expecting(full, bytes);
      sync_warp();
      if (has_box) {
        unsigned char* const to = Ring::memory(place) + lane * Its::kPart;
        if constexpr (kPlanes) {
          load_box(to, map, {w * a.box_w, channel, n, 0}, full);
        } else {
          load_box(to, map, {channel, w * a.box_w + ahead_w, h * a.box_h + ahead_h, n * a.box_n},
                   full);
        }
      }
      if (++w < a.boxes_w) continue;
      w = 0;
      if (++h < a.boxes_h) continue;
      h = 0;
      ++n;
    }
  }
}

// grads, image: of the consumer. Pixels go down the rows of boxes, or along them where those are of
// planes.
template <typename T, typename Its, bool kPlanes>
GDFAST_DEVICE void multiply_stage(float (&sums)[Its::kProducts][Its::kN / 2],
                                  const unsigned char* grads, const unsigned char* image) {
  warpgroup_begin();
#pragma unroll
  for (int pixel = 0; pixel < Its::kPixels; pixel += kDepth) {
    const auto matrix = [pixel](const unsigned char* from) {
      return kPlanes ? rows_matrix(from, 2 * pixel)
                     : columns_matrix(from, pixel * kBoxRow, Its::kPart);
    };
    const uint64_t b = matrix(image);
#pragma unroll
    for (int product = 0; product < Its::kProducts; ++product) {
      const uint64_t a = matrix(grads + product * Its::kPart);
      warpgroup_multiply<T, Its::kN, !kPlanes, !kPlanes>(sums[product], a, b, true);
    }
  }
  warpgroup_commit();
}

struct alignas(16) FourSums {
  float values[4];
};

// Writes what a warp has of one product: 16 filters, from the first of which on, by units. A lane
// has two channels of each chunk of eight; lanes side by side exchange what makes it four of every
// second chunk, so that a line of memory is written in half as many accesses.
template <int kN>
GDFAST_DEVICE void write_sums(const HopperWeightArguments& a, const float (&sums)[kN / 2],
                              int split, int first_filter, int first_unit) {
  const int lane = computed_again(warp_lane()), odd = lane % 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int filter = first_filter + lane / 4 + 8 * i;
    float* const row = a.sums + (int64_t{split} * a.K + filter) * (a.taps * a.C);
#pragma unroll
    for (int part = 0; part < kN / kBlock; ++part) {
      const int unit = first_unit + part;
      if (unit >= a.units) continue;
      const int block = unit / a.taps, tap = unit - block * a.taps;
      const int channel = block * kBlock + 8 * odd + lane % 4 / 2 * 4;
      float* const to = row + (tap * a.C + channel);
#pragma unroll
      for (int chunk = 0; chunk < 8; chunk += 2) {
        const float* const even = sums + (32 * part + 4 * chunk + 2 * i);
        float theirs[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) theirs[j] = shuffle_xor(odd ? even[j] : even[4 + j], 1);
        // Channels come in eights.
        if (filter >= a.K || channel + 8 * chunk >= a.C) continue;
        *reinterpret_cast<FourSums*>(to + 8 * chunk) =
            odd ? FourSums{theirs[0], theirs[1], even[4], even[5]}
                : FourSums{even[0], even[1], theirs[0], theirs[1]};
      }
    }
  }
}

template <typename T, int kFilters, int kColumns, bool kPlanes>
GDFAST_DEVICE void multiply_items(const HopperWeightArguments& a, int consumer) {
  using Its = HopperWeightTile<kFilters, kColumns>;
  using Ring = WeightRing<Its>;
  const int warp = warp_index() % 4;
  const int my_filters = Its::kAcross ? 0 : consumer * Its::kProducts * kBlock;
  const int my_units = Its::kAcross ? consumer * (Its::kN / kBlock) : 0;
  const int my_grads = my_filters / kBlock * Its::kPart;
  const int my_image = (Its::kFilterBlocks + my_units) * Its::kPart;
  const auto arrive = [](uint64_t* barrier) {
    if (warp_lane() == 0) barrier_arrive(barrier);
  };
  Place place{0, 0};
  float sums[Its::kProducts][Its::kN / 2];
  for (int index = static_cast<int>(blockIdx.x); index < a.items;
       index += static_cast<int>(gridDim.x)) {
    const WeightItem item = item_at<kFilters, kColumns>(a, index);
    const int filter = item.filter + my_filters, unit = item.unit + my_units;
    if (filter >= a.K || unit >= a.units) {
      for (int box = item.first_box; box < item.end_box; ++box, Ring::advance(place)) {
        barrier_wait(Ring::full(place), place.parity);
        arrive(Ring::empty(place));
      }
      continue;
    }
#pragma unroll
    for (auto& product : sums) {
#pragma unroll
      for (float& sum : product) sum = 0;
    }
    uint64_t* before = nullptr;
    for (int box = item.first_box; box < item.end_box; ++box, Ring::advance(place)) {
      barrier_wait(Ring::full(place), place.parity);
      multiply_stage<T, Its, kPlanes>(sums, Ring::memory(place) + my_grads,
                                      Ring::memory(place) + my_image);
      // The products of the stage before are over when only these are under way.
      warpgroup_wait<1>();
      if (before != nullptr) arrive(before);
      before = Ring::empty(place);
    }
    warpgroup_wait<0>();
#pragma unroll
    for (auto& product : sums) warpgroup_take(product);
    if (before != nullptr) arrive(before);
#pragma unroll
    for (int product = 0; product < Its::kProducts; ++product) {
      write_sums<Its::kN>(a, sums[product], item.split, filter + product * kBlock + 16 * warp,
                          unit);
    }
  }
}

// Pixels of a stage that no box reaches: zeros, which add nothing to any sum.
template <typename Its>
GDFAST_DEVICE void clear_rest(int box_pixels) {
  const int rest = (Its::kPixels - box_pixels) * kBoxRow;
  if (rest == 0) return;
  for (int part = 0; part < Its::kStages * (Its::kStage / Its::kPart); ++part) {
    unsigned char* const to = shared_memory() + (part + 1) * Its::kPart - rest;
    for (int byte = static_cast<int>(threadIdx.x) * 16; byte < rest; byte += Its::kThreads * 16) {
      store_16(to + byte, {});
    }
  }
  stores_ready();
}

#endif

template <typename T, int kFilters, int kColumns, bool kPlanes>
GDFAST_KERNEL((HopperWeightTile<kFilters, kColumns>::kThreads), 1)
conv2d_hopper_grad_weight_kernel(GDFAST_GRID_CONSTANT const HopperWeightArguments a) {
#if defined(GDFAST_HOPPER)
  using Its = HopperWeightTile<kFilters, kColumns>;
  using Ring = WeightRing<Its>;
  if (threadIdx.x == 0) {
    for (Place place{0, 0}; place.parity == 0; Ring::advance(place)) {
      barrier_init(Ring::full(place), 1);
      barrier_init(Ring::empty(place), 4 * Its::kConsumers);  // warps
    }
    barriers_ready();
  }
  clear_rest<Its>(a.box_n * a.box_h * a.box_w);
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warpgroup = shuffle(warp_index() / 4, 0);
  if (warpgroup == 0) {
    give_registers<Its::kLoaderRegisters>();
    if (warp_index() == 0) load_items<kFilters, kColumns, kPlanes>(a);
  } else {
    take_registers<Its::kConsumerRegisters>();
    multiply_items<T, kFilters, kColumns, kPlanes>(a, warpgroup - 1);
  }
#endif
}

}  // namespace
}  // namespace gdfast::cuda
