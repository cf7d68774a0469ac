// TapConv in bfloat16: PixelTiles' way with pairs of channels, that is a tile of pixels x output
// channels whose rows are read where the image lies.
//
// Sums stay in float32 over the whole reduction and are rounded once, a tile at a time, while L1
// still holds them.
#pragma once

#include "convert.h"
#include "pixel_major.h"
#include "tap_conv_pixels.h"
#include "weight_pairs.h"

namespace gdfast::cpu {
namespace {

class PairTiles {
 public:
  // The channels that each tap takes in the reduction. With few of them, taps follow each other
  // without a gap, and what a pixel sees is copied together: a tap alone is too short a stretch.
  static int64_t tap_channels(int64_t reduced) {
    return is_few(reduced) ? reduced : round_up(reduced, 2);
  }

  // conv.source is that of a PixelMajor of as many channels.
  PairTiles(const TapConv& conv, const BFloat16* source, const BFloat16* weight,
            const BFloat16* bias, BFloat16* dest, int threads)
      : conv_(conv),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        threads_(threads),
        few_(is_few(conv.reduced)),
        packer_(conv, tap_channels(conv.reduced)),
        panels_(conv.produced),
        reduction_(conv.tap_count == 0 ? Reduction(0, 1)
                   : few_              ? Reduction(1, packer_.count())
                                       : Reduction(conv.tap_count, round_up(conv.reduced, 2) / 2)) {
    // What is copied stays in L2, however large the kernel is.
    const int64_t most =
        few_ ? min_of(kBlockPixels, kCopiedPairs / max_of(1, packer_.count())) : kBlockPixels;
    int64_t blocks = ceil_div(conv.pixels(), max_of(kTileRows, most));
    if (blocks < 4 * threads) blocks = round_up(blocks, threads);
    block_pixels_ = round_up(ceil_div(conv.pixels(), blocks), kTileRows);
    blocks_ = ceil_div(conv.pixels(), block_pixels_);
    panels_at_once_ =
        max_of(1, kBlockBytesOfChannels / (panels_.width * static_cast<int64_t>(sizeof(float))));
    const int64_t wanted = ceil_div(2 * threads, blocks_ * conv.groups);
    if (wanted > 1) panels_at_once_ = min_of(panels_at_once_, ceil_div(panels_.count, wanted));
    panels_at_once_ = min_of(panels_at_once_, panels_.count);
    panel_groups_ = ceil_div(panels_.count, panels_at_once_);
  }

  void run() {
    const ThreadScratch memory(
        threads_, [&](Carver& carver) { carve(carver); },
        [&](Carver& carver) { scratch_from(carver); });
    std::memset(zeros_, 0, zero_pairs() * sizeof *zeros_);
    if (few_) find_runs();
    parallel_for(conv_.groups * panels_.count, threads_, [&](int64_t index, int) { pack(index); });
    parallel_for(conv_.groups * blocks_ * panel_groups_, threads_, [&](int64_t index, int thread) {
      Carver carver = memory.of(thread);
      block(index, scratch_from(carver));
    });
  }

 private:
  static constexpr int64_t kCopiedPairs = 131072;  // 512 KB

  // Taps of one line of the kernel that see one stretch of memory, from the pixel at (dh, dw).
  struct Run {
    int64_t dh, dw, taps;
  };

  struct Scratch {
    const BFloat16Pair** rows;  // [tiles][taps of a part][kTileRows]
    BFloat16** dest;            // [block_pixels]
    BFloat16Pair* packed;       // [block_pixels][depth], with few channels
    float* sums;                // [block_pixels or one tile][panels_at_once * width]
  };

  static bool is_few(int64_t reduced) { return reduced < kLanes<float>; }

  int64_t panel_size() const { return packer_.count() * panels_.width; }
  int64_t sums_step() const { return panels_at_once_ * panels_.width; }
  int64_t parts() const { return max_of(1, reduction_.parts()); }
  int64_t zero_pairs() const { return few_ ? 0 : reduction_.channels_at_once; }

  void carve(Carver& carver) {
    weights_ = carver.take<BFloat16Pair>(conv_.groups * panels_.count * panel_size());
    biases_ = carver.take<float>(conv_.groups * panels_.count * panels_.width);
    zeros_ = carver.take<BFloat16Pair>(zero_pairs());
    runs_ = carver.take<Run>(few_ ? conv_.tap_count : 0);
  }

