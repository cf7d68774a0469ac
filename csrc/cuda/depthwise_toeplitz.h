// Depthwise convolution 5x5 and 7x7 of half types in channels_last on Hopper's tensor cores, a
// channel at a time: what its kernels share.
//
// Of one channel a row of the filter is a band: eight outputs side by side are sixteen pixels times
// a matrix of 16 x 8 whose columns have the filter's numbers, each one further down. One matrix
// instruction makes what a row of the filter gives to 8 outputs of each of sixteen tiles; nearly
// half of its products count, where of diagonals (depthwise_tensor.h) one in eight does. Pixels of
// one channel are two bytes of as many as there are channels, but their order along the sum is
// free: a lane loads four channels of pixels that lie in different banks, and pairs of pixels are
// put together in its registers.
//
// Rows come and leave as TMA's boxes of 32 channels (depthwise_boxes_ring.h). A warp has four
// channels of all tiles, with their bands and the sums of all outputs that see a row in registers.
//
//   tile    8 outputs of a row, and the 16 pixels from the first one that they see. Tiles are side
//           by side, of several images where rows are short
//   slot    64 bytes of a box: 32 channels of a pixel
#pragma once

#include "depthwise_boxes.h"

namespace gdfast::cuda {

constexpr int kToeplitzTiles = 16, kTileOutputs = 8, kTilePixels = 16;
constexpr int kToeplitzChannels = kHalfBoxRow / 2;
constexpr int kWarpChannels = 4;
constexpr int kToeplitzWarps = kToeplitzChannels / kWarpChannels;
constexpr int kToeplitzWorkers = kToeplitzWarps * kWarp;
constexpr int kToeplitzThreads = kBoxLoaders + kToeplitzWorkers;
// At launch, and after the loaders have given theirs to the others.
constexpr int kToeplitzRegisters = 168, kToeplitzWorkerRegisters = 240;
static_assert(kToeplitzThreads * kToeplitzRegisters <= 65536, "of a multiprocessor");
static_assert(kBoxLoaders * kLoaderRegisters + kToeplitzWorkers * kToeplitzWorkerRegisters <=
                  kToeplitzThreads * kToeplitzRegisters,
              "of a block");
constexpr int kToeplitzStages = 8;  // rows on their way

// Where four channels lie, the first of which 4 divides, of a slot of a box.
GDFAST_DEVICE int channels_of_slot(int slot, int channel) {
  return slot * kHalfBoxRow + (channel / 8 ^ slot / 2 % 4) * 16 + channel / 4 % 2 * 8;
}

// The same channels' place four slots further on.
GDFAST_DEVICE int four_slots_on(int at) { return (at ^ 32) + 4 * kHalfBoxRow; }

// Two pixels of one of four channels, as a register of a matrix instruction.
template <typename Pack>
GDFAST_DEVICE uint32_t pair_of_pixels(const Pack& first, const Pack& second, int channel) {
  const uint32_t a = first.words[channel / 2], b = second.words[channel / 2];
  return channel % 2 == 0 ? low_halves(a, b) : high_halves(a, b);
}

// Of one channel, the left operand of a matrix instruction: a lane has packs of channels by row of
// the operand, of two, and pixel, of four.
template <typename Pack>
GDFAST_DEVICE void left_operand(uint32_t (&left)[4], const Pack (&packs)[2][4], int channel) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    left[i] = pair_of_pixels(packs[i % 2][i / 2 * 2], packs[i % 2][i / 2 * 2 + 1], channel);
  }
}

// Which image a tile is of, and its first column. Images come before columns: lanes that load at
// a time have tiles of two.
struct ToeplitzTile {
  int image, column;
  bool exists;

  GDFAST_DEVICE ToeplitzTile at(const BoxesArguments& boxes, int index) {
    const int image = index % boxes.images, column = index / boxes.images * kTileOutputs;
    if (column >= boxes.strip) return {0, 0, false};
    return {image, column, true};
  }
};

// All but the maps, for as many blocks at once.
inline BoxesArguments toeplitz_arguments(const DepthwiseArguments& a, int64_t at_once) {
  constexpr int64_t kMost = kToeplitzTiles * kTileOutputs;
  BoxesArguments boxes{};
  int64_t best = 0, least = 0;
  for (int64_t strips = ceil_div(a.Q, kMost), end = strips + 8; strips < end; ++strips) {
    const int64_t strip = ceil_div(a.Q, strips);
    if (ceil_div(a.Q, strip) < strips) continue;
    const int64_t fit = kToeplitzTiles / ceil_div(strip, kTileOutputs);
    const int64_t images = fit < a.N ? fit : a.N, pieces = strips * ceil_div(a.N, images);
    if (best > 0 && pieces >= least) continue;
    best = strips;
    least = pieces;
    boxes.strip = static_cast<int>(strip);
    boxes.images = static_cast<int>(images);
  }
  // Images begin in different banks. A tile's pixels may go on beyond those of the last one, where
  // there are zeros.
  const int columns = boxes.strip + a.S - 1;
  boxes.pitch = static_cast<int>(ceil_div(columns + 4, 8) * 8 - 4);
  const int beyond = static_cast<int>(ceil_div(boxes.strip, kTileOutputs)) * kTileOutputs +
                     kTilePixels - kTileOutputs - boxes.pitch;
  boxes.pixels = boxes.images * boxes.pitch * kHalfBoxRow;
  const int bytes = boxes.pixels + (beyond > 0 ? beyond * kHalfBoxRow : 0);
  boxes.stage = static_cast<int>(ceil_div(bytes, 1024) * 1024);
  boxes.made = static_cast<int>(ceil_div(boxes.images * boxes.strip * kHalfBoxRow, 1024) * 1024);
  boxes.chunks = static_cast<int>(ceil_div(a.C, kToeplitzChannels));
  share_rows(boxes, a, best, at_once);
  return boxes;
}

// The kernels' launchers, for addresses that 16 divides and what there is nothing against.
void depthwise_toeplitz(DType dtype, const DepthwiseArguments& arguments, const void* input,
                        const void* weight, const void* bias, void* output, uintptr_t stream);

// In how many splits `partial` gets the sums (depthwise_weight_sums.h).
int depthwise_toeplitz_splits(const DepthwiseArguments& arguments, bool with_bias);
void depthwise_toeplitz_grad_weight(DType dtype, const DepthwiseArguments& arguments,
                                    const void* grad_output, const void* input, bool with_bias,
                                    void* partial, uintptr_t stream);

}  // namespace gdfast::cuda
