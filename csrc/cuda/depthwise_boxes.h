// Depthwise convolution 3x3 of half types in channels_last on Hopper's tensor cores, in boxes of 64
// channels: what its kernels share.
//
// Products are those of depthwise_tensor.h, rows come and leave as TMA's boxes, with zeros from
// outside of the image. No warp waits for the others of its block but through the barriers of a
// ring of rows: while some multiply, others write what they have made.
//
// A block has two tiles of 16 positions of a row side by side: of one image, or of two where rows
// are short. It walks down the rows of pieces, one after the other, all of the same channels.
//
//   slot    128 bytes of a box: the channels of a pixel. An output's position is the slot of the
//           first column that it sees
//   step    a row of the image that a piece's outputs see, from 0; output p begins at step p
#pragma once

#include "conv2d_hopper_images.h"
#include "depthwise_exact.h"

namespace gdfast::cuda {

constexpr int kBoxSize = 3;  // of filters
constexpr int kBoxChannels = 64, kBoxTiles = 2, kTilePositions = 16;
// A warp has both tiles of so many groups of 8 channels: enough products for each barrier.
constexpr int kBoxGroups = 2;
constexpr int kBoxWarps = kBoxChannels / 8 / kBoxGroups, kBoxWorkers = kBoxWarps * kWarp;
constexpr int kBoxLoaders = 4 * kWarp;  // threads of the warpgroup that starts copies
constexpr int kBoxThreads = kBoxLoaders + kBoxWorkers;
constexpr int kBoxBlocks = 3;  // of a multiprocessor
// At launch, and after the loaders have given theirs to the others.
constexpr int kBoxRegisters = 80, kLoaderRegisters = 24, kWorkerRegisters = 136;
static_assert(kBoxBlocks * kBoxThreads * kBoxRegisters <= 65536, "of a multiprocessor");
static_assert(kBoxLoaders * kLoaderRegisters + kBoxWorkers * kWorkerRegisters <=
                  kBoxThreads * kBoxRegisters,
              "of a block");
constexpr int kBoxStages = 7;  // rows on their way
constexpr int kMadeBytes = kBoxTiles * kTilePositions * kBoxRow;

struct BoxesArguments {
  TensorMap input, output;  // for the gradient in the weight what is read, and its gradient
  int stage, pixels;        // bytes, and those that a box of the input fills
  int made;                 // bytes of a row of outputs
  int images, strip;        // side by side, and the columns of outputs of each
  int pitch;                // slots of an image
  int inset;                // columns that are seen to the left of a box's first one
  int chunks;               // of channels
  int parts, rows;          // of an image's rows of outputs
  int pieces;               // of each chunk
  int blocks;
  Divisor strips, parts_by;
  // Who makes TMA see what threads have written: the one that starts the store, or all of them. The
  // former takes twice as long where three blocks of a multiprocessor store many rows.
  bool storer_fences;
};

// Rows of outputs down from (p, q) of images from n on.
struct BoxesPiece {
  int n, p, q, rows;

  GDFAST_DEVICE BoxesPiece at(const DepthwiseArguments& a, const BoxesArguments& boxes, int index) {
    const Divided part = divide(index, boxes.parts_by);
    const Divided strip = divide(part.quotient, boxes.strips);
    const int p = part.rest * boxes.rows, below = a.P - p;
    return {strip.quotient * boxes.images, p, strip.rest * boxes.strip,
            below < boxes.rows ? below : boxes.rows};
  }
};

GDFAST_DEVICE int box_channel(const BoxesArguments& boxes) {
  return static_cast<int>(blockIdx.x) % boxes.chunks * kBoxChannels;
}
GDFAST_DEVICE int first_piece(const BoxesArguments& boxes) {
  return static_cast<int>(blockIdx.x) / boxes.chunks;
}

GDFAST_DEVICE int pieces_of_block(const BoxesArguments& boxes) {
  const int blocks = static_cast<int>(gridDim.x) / boxes.chunks;
  return (boxes.pieces - first_piece(boxes) + blocks - 1) / blocks;
}

// The slot of a column that a tile of its own sees, or one of zeros: behind the images of a stage,
// and as far from these as the second image is from the first.
GDFAST_DEVICE int box_slot(const BoxesArguments& boxes, int column) {
  const int slot = column - boxes.inset;
  const bool exists = static_cast<unsigned>(slot) < static_cast<unsigned>(boxes.pitch);
  return exists ? slot : boxes.images * boxes.pitch + (slot & 7);
}

// Zeros where no box is written to, of so many stages with `more` bytes behind them.
GDFAST_DEVICE void clear_behind(const BoxesArguments& boxes, unsigned char* stages, int count,
                                int more, int threads) {
  const int behind = (boxes.stage - more - boxes.pixels) / 16;
  for (int i = static_cast<int>(threadIdx.x); i < count * behind; i += threads) {
    store_16(stages + i / behind * boxes.stage + boxes.pixels + i % behind * 16, {{0, 0, 0, 0}});
  }
}

// Calls each(piece) for those of a block, one after the other.
template <typename Each>
GDFAST_DEVICE void for_each_box_piece(const DepthwiseArguments& a, const BoxesArguments& boxes,
                                      Each&& each) {
#pragma unroll 1
  for (int i = first_piece(boxes); i < boxes.pieces;
       i += static_cast<int>(gridDim.x) / boxes.chunks) {
    each(BoxesPiece::at(a, boxes, i));
  }
}

// What a block's pieces add to a tap's sum (exact_sum).
template <typename T>
GDFAST_DEVICE float exact_sum_of_pieces(const DepthwiseArguments& a, const BoxesArguments& boxes,
                                        const T* grad_output, const T* input, int k, int r, int s) {
  float sum = 0;
  for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
    const int columns = a.Q - piece.q < boxes.strip ? a.Q - piece.q : boxes.strip;
#pragma unroll 1
    for (int n = piece.n; n < a.N && n < piece.n + boxes.images; ++n) {
      sum += exact_sum(a, grad_output, input, n, piece.p, piece.rows, piece.q, columns, k, r, s);
    }
  });
  return sum;
}

