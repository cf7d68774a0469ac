// Depthwise convolution of half types in channels_last on Hopper, a whole row at a time: what its
// kernels share.
//
// All channels of a row of pixels lie side by side in memory: a row comes to shared memory in one
// copy, which no thread takes part in, and many rows are on their way at a time. Around it lie
// zeros that stay there for good: the padding. A thread has two channels and some columns, and
// walks down the rows; what a row gives to the outputs that see it is added up in registers.
//
//   piece   rows of outputs of one image, which a block makes one below the other
//   step    a row of the image that a piece's outputs see, from 0, inside of the image or not;
//           output p begins at step p
//   stage   a step's place in shared memory, of a ring: a row of the input and, for the gradient in
//           the weight, one of the gradient
#pragma once

#include "depthwise_exact.h"
#include "hopper.h"

namespace gdfast::cuda {

constexpr int kRowSize = 3, kRowTaps = kRowSize * kRowSize;          // of filters
constexpr int kRowColumns = 7;                                       // of a thread
constexpr int kRowWorkers = 576, kRowThreads = kRowWorkers + kWarp;  // at most, with the loader

constexpr int64_t kMostRow = 1 << 17;  // elements: more than shared memory holds
constexpr int kMostRowStages = 16;
constexpr int kRowBarriers = 2 * kMostRowStages * 8;  // bytes, before the stages
constexpr int kFewestRowStages = 4;

struct RowsWalk {
  int pairs, strips;  // of channels, and of a row's outputs: threads
  int pitch;          // bytes from a pixel of a row to the next
  int row, stage;     // bytes of a row with its zeros, and of a stage
  int stages;
  int parts, rows;      // pieces of an image, and their rows of outputs
  int blocks, workers;  // threads of a block but for its loader's warp

  int shared_bytes() const { return kRowBarriers + stages * stage; }
};

// For blocks that have `each` rows in a stage, on so many multiprocessors.
inline RowsWalk rows_walk(const DepthwiseArguments& a, int each, int64_t multiprocessors) {
  constexpr int kBytes = 227 * 1024, kReserved = 1024;  // of a multiprocessor, and of a block
  RowsWalk walk{};
  walk.pairs = a.C / 2;
  walk.strips = static_cast<int>(ceil_div(a.Q, kRowColumns));
  walk.pitch = a.C * 2;
  // The columns that strips see, and those that the image has beside its zeros.
  const int seen = walk.strips * kRowColumns + kRowSize - 1, there = a.pad_w + a.W;
  walk.row = (seen > there ? seen : there) * walk.pitch;
  walk.stage = each * walk.row;
  walk.workers = static_cast<int>(ceil_div(int64_t{walk.pairs} * walk.strips, kWarp) * kWarp);
  // Small blocks share a multiprocessor where each has room for a few rows ahead.
  const auto room = [&](int blocks) {
    const int bytes = kBytes / blocks - kReserved - kRowBarriers;
    return bytes < kMostRowStages * walk.stage ? bytes / walk.stage : kMostRowStages;
  };
  int at_once = walk.workers < kRowWorkers ? kRowThreads / (walk.workers + kWarp) : 1;
  while (at_once > 1 && room(at_once) < kFewestRowStages) --at_once;
  walk.stages = room(at_once);
  // Pieces of equal height, as many as make the longest block the shortest.
  const int64_t blocks = at_once * multiprocessors;
  int64_t least = 0;
  for (int64_t parts = 1; parts <= a.P && parts <= 64; ++parts) {
    const int64_t rows = ceil_div(a.P, parts), pieces = a.N * ceil_div(a.P, rows);
    const int64_t takes = ceil_div(pieces, blocks) * (rows + kRowSize - 1);
    if (least > 0 && takes >= least) continue;
    least = takes;
    walk.rows = static_cast<int>(rows);
    walk.parts = static_cast<int>(ceil_div(a.P, rows));
    walk.blocks = static_cast<int>(pieces < blocks ? pieces : blocks);
  }
  return walk;
}

// Whether blocks can have all of a row, and stages with a row of the gradient too.
inline bool has_rows(const DepthwiseArguments& a) {
  const RowsWalk walk = rows_walk(a, 2, 1);
  return walk.workers <= kRowWorkers && walk.stages >= kFewestRowStages;
}

// A place in the ring. Both sides count from the block's first step; a barrier's phase is over once
// per turn of the ring.
struct RowStage {
  int index = 0, parity = 0;

