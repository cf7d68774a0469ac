// Winograd's F(4x4, 3x3) for a TapConv with a dense 3x3 kernel and step 1: a quarter of the
// multiplications of the direct way.
//
// A grid of 4x4 outputs sees 6x6 image values. Image and weights are transformed, multiplied as 36
// independent products of matrices (tiles x channels by channels x outputs), and transformed back.
// Few channels: winograd_blocks.h. Many: the transformed weights are four times as large as the
// weights, too large to be written and read back; the image is transformed for all panels, a round
// of tiles at a time, and a task transforms its panel's weights just before use, a part of the
// channels and two lines of products at a time:
//
//   image   [part][36][tiles][channels of the part]  what one product of a part reads lies together
//   weights [12][channels of the part][width]
//   sums    [36][tiles][width]                       of a task's outputs
#pragma once

#include "memory_ahead.h"
#include "shares.h"
#include "winograd_blocks.h"

namespace gdfast::cpu {
namespace {

// Whether a TapConv is one that run_winograd takes.
template <typename T>
bool winograd_fits(const TapConv& conv) {
  if (!kSame<T, float> || conv.tap_count != 9 || conv.step_h != 1 || conv.step_w != 1) return false;
  bool seen[9] = {};
  int64_t low_h = conv.taps[0].dh, low_w = conv.taps[0].dw;
  for (int t = 1; t < 9; ++t) {
    low_h = min_of(low_h, conv.taps[t].dh);
    low_w = min_of(low_w, conv.taps[t].dw);
  }
  for (int t = 0; t < 9; ++t) {
    const int64_t r = conv.taps[t].dh - low_h, s = conv.taps[t].dw - low_w;
    if (r > 2 || s > 2 || seen[r * 3 + s]) return false;
    seen[r * 3 + s] = true;
  }
  return true;
}

class WinogradRounds {
  using T = float;
  static constexpr int kWidth = kLanes<T>;
  // Channels whose products are summed at once: sums of sums keep the error of long ones small.
  static constexpr int64_t kPartChannels = 64;
  static constexpr int64_t kMostTiles = 132;  // of a block

 public:
  WinogradRounds(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
                 int threads)
      : conv_(conv),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        threads_(threads),
        ending_(Ending<T>::of(conv)),
        taps_(conv),
        grid_(conv.batch, conv.height, conv.width),
        panels_(conv.produced),
        channels_(round_up(conv.reduced, kWidth)) {
    parts_ = ceil_div(channels_, kPartChannels);
    part_channels_ = round_up(ceil_div(channels_, parts_), kWidth);
    round_tiles_ = image_round_tiles(grid_.count, channels_);
    tiles_ = ceil_div(round_tiles_, ceil_div(round_tiles_, kMostTiles));
    // Few tiles leave room for the sums of several panels, which then read the image together.
    panels_at_once_ = max_of(1, min_of(kMostTiles / tiles_, panels_.count / (4 * threads)));
    panels_at_once_ = min_of(panels_at_once_, 2);
    width_ = panels_at_once_ * panels_.width;
    outputs_ = round_up(conv.produced, width_);
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    for (int64_t group = 0; group < conv_.groups; ++group) run_group(group);
  }

 private:
  struct Scratch {
    T* packed;   // [part_channels][9][width]: weights before they are transformed
    T* weights;  // [12][part_channels][width], of two lines of products
    T* sums;     // [36][tiles][width]
    T* stage;    // pixels whose channels are brought side by side, or apart
    MemoryAhead::Stretch* ahead;
  };

  // From one product to the next: a cache line more than there is, so that the same place of all
  // products spreads over the cache.
  int64_t image_step() const { return round_tiles_ * part_channels_ + 16; }
  int64_t weights_step() const { return part_channels_ * width_ + 16; }
  // Rows beyond the last tile are of no other product, which may be finished or have summed a part.
  int64_t sums_step() const { return (tiles_ + kRowsBeyond) * width_ + 16; }

