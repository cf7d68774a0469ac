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

// Registers of a warp hold the sums of 7 x 7 if a multiprocessor has eight: each has both tiles.
template <int kSize>
struct Warps {
  static constexpr int kTiles = kSize == 7 ? kBoxTiles : 1;
  static constexpr int kOfChannels = kBoxTiles / kTiles;
  static constexpr int kThreads = kBoxThreads / kTiles;
  static constexpr int kSums = kBoxChannels * (kSize * kSize + 1);
};

#if defined(GDFAST_HOPPER)

GDFAST_DEVICE uint64_t* full_barrier(const BoxesArguments& boxes, int stage) {
  return reinterpret_cast<uint64_t*>(shared_memory() + kBoxStages * boxes.stage) + stage;
}
GDFAST_DEVICE uint64_t* empty_barrier(const BoxesArguments& boxes, int stage) {
  return full_barrier(boxes, kBoxStages + stage);
}

// What one thread does beside its part: it starts the copies.
template <int kSize>
struct Loader {
  BoxesWalk walk;
  RingPlace<kBoxStages> stage;

  // A step more, if there is one: as soon as its stage is nobody's any more.
  GDFAST_DEVICE void load(Loader& its, const DepthwiseArguments& a, const BoxesArguments& boxes) {
    BoxesWalk& at = its.walk;
    if (!BoxesWalk::has(at, a, boxes, kSize - 1)) return;
    uint64_t* const full = full_barrier(boxes, its.stage.index);
    // In the first turn nobody has to leave a stage: the phase before the first is over.
    barrier_wait(empty_barrier(boxes, its.stage.index), its.stage.parity ^ 1);
    const int p = at.piece.p + at.step, h = p - a.pad_h, pixels = boxes.stage - kGradBytes;
    const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(a.H);
    const bool graded = at.step < at.piece.rows;
    unsigned char* const to = shared_memory() + its.stage.index * boxes.stage;
    barrier_arrive_expecting(full, (inside ? pixels : 0) + (graded ? kGradBytes : 0));
    if (inside) {
      load_box(to, boxes.input, {box_channel(boxes), at.piece.q - a.pad_w, h, at.piece.n}, full);
    }
    if (graded) {
      load_box(to + pixels, boxes.output, {box_channel(boxes), at.piece.q, p, at.piece.n}, full);
    }
    ++at.step;
    RingPlace<kBoxStages>::advance(its.stage);
  }
};

#endif

template <typename T, int kSize>
GDFAST_KERNEL((Warps<kSize>::kThreads), 1)
depthwise_boxes_grad_weight_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                                   const GDFAST_GRID_CONSTANT BoxesArguments boxes,
                                   const GDFAST_GRID_CONSTANT Tensors<T> tensors, float* partial) {
#if defined(GDFAST_HOPPER)
  using Its = Warps<kSize>;
  using Carrier = Loader<kSize>;
  const bool carries = threadIdx.x == 0;
  if (carries) {
    for (int i = 0; i < kBoxStages; ++i) {
      barrier_init(full_barrier(boxes, i), 1);
      barrier_init(empty_barrier(boxes, i), Its::kThreads / kWarp);
    }
    barriers_ready();
  }
  sync_block();
  Carrier carrier{{first_piece(boxes)}, {}};
  if (carries) {
#pragma unroll 1
    for (int i = 0; i < kBoxStages; ++i) Carrier::load(carrier, a, boxes);
  }

  // Where this lane loads matrices: columns of two taps, or the last tap's and the gradients'. The
  // next tile's are as far for all of them, a multiple of eight slots.
  const int plane = warp_index() % 8, tile = warp_index() / 8, matrix = warp_lane() / 8;
  const int next = boxes.images > 1 ? boxes.pitch : kTilePositions, line = warp_lane() % 8;
  const auto at = [&](int slot) { return slot * kBoxRow + (plane ^ slot % 8) * 16; };
  int pairs_at[kSize / 2];
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) {
    pairs_at[i] = at(tile * next + line + matrix / 2 * 8 + matrix % 2 + 2 * i);
  }
  const bool of_pixels = matrix < 2;
  const int last_at =
      of_pixels ? at(tile * next + line + matrix * 8 + kSize - 1)
                : boxes.stage - kGradBytes + at(tile * kTilePositions + line + matrix % 2 * 8);
  const int last_next = (of_pixels ? next : kTilePositions) * kBoxRow;
  const bool exists = box_channel(boxes) + plane * 8 < a.C;

  TapSums<kSize> sums{};
  RingPlace<kBoxStages> stage;
  int behind = -kBoxLag;
  BoxesWalk walk{first_piece(boxes)};
