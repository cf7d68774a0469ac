// Winograd's F(4x4, 3x3) for few channels: the transformed weights are small, every thread makes
// its own, and a task takes a block of tiles through all steps within its caches. Weights that
// threads share would take longer to write than to make: each of their lines is in the other cores'
// caches.
//
//   weights [36][panel][channels][width]
//   slots   [37][tiles][line]   a line: the channels of one tile, or its sums
//
// The image of product p lies in slot p + 1 and its sums go to slot p, whose image is done with: a
// block needs half of the memory that image and sums would, and twice as many tiles fit.
#pragma once

#include "shares.h"
#include "winograd_ahead.h"
#include "winograd_products.h"
#include "winograd_runs.h"
#include "winograd_weights.h"

namespace gdfast::cpu {
namespace {

class WinogradBlocks {
  using T = float;
  static constexpr int kWidth = kLanes<T>;
  // Channels whose products are summed at once: sums of sums keep the error of long ones small.
  static constexpr int64_t kPartChannels = 64;
  // Of a block's slots: they share an L2 with its outputs' pixels and those of the next image.
  static constexpr int64_t kBlockBytes = 144 << 10;
  // A block that is smaller does not make reading the weights worth its while.
  static constexpr int64_t kLeastCalls = 2;

 public:
  static bool fits(const TapConv& conv) {
    return round_up(conv.reduced, kWidth) * conv.produced <= 160 * 160;
  }

  WinogradBlocks(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
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
        channels_(round_up(conv.reduced, kWidth)),
        line_(max_of(channels_, panels_.count * panels_.width)) {
    // As many blocks as fit, or somewhat more: each thread then has as many, of one size.
    const int64_t line_bytes = (kProducts + 1) * line_ * static_cast<int64_t>(sizeof(T));
    const int64_t most = max_of(kLeastCalls, kBlockBytes / line_bytes / kTileRows);
    calls_ = ceil_div(grid_.count, kTileRows);
    blocks_ = min_of(calls_, round_up(ceil_div(calls_, most), threads));
    tiles_ = ceil_div(calls_, blocks_) * kTileRows;
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    for (int64_t group = 0; group < conv_.groups; ++group) run_group(group);
  }

 private:
  struct Scratch {
    T* weights;
    T* slots;
    T* packed;  // [channels][9][width]: weights before they are transformed
    T* stage;
    const T** ahead;  // [2][tiles]: of the next image and of the outputs, fetched meanwhile
  };

  // Block `index` takes tiles [begin(index), begin(index + 1)), whole calls of the micro-kernel.
  int64_t begin(int64_t index) const {
    return min_of(calls_ * index / blocks_ * kTileRows, grid_.count);
  }

  // A cache line more than there is, so that the same place of all slots spreads over the cache.
  // Where tiles need different products, a call may run on beyond the last one.
  int64_t slot_size() const { return (tiles_ + (grid_.is_whole() ? 0 : kTileRows)) * line_ + 16; }
  int64_t panel_size() const { return channels_ * panels_.width; }
  int64_t product_size() const { return panels_.count * panel_size() + 16; }

  // Calls look at as many tiles as they have rows, wherever they begin.
  int64_t ahead_size() const { return tiles_ + kTileRows; }

  int64_t carve(Carver carver) {
    zeros_ = carver.take<T>(kWidth);
    biases_ = carver.take<T>(panels_.count * panels_.width);
    const int64_t before = carver.used();
    scratch_.weights = carver.take<T>(kProducts * product_size());
    scratch_.slots = carver.take<T>((kProducts + 1) * slot_size());
    scratch_.packed = carver.take<T>(9 * panel_size());
    scratch_.stage = carver.take<T>(RunReader<kTileIn>::kStageSize);
    scratch_.ahead = carver.take<const T*>(2 * ahead_size());
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](auto* part) { return part + scratch_bytes_ / sizeof(*part) * thread; };
    return {move(scratch_.weights), move(scratch_.slots), move(scratch_.packed),
            move(scratch_.stage), move(scratch_.ahead)};
  }

