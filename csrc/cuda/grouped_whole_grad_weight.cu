// The gradients in the weight and the bias in groups on Hopper of small images, in bfloat16, by
// filters of 3 x 3 with stride 1 and padding of 1.
//
// A block sums images one after the other, which come by the TMA unit to a ring in shared memory,
// all that fit there ahead of time. A warp walks down an image, or a column of it, and loads each
// row of the input and of the gradient to registers once: there it meets the rows before it. So a
// slot is some rows of both and nothing around them.
#include "conv2d.h"
#include "conv2d_grouped_whole.h"
#include "device.h"
#include "early.h"
#include "grouped_hopper.h"
#include "grouped_weight_sums.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";

// Images of so many rows and columns, of which a slot has kSlotRowCount rows of kImageCount of
// them, kPitch pixels each; the input's from column kFirst on. A warp multiplies 16 pixels of a row
// at a time: 8 columns of two images, or 16 columns. Two streams of warps take slots in turns or,
// where images are wide, both all of them: a half of the columns each.
template <int kGroupChannels, int kSize, int kPitch, int kFirst, int kImageCount, int kSlotRowCount,
          int kChannelCount, int kSlotCount>
struct WeightWalk {
  static constexpr int kGroup = kGroupChannels, kRows = kSize, kColumns = kSize;
  static constexpr int kRowPixels = kPitch, kFirstColumn = kFirst;
  static constexpr int kImages = kImageCount, kSlotRows = kSlotRowCount, kSlots = kSlotCount;
  static constexpr int kParts = kRows / kSlotRows;  // slots of an image
  static constexpr bool kTogether = kPitch > 16, kWide = kGroup > kChannelsOfWarp;
  static constexpr int kStreams = 2, kConsumers = kStreams * kUnits;
  static constexpr int kThreads = kConsumers * kWarp;
  static constexpr int kSlotsTogether = kTogether ? 1 : kStreams;
  static constexpr int kSlotsOfStream = kSlots / kSlotsTogether;
  static constexpr int kRoundImages = kSlotsTogether * kImages;
  // A block's channels: one group of 32 lies in half of a box's row.
  static constexpr int kChannels = kChannelCount, kPixel = kChannels * 2;
  static constexpr int kRowBytes = kPitch * kPixel, kImageBytes = kSlotRows * kRowBytes;
  static constexpr int kGradAt = kImages * kImageBytes, kSlotBytes = 2 * kGradAt;
  static constexpr int kRingBytes = kSlots * kSlotBytes;
  static_assert(kGradAt % 1024 == 0);
  static_assert(kSlots <= kMostSlots && kSlots % kSlotsTogether == 0);
  static_assert(kRingAt + kRingBytes <= kHopperMemory);
  static_assert(kStreams * kChannels * (row_sums_of(kGroup) + 1) * 4 <= kRingBytes, "sums");
  static_assert(kRowPixels - 1 + kFirstColumn >= kColumns, "a row's last pixel is zero");
  static_assert(kParts * kSlotRows == kRows && kSlotsOfStream >= 2, "a slot is read, one comes");
  static_assert(kGroup <= kChannels && (!kWide || kGroup == kChannels), "whole groups");
};

using OctetWalk = WeightWalk<32, 7, 8, 0, 2, 7, 32, 8>;
using QuadWalk = WeightWalk<16, 14, 16, -1, 1, 7, kSlab, 6>;
using StripWalk = WeightWalk<8, 28, 32, -1, 1, 4, kSlab, 6>;

struct WholeWeightArguments {
  TensorMap input, grad;
  int rounds, rounds_of_block;  // of images that streams take at a time
  GroupedWeightSplit split;
};

#if defined(GDFAST_HOPPER)

// The n-th slot of a stream.
template <typename Its>
GDFAST_DEVICE Slot slot_of(int stream, int n) {
  const int number = n * Its::kSlotsTogether + (Its::kTogether ? 0 : stream);
  return {number % Its::kSlots, number / Its::kSlots & 1};
}

template <typename Its>
GDFAST_DEVICE unsigned char* slot_memory(const Slot& slot) {
  return shared_memory() + kRingAt + slot.index * Its::kSlotBytes;
}

// Of images that the block has: which it begins with, and how often streams take some: at least
// once, of images that do not exist if there are no others.
struct Rounds {
  int first, count;
};

GDFAST_DEVICE Rounds rounds_of(const WholeWeightArguments& a) {
  const int first = static_cast<int>(blockIdx.x) * a.rounds_of_block, left = a.rounds - first;
  return {first, left < 1 ? 1 : left < a.rounds_of_block ? left : a.rounds_of_block};
}

