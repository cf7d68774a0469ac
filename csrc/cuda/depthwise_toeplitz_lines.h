// How the gradient in the weight by bands (depthwise_toeplitz_grad_weight.cu) divides images among
// blocks, and brings their rows to shared memory.
//
//   step     four rows of the image, and four of the gradient
//   line     a row of some images side by side in shared memory, with zeros between and behind them
//   window   16 columns of a line; moved gradients go four columns beyond an image's last ones
#pragma once

#include <algorithm>

#include "depthwise_toeplitz.h"

namespace gdfast::cuda {
namespace {

// What the plan is made for. Not what this GPU has, so that sums have the same bits on every one.
constexpr int kMultiprocessors = 132;

constexpr int kWindow = 16, kMove = 4;
constexpr int kLines = 4;  // of a step, of pixels and of gradients

// A block's channels, of which a warp has 4 or 8, and what its stages hold. What bounds small
// filters is how fast boxes come, by the row: these have 128 bytes where a warp's registers hold
// that.
template <bool kWide>
struct WeightShape {
  static constexpr int kRow = kWide ? kBoxRow : kHalfBoxRow;  // bytes of a slot
  static constexpr int kBlockChannels = kRow / 2, kChannels = kBlockChannels / kToeplitzWarps;
  static constexpr int kWindows = kWide ? 2 : 4;
  static constexpr int kSteps = kWide ? 5 : 6;  // on their way
  // The windows' pixels are moved by up to 3. Narrow lines next to one another begin in different
  // banks: of four slots, those of two lines lie in all banks.
  static constexpr int kLineSlots = kWide ? 40 : 68;
  static constexpr int kLine = kLineSlots * kRow, kStage = 2 * kLines * kLine;
  static constexpr int kBytes = kSteps * (kStage + 16);  // with barriers
  static_assert(kLineSlots >= kWindows * kWindow + 3 && (kWide || kLineSlots % 8 == 4));
  static_assert(kLine % (kWide ? 1024 : 128) == 0 && kStage % (8 * kRow) == 0,
                "where boxes may begin, and chunks lie alike");
  static_assert(kBytes <= 227 * 1024);

  // Where a warp's channels lie of a slot.
  GDFAST_DEVICE int place(int slot, int channel) {
    return kWide ? slot * kRow + (channel / 8 ^ slot % 8) * 16 : channels_of_slot(slot, channel);
  }
};

struct WeightLines {
  BoxesArguments boxes;
  int graded;  // bytes that a row of gradients fills
  int inset;   // columns before those that come, where a line has one image
};

template <bool kWide>
WeightLines weight_lines(const DepthwiseArguments& a) {
  using Shape = WeightShape<kWide>;
  constexpr int64_t kMost = Shape::kWindows * kWindow - kMove;  // columns of gradients
  WeightLines lines{};
  BoxesArguments& boxes = lines.boxes;
  const int64_t strips = ceil_div(a.Q, kMost), strip = ceil_div(a.Q, strips);
  const int64_t seen = strip + a.S - 1;
  int64_t pitch = seen, images = 1;
  if (strips == 1) {
    // Of images side by side each one's last zeros are the next one's first.
    const int64_t needed = std::min<int64_t>(seen, a.pad_w + a.W);
    pitch = std::max(std::max<int64_t>(strip, seen - a.pad_w), needed);
    images = std::min<int64_t>(a.N, (kMost - strip) / pitch + 1);
  }
  boxes.images = static_cast<int>(images);
  boxes.strip = static_cast<int>(strip);
  boxes.pitch = static_cast<int>(pitch);
  if (strips == 1 && images == 1 && a.pad_w < seen && a.pad_w * Shape::kRow % 128 == 0) {
    lines.inset = a.pad_w;
    boxes.pitch = static_cast<int>(std::min<int64_t>(seen - a.pad_w, a.W));
  }
  boxes.pixels = static_cast<int>(images) * boxes.pitch * Shape::kRow;
  lines.graded = images > 1 ? boxes.pixels : boxes.strip * Shape::kRow;
  boxes.stage = Shape::kStage;
  boxes.chunks = static_cast<int>(ceil_div(a.C, Shape::kBlockChannels));
  share_rows(boxes, a, strips, kMultiprocessors, kLines);
  return lines;
}

// Whether lines of 64 channels are as full as those of 32.
inline bool is_wide(const DepthwiseArguments& a, bool with_bias) {
  if (a.R != 5 || with_bias) return false;
  const auto steps = [](const BoxesArguments& boxes) {
    return ceil_div(boxes.pieces, boxes.blocks / boxes.chunks) * boxes.rows;
  };
  return steps(weight_lines<true>(a).boxes) <= steps(weight_lines<false>(a).boxes);
}

// Rows that a step's pixels begin above the first one that its gradients see. For padding of half
// the filter no step then has pixels outside of an image alone.
template <int kSize>
constexpr int kAbove = kSize == 7 ? 1 : 0;
// Groups of four rows of gradients that four rows of the image see.
template <int kSize>
constexpr int kSeen = (kSize + 2 + kAbove<kSize>) / kLines + 1;

#if defined(GDFAST_HOPPER)

template <typename Shape>
GDFAST_DEVICE int first_channel_of(const BoxesArguments& boxes) {
  return static_cast<int>(blockIdx.x) % boxes.chunks * Shape::kBlockChannels;
}

// The steps of a piece: the first ones have gradients, and some have pixels. Rows that there are
// not, of those that a step has, are zeros.
struct WeightSteps {
  int count, graded;
  int first, rows;  // of the image's pixels; how many it has

