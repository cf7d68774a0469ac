// Depthwise convolution in boxes (depthwise_boxes.h), gradient in the weight: the first pass, by
// the products of depthwise_diagonal_sums.h.
#include "depthwise_boxes.h"
#include "depthwise_diagonal_sums.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";
// What the plan is made for. Not what this GPU has, so that sums have the same bits on every one.
constexpr int kMultiprocessors = 132;

// A stage has a box of the input and, behind it, one of the gradient, zeros beyond its columns.
constexpr int kGradBytes = kBoxTiles * kTilePositions * kBoxRow;

constexpr int kWeightStages = 6;  // so that memory is for three blocks
constexpr int kBarrierBytes = 256;
static_assert(2 * kWeightStages * 8 <= kBarrierBytes, "barriers fit");

#if defined(GDFAST_HOPPER)

using Rows = Stages<kWeightStages>;

// One thread starts to load all rows, each as soon as its stage is nobody's any more.
GDFAST_DEVICE void load_box_rows(const DepthwiseArguments& a, const BoxesArguments& boxes) {
  RingPlace<kWeightStages> stage;
  for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
#pragma unroll 1
    for (int step = 0; step < piece.rows + kBoxSize - 1; ++step) {
      const int p = piece.p + step, h = p - a.pad_h;
      const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(a.H);
      const bool graded = step < piece.rows;
      uint64_t* const full = Rows::full(boxes, stage.index);
      unsigned char* const to = Rows::at(boxes, stage.index);
      // In the first turn nobody has to leave a stage: the phase before the first is over.
      barrier_wait(Rows::empty(boxes, stage.index), stage.parity ^ 1);
      barrier_arrive_expecting(full, (inside ? boxes.pixels : 0) + (graded ? kGradBytes : 0));
      if (inside) {
        load_box(to, boxes.input, {box_channel(boxes), piece.q - a.pad_w + boxes.inset, h, piece.n},
                 full);
      }
      if (graded) {
        load_box(to + boxes.stage - kGradBytes, boxes.output,
                 {box_channel(boxes), piece.q, p, piece.n}, full);
      }
      RingPlace<kWeightStages>::advance(stage);
    }
  });
}

#endif

template <typename T>
GDFAST_KERNEL(kBoxThreads, kBoxBlocks)
depthwise_boxes_grad_weight_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                                   const GDFAST_GRID_CONSTANT BoxesArguments boxes,
                                   const GDFAST_GRID_CONSTANT Tensors<T> tensors, float* partial) {
#if defined(GDFAST_HOPPER)
  constexpr int kGroups = kBoxGroups, kTiles = kBoxTiles;
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWeightStages; ++i) {
      barrier_init(Rows::full(boxes, i), 1);
      barrier_init(Rows::empty(boxes, i), kBoxWarps);
    }
    barriers_ready();
  }
  clear_behind(boxes, Rows::at(boxes, 0), kWeightStages, kGradBytes, kBoxThreads);
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warp = shuffle(warp_index(), 0) - kBoxLoaders / kWarp;
  if (warp < 0) {
    give_registers<kLoaderRegisters>();
    if (warp == -1 && warp_lane() == 0) load_box_rows(a, boxes);
    return;
  }
  take_registers<kWorkerRegisters>();

  // Where this lane loads matrices: columns of two taps, or the last tap's and the gradients'. The
  // next group's chunk has a place that differs by a bit; the next tile is so many slots on, a
  // multiple of eight.
  static_assert(kGroups == 2, "groups are two chunks side by side");
  const int plane = warp * kGroups;
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  const int next = (boxes.images > 1 ? boxes.pitch : kTilePositions) * kBoxRow;
  const auto at = [&](int slot) { return slot * kBoxRow + (plane ^ slot % 8) * 16; };
  int pairs_at[kBoxSize / 2];
