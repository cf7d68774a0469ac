// Winograd's F(4x4, 3x3) for a TapConv with a dense 3x3 kernel and step 1: a quarter of the
// multiplications of the direct way.
//
// A grid of 4x4 outputs sees 6x6 image values. Image and weights are transformed, multiplied as 36
// independent products of matrices (tiles x channels by channels x outputs), and transformed back.
// Few channels: winograd_blocks.h. Many: the transformed weights are four times as large as the
// weights, too large to be written and read back; the image is transformed for all panels, a round
// of tiles at a time, and a task transforms a part of its panel's weights just before use:
//
//   image   [tiles][channels / lanes][36][lanes]   one vector for each tile, lane group and product
//   weights [part][36][channels of the part][width]
//   sums    [36][tiles][width]                      of one panel of output channels
#pragma once

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
  // Channels of a part of the reduction: 36 x 64 x 64 x 4 bytes = 590 KB of weights.
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
    part_channels_ = min_of(channels_, kPartChannels);
    parts_ = ceil_div(channels_, part_channels_);
    round_tiles_ = image_round_tiles(grid_.count, channels_);
    const int64_t blocks = ceil_div(round_tiles_, kMostTiles);
    tiles_ = round_up(ceil_div(round_tiles_, blocks), kTileRows);
    block_tiles_ = padded_tiles(tiles_);  // one more than tiles_, which is even
    image_tiles_ = round_up(round_tiles_, kTileRows);
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    for (int64_t group = 0; group < conv_.groups; ++group) run_group(group);
  }

 private:
  struct Scratch {
    T* weights;  // of one part and panel
    T* packed;   // [9][part_channels][width]: weights before they are transformed
    T* sums;     // [36][block_tiles][width]
    T* stage;    // pixels whose channels are brought side by side, or apart
  };

  // From the weights of one product to those of the next: a vector more than they are, for the
  // same reason as padded_tiles.
  int64_t weights_step() const { return part_channels_ * panels_.width + kWidth; }
  int64_t weights_size() const { return kProducts * weights_step(); }
  // Zeros stand for the channels of a pixel outside, and are what the rows of a tile start from.
  int64_t zeros_size() const { return max_of(channels_, kTileRows); }

  // The image of one tile: an odd number of lines, so that the same product of neighbouring tiles
  // spreads over the sets of the cache.
  int64_t tile_size() const { return channels_ * kProducts + kWidth; }

  int64_t carve(Carver carver) {
    image_ = carver.take<T>(image_tiles_ * tile_size());
    zeros_ = carver.take<T>(zeros_size());
    biases_ = carver.take<T>(panels_.count * panels_.width);
    const int64_t before = carver.used();
    scratch_.weights = carver.take<T>(weights_size());
    scratch_.packed = carver.take<T>(9 * part_channels_ * panels_.width);
    scratch_.sums = carver.take<T>(kProducts * block_tiles_ * panels_.width);
    scratch_.stage = carver.take<T>(RunReader<kTileIn>::kStageSize);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](T* part) { return part + scratch_bytes_ / sizeof(T) * thread; };
    return {move(scratch_.weights), move(scratch_.packed), move(scratch_.sums),
            move(scratch_.stage)};
  }

  void run_group(int64_t group) {
    const T* source = source_ + group * conv_.source_group;
    const T* weight = weight_ + group * conv_.weight_group;
    T* dest = dest_ + group * conv_.dest_group;
    std::memset(zeros_, 0, zeros_size() * sizeof(T));
    for (int64_t o = 0; o < panels_.count * panels_.width; ++o) {
      const bool has = bias_ != nullptr && o < conv_.produced;
      biases_[o] = has ? bias_[group * conv_.produced + o] : T(0);
    }
    for (int64_t first = 0; first < grid_.count; first += round_tiles_) {
      run_round(source, weight, first, min_of(first + round_tiles_, grid_.count), dest);
    }
  }

  // Tiles [first, end) of a convolution with many channels.
  void run_round(const T* source, const T* weight, int64_t first, int64_t end, T* dest) {
    constexpr int64_t kStep = 2 * kTileRows;
    parallel_for(ceil_div(end - first, kStep), threads_, [&](int64_t index, int thread) {
      const int64_t tile = first + index * kStep;
      transform_tiles(source, tile, min_of(tile + kStep, end), scratch_of(thread).stage,
                      image_ + (tile - first) * tile_size());
    });
    const int64_t blocks = ceil_div(end - first, tiles_);
    parallel_for(panels_.count * blocks, threads_, [&](int64_t index, int thread) {
      const Scratch scratch = scratch_of(thread);
      const int64_t panel = index / blocks, tile = first + index % blocks * tiles_;
      const int64_t tile_end = min_of(tile + tiles_, end);
      for (int64_t part = 0; part < parts_; ++part) {
        const int64_t c = part * part_channels_;
        transform_weights(conv_, taps_, weight, panels_, panel, c,
                          min_of(part_channels_, channels_ - c), scratch.packed, scratch.weights,
                          weights_step());
        multiply(image_ + (tile - first) * tile_size(), tile, tile_end - tile, part,
                 scratch.weights, scratch.sums);
      }
      const int64_t output = panel * panels_.width;
      write_tiles(grid_, tile, tile_end, scratch.sums, panels_.width, block_tiles_ * panels_.width,
                  min_of(panels_.width, conv_.produced - output), biases_ + output, ending_,
                  scratch.stage, conv_.dest, dest + output * conv_.dest.c);
    });
  }

  // Transforms the image values of tiles [first, end); tile `first` goes to column 0 of `to`.
  // Columns up to a multiple of kTileRows are left as they are: their sums are never looked at.
  void transform_tiles(const T* source, int64_t first, int64_t end, T* stage, T* to) const {
    const RunReader<kTileIn> reader(grid_, source, conv_.source, conv_.reduced, conv_.source_height,
                                    conv_.source_width, taps_.low_h, taps_.low_w);
    reader.read(first, end, zeros_, stage, [&](const Run<kTileIn>& run, int64_t c, int64_t tile) {
      transform_image_run(run, to + (tile - first) * tile_size() + c * kProducts, tile_size(),
                          kWidth);
    });
  }

  // The 36 products of tiles [first, first + tiles), each of those that need it: sums (+)= image x
  // weights over the channels of one part.
  void multiply(const T* image, int64_t first, int64_t tiles, int64_t part, const T* weights,
                T* sums) const {
    const int64_t channels = min_of(part_channels_, channels_ - part * part_channels_);
    const int64_t width = panels_.width;
    TileArgs<T> args;
    args.row_step = 1;
    args.segment_step = kProducts * kWidth;
    args.panel_step = width;
    args.segments = channels / kWidth;
    args.length = kWidth;
    args.start = zeros_;
    args.how = part == 0 ? Start::kRows : Start::kAccumulate;
    const T* rows[2][kTileRows];
    T* out[kTileRows];
    args.out = out;
    const auto point = [&](int product, int64_t tile, int64_t end, const T** to) {
      const T* from = image + part * part_channels_ * kProducts + product * kWidth;
      for (int i = 0; i < kTileRows; ++i) to[i] = from + min_of(tile + i, end - 1) * tile_size();
    };
    for (int product = 0; product < kProducts; ++product) {
      args.panel = weights + product * weights_step();
      T* to = sums + product * block_tiles_ * width;
      for (const TileRange& range : grid_.needing(product).part) {
        const TileRange own = range.within(first, first + tiles);
        for (int64_t tile = own.begin - first; tile < own.end - first; tile += kTileRows) {
          const int64_t end = own.end - first;
          const bool more = tile + kTileRows < end;
          point(product, tile, end, rows[0]);
          point(more ? product : product + 1, more ? tile + kTileRows : 0, tiles, rows[1]);
          for (int i = 0; i < kTileRows; ++i) {
            // Rows past the end are computed like the last one, and stored where nobody looks.
            out[i] = to + (tile + i < end ? tile + i : block_tiles_ - 1) * width;
          }
          args.rows = rows[0];
          args.rows_ahead = rows[1];
          multiply_tile<T>(panels_.vectors, args);
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
  int64_t part_channels_, parts_;
  int64_t tiles_;                      // of a block
  int64_t round_tiles_;                // of a round, in which the image is transformed at once
  int64_t block_tiles_, image_tiles_;  // of a block and of a round, padded
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