  void run_group(int64_t group) {
    const T* source = source_ + group * conv_.source_group;
    const T* weight = weight_ + group * conv_.weight_group;
    T* dest = dest_ + group * conv_.dest_group;
    std::memset(zeros_, 0, kWidth * sizeof(T));
    for (int64_t o = 0; o < panels_.count * panels_.width; ++o) {
      const bool has = bias_ != nullptr && o < conv_.produced;
      biases_[o] = has ? bias_[group * conv_.produced + o] : T(0);
    }
    const auto start = [&](int thread) {
      const Scratch scratch = scratch_of(thread);
      for (int64_t panel = 0; panel < panels_.count; ++panel) {
        transform_weights(conv_, taps_, weight, panel * panels_.width, panels_.width, channels_,
                          scratch.packed, scratch.weights + panel * panel_size(), product_size());
      }
    };
    const RunReader<kTileIn> reader(grid_, source, conv_.source, conv_.reduced, conv_.source_height,
                                    conv_.source_width, taps_.low_h, taps_.low_w);
    // The rows above were fetched for the tiles above.
    const TilesAhead next(grid_, source, conv_.source, conv_.reduced, taps_.low_h + 2,
                          taps_.low_w + 1);
    const TilesAhead outputs(grid_, dest, conv_.dest, conv_.produced, 0, 0);
    parallel_shares(blocks_, threads_, start, [&](int64_t index, int thread) {
      const Scratch scratch = scratch_of(thread);
      const int64_t first = begin(index), end = begin(index + 1);
      T* image = scratch.slots + slot_size();
      reader.read(
          first, end, zeros_, scratch.stage, [&](const Run<kTileIn>& run, int64_t c, int64_t tile) {
            transform_image_run(run, image + (tile - first) * line_ + c, line_, slot_size());
          });
      next.point(end, begin(min_of(index + 2, blocks_)), ahead_size(), scratch.ahead);
      outputs.point(first, end, ahead_size(), scratch.ahead + ahead_size());
      multiply(first, end, scratch, next, outputs);
      write_tiles(grid_, first, end, scratch.slots, line_, slot_size(), conv_.produced, biases_,
                  ending_, scratch.stage, conv_.dest, dest);
    });
  }

  // The 36 products of tiles [first, end), each of those that need it. Rows are taken in whole
  // tiles of the micro-kernel: a row that does not need a product, or is none, does no harm.
  void multiply(int64_t first, int64_t end, const Scratch& scratch, const TilesAhead& next,
                const TilesAhead& outputs) const {
    for (int product = 0; product < kProducts; ++product) {
      for (const TileRange& range : grid_.needing(product).part) {
        const TileRange own = range.within(first, end);
        if (own.empty()) continue;
        const int64_t tile = own.begin - first;
        T* sums = scratch.slots + product * slot_size() + tile * line_;
        Ahead ahead = ahead_of(product, next, outputs, scratch.ahead + tile, ahead_size());
        if (kHoldsWeights && line_ == kWidth) {
          const T* weights = scratch.weights + product * product_size();
          multiply_block_held(sums + slot_size(), own.end - own.begin, weights, sums, ahead);
          continue;
        }
        for (int64_t panel = 0; panel < panels_.count; ++panel) {
          const T* weights = scratch.weights + product * product_size() + panel * panel_size();
          for (int64_t c = 0; c < channels_; c += kPartChannels) {
            with_vectors(panels_.vectors, [&](auto vectors) {
              multiply_block<decltype(vectors)::value>(
                  sums + slot_size() + c, line_, own.end - own.begin,
                  min_of(kPartChannels, channels_ - c), weights + c * panels_.width, c > 0,
                  sums + panel * panels_.width, ahead);
            });
            ahead.size = 0;
          }
        }
      }
    }
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
  int64_t line_;
  int64_t calls_, blocks_;
  int64_t tiles_;  // of a block, at most
  T* zeros_;
  T* biases_;
  Scratch scratch_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