#pragma unroll
  for (int i = 0; i < kBoxSize / 2; ++i) {
    pairs_at[i] = at(box_slot(boxes, line + matrix / 2 * 8 + matrix % 2 + 2 * i));
  }
  const bool of_pixels = matrix < 2;
  const int last_next = of_pixels ? next : kTilePositions * kBoxRow;
  const int last_at = (of_pixels ? at(box_slot(boxes, line + matrix * 8 + kBoxSize - 1))
                                 : boxes.stage - kGradBytes + at(line + matrix % 2 * 8));
  const bool exists = box_channel(boxes) + plane * 8 < a.C;

  TapSums<kBoxSize> sums[kGroups] = {};
  RingPlace<kWeightStages> stage;
  for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
    const int h = piece.p - a.pad_h, rows = piece.rows, steps = rows + kBoxSize - 1;
    TapRows<kBoxSize> taps[kGroups][kTiles] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step += kBoxSize) {
#pragma unroll
      for (int u = 0; u < kBoxSize; ++u) {
        if (step + u >= steps) break;
        const bool inside = static_cast<unsigned>(h + step + u) < static_cast<unsigned>(a.H);
        const unsigned char* const from = Rows::at(boxes, stage.index);
        barrier_wait(Rows::full(boxes, stage.index), stage.parity);
#pragma unroll
        for (int i = 0; i < kTiles * kGroups; ++i) {
          const int number = i / kGroups, group = i % kGroups;
          multiply_taps<T>(
              sums[group], taps[group][number], u, inside && exists, step + u < rows,
              [&](int s) { return from + (pairs_at[s / 2] ^ group * 16) + number * next; },
              from + (last_at ^ group * 16) + number * last_next);
        }
        sync_warp();
        if (warp_lane() == 0) barrier_arrive(Rows::empty(boxes, stage.index));
        RingPlace<kWeightStages>::advance(stage);
      }
    }
  });

  // All rows have come and been read: their place is free.
  sync_threads_of(1, kBoxWorkers);
  auto* const shared = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    share_sums<kBoxChannels, kBoxSize>(sums[i], shared, plane + i);
  }
  sync_threads_of(1, kBoxWorkers);
  write_sums<kBoxChannels, kBoxSize, kBoxWorkers>(
      a, box_channel(boxes), partial, static_cast<int>(gridDim.x) / boxes.chunks,
      first_piece(boxes), static_cast<int>(threadIdx.x) - kBoxLoaders,
      [&](int channel, int tap) {
        return shared_sum<kBoxChannels, kBoxSize>(shared, 1, channel, tap);
      },
      [&](int k, int r, int s) {
        return exact_sum_of_pieces(a, boxes, tensors.grad_output, tensors.input, k, r, s);
      });
#endif
}

BoxesArguments weight_boxes(const DepthwiseArguments& a) {
  // Strips are as wide as boxes, whose columns beyond the gradient's last one are zeros.
  BoxesArguments boxes = boxes_arguments(a, int64_t{kBoxBlocks} * kMultiprocessors, false, false);
  boxes.stage += kGradBytes;
  return boxes;
}

template <typename T>
void launch_boxes(const DepthwiseArguments& a, const Tensors<T>& tensors, float* partial,
                  uintptr_t stream) {
  BoxesArguments boxes = weight_boxes(a);
  boxes.input = box_map(kOp, tensors.input, a, a.input, a.H, a.W, boxes.images, boxes.pitch);
  boxes.input = read_once(kOp, boxes.input, output_bytes(a));
  boxes.output = box_map(kOp, tensors.grad_output, a, a.output, a.P, a.Q, boxes.images,
                         kBoxTiles * kTilePositions / boxes.images);
  launch(kOp, depthwise_boxes_grad_weight_kernel<T>, static_cast<unsigned>(boxes.blocks),
         kBoxThreads, static_cast<size_t>(kWeightStages * boxes.stage + kBarrierBytes), stream, a,
         boxes, tensors, partial);
}

}  // namespace

int depthwise_boxes_splits(const DepthwiseArguments& a) {
  const BoxesArguments boxes = weight_boxes(a);
  return boxes.blocks / boxes.chunks;
}

void depthwise_boxes_grad_weight(DType dtype, const DepthwiseArguments& a, const void* grad_output,
                                 const void* input, void* partial, uintptr_t stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const Tensors<T> tensors{static_cast<const T*>(grad_output), static_cast<const T*>(input)};
      launch_boxes(a, tensors, static_cast<float*>(partial), stream);
    }
  });
}

}  // namespace gdfast::cuda