  template <int kSize>
  GDFAST_DEVICE WeightSteps of(const DepthwiseArguments& a, const BoxesPiece& piece) {
    const int first = piece.p - a.pad_h - kAbove<kSize>, up = kLines - 1;
    const int graded = (piece.rows + up) / kLines;
    const int seen = (piece.rows + kSize - 1 + kAbove<kSize> + up) / kLines;
    const int inside = (a.H - first + up) / kLines, last = seen < inside ? seen : inside;
    return {last > graded ? last : graded, graded, first, a.H};
  }
  GDFAST_DEVICE bool is_graded(const WeightSteps& steps, int step) { return step < steps.graded; }
  GDFAST_DEVICE bool has_pixels(const WeightSteps& steps, int step) {
    const int h = steps.first + step * kLines;
    return h > -kLines && h < steps.rows;
  }
};

// One thread starts to load all rows, each step as soon as its stage is nobody's any more.
template <typename Shape, int kSize>
GDFAST_DEVICE void load_lines(const DepthwiseArguments& a, const WeightLines& lines) {
  using Rows = Stages<Shape::kSteps>;
  constexpr int kLine = Shape::kLine;
  const BoxesArguments& boxes = lines.boxes;
  RingPlace<Shape::kSteps> stage;
  for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
    const int channel = first_channel_of<Shape>(boxes);
    const WeightSteps steps = WeightSteps::of<kSize>(a, piece);
#pragma unroll 1
    for (int step = 0; step < steps.count; ++step) {
      const bool graded = WeightSteps::is_graded(steps, step);
      const bool pixels = WeightSteps::has_pixels(steps, step);
      uint64_t* const full = Rows::full(boxes, stage.index);
      // In the first turn nobody has to leave a stage: the phase before the first is over.
      barrier_wait(Rows::empty(boxes, stage.index), stage.parity ^ 1);
      barrier_arrive_expecting(
          full, kLines * ((pixels ? boxes.pixels : 0) + (graded ? lines.graded : 0)));
      unsigned char* to = Rows::at(boxes, stage.index);
#pragma unroll 1
      for (int i = 0; i < kLines; ++i, to += kLine) {
        const int h = steps.first + step * kLines + i, p = piece.p + step * kLines + i;
        if (pixels) {
          load_box(to + lines.inset * Shape::kRow, boxes.input,
                   {channel, piece.q - a.pad_w + lines.inset, h, piece.n}, full);
        }
        if (graded) {
          load_box(to + kLines * kLine, boxes.output, {channel, piece.q, p, piece.n}, full);
        }
      }
      RingPlace<Shape::kSteps>::advance(stage);
    }
  });
}

#endif

}  // namespace
}  // namespace gdfast::cuda
