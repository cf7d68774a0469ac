// Winograd's F(4x4, 3x3) for a TapConv with a dense 3x3 kernel and step 1: a quarter of the
// multiplications of the direct way.
//
// A grid of 4x4 outputs sees 6x6 image values. Image and weights are transformed, multiplied as 36
// independent products of matrices (tiles x channels by channels x outputs), and transformed back:
//
//   image   [tiles][channels / lanes][36][lanes]   one vector for each tile, lane group and product
//   weights [part][36][channels of the part][width]
//   sums    [36][tiles][width]                      of one panel of output channels
//
// Two schedules. Few channels: the transformed weights are small, made once and shared; a task
// takes a block of tiles, whose image and sums stay in L2. Many channels: the transformed weights
// are four times as large as the weights, too large to be written and read back; the image is
// transformed for all panels, a round of tiles at a time, and a task transforms a part of its
// panel's weights just before use.
#pragma once

#include "tap_conv_pixels.h"
#include "winograd_tiles.h"

namespace gdfast::cpu {
namespace {

// Whether a TapConv is one that WinogradTiles takes.
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

class WinogradTiles {
  using T = float;
  static constexpr int kWidth = kLanes<T>;
  // Columns of the stage for outputs.
  static constexpr int64_t kRunOut = TileGrid::kRun * kTileOut;
  // Channels of a part of the reduction: 36 x 64 x 64 x 4 bytes = 590 KB of weights.
  static constexpr int64_t kPartChannels = 64;

 public:
  WinogradTiles(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
                int threads)
      : conv_(conv),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        threads_(threads),
        ending_(Ending<T>::of(conv)),
        grid_(conv.batch, conv.height, conv.width),
        panels_(conv.produced),
        channels_(round_up(conv.reduced, kWidth)) {
    low_h_ = conv.taps[0].dh;
    low_w_ = conv.taps[0].dw;
    for (int t = 1; t < 9; ++t) {
      low_h_ = min_of(low_h_, conv.taps[t].dh);
      low_w_ = min_of(low_w_, conv.taps[t].dw);
    }
    part_channels_ = min_of(channels_, kPartChannels);
    parts_ = ceil_div(channels_, part_channels_);
    shared_weights_ = channels_ * conv.produced <= 160 * 160;
    // Image and sums of a block take 440 KB each at 64 channels.
    const int64_t most = shared_weights_ ? max_of(48, 3072 / channels_) : 132;
    round_tiles_ = shared_weights_ ? grid_.count : image_round_tiles(grid_.count, channels_);
    int64_t blocks = ceil_div(round_tiles_, most);
    if (shared_weights_ && blocks < 4 * threads) blocks = round_up(blocks, threads);
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
    T* image;    // [channels][36][block_tiles], where weights are shared
    T* weights;  // of one part and panel, where they are not
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
    weights_ = carver.take<T>(shared_weights_ ? panels_.count * parts_ * weights_size() : 0);
    image_ = carver.take<T>(shared_weights_ ? 0 : image_tiles_ * tile_size());
    zeros_ = carver.take<T>(zeros_size());
    biases_ = carver.take<T>(panels_.count * panels_.width);
    const int64_t before = carver.used();
    scratch_.image = carver.take<T>(shared_weights_ ? tiles_ * tile_size() : 0);
    scratch_.weights = carver.take<T>(shared_weights_ ? 0 : weights_size());
    scratch_.packed = carver.take<T>(9 * part_channels_ * panels_.width);
    scratch_.sums = carver.take<T>(kProducts * block_tiles_ * panels_.width);
    scratch_.stage = carver.take<T>(ImageReader::kStageSize);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](T* part) { return part + scratch_bytes_ / sizeof(T) * thread; };
    return {move(scratch_.image), move(scratch_.weights), move(scratch_.packed),
            move(scratch_.sums), move(scratch_.stage)};
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
    if (shared_weights_) {
      parallel_for(panels_.count * parts_, threads_, [&](int64_t index, int thread) {
        transform_weights(weight, index / parts_, index % parts_, scratch_of(thread).packed,
                          weights_ + index * weights_size());
      });
      parallel_for(ceil_div(grid_.count, tiles_), threads_, [&](int64_t block, int thread) {
        const Scratch scratch = scratch_of(thread);
        const int64_t first = block * tiles_, end = min_of(first + tiles_, grid_.count);
        transform_tiles(source, first, end, scratch, scratch.image);
        for (int64_t panel = 0; panel < panels_.count; ++panel) {
          for (int64_t part = 0; part < parts_; ++part) {
            multiply(scratch.image, first, end - first, part,
                     weights_ + (panel * parts_ + part) * weights_size(), scratch.sums);
          }
          write_tiles(panel, first, end, scratch, dest);
        }
      });
      return;
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
      transform_tiles(source, tile, min_of(tile + kStep, end), scratch_of(thread),
                      image_ + (tile - first) * tile_size());
    });
    const int64_t blocks = ceil_div(end - first, tiles_);
    parallel_for(panels_.count * blocks, threads_, [&](int64_t index, int thread) {
      const Scratch scratch = scratch_of(thread);
      const int64_t panel = index / blocks, tile = first + index % blocks * tiles_;
      const int64_t tile_end = min_of(tile + tiles_, end);
      for (int64_t part = 0; part < parts_; ++part) {
        transform_weights(weight, panel, part, scratch.packed, scratch.weights);
        multiply(image_ + (tile - first) * tile_size(), tile, tile_end - tile, part,
                 scratch.weights, scratch.sums);
      }
      write_tiles(panel, tile, tile_end, scratch, dest);
    });
  }

