// How the Hopper convolution whose taps share boxes divides its output, and a block's memory.
//
// A tile's positions are those of its rows one after the other, with the padding beside them: the
// input of tap (r, s) lies the same number of positions further on for all of them. The zeros to
// the right of a row are those to the left of the next one, and the rows of zeros below an image
// those above the next one. Positions in the padding are computed too, and not written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>

#include "conv2d_hopper_tiles.h"

namespace gdfast::cuda {

// The positions of a product: the fewest that images of 28 pixels, which have more than 64
// channels, of 56 and of 7 need with their padding.
constexpr int kHaloWidths[] = {208, 232, 248};

constexpr bool is_halo_width(int64_t channels, int width) { return channels > 64 || width > 208; }

// Along one axis: tap i of output row o reads row o - before + shift + i * step.
struct HaloAxis {
  int64_t taps, shift, step;
  int64_t before, after;  // what lies around the input, after it at least 0
  int64_t span() const { return (taps - 1) * std::abs(step); }
};

inline HaloAxis halo_axis(const HopperTaps& taps, int64_t in, int64_t out) {
  const int64_t last = taps.at + (taps.count - 1) * int64_t{taps.at_step};
  const int64_t lowest = std::min<int64_t>(taps.at, last);
  HaloAxis axis{taps.count, taps.at - lowest, taps.at_step, -lowest, 0};
  axis.after = std::max<int64_t>(out + axis.span() + lowest - in, 0);
  return axis;
}

struct HaloPlan {
  int64_t width;       // positions of a product; 0 where nothing fits
  int64_t n, h;        // images and rows of a tile
  int64_t pitch;       // positions from one row to the next
  int64_t box_h;       // rows of a box, in each of its images
  int64_t out_h;       // likewise of the results
  int64_t tiles;       // of pixels
  int64_t stage_rows;  // of 128 bytes, in eights: those of a box, and zeros after them
  int64_t result_rows;
  int64_t box_stages, weight_stages;  // no stages of weights where those of all steps stay
  int64_t steps, blocks;

  int64_t box_rows() const { return n * box_h * pitch; }
};

struct HaloLimits {
  int64_t row_bytes, block_bytes;     // of a box; what a block has beside its barriers
  int64_t box_stages, weight_stages;  // at most
};

// Plans tiles of some images' whole rows, or fails to.
class HaloPlanner {
 public:
  HaloPlanner(const HopperPass& pass, int64_t channels, int64_t multiprocessors,
              const HaloLimits& limits)
      : in_(pass.in),
        out_(pass.out),
        rows_(halo_axis(pass.rows.taps[0], in_.H, out_.H)),
        columns_(halo_axis(pass.columns.taps[0], in_.W, out_.W)),
        channels_(channels),
        multiprocessors_(multiprocessors),
        limits_(limits) {}

  const HaloAxis& rows() const { return rows_; }
  const HaloAxis& columns() const { return columns_; }

  // Whether padding is narrower than the window, so that rows can share it.
  bool shares_padding() const {
    const auto fits = [](const HaloAxis& axis) {
      return axis.before >= 0 && axis.before <= axis.span() && axis.after <= axis.span();
    };
    return fits(rows_) && fits(columns_);
  }

  // The plan that is expected to be the fastest. Asked for at every launch: of tiles that fit,
  // those with less than half as many rows or images are left out.
  HaloPlan best() const {
    HaloPlan best{};
    int64_t least = 0;
    const auto consider = [&](int64_t n, int64_t h) {
      HaloPlan plan = plan_of(n, h);
      if (plan.width == 0 || !divide_memory(plan)) return;
      const int64_t time = cycles(plan);
      if (best.width == 0 || time < least) best = plan, least = time;
    };
    // Calls with(of_tile) for what divides an axis evenly into tiles of at most `most`.
    const auto for_sizes = [&](int64_t size, int64_t most, auto with) {
      for (int64_t of_tile = most; of_tile > 0; --of_tile) {
        of_tile = tiles_for(size, tiles_for(size, of_tile));
        if (2 * of_tile < most && best.width != 0) return;
        with(of_tile);
      }
    };
    const HaloPlan row = plan_of(1, 1), images = plan_of(2, out_.H);
    const int64_t rest = kHaloWidths[std::size(kHaloWidths) - 1] - out_.W;
    if (rest < 0) return best;
    for_sizes(out_.H, std::min(out_.H, rest / row.pitch + 1), [&](int64_t h) { consider(1, h); });
    const int64_t more = rest - (out_.H - 1) * row.pitch;  // beside one image
    if (more < 0) return best;
    for_sizes(in_.N, std::min(in_.N, more / (images.box_h * row.pitch) + 1),
              [&](int64_t n) { consider(n, out_.H); });
    return best;
  }

