// The kernel of depthwise_boxes.cu.
#pragma once

#include "depthwise_boxes.h"
#include "depthwise_diagonals.h"

namespace gdfast::cuda {
namespace {

// Shared memory: stages, rows of outputs, barriers. Filters lie in the rows of outputs before.
GDFAST_DEVICE int made_at(const BoxesArguments& boxes) { return kBoxStages * boxes.stage; }
inline int boxes_bytes(const BoxesArguments& boxes) {
  return kBoxStages * boxes.stage + kMadeRows * kMadeBytes + 1024;
}

#if defined(GDFAST_HOPPER)

struct BoxesBarriers {
  uint64_t* first;

  GDFAST_DEVICE BoxesBarriers of(const BoxesArguments& boxes) {
    return {reinterpret_cast<uint64_t*>(shared_memory() + made_at(boxes) + kMadeRows * kMadeBytes)};
  }
  GDFAST_DEVICE uint64_t* full(const BoxesBarriers& its, int stage) { return its.first + stage; }
  GDFAST_DEVICE uint64_t* empty(const BoxesBarriers& its, int stage) {
    return its.first + kBoxStages + stage;
  }
  // A row of outputs is there, or may be made.
  GDFAST_DEVICE uint64_t* made(const BoxesBarriers& its, int row) {
    return its.first + 2 * kBoxStages + row;
  }
  GDFAST_DEVICE uint64_t* written(const BoxesBarriers& its, int row) {
    return its.first + 2 * kBoxStages + kMadeRows + row;
  }
  GDFAST_DEVICE void init(const BoxesBarriers& its) {
    for (int i = 0; i < kBoxStages; ++i) {
      barrier_init(full(its, i), 1);
      barrier_init(empty(its, i), kBoxWarps);
    }
    for (int i = 0; i < kMadeRows; ++i) {
      barrier_init(made(its, i), kBoxWarps);
      barrier_init(written(its, i), 1);
    }
    barriers_ready();
  }
};

// What one thread does beside its part: it starts the copies, of rows and of outputs.
template <int kSize>
struct BoxesCarrier {
  BoxesWalk loads, stores;
  RingPlace<kBoxStages> stage;
  RingPlace<kMadeRows> row;
  int behind = -kBoxLag;  // steps that have been multiplied, and rows that have been made,
  int made = -kBoxLag;    // when both sides are far enough apart
  bool stores_before = false;

  // A step more, if there is one: as soon as its stage is nobody's any more.
  GDFAST_DEVICE void load(BoxesCarrier& its, const DepthwiseArguments& a,
                          const BoxesArguments& boxes, const BoxesBarriers& barriers) {
    BoxesWalk& at = its.loads;
    if (!BoxesWalk::has(at, a, boxes, kSize - 1)) return;
    uint64_t* const full = BoxesBarriers::full(barriers, its.stage.index);
    // In the first turn nobody has to leave a stage: the phase before the first is over.
    barrier_wait(BoxesBarriers::empty(barriers, its.stage.index), its.stage.parity ^ 1);
    const int h = at.piece.p + at.step - a.pad_h;
    const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(a.H);
    barrier_arrive_expecting(full, inside ? boxes.stage : 0);
    if (inside) {
      load_box(shared_memory() + its.stage.index * boxes.stage, boxes.input,
               {box_channel(boxes), at.piece.q - a.pad_w, h, at.piece.n}, full);
    }
    ++at.step;
    RingPlace<kBoxStages>::advance(its.stage);
  }