// By one thread of a stream: has the n-th slot filled, if there is one, when its memory is free.
template <typename Its>
GDFAST_DEVICE void fill_slot(const WholeWeightArguments& a, int first_channel, int stream, int n) {
  const Rounds rounds = rounds_of(a);
  if (n >= rounds.count * Its::kParts) return;
  const Slot slot = slot_of<Its>(stream, n);
  const int row = n % Its::kParts * Its::kSlotRows;
  const int image = (rounds.first + n / Its::kParts) * Its::kRoundImages +
                    (Its::kTogether ? 0 : stream * Its::kImages);
  // In the first turn nobody has to leave a slot: the phase before the first is over.
  barrier_wait(empty(slot), slot.parity ^ 1);
  barrier_arrive_expecting(full(slot), Its::kSlotBytes);
  unsigned char* const to = slot_memory<Its>(slot);
  load_box(to, a.input, {first_channel, Its::kFirstColumn, row, image}, full(slot));
  load_box(to + Its::kGradAt, a.grad, {first_channel, 0, row, image}, full(slot));
}

// The place of a chunk of a pixel in a box whose rows have 128 bytes, or 64.
template <typename Its>
GDFAST_DEVICE int chunk_at(int pixel, int chunk) {
  if (Its::kPixel == kBoxRow) return swizzled(pixel, chunk);
  return pixel * Its::kPixel + ((chunk ^ (pixel >> 1 & 3)) << 4);
}

// Where a lane finds its pixels of a slot's first row, for ldmatrix.
struct RowPlaces {
  int input[3];  // for each column of a filter
  int grad;
};

template <typename Its>
GDFAST_DEVICE RowPlaces row_places(const Unit& unit, int stream) {
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  const auto pixels = [&](int half, int& column) {
    column = line + (Its::kTogether ? stream * 16 : 0) + (Its::kImages == 1 ? half * 8 : 0);
    return Its::kImages == 1 ? 0 : half * Its::kImageBytes;
  };
  int column;
  RowPlaces places;
  const int of_grad = pixels(matrix >> 1, column);
  places.grad = Its::kGradAt + of_grad + chunk_at<Its>(column, unit.filter / 8 + (matrix & 1));
  const int of_input = pixels(matrix & 1, column);
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    // What is no neighbour of a pixel is zero: the gradient's zeros would not undo an infinity.
    const int at = column + s - 1 - Its::kFirstColumn;
    const int pixel = at < 0 || column >= Its::kColumns ? Its::kRowPixels - 1 : at;
    places.input[s] = of_input + chunk_at<Its>(pixel, unit.channel / 8 + (matrix >> 1));
  }
  return places;
}

// A row of an image in registers: the input's pixels for each column of a filter.
struct RowFragments {
  uint32_t input[3][4], grad[4];
};

GDFAST_DEVICE void multiply(WeightSums& sums, int tap, const uint32_t (&grads)[4],
                            const uint32_t (&pixels)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mma_m16n8k16<BFloat16>(sums.weight[tap][half], grads, {pixels[half * 2], pixels[half * 2 + 1]});
  }
}

// Multiplies a row by itself and, with the row before it, both ways.
GDFAST_DEVICE void sum_row(WeightSums& sums, const RowPlaces& places, const unsigned char* row,
                           RowFragments& its, const RowFragments& before, bool is_first) {
  ldmatrix_x4_transposed(its.grad, row + places.grad);
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    ldmatrix_x4_transposed(its.input[s], row + places.input[s]);
    multiply(sums, 3 + s, its.grad, its.input[s]);
    if (is_first) continue;
    multiply(sums, s, its.grad, before.input[s]);
    multiply(sums, 6 + s, before.grad, its.input[s]);
  }
}

// Apart from the products, which would wait for each other at every row.
template <typename Its>
GDFAST_DEVICE void add_slot_to_bias(WeightSums& sums, const unsigned char* grad) {
#pragma unroll
  for (int i = 0; i < Its::kSlotRows; ++i) {
    uint32_t grads[4];
    ldmatrix_x4_transposed(grads, grad + i * Its::kRowBytes);
    add_to_bias<BFloat16>(sums, grads);
  }
}