// A place in a ring. Both sides count from the block's first step; a barrier's phase is over once
// per turn of the ring.
template <int kCount>
struct RingPlace {
  int index = 0, parity = 0;

  GDFAST_DEVICE void advance(RingPlace& place) {
    if (++place.index == kCount) {
      place.index = 0;
      place.parity ^= 1;
    }
  }
};

#if defined(GDFAST_HOPPER)

// So many places for rows that come, at the beginning of shared memory, and their barriers behind
// them.
template <int kCount>
struct Stages {
  GDFAST_DEVICE unsigned char* at(const BoxesArguments& boxes, int index) {
    return shared_memory() + index * boxes.stage;
  }
  GDFAST_DEVICE uint64_t* full(const BoxesArguments& boxes, int index) {
    return reinterpret_cast<uint64_t*>(at(boxes, kCount)) + index;
  }
  GDFAST_DEVICE uint64_t* empty(const BoxesArguments& boxes, int index) {
    return full(boxes, kCount + index);
  }
};

#endif

// Divides images into pieces of so many strips, for as many blocks at once; all but an image's last
// piece have a multiple of rows.
inline void share_rows(BoxesArguments& boxes, const DepthwiseArguments& a, int64_t strips,
                       int64_t at_once, int64_t multiple = 1) {
  boxes.strips = Divisor::of(strips);
  const int64_t blocks = boxes.chunks < at_once ? at_once / boxes.chunks : 1;
  int64_t least = 0;
  for (int64_t parts = 1; parts <= a.P && parts <= 64; ++parts) {
    const int64_t rows = ceil_div(ceil_div(a.P, parts), multiple) * multiple;
    const int64_t whole = ceil_div(a.P, rows);
    const int64_t pieces = ceil_div(a.N, boxes.images) * strips * whole;
    const int64_t takes = ceil_div(pieces, blocks) * (rows + a.R - 1);
    if (least > 0 && takes >= least) continue;
    least = takes;
    boxes.rows = static_cast<int>(rows);
    boxes.parts = static_cast<int>(whole);
    boxes.pieces = static_cast<int>(pieces);
    boxes.blocks = static_cast<int>(pieces < blocks ? pieces : blocks) * boxes.chunks;
  }
  boxes.parts_by = Divisor::of(boxes.parts);
}

// All but the maps, for as many blocks at once, in strips of one width or as wide as tiles are.
inline BoxesArguments boxes_arguments(const DepthwiseArguments& a, int64_t at_once, bool equal,
                                      bool padded) {
  constexpr int64_t kMost = kBoxTiles * kTilePositions;
  BoxesArguments boxes{};
  const int64_t strips = ceil_div(a.Q, kMost);
  const int64_t strip = equal || strips == 1 ? ceil_div(a.Q, strips) : kMost;
  boxes.images = strip <= kTilePositions && a.N > 1 ? kBoxTiles : 1;
  boxes.strip = static_cast<int>(strip);
  // Matrices are loaded for all positions of a tile, and of a column more than the filter has;
  // rows of a box begin at multiples of 1024 bytes.
  // Boxes of two images may come without padding.
  const int64_t seen = strip + kBoxSize - 1;
  const bool bare = !padded && boxes.images > 1 && a.pad_w >= 0 && a.pad_w < seen;
  const int64_t positions = boxes.images > 1 ? kTilePositions : kMost;
  const int64_t columns =
      bare ? (a.W < seen - a.pad_w ? a.W : seen - a.pad_w) : positions + kBoxSize;
  boxes.inset = bare ? a.pad_w : 0;
  boxes.pitch = static_cast<int>(ceil_div(columns, 8) * 8);
  boxes.pixels = boxes.images * boxes.pitch * kBoxRow;
  boxes.stage = boxes.pixels + (bare ? (boxes.pitch + 8) * kBoxRow : 0);
  boxes.made = kMadeBytes;
  boxes.chunks = static_cast<int>(ceil_div(a.C, kBoxChannels));
  share_rows(boxes, a, strips, at_once);
  return boxes;
}

inline int64_t output_bytes(const DepthwiseArguments& a) {
  return int64_t{a.N} * a.C * a.P * a.Q * 2;
}

// A tensor of half types as boxes of some images, a row and columns by 64 channels or 32.
template <typename T>
TensorMap box_map(const char* op, const T* address, const DepthwiseArguments& a,
                  const ImageStrides& s, int rows, int columns, int images, int box,
                  int row_bytes = kBoxRow) {
  return channels_first<T>(op, address, {a.N, a.C, rows, columns, {s.n, s.c, s.h, s.w}},
                           {images, 1, box}, row_bytes);
}

// The kernels' launchers, for addresses that 16 divides and what there is nothing against.
void depthwise_boxes(DType dtype, const DepthwiseArguments& arguments, const void* input,
                     const void* weight, const void* bias, void* output, uintptr_t stream);

// In how many splits `partial` gets the sums (depthwise_weight_sums.h).
int depthwise_boxes_splits(const DepthwiseArguments& arguments);
void depthwise_boxes_grad_weight(DType dtype, const DepthwiseArguments& arguments,
                                 const void* grad_output, const void* input, void* partial,
                                 uintptr_t stream);

}  // namespace gdfast::cuda