  // A row of outputs more. Of the row before it, memory is free when this one has been started.
  GDFAST_DEVICE void store(BoxesCarrier& its, const DepthwiseArguments& a,
                           const BoxesArguments& boxes, const BoxesBarriers& barriers) {
    BoxesWalk& at = its.stores;
    if (!BoxesWalk::has(at, a, boxes, 0)) return;
    const int row = its.row.index, before = (row + kMadeRows - 1) % kMadeRows;
    barrier_wait(BoxesBarriers::made(barriers, row), its.row.parity);
    store_box(boxes.output, {box_channel(boxes), at.piece.q, at.piece.p + at.step, at.piece.n},
              shared_memory() + made_at(boxes) + row * kMadeBytes);
    stores_commit();
    stores_wait_read<1>();
    if (its.stores_before) barrier_arrive(BoxesBarriers::written(barriers, before));
    its.stores_before = true;
    ++at.step;
    RingPlace<kMadeRows>::advance(its.row);
  }
};

#endif

// kEnding: with a bias or an activation.
template <typename T, int kSize, bool kEnding>
GDFAST_KERNEL(kBoxThreads, 1)
depthwise_boxes_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                       const GDFAST_GRID_CONSTANT BoxesArguments boxes,
                       const GDFAST_GRID_CONSTANT Tensors<T> tensors) {
#if defined(GDFAST_HOPPER)
  using Filters = Diagonals<T, kSize, 1>;
  using Carrier = BoxesCarrier<kSize>;
  static_assert(kBoxChannels * kSize * kSize * 2 <= kMadeRows * kMadeBytes, "filters fit");
  const BoxesBarriers barriers = BoxesBarriers::of(boxes);
  const bool carries = threadIdx.x == 0;
  const int first_channel = box_channel(boxes);
  if (carries) BoxesBarriers::init(barriers);
  sync_block();
  Carrier carrier{{first_piece(boxes)}, {first_piece(boxes)}, {}, {}};
  if (carries) {
#pragma unroll 1
    for (int i = 0; i < kBoxStages; ++i) Carrier::load(carrier, a, boxes, barriers);
  }
  unsigned char* const made = shared_memory() + made_at(boxes);
  Filters::template share<kBoxChannels, kBoxThreads>(a, tensors.weight, first_channel,
                                                     reinterpret_cast<T*>(made));
  sync_block();
  // The channels and positions of this warp.
  const int plane = warp_index() % 8, tile = warp_index() / 8, quarter = warp_lane() % 4;
  const bool exists = first_channel + plane * 8 < a.C;
  Filters diagonals;
  Filters::take(diagonals, reinterpret_cast<const T*>(made) + plane * 8 * kSize * kSize);
  float bias[2] = {};  // of the channels that this lane has of a matrix's columns
  if (kEnding && tensors.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = first_channel + plane * 8 + quarter * 2 + i;
      if (k < a.K) bias[i] = to_float(tensors.bias[k]);
    }
  }
  sync_block();

  // Where this lane loads matrices: two columns of the filter at a time.
  const int matrix = warp_lane() / 8;
  const bool alone = boxes.images > 1;  // a tile has an image of its own
  const int slot = (alone ? tile * boxes.pitch : tile * kTilePositions) + matrix % 2 * 8 +
                   warp_lane() % 8 + matrix / 2;
  int load_at[kSize / 2 + 1];
#pragma unroll
  for (int i = 0; i <= kSize / 2; ++i) {
    const int at = slot + 2 * i;
    load_at[i] = at * kBoxRow + (plane ^ at % 8) * 16;
  }
  // And where it puts sums: of two positions, if there are outputs of these.
  int sums_at[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int place = warp_lane() / 4 + 8 * i, column = alone ? place : tile * 16 + place;
    const int row = alone ? tile * boxes.strip + place : column;
    sums_at[i] = column < boxes.strip ? row * kBoxRow + (plane ^ row % 8) * 16 + quarter * 4 : -1;
  }