  int64_t carve(Carver carver) {
    image_ = carver.take<T>(parts_ * kProducts * image_step() + kRowsBeyond * part_channels_);
    zeros_ = carver.take<T>(kWidth);
    biases_ = carver.take<T>(outputs_);
    const int64_t before = carver.used();
    scratch_.packed = carver.take<T>(9 * part_channels_ * width_);
    scratch_.weights = carver.take<T>(2 * kTileIn * weights_step());
    scratch_.sums = carver.take<T>(kProducts * sums_step());
    scratch_.stage = carver.take<T>(RunReader<kTileIn>::kStageSize);
    scratch_.ahead = carver.take<MemoryAhead::Stretch>(9 * max_of(part_channels_, width_));
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](auto* part) {
      return reinterpret_cast<decltype(part)>(reinterpret_cast<uintptr_t>(part) +
                                              scratch_bytes_ * thread);
    };
    return {move(scratch_.packed), move(scratch_.weights), move(scratch_.sums),
            move(scratch_.stage), move(scratch_.ahead)};
  }

  void run_group(int64_t group) {
    const T* source = source_ + group * conv_.source_group;
    const T* weight = weight_ + group * conv_.weight_group;
    T* dest = dest_ + group * conv_.dest_group;
    std::memset(zeros_, 0, kWidth * sizeof(T));
    for (int64_t o = 0; o < outputs_; ++o) {
      const bool has = bias_ != nullptr && o < conv_.produced;
      biases_[o] = has ? bias_[group * conv_.produced + o] : T(0);
    }
    for (int64_t first = 0; first < grid_.count; first += round_tiles_) {
      run_round(source, weight, first, min_of(first + round_tiles_, grid_.count), dest);
    }
  }

  // Tiles [first, end).
  void run_round(const T* source, const T* weight, int64_t first, int64_t end, T* dest) {
    const RunReader<kTileIn> reader(grid_, source, conv_.source, conv_.reduced, conv_.source_height,
                                    conv_.source_width, taps_.low_h, taps_.low_w);
    constexpr int64_t kStep = TileGrid::kRun;
    parallel_shares(ceil_div(end - first, kStep), threads_, [&](int64_t index, int thread) {
      const int64_t begin = first + index * kStep;
      reader.read(begin, min_of(begin + kStep, end), zeros_, scratch_of(thread).stage,
                  [&](const Run<kTileIn>& run, int64_t c, int64_t tile) {
                    T* to = image_ + c / part_channels_ * kProducts * image_step() +
                            (tile - first) * part_channels_ + c % part_channels_;
                    transform_image_run<true>(run, to, part_channels_, image_step());
                  });
      stream_fence();
    });
    const int64_t blocks = ceil_div(end - first, tiles_);
    const int64_t tasks = outputs_ / width_ * blocks;
    // SiLU reads outputs once more.
    const bool stream = ending_.activation != Activation::kSilu &&
                        streams_outputs(dest, conv_.dest, conv_.pixels() * conv_.produced);
    parallel_shares(tasks, threads_, [&](int64_t index, int thread) {
      const Scratch scratch = scratch_of(thread);
      const int64_t output = index / blocks * width_;
      const int64_t tile = first + index % blocks * tiles_;
      const int64_t tile_end = min_of(tile + tiles_, end);
      for (int64_t part = 0; part < parts_; ++part) {
        const int64_t c = part * part_channels_;
        const int64_t channels = min_of(part_channels_, channels_ - c);
        pack_filters(conv_, taps_, weight, output, width_, c, channels, scratch.packed);
        const T* image = image_ + part * kProducts * image_step() + (tile - first) * part_channels_;
        // The next part's weights, which lie apart: memory would take longer than the products.
        MemoryAhead ahead(scratch.ahead);
        if (part + 1 < parts_) {
          weights_ahead(weight, output, part + 1, ahead);
        } else if (index + 1 < tasks) {
          weights_ahead(weight, (index + 1) / blocks * width_, 0, ahead);
        }
        ahead.spread(kProducts * 2 / 3 * panels_at_once_ * ceil_div(tile_end - tile, kTileRows));
        for (int pair = 0; pair < kFilterPairs; ++pair) {
          transform_filter_pair(pair, scratch.packed, channels, width_, scratch.weights,
                                kTileIn * weights_step(), weights_step());
          for (int x = 0; x < 2 * kTileIn; ++x) {
            multiply(kFilterLines[pair][x / kTileIn] * kTileIn + x % kTileIn, image, tile, tile_end,
                     channels, scratch.weights + x * weights_step(), part > 0, scratch.sums, ahead);
          }
        }
      }
      write_tiles(grid_, tile, tile_end, scratch.sums, width_, sums_step(),
                  min_of(width_, conv_.produced - output), biases_ + output, ending_, scratch.stage,
                  conv_.dest, dest + output * conv_.dest.c, stream);
      stream_fence();
    });
  }