  Scratch scratch_from(Carver& carver) const {
    Scratch scratch;
    scratch.rows = carver.take<const BFloat16Pair*>(block_pixels_ * reduction_.taps_at_once);
    scratch.dest = carver.take<BFloat16*>(block_pixels_);
    scratch.packed = carver.take<BFloat16Pair>(few_ ? block_pixels_ * packer_.count() : 0);
    scratch.sums = carver.take<float>((parts() == 1 ? kTileRows : block_pixels_) * sums_step());
    return scratch;
  }

  void find_runs() {
    run_count_ = 0;
    const bool no_gaps = conv_.source.w == conv_.reduced;
    for (int64_t t = 0; t < conv_.tap_count; ++t) {
      const Tap& tap = conv_.taps[t];
      if (no_gaps && t > 0) {
        Run& last = runs_[run_count_ - 1];
        if (last.dh == tap.dh && last.dw + last.taps == tap.dw) {
          ++last.taps;
          continue;
        }
      }
      runs_[run_count_++] = {tap.dh, tap.dw, 1};
    }
  }

  void pack(int64_t index) {
    const int64_t group = index / panels_.count;
    const int64_t first = index % panels_.count * panels_.width;
    packer_.pack(weight_ + group * conv_.weight_group, first, panels_.width,
                 weights_ + index * panel_size());
    for (int64_t o = 0; o < panels_.width; ++o) {
      const bool has = bias_ != nullptr && first + o < conv_.produced;
      biases_[index * panels_.width + o] =
          has ? widen(bias_[group * conv_.produced + first + o]) : 0.0f;
    }
  }

  void block(int64_t index, const Scratch& scratch) const {
    const int64_t panel_group = index % panel_groups_;
    const int64_t pixel_block = index / panel_groups_ % blocks_;
    const int64_t group = index / panel_groups_ / blocks_;
    const int64_t first = pixel_block * block_pixels_;
    const int64_t pixels = min_of(block_pixels_, conv_.pixels() - first);
    const int64_t panel0 = panel_group * panels_at_once_;
    const int64_t panel_end = min_of(panel0 + panels_at_once_, panels_.count);
    const BFloat16* source = source_ + group * conv_.source_group;
    point_dest(dest_ + group * conv_.dest_group, first, pixels, scratch);
    if (few_) copy_pixels(source, first, pixels, scratch);

    for (int64_t part_index = 0; part_index < parts(); ++part_index) {
      const ReductionPart part =
          conv_.tap_count == 0 ? ReductionPart{0, 0, 0, 0} : reduction_.part(part_index);
      point_rows(part, source, first, pixels, scratch);
      TileArgs<BFloat16Pair> args;
      args.row_step = 1;
      args.panel_step = panels_.width;
      args.segments = part.taps;
      args.length = part.channels;
      args.how = part_index == 0 ? Start::kColumns : Start::kAccumulate;
      const bool last = part_index == parts() - 1;
      if (last) args.ending = Ending<float>::of(conv_);
      for (int64_t panel = panel0; panel < panel_end; ++panel) {
        const int64_t number = group * panels_.count + panel;
        args.panel = weights_ + number * panel_size() +
                     (part.tap * reduction_.channels + part.channel) * panels_.width;
        args.start = biases_ + number * panels_.width;
        for (int64_t x = 0; x < pixels; x += kTileRows) {
          float* out[kTileRows];
          for (int64_t i = 0; i < kTileRows; ++i) {
            out[i] = scratch.sums + (parts() == 1 ? i : x + i) * sums_step() +
                     (panel - panel0) * panels_.width;
          }
          args.out = out;
          args.rows = scratch.rows + x * part.taps;
          args.rows_ahead = x + kTileRows < pixels ? args.rows + part.taps * kTileRows : nullptr;
          multiply_tile(panels_.vectors, args);
          if (last) round_tile(panel, out, scratch.dest + x, min_of(kTileRows, pixels - x));
        }
      }
    }
  }

  void point_dest(BFloat16* dest, int64_t first, int64_t pixels, const Scratch& scratch) const {
    GridPoint at = GridPoint::at(conv_, first);
    for (int64_t x = 0; x < pixels; ++x, at.advance(conv_)) {
      scratch.dest[x] = dest + at.n * conv_.dest.n + at.i * conv_.dest.h + at.j * conv_.dest.w;
    }
  }