template <typename Its>
GDFAST_DEVICE void sum_images(const WholeWeightArguments& a, int first_channel) {
  const int index = warp_index() % kUnits, stream = warp_index() / kUnits;
  const Unit unit{(Its::kWide ? index >> 1 : index) * kChannelsOfWarp,
                  (Its::kWide ? index & 1 : index) * kChannelsOfWarp,
                  a.split.bias_sums != nullptr && !(Its::kWide && (index & 1))};
  const RowPlaces places = row_places<Its>(unit, stream);
  WeightSums sums;
#pragma unroll
  for (float& sum : reinterpret_cast<FlatSums&>(sums)) sum = 0;
  const bool leads = warp_lane() == 0 && index == 0 && !(Its::kTogether && stream > 0);
  for (int n = 0; leads && n < Its::kSlotsOfStream; ++n) {
    fill_slot<Its>(a, first_channel, stream, n);
  }
  // An odd number of rows ends with the fragments that the next slot begins with.
  constexpr int kUnrolled = Its::kSlotRows % 2 == 0 ? 1 : Its::kParts;
  const int slots = rounds_of(a).count * Its::kParts;
  RowFragments rows[2] = {};
  int first = 0;
  do {
#pragma unroll
    for (int i = 0; i < kUnrolled; ++i) {
      const int n = first + i;
      const bool is_top = kUnrolled > 1 || Its::kParts == 1 ? i == 0 : n % Its::kParts == 0;
      const Slot slot = slot_of<Its>(stream, n);
      barrier_wait(full(slot), slot.parity);
      const unsigned char* const row = slot_memory<Its>(slot);
#pragma unroll
      for (int h = 0; h < Its::kSlotRows; ++h) {
        const int now = (i * Its::kSlotRows + h) % 2;
        sum_row(sums, places, row + h * Its::kRowBytes, rows[now], rows[now ^ 1], is_top && h == 0);
      }
      if (unit.sums_bias) add_slot_to_bias<Its>(sums, row + places.grad);
      leave(slot);
      // By now all others have left the slot before this one, or soon will.
      if (leads && n > 0) fill_slot<Its>(a, first_channel, stream, n - 1 + Its::kSlotsOfStream);
    }
    first += kUnrolled;
  } while (first < slots);
  auto* const all = reinterpret_cast<float*>(shared_memory() + kRingAt);
  write_sums<Its>(sums, a.split, unit, first_channel, stream, all);
}

#endif

// Registers for two blocks, where memory is for one and they are enough: the kernel that adds up
// splits begins beside.
template <typename Its>
GDFAST_KERNEL(Its::kThreads, (Its::kTogether ? 1 : 2))
grouped_whole_grad_weight_kernel(GDFAST_GRID_CONSTANT const WholeWeightArguments a) {
#if defined(GDFAST_HOPPER)
  let_next_begin();
  if (this_thread() == 0) expect_boxes(a.input), expect_boxes(a.grad);
  if (this_thread() < Its::kSlots) {
    const Slot slot{this_thread(), 0};
    barrier_init(full(slot), 1);
    barrier_init(empty(slot), Its::kTogether ? Its::kConsumers : kUnits);
    barriers_ready();
  }
  sync_block();
  sum_images<Its>(a, static_cast<int>(blockIdx.y) * Its::kChannels);
#else
  static_cast<void>(a);
#endif
}

template <typename With>
auto with_walk(const Conv2dProblem& p, With&& with) {
  switch (p.H) {
    case OctetWalk::kRows:
      return with(OctetWalk{});
    case QuadWalk::kRows:
      return with(QuadWalk{});
    default:
      return with(StripWalk{});
  }
}

template <typename Its>
void start(const Conv2dProblem& p, const void* grad_output, const void* input, void* workspace,
           bool with_bias, int64_t splits, const Where& where) {
  const auto map = [&](const void* images, const Strides4& strides) {
    return channels_first<BFloat16>(kOp, images, {p.N, p.C, p.H, p.W, strides},
                                    {Its::kImages, Its::kSlotRows, Its::kRowPixels}, Its::kPixel);
  };
  const int64_t rounds = ceil_div(p.N, Its::kRoundImages);
  const WholeWeightArguments a{read_once(kOp, map(input, p.input), p.N * p.K * p.P * p.Q * 2),
                               map(grad_output, p.output), small(rounds),
                               small(ceil_div(rounds, splits)),
                               grouped_weight_split(p, workspace, splits, with_bias)};
  const dim3 grid(static_cast<unsigned>(splits),
                  static_cast<unsigned>(ceil_div(p.C, Its::kChannels)));
  launch(kOp, grouped_whole_grad_weight_kernel<Its>, grid, Its::kThreads,
         size_t{kRingAt + Its::kRingBytes}, where.stream, a);
}

}  // namespace

// As many as there are multiprocessors for, and no more than take as long.
int64_t grouped_whole_splits(const Conv2dProblem& p) {
  return with_walk(p, [&](auto its) {
    using Its = decltype(its);
    const int64_t slabs = ceil_div(p.C, Its::kChannels), all = multiprocessors(kOp);
    const int64_t rounds = ceil_div(p.N, Its::kRoundImages), most = all < slabs ? 1 : all / slabs;
    return ceil_div(rounds, ceil_div(rounds, most));
  });
}

void conv2d_grad_weight_grouped_whole(const Conv2dProblem& p, const void* grad_output,
                                      const void* input, void* grad_weight, void* grad_bias,
                                      void* workspace, int64_t splits, const Where& where) {
  const DeviceGuard guard(kOp, where.device);
  with_walk(p, [&](auto its) {
    start<decltype(its)>(p, grad_output, input, workspace, grad_bias != nullptr, splits, where);
  });
  if (grad_weight == nullptr && grad_bias == nullptr) return;
  const Conv2dWay way{Precision::kIeee, BlockTile::k64x64};
  conv2d_grad_weight(p, way, nullptr, nullptr, grad_weight, grad_bias, workspace, splits, where);
}

}  // namespace gdfast::cuda