  // Adds the weights of a part of the channels and a task's outputs.
  void weights_ahead(const T* weight, int64_t output, int64_t part, MemoryAhead& ahead) const {
    const int64_t first = part * part_channels_;
    const int64_t channels = min_of(part_channels_, conv_.reduced - first);
    const int64_t outputs = min_of(width_, conv_.produced - output);
    const int64_t reduced = conv_.weight_reduced, produced = conv_.weight_produced;
    weight += first * reduced + output * produced;
    // Of each output, or channel, what lies side by side: tap by tap or all taps of a filter.
    const bool by_output = reduced < produced;
    const int64_t lines = by_output ? outputs : channels, side = by_output ? channels : outputs;
    for (int64_t line = 0; line < lines; ++line, weight += max_of(reduced, produced)) {
      if (min_of(reduced, produced) == 9) ahead.add(weight, 9 * side, false);
      if (min_of(reduced, produced) > 1) continue;
      for (int t = 0; t < 9; ++t) ahead.add(weight + taps_.taps[t].weight, side, false);
    }
  }

  // One product of those tiles of [first, end) that need it: sums (+)= image x weights.
  void multiply(int product, const T* image, int64_t first, int64_t end, int64_t channels,
                const T* weights, bool accumulate, T* sums, MemoryAhead& ahead) const {
    image += product * image_step();
    sums += product * sums_step();
    // The next product of a line of them lies behind this one.
    const int64_t next = product % kTileIn + 1 < kTileIn ? image_step() : 0;
    const auto run = [&](TileRange own) {
      if (own.empty()) return;
      multiply_lines(panels_.vectors, panels_at_once_, own.end - own.begin,
                     image + (own.begin - first) * part_channels_, part_channels_, channels,
                     weights, accumulate, sums + (own.begin - first) * width_, next,
                     [&] { ahead.fetch(); });
    };
    const TileGrid::Ranges ranges = grid_.needing(product);
    TileRange low = ranges.part[0].within(first, end), high = ranges.part[1].within(first, end);
    // Rows beyond the first must not be of the second. To have both as one does no harm: sums of
    // tiles that do not need the product are never looked at.
    if (!low.empty() && !high.empty() && high.begin - low.end < kRowsBeyond) {
      return run({low.begin, high.end});
    }
    run(low);
    run(high);
  }

  const TapConv& conv_;
  const T* source_;
  const T* weight_;
  const T* bias_;
  T* dest_;
  int threads_;
  Ending<T> ending_;
  TapGrid taps_;
  TileGrid grid_;
  Panels<T> panels_;
  int64_t channels_;  // reduced ones, padded to whole vectors
  int64_t parts_, part_channels_;
  int64_t panels_at_once_, width_;  // of a task
  int64_t outputs_;                 // whole tasks of them
  int64_t round_tiles_;             // of a round, in which the image is transformed at once
  int64_t tiles_;                   // of a block
  T* image_;
  T* zeros_;
  T* biases_;
  Scratch scratch_;
  int64_t scratch_bytes_;
};

// conv, which winograd_fits.
inline void run_winograd(const TapConv& conv, const float* source, const float* weight,
                         const float* bias, float* dest, int threads) {
  if (WinogradBlocks::fits(conv)) {
    WinogradBlocks(conv, source, weight, bias, dest, threads).run();
  } else {
    WinogradRounds(conv, source, weight, bias, dest, threads).run();
  }
}

}  // namespace
}  // namespace gdfast::cpu
