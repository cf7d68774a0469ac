// What moves rows for depthwise kernels in boxes (depthwise_boxes.h): a ring of those that come,
// one of those that leave, and the threads that start the copies.
#pragma once

#include "depthwise_boxes.h"
#include "depthwise_diagonals.h"

namespace gdfast::cuda {
namespace {

constexpr int kMadeRows = 4;         // of outputs, that are written
constexpr int kBarrierBytes = 1024;  // where boxes may begin

// Of filters of kFilter rows, for so many warps, which have all of a block's channels.
// Shared memory: barriers, whose addresses are then constants, stages, rows of outputs. Filters lie
// in the rows of outputs before.
template <int kFilter, int kChannels, int kStages, int kWarps>
struct BoxesMemory {
  static_assert((2 * (kStages + kMadeRows) + 1) * 8 <= kBarrierBytes, "barriers fit");

  static int bytes(const BoxesArguments& boxes) {
    return kStages * boxes.stage + kMadeRows * boxes.made + kBarrierBytes;
  }

#if defined(GDFAST_HOPPER)
  using Stage = RingPlace<kStages>;
  using Row = RingPlace<kMadeRows>;

  GDFAST_DEVICE int channel(const BoxesArguments& boxes) {
    return static_cast<int>(blockIdx.x) % boxes.chunks * kChannels;
  }
  GDFAST_DEVICE unsigned char* stage(const BoxesArguments& boxes, int index) {
    return shared_memory() + kBarrierBytes + index * boxes.stage;
  }
  GDFAST_DEVICE unsigned char* made_row(const BoxesArguments& boxes, int row) {
    return stage(boxes, kStages) + row * boxes.made;
  }
  GDFAST_DEVICE uint64_t* full(int stage) {
    return reinterpret_cast<uint64_t*>(shared_memory()) + stage;
  }
  GDFAST_DEVICE uint64_t* empty(int stage) { return full(kStages + stage); }
  // A row of outputs is there, or may be made.
  GDFAST_DEVICE uint64_t* made(int row) { return full(2 * kStages + row); }
  GDFAST_DEVICE uint64_t* written(int row) { return full(2 * kStages + kMadeRows + row); }
  // All of the block's outputs are in global memory.
  GDFAST_DEVICE uint64_t* finished() { return full(2 * (kStages + kMadeRows)); }

  // For so many warps, those that have channels.
  GDFAST_DEVICE void init_barriers(int warps) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), warps);
    }
    for (int i = 0; i < kMadeRows; ++i) {
      barrier_init(made(i), warps);
      barrier_init(written(i), 1);
    }
    barrier_init(finished(), 1);
    barriers_ready();
  }

  // One thread starts to load all rows, each as soon as its stage is nobody's any more.
  GDFAST_DEVICE void load_rows(const DepthwiseArguments& a, const BoxesArguments& boxes) {
    Stage at;
    for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
#pragma unroll 1
      for (int step = 0; step < piece.rows + kFilter - 1; ++step) {
        const int h = piece.p + step - a.pad_h;
        const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(a.H);
        uint64_t* const arrived = full(at.index);
        // In the first turn nobody has to leave a stage: the phase before the first is over.
        barrier_wait(empty(at.index), at.parity ^ 1);
        barrier_arrive_expecting(arrived, inside ? boxes.pixels : 0);
        if (inside) {
          load_box(stage(boxes, at.index), boxes.input,
                   {channel(boxes), piece.q - a.pad_w, h, piece.n}, arrived);
        }
        Stage::advance(at);
      }
    });
  }

  // Another one stores rows of outputs. Of a row memory is free when the next one has been started.
  GDFAST_DEVICE void store_rows(const DepthwiseArguments& a, const BoxesArguments& boxes) {
    Row row;
    int before = -1;
    for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
#pragma unroll 1
      for (int p = piece.p; p < piece.p + piece.rows; ++p) {
        barrier_wait(made(row.index), row.parity);
        if (boxes.storer_fences) stores_ready();
        store_box(boxes.output, {channel(boxes), piece.q, p, piece.n}, made_row(boxes, row.index));
        stores_commit();
        stores_wait_read<1>();
        if (before >= 0) barrier_arrive(written(before));
        before = row.index;
        Row::advance(row);
      }
    });
    stores_wait<0>();
    barrier_arrive(finished());
  }

  // What warps before the first that multiplies do, which need few registers.
  GDFAST_DEVICE void move_rows(const DepthwiseArguments& a, const BoxesArguments& boxes, int warp) {
    give_registers<kLoaderRegisters>();
    if (warp_lane() != 0) return;
    if (warp == -1) load_rows(a, boxes);
    if (warp == -2) store_rows(a, boxes);
  }

  // Makes outputs that are NaN once more, when all are written (mend).
  template <typename T>
  GDFAST_DEVICE void mend_pieces(const DepthwiseArguments& a, const BoxesArguments& boxes,
                                 const Tensors<T>& tensors, int thread) {
    constexpr int kChunks = kChannels / 8;
    barrier_wait(finished(), 0);
    for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
      const int chunks = boxes.strip * kChunks, of_image = piece.rows * chunks;
#pragma unroll 1
      for (int i = thread; i < boxes.images * of_image; i += kWarps * kWarp) {
        const int n = piece.n + i / of_image, p = piece.p + i % of_image / chunks;
        const int q = piece.q + i % chunks / kChunks, k = channel(boxes) + i % kChunks * 8;
        if (n >= a.N || q >= a.Q || k >= a.K) continue;
        T* const chunk =
            tensors.output + n * a.output.n + int64_t{p} * a.output.h + int64_t{q} * a.output.w + k;
        mend<T, kFilter>(a, tensors, chunk, n, k, p, q);
      }
    });
  }
#endif
};

}  // namespace
}  // namespace gdfast::cuda