 private:
  static int64_t in_eights(int64_t size) { return (size + 7) / 8 * 8; }

  HaloPlan plan_of(int64_t n, int64_t h) const {
    HaloPlan plan{};
    plan.n = n, plan.h = h;
    plan.pitch = in_.W + std::max(columns_.before, columns_.after);
    plan.box_h = n == 1 ? h + rows_.span() : in_.H + std::max(rows_.before, rows_.after);
    plan.out_h = n == 1 ? h : plan.box_h;
    const int64_t image = plan.box_h * plan.pitch;
    const int64_t positions = (n - 1) * image + (h - 1) * plan.pitch + out_.W;
    const int64_t furthest = rows_.span() * plan.pitch + columns_.span();
    for (const int width : kHaloWidths) {
      const bool fits = is_halo_width(channels_, width) && positions <= width;
      if (plan.width == 0 && fits) plan.width = width;
    }
    constexpr int64_t kMostOfABox = 256;
    if (std::max({plan.pitch, plan.box_h, n}) > kMostOfABox) plan.width = 0;
    plan.tiles = tiles_for(out_.N, n) * tiles_for(out_.H, h);
    plan.stage_rows = in_eights(std::max(n * image, furthest + plan.width));
    plan.result_rows = in_eights(std::max(n * plan.out_h * plan.pitch, plan.width));
    plan.steps = rows_.taps * columns_.taps * tiles_for(in_.channels, 64);
    return plan;
  }

  // Weights that all tiles of a block need stay there, where two boxes fit beside them.
  bool divide_memory(HaloPlan& plan) const {
    constexpr int64_t kConsumers = 2, kBoxes = 2, kFewestWeights = 3;
    const int64_t weights = channels_ * limits_.row_bytes,
                  box = plan.stage_rows * limits_.row_bytes;
    int64_t rest = limits_.block_bytes - kConsumers * plan.result_rows * limits_.row_bytes;
    // A block's tiles have the same channels where blocks are a multiple of the channels' tiles.
    const int64_t channel_tiles = tiles_for(out_.channels, channels_);
    const int64_t same_channels = multiprocessors_ - multiprocessors_ % channel_tiles;
    const bool stay = same_channels > 0 && plan.steps * weights + kBoxes * box <= rest;
    plan.blocks = std::min(stay ? same_channels : multiprocessors_, plan.tiles * channel_tiles);
    if (stay) {
      rest -= plan.steps * weights;
    } else {
      plan.weight_stages = std::min((rest - kBoxes * box) / weights, limits_.weight_stages);
      if (plan.weight_stages < kFewestWeights) return false;
      rest -= plan.weight_stages * weights;
    }
    plan.box_stages = std::min(rest / box, limits_.box_stages);
    return true;
  }

  // A guess: tensor cores make 64 channels by 64 summed ones of a position in two cycles, and a
  // multiprocessor loads some 28 bytes in one. Consumers that share
  // a tile write their results at the same time, and multiply nothing then.
  int64_t cycles(const HaloPlan& plan) const {
    const int64_t parts = channels_ / 64, sums = tiles_for(in_.channels, 64);
    const int64_t loaded =
        sums * plan.box_rows() + (plan.weight_stages > 0 ? plan.steps * channels_ : 0);
    const int64_t tile =
        std::max(plan.steps * parts * plan.width * 2, loaded * limits_.row_bytes / 28) +
        (parts > 1 ? 1000 : 0);
    return tile * tiles_for(plan.tiles * tiles_for(out_.channels, channels_), plan.blocks);
  }

  HopperImage in_, out_;
  HaloAxis rows_, columns_;
  int64_t channels_;
  int64_t multiprocessors_;
  HaloLimits limits_;
};

}  // namespace gdfast::cuda