  float zero = 0;  // unless a sum was not finite
  RingPlace<kBoxStages> stage;
  RingPlace<kMadeRows> row;
  BoxesWalk walk{first_piece(boxes)};
#pragma unroll 1
  while (BoxesWalk::has(walk, a, boxes, kSize - 1)) {
    const int h = walk.piece.p - a.pad_h, steps = walk.steps;
    walk.step = steps;
    Sums<1> alive[kSize] = {};
    LastColumn<1> before = {};
    const auto multiply = [&](int step, int u) {
#pragma unroll
      for (float& sum : alive[u]) sum = 0;
      const bool inside = exists && static_cast<unsigned>(h + step) < static_cast<unsigned>(a.H);
      const unsigned char* const pixels = shared_memory() + stage.index * boxes.stage;
      barrier_wait(BoxesBarriers::full(barriers, stage.index), stage.parity);
      multiply_row<T, kSize>(alive, u, before, diagonals, inside,
                             [&](int, int s) { return pixels + load_at[s / 2]; });
      sync_warp();
      if (warp_lane() == 0) barrier_arrive(BoxesBarriers::empty(barriers, stage.index));
      if (carries && ++carrier.behind > 0) Carrier::load(carrier, a, boxes, barriers);
      RingPlace<kBoxStages>::advance(stage);
    };
    const auto finish = [&](Sums<1>& sums) {
#pragma unroll
      for (float sum : sums) zero += sum * 0;
      if constexpr (kEnding) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += bias[i % 2];
        activate(sums, a.activation, static_cast<float>(a.negative_slope));
      }
      barrier_wait(BoxesBarriers::written(barriers, row.index), row.parity ^ 1);
      unsigned char* const to = made + row.index * kMadeBytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        auto* const word = reinterpret_cast<PackOf<T, 2>*>(to + sums_at[i]);
        if (sums_at[i] >= 0) *word = {{pack_two<T>(sums[2 * i], sums[2 * i + 1])}};
      }
      stores_ready();
      sync_warp();
      if (warp_lane() == 0) barrier_arrive(BoxesBarriers::made(barriers, row.index));
      if (carries && ++carrier.made > 0) Carrier::store(carrier, a, boxes, barriers);
      RingPlace<kMadeRows>::advance(row);
    };
#pragma unroll 1
    for (int step = 0; step < steps; step += kSize) {
      if constexpr (kEnding) {
        // Activations are long: they are there once.
#pragma unroll 1
        for (int u = 0; u < kSize && step + u < steps; ++u) {
          Sums<1> sums;
#pragma unroll
          for (int v = 0; v < kSize; ++v) {
            if (u != v) continue;
            multiply(step + v, v);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] = alive[(v + 1) % kSize][i];
          }
          if (step + u >= kSize - 1) finish(sums);
        }
      } else {
#pragma unroll
        for (int u = 0; u < kSize; ++u) {
          if (step + u >= steps) break;
          multiply(step + u, u);
          if (step + u >= kSize - 1) finish(alive[(u + 1) % kSize]);
        }
      }
    }
  }
  if (carries) {
#pragma unroll 1
    for (int i = 0; i < kBoxLag; ++i) Carrier::store(carrier, a, boxes, barriers);
    stores_wait<0>();
  }
  sync_block();
  if (sum_of_block(zero, reinterpret_cast<float*>(shared_memory())) == 0) return;
  walk = {first_piece(boxes)};
#pragma unroll 1
  while (BoxesWalk::has(walk, a, boxes, 0)) {
    walk.step = walk.steps;
    const BoxesPiece& piece = walk.piece;
    const int chunks = boxes.strip * 8, of_image = piece.rows * chunks;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < boxes.images * of_image; i += kBoxThreads) {
      const int n = piece.n + i / of_image, p = piece.p + i % of_image / chunks;
      const int q = piece.q + i % chunks / 8, k = first_channel + i % 8 * 8;
      if (n >= a.N || q >= a.Q || k >= a.K) continue;
      T* const chunk =
          tensors.output + n * a.output.n + int64_t{p} * a.output.h + int64_t{q} * a.output.w + k;
      mend<T, kSize>(a, tensors, chunk, n, k, p, q);
    }
  }
#endif
}

}  // namespace
}  // namespace gdfast::cuda