  GDFAST_DEVICE void advance(RowStage& stage, const RowsWalk& walk) {
    if (++stage.index == walk.stages) {
      stage.index = 0;
      stage.parity ^= 1;
    }
  }
};

struct RowsPiece {
  int n, p, rows;

  GDFAST_DEVICE RowsPiece at(const DepthwiseArguments& a, const RowsWalk& walk, int index) {
    const int p = index % walk.parts * walk.rows, below = a.P - p;
    return {index / walk.parts, p, below < walk.rows ? below : walk.rows};
  }
};

// Calls each(piece) for those of this block.
template <typename Each>
GDFAST_DEVICE void for_each_piece(const DepthwiseArguments& a, const RowsWalk& walk, Each&& each) {
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x); i < a.N * walk.parts;
       i += static_cast<int>(gridDim.x)) {
    each(RowsPiece::at(a, walk, i));
  }
}

#if defined(GDFAST_HOPPER)

GDFAST_DEVICE uint64_t* row_full(const RowStage& stage) {
  return reinterpret_cast<uint64_t*>(shared_memory()) + stage.index;
}
GDFAST_DEVICE uint64_t* row_empty(const RowStage& stage) {
  return reinterpret_cast<uint64_t*>(shared_memory()) + kMostRowStages + stage.index;
}
GDFAST_DEVICE unsigned char* row_stage(const RowsWalk& walk, const RowStage& stage) {
  return shared_memory() + kRowBarriers + stage.index * walk.stage;
}

// The loader: one thread of a block starts all copies, each as soon as its stage is nobody's any
// more. There may be no gradient.
template <typename T>
GDFAST_DEVICE void load_rows(const DepthwiseArguments& a, const RowsWalk& walk, const T* input,
                             const T* gradient) {
  const int pixels = a.W * walk.pitch, gradients = a.Q * walk.pitch;  // bytes
  RowStage stage;
  for_each_piece(a, walk, [&](const RowsPiece& piece) {
#pragma unroll 1
    for (int step = 0; step < piece.rows + kRowSize - 1; ++step) {
      const int p = piece.p + step, h = p - a.pad_h;
      const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(a.H);
      const bool graded = gradient != nullptr && step < piece.rows;
      uint64_t* const full = row_full(stage);
      unsigned char* const to = row_stage(walk, stage);
      // In the first turn nobody has to leave a stage: the phase before the first is over.
      barrier_wait(row_empty(stage), stage.parity ^ 1);
      barrier_arrive_expecting(full, (inside ? pixels : 0) + (graded ? gradients : 0));
      if (inside) {
        load_line(to + a.pad_w * walk.pitch, input + piece.n * a.input.n + int64_t{h} * a.input.h,
                  pixels, full);
      }
      if (graded) {
        load_line(to + walk.row, gradient + piece.n * a.output.n + int64_t{p} * a.output.h,
                  gradients, full);
      }
      RowStage::advance(stage, walk);
    }
  });
}

GDFAST_DEVICE void init_row_barriers(const RowsWalk& walk) {
  for (int i = 0; i < walk.stages; ++i) {
    barrier_init(row_full({i, 0}), 1);
    barrier_init(row_empty({i, 0}), walk.workers / kWarp);
  }
  barriers_ready();
}

// Zeros in the bytes of every stage from `first` on, where no row is copied to.
GDFAST_DEVICE void clear_rows(const RowsWalk& walk, int first, int bytes) {
  for (int stage = 0; stage < walk.stages; ++stage) {
    auto* const to = reinterpret_cast<uint32_t*>(row_stage(walk, {stage, 0}) + first);
    for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += walk.workers) to[i] = 0;
  }
}

GDFAST_DEVICE void sync_workers(const RowsWalk& walk) { sync_threads_of(1, walk.workers); }

// The row of a stage is not read by this warp any more.
GDFAST_DEVICE void leave_row(const RowStage& stage) {
  sync_warp();
  if (warp_lane() == 0) barrier_arrive(row_empty(stage));
}

#endif

// The kernels' launchers, for addresses that 16 divides and what there is nothing against.
void depthwise_rows(DType dtype, const DepthwiseArguments& arguments, const void* input,
                    const void* weight, const void* bias, void* output, uintptr_t stream);

// In how many splits `partial` gets the sums (depthwise_weight_sums.h), those of the bias if asked.
int depthwise_rows_splits(const DepthwiseArguments& arguments);
void depthwise_rows_grad_weight(DType dtype, const DepthwiseArguments& arguments,
                                const void* grad_output, const void* input, bool bias,
                                void* partial, uintptr_t stream);

}  // namespace gdfast::cuda