  // What each pixel sees through all taps, zeros where a tap falls outside.
  void copy_pixels(const BFloat16* source, int64_t first, int64_t pixels,
                   const Scratch& scratch) const {
    const int64_t channels = conv_.reduced;
    GridPoint at = GridPoint::at(conv_, first);
    for (int64_t x = 0; x < pixels; ++x, at.advance(conv_)) {
      BFloat16* to = reinterpret_cast<BFloat16*>(scratch.packed + x * packer_.count());
      if (conv_.tap_count * channels % 2 != 0) to[conv_.tap_count * channels] = {0};
      const BFloat16* image = source + at.n * conv_.source.n;
      for (int64_t r = 0; r < run_count_; ++r) {
        const Run& run = runs_[r];
        const int64_t h = at.i * conv_.step_h + run.dh, w = at.j * conv_.step_w + run.dw;
        const bool line = h >= 0 && h < conv_.source_height;
        const int64_t begin = line ? min_of(max_of(0, -w), run.taps) : run.taps;
        const int64_t end = max_of(begin, min_of(run.taps, conv_.source_width - w));
        const BFloat16* from = image + h * conv_.source.h + w * conv_.source.w;
        const int64_t count = run.taps * channels;
        for (int64_t i = 0; i < begin * channels; ++i) to[i] = {0};
        for (int64_t i = begin * channels; i < end * channels; ++i) to[i] = from[i];
        for (int64_t i = end * channels; i < count; ++i) to[i] = {0};
        to += count;
      }
    }
  }

  // Points every row of every tile to what its pixel sees, or to zeros.
  void point_rows(const ReductionPart& part, const BFloat16* source, int64_t first, int64_t pixels,
                  const Scratch& scratch) const {
    GridPoint at = GridPoint::at(conv_, first);
    for (int64_t x = 0; x < round_up(pixels, kTileRows); ++x) {
      const BFloat16Pair** rows =
          scratch.rows + x / kTileRows * part.taps * kTileRows + x % kTileRows;
      if (x >= pixels) {  // computed like the last pixel, and left
        for (int64_t t = 0; t < part.taps; ++t) rows[t * kTileRows] = rows[t * kTileRows - 1];
        continue;
      }
      if (few_) {
        if (part.taps > 0) rows[0] = scratch.packed + x * packer_.count() + part.channel;
        continue;
      }
      const BFloat16* image = source + at.n * conv_.source.n + 2 * part.channel;
      for (int64_t t = 0; t < part.taps; ++t) {
        const Tap& tap = conv_.taps[part.tap + t];
        const int64_t h = at.i * conv_.step_h + tap.dh, w = at.j * conv_.step_w + tap.dw;
        const bool inside = h >= 0 && h < conv_.source_height && w >= 0 && w < conv_.source_width;
        rows[t * kTileRows] = inside ? reinterpret_cast<const BFloat16Pair*>(
                                           image + h * conv_.source.h + w * conv_.source.w)
                                     : zeros_;
      }
      at.advance(conv_);
    }
  }

  void round_tile(int64_t panel, float* const* sums, BFloat16* const* dest, int64_t pixels) const {
    const int64_t first = panel * panels_.width, step = conv_.dest.c;
    const int64_t channels = min_of(panels_.width, conv_.produced - first);
    if (step != 1) {
      for (int64_t o = 0; o < channels; ++o) {
        for (int64_t i = 0; i < pixels; ++i) {
          dest[i][(first + o) * step] = narrow<BFloat16>(sums[i][o]);
        }
      }
      return;
    }
    for (int64_t i = 0; i < pixels; ++i) {
      BFloat16* to = dest[i] + first;
      int64_t o = 0;
      for (; o + kLanes<float> <= channels; o += kLanes<float>) {
        store_narrowed(to + o, load(sums[i] + o));
      }
      if (o < channels) store_some(to + o, load(sums[i] + o), channels - o);
    }
  }

  const TapConv& conv_;
  const BFloat16* source_;
  const BFloat16* weight_;
  const BFloat16* bias_;
  BFloat16* dest_;
  int threads_;
  bool few_;
  WeightPairs packer_;
  Panels<float> panels_;
  Reduction reduction_;
  int64_t block_pixels_, blocks_;
  int64_t panels_at_once_, panel_groups_;
  BFloat16Pair* weights_;
  float* biases_;
  BFloat16Pair* zeros_;
  Run* runs_;
  int64_t run_count_ = 0;
};

}  // namespace
}  // namespace gdfast::cpu