  // to[product][c][o] for the channels of one part and the outputs of one panel.
  void transform_weights(const T* weight, int64_t panel, int64_t part, T* packed, T* to) const {
    const int64_t width = panels_.width, first = part * part_channels_;
    const int64_t channels = min_of(part_channels_, channels_ - first);
    // The taps in the order of the 3x3 grid, whichever way this pass runs over it.
    Tap taps[9];
    for (int t = 0; t < 9; ++t) {
      const Tap& tap = conv_.taps[t];
      taps[(tap.dh - low_h_) * 3 + tap.dw - low_w_] = tap;
    }
    TapConv conv = conv_;
    conv.taps = taps;
    conv.reduced = min_of(channels, conv_.reduced - first);
    pack_weight_panel(conv, weight + first * conv.weight_reduced, panel * width, width, packed);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t o = 0; o < width; o += kWidth) {
        Vec<T> filter[9], half[18], line[kTileIn];
        for (int t = 0; t < 9; ++t) {
          filter[t] =
              c < conv.reduced ? load(packed + (t * conv.reduced + c) * width + o) : Vec<T>{};
        }
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) transform_filter<T>(filter + s, 3, half + s, 3);
#pragma GCC unroll 6
        for (int i = 0; i < kTileIn; ++i) {
          transform_filter<T>(half + i * 3, 1, line, 1);
#pragma GCC unroll 6
          for (int j = 0; j < kTileIn; ++j) {
            store<T>(to + (i * kTileIn + j) * weights_step() + c * width + o, line[j]);
          }
        }
      }
    }
  }

  // Transforms the image values of tiles [first, end); tile `first` goes to column 0 of `to`.
  // Columns up to a multiple of kTileRows are left as they are: their sums are never looked at.
  void transform_tiles(const T* source, int64_t first, int64_t end, const Scratch& scratch,
                       T* to) const {
    const ImageReader reader(grid_, source, conv_.source, conv_.reduced, conv_.source_height,
                             conv_.source_width, low_h_, low_w_);
    reader.read(first, end, zeros_, scratch.stage,
                [&](const T* const* from, int64_t offset, int64_t c, int64_t tile) {
                  transform_image_tile(from, offset,
                                       to + (tile - first) * tile_size() + c * kProducts, kWidth);
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

  // Transforms the sums of tiles [first, end) back and writes their 4x4 outputs.
  void write_tiles(int64_t panel, int64_t first, int64_t end, const Scratch& scratch,
                   T* dest) const {
    const int64_t width = panels_.width;
    const int64_t outputs = min_of(width, conv_.produced - panel * width);
    const T* biases = biases_ + panel * width;
    dest += panel * width * conv_.dest.c;
    const int64_t in_place =
        conv_.dest.c == 1 ? outputs / kWidth * kWidth : static_cast<int64_t>(0);
    for (int64_t tile = first; in_place > 0 && tile < end; ++tile) {
      const TileGrid::At at = grid_.at(tile);
      T* to = dest + at.n * conv_.dest.n + at.h * conv_.dest.h + at.w * conv_.dest.w;
      for (int64_t o = 0; o < in_place; o += kWidth) {
        Outputs out;
        transform_sums(scratch.sums + (tile - first) * width + o, load(biases + o), out);
        for (int64_t i = 0; i < at.rows; ++i) {
          for (int64_t j = 0; j < at.columns; ++j) {
            store<T>(to + i * conv_.dest.h + j * conv_.dest.w + o, out[i * kTileOut + j]);
          }
        }
      }
    }
    for (int64_t o = in_place; o < outputs; o += kWidth) {
      for (int64_t tile = first; tile < end;) {
        const TileGrid::At begin = grid_.at(tile);
        const int64_t run = grid_.run_from(tile, end);
        int64_t columns = 0;
        for (int64_t x = 0; x < run; ++x, ++tile) {
          const TileGrid::At at = grid_.at(tile);
          Outputs out;
          transform_sums(scratch.sums + (tile - first) * width + o, load(biases + o), out);
          for (int64_t i = 0; i < at.rows; ++i) {
            for (int64_t j = 0; j < at.columns; ++j) {
              store<T>(scratch.stage + (i * kRunOut + at.w - begin.w + j) * kWidth,
                       out[i * kTileOut + j]);
            }
          }
          columns = at.w - begin.w + at.columns;
        }
        unstage(scratch.stage, min_of(kWidth, outputs - o), begin, columns,
                dest + o * conv_.dest.c);
      }
    }
  }

  // Writes staged outputs [i][x][lane] of a run of tiles.
  void unstage(const T* stage, int64_t channels, TileGrid::At at, int64_t columns, T* dest) const {
    for (int64_t i = 0; i < at.rows; ++i, stage += kRunOut * kWidth) {
      T* to = dest + at.n * conv_.dest.n + (at.h + i) * conv_.dest.h + at.w * conv_.dest.w;
      if (conv_.dest.w == 1) {
        transpose_widened(stage, kWidth, channels, columns, columns, to, conv_.dest.c);
      } else {
        for (int64_t x = 0; x < columns; ++x) {
          copy_narrowed(stage + x * kWidth, channels, to + x * conv_.dest.w, conv_.dest.c);
        }
      }
    }
  }

  using Outputs = Vec<T>[kTileOut * kTileOut];

  GDFAST_INLINE void transform_sums(const T* from, Vec<T> bias, Outputs& out) const {
    const int64_t product_step = block_tiles_ * panels_.width;
    Vec<T> half[kTileOut * kTileIn];
#pragma GCC unroll 6
    for (int j = 0; j < kTileIn; ++j) {
      Vec<T> column[kTileIn];
#pragma GCC unroll 6
      for (int i = 0; i < kTileIn; ++i) column[i] = load(from + (i * kTileIn + j) * product_step);
      transform_output<T>(column, 1, half + j, kTileIn);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTileOut; ++i) {
      transform_output<T>(half + i * kTileIn, 1, out + i * kTileOut, 1);
#pragma GCC unroll 4
      for (int j = 0; j < kTileOut; ++j) out[i * kTileOut + j] += bias;
    }
    finish_sums<1, kTileOut * kTileOut>(ending_, &out);
    T* values = reinterpret_cast<T*>(out);
    finish_rows(ending_, &values, 1, kTileOut * kTileOut * kWidth);
  }

  const TapConv& conv_;
  const T* source_;
  const T* weight_;
  const T* bias_;
  T* dest_;
  int threads_;
  Ending<T> ending_;
  TileGrid grid_;
  Panels<T> panels_;
  int64_t channels_;  // reduced ones, padded to whole vectors
  int64_t low_h_, low_w_;
  int64_t part_channels_, parts_;
  bool shared_weights_;
  int64_t tiles_;                      // of a block
  int64_t round_tiles_;                // of a round, in which the image is transformed at once
  int64_t block_tiles_, image_tiles_;  // of a block and of a round, padded
  T* weights_;
  T* image_;
  T* zeros_;
  T* biases_;
  Scratch scratch_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
