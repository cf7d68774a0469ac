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

constexpr int kWindows = 4, kWindow = 16, kMove = 4;
constexpr int kWindowBytes = kWindow * kHalfBoxRow;
constexpr int kLines = 4;  // of a step, of pixels and of gradients
constexpr int kSteps = 6;  // on their way
// The windows' pixels are moved by up to 3. Lines next to one another begin in different banks: of
// four slots, those of two lines lie in all banks.
constexpr int kLineSlots = 68;
static_assert(kLineSlots >= kWindows * kWindow + 3 && kLineSlots % 8 == 4);
constexpr int kLine = kLineSlots * kHalfBoxRow;
constexpr int kStage = 2 * kLines * kLine;
static_assert(kLine % 128 == 0 && kStage % 512 == 0, "where boxes may begin, and chunks lie alike");
constexpr int kBytes = kSteps * (kStage + 16);  // with barriers
static_assert(kBytes <= 227 * 1024);

struct WeightLines {
  BoxesArguments boxes;
  int graded;  // bytes that a row of gradients fills
};

WeightLines weight_lines(const DepthwiseArguments& a) {
  constexpr int64_t kMost = kWindows * kWindow - kMove;  // columns of gradients
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
  boxes.pixels = static_cast<int>(images * pitch) * kHalfBoxRow;
  lines.graded = strips > 1 ? boxes.strip * kHalfBoxRow : boxes.pixels;
  boxes.stage = kStage;
  boxes.chunks = static_cast<int>(ceil_div(a.C, kToeplitzChannels));
  share_rows(boxes, a, strips, kMultiprocessors, kLines);
  return lines;
}

// Rows that a step's pixels begin above the first one that its gradients see. For padding of half
// the filter no step then has pixels outside of an image alone.
template <int kSize>
constexpr int kAbove = kSize == 7 ? 1 : 0;
// Groups of four rows of gradients that four rows of the image see.
template <int kSize>
constexpr int kSeen = (kSize + 2 + kAbove<kSize>) / kLines + 1;

#if defined(GDFAST_HOPPER)

using Rows = Stages<kSteps>;

GDFAST_DEVICE int first_channel_of(const BoxesArguments& boxes) {
  return static_cast<int>(blockIdx.x) % boxes.chunks * kToeplitzChannels;
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
template <int kSize>
GDFAST_DEVICE void load_lines(const DepthwiseArguments& a, const WeightLines& lines) {
  const BoxesArguments& boxes = lines.boxes;
  RingPlace<kSteps> stage;
  for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
    const int channel = first_channel_of(boxes);
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
        if (pixels) load_box(to, boxes.input, {channel, piece.q - a.pad_w, h, piece.n}, full);
        if (graded) {
          load_box(to + kLines * kLine, boxes.output, {channel, piece.q, p, piece.n}, full);
        }
      }
      RingPlace<kSteps>::advance(stage);
    }
  });
}

#endif

}  // namespace
}  // namespace gdfast::cuda