#pragma unroll 1
  while (BoxesWalk::has(walk, a, boxes, kSize - 1)) {
    const int h = walk.piece.p - a.pad_h, rows = walk.piece.rows, steps = walk.steps;
    walk.step = steps;
    TapRows<kSize> taps[Its::kTiles] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step += kSize) {
#pragma unroll
      for (int u = 0; u < kSize; ++u) {
        if (step + u >= steps) break;
        const bool inside = static_cast<unsigned>(h + step + u) < static_cast<unsigned>(a.H);
        const unsigned char* const from = shared_memory() + stage.index * boxes.stage;
        barrier_wait(full_barrier(boxes, stage.index), stage.parity);
#pragma unroll
        for (int i = 0; i < Its::kTiles; ++i) {
          multiply_taps<T>(
              sums, taps[i], u, inside && exists, step + u < rows,
              [&](int s) { return from + pairs_at[s / 2] + i * next * kBoxRow; },
              from + last_at + i * last_next);
        }
        sync_warp();
        if (warp_lane() == 0) barrier_arrive(empty_barrier(boxes, stage.index));
        if (carries && ++behind > 0) Carrier::load(carrier, a, boxes);
        RingPlace<kBoxStages>::advance(stage);
      }
    }
  }

  // All rows have come and been read: their place is free.
  sync_block();
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  share_sums<kBoxChannels, kSize>(sums, shared + tile * Its::kSums, plane);
  sync_block();
  write_sums<kBoxChannels, kSize, Its::kThreads>(
      a, shared, Its::kOfChannels, box_channel(boxes), partial,
      static_cast<int>(gridDim.x) / boxes.chunks, first_piece(boxes), [&](int k, int r, int s) {
        float sum = 0;
        BoxesWalk again{first_piece(boxes)};
#pragma unroll 1
        while (BoxesWalk::has(again, a, boxes, 0)) {
          const BoxesPiece& piece = again.piece;
          again.step = again.steps;
          const int columns = a.Q - piece.q < boxes.strip ? a.Q - piece.q : boxes.strip;
#pragma unroll 1
          for (int n = piece.n; n < a.N && n < piece.n + boxes.images; ++n) {
            sum += exact_sum(a, tensors.grad_output, tensors.input, n, piece.p, piece.rows, piece.q,
                             columns, k, r, s);
          }
        }
        return sum;
      });
#endif
}

// Strips are as wide as boxes, whose columns beyond the gradient's last one are zeros.
BoxesArguments weight_boxes(const DepthwiseArguments& a) {
  BoxesArguments boxes = boxes_arguments(a, kMultiprocessors, false);
  boxes.stage += kGradBytes;
  return boxes;
}

template <typename T, int kSize>
void launch_boxes(const DepthwiseArguments& a, const Tensors<T>& tensors, float* partial,
                  uintptr_t stream) {
  BoxesArguments boxes = weight_boxes(a);
  boxes.input = box_map(kOp, tensors.input, a, a.input, a.H, a.W, boxes.images, boxes.pitch);
  boxes.output = box_map(kOp, tensors.grad_output, a, a.output, a.P, a.Q, boxes.images,
                         boxes.images > 1 ? kTilePositions : kBoxTiles * kTilePositions);
  constexpr int kBarriers = 1024;
  launch(kOp, depthwise_boxes_grad_weight_kernel<T, kSize>, static_cast<unsigned>(boxes.blocks),
         Warps<kSize>::kThreads, static_cast<size_t>(kBoxStages * boxes.stage + kBarriers), stream,
         a, boxes, tensors, partial);
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
      auto* const chosen = a.R == 5 ? launch_boxes<T, 5> : launch_boxes<T, 7>;
      chosen(a, tensors, static_cast<float*>(partial), stream);
    }
  });
}

}  // namespace gdfast::cuda
