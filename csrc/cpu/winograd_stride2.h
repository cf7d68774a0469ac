// Winograd's way through a dense 3x3 kernel with stride 2, forward and for grad_input: 49 products
// where the direct way has 81; see winograd_stride2_transforms.h.
//
// A grid of 3x3 points, outputs of the forward pass and 2x2 pixels of grad_input, is one tile. What
// it sees is transformed, multiplied as independent products of matrices (tiles x channels by
// channels x outputs), of which those with one sum are a single one, and transformed back:
//
//   image   [tiles][channels / stretch][49][stretch]   products of one sum side by side, or
//           [49][tiles][channels]                      for many channels of grad_input
//   weights [part][25][channels of the part][width]     products share filters
//   sums    [25 or 49][tiles][width]                   of one panel of output channels
//
// Few channels: a task takes a block of tiles whose image and sums stay in L2, and each thread
// transforms the weights once, for itself: lines of memory that another core reads take long to
// write. Many: the image is transformed for all panels, a round of tiles at a time, and a task
// transforms a part of its panel's weights just before use.
#pragma once

#include "memory_ahead.h"
#include "shares.h"
#include "tap_conv_pixels.h"
#include "winograd_stride2_passes.h"
#include "winograd_stride2_products.h"
#include "winograd_tiles.h"

namespace gdfast::cpu {
namespace {

template <typename Pass>
class Stride2Tiles {
  using T = float;
  using Grid = TileGridOf<Stride2::kOut>;
  using Reader = TileReader<Stride2::kOut * Pass::kStep + 1, Stride2::kOut, Pass::kStep>;
  static constexpr int kWidth = kLanes<T>;
  static constexpr int kProducts = Stride2::kProducts;
  static constexpr const Stride2Order& kOrder = Pass::kOrder;
  static constexpr int kTilePixels = Stride2::kOut * Pass::kPixels;  // along one axis
  // Columns of the stage for what is written.
  static constexpr int64_t kRunOut = Grid::kRun * kTilePixels;
  // Channels times tiles of a block: an image of 130 to 150 KB.
  static constexpr int64_t kBlockChannels = kVectorRegisters == 32 ? 640 : 768;
  static constexpr int kStepFilters = Stride2::kFilters / Pass::kSteps;

 public:
  Stride2Tiles(const Stride2Problem& problem, int64_t batch, const T* source, const T* weight,
               const T* bias, T* dest, int threads)
      : p_(problem),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        threads_(threads),
        grid_(batch, ceil_div(p_.dest_height, Pass::kPixels),
              ceil_div(p_.dest_width, Pass::kPixels)),
        panels_(p_.produced),
        channels_(round_up(p_.reduced, kWidth)) {
    stretch_ = 32;
    while (channels_ % stretch_ != 0) stretch_ /= 2;
    part_channels_ = min_of(channels_, Pass::kPartChannels);
    parts_ = ceil_div(channels_, part_channels_);
    kept_weights_ = channels_ * p_.produced <= 128 * 128;
    const int64_t most = kept_weights_ ? max_of(12, kBlockChannels / channels_) : 132;
    round_tiles_ = kept_weights_ ? grid_.count : image_round_tiles(grid_.count, channels_);
    int64_t blocks = ceil_div(round_tiles_, most);
    if (kept_weights_ && blocks < 4 * threads) blocks = round_up(blocks, threads);
    tiles_ = round_up(ceil_div(round_tiles_, blocks), kTileRows);
    if (kept_weights_) round_tiles_ = tiles_;
    block_tiles_ = padded_tiles(tiles_);  // one more than tiles_, which is even
    // A line more from one tile, or product, to the next than there is, so that they spread over
    // the sets of the cache.
    tile_step_ = channels_ * kProducts + 16;
    place_step_ = stretch_;
    stretch_step_ = kProducts * stretch_;
    if (!kept_weights_ && Pass::kPixels > 1) {
      tile_step_ = channels_;
      place_step_ = (ceil_div(round_up(round_tiles_, kTileRows) * channels_, 16) | 1) * 16;
      stretch_ = stretch_step_ = parts_ == 1 ? part_channels_ : stretch_;
    }
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    for (int64_t group = 0; group < p_.groups; ++group) run_group(group);
  }

 private:
  struct Scratch {
    T* image;    // of a block
    T* weights;  // of all parts and panels, where they are kept, or of one part, panel and step
    T* packed;   // [9][part_channels][width]: weights before they are transformed
    T* sums;     // [sum][block_tiles][width]
    T* stage;    // pixels whose channels are brought side by side, or apart
    MemoryAhead::Stretch* ahead;
  };

  // From one filter to the next: a vector more than it has, so that they spread over the sets of
  // the cache.
  int64_t filter_step() const { return part_channels_ * panels_.width + kWidth; }
  int64_t weights_size() const { return Stride2::kFilters * filter_step(); }
  // Zeros stand for the channels of a pixel outside, and are what the rows of a tile start from.
  int64_t zeros_size() const { return max_of(channels_, kTileRows); }
  int64_t image_size() const {
    return max_of(round_up(round_tiles_, kTileRows) * tile_step_, kProducts * place_step_);
  }
  static constexpr int64_t kStageSize = Reader::kStageSize > kTilePixels * kRunOut * kWidth
                                            ? Reader::kStageSize
                                            : kTilePixels * kRunOut * kWidth;

  int64_t carve(Carver carver) {
    image_ = carver.take<T>(kept_weights_ ? 0 : image_size());
    zeros_ = carver.take<T>(zeros_size());
    biases_ = carver.take<T>(panels_.count * panels_.width);
    const int64_t before = carver.used();
    scratch_.image = carver.take<T>(kept_weights_ ? image_size() : 0);
    scratch_.weights = carver.take<T>(kept_weights_ ? panels_.count * parts_ * weights_size()
                                                    : kStepFilters * filter_step());
    scratch_.packed = carver.take<T>(9 * part_channels_ * panels_.width);
    scratch_.sums = carver.take<T>(kOrder.count * block_tiles_ * panels_.width);
    scratch_.stage = carver.take<T>(kStageSize);
    scratch_.ahead = carver.take<MemoryAhead::Stretch>(
        kept_weights_ ? tiles_ * (Reader::kRows + kTilePixels) : 0);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](auto* part) {
      return reinterpret_cast<decltype(part)>(reinterpret_cast<uintptr_t>(part) +
                                              scratch_bytes_ * thread);
    };
    return {move(scratch_.image), move(scratch_.weights), move(scratch_.packed),
            move(scratch_.sums),  move(scratch_.stage),   move(scratch_.ahead)};
  }

  void run_group(int64_t group) {
    const T* source = source_ + group * p_.reduced * p_.source.c;
    const T* weight = weight_ + group * p_.weight_group;
    T* dest = dest_ + group * p_.produced * p_.dest.c;
    std::memset(zeros_, 0, zeros_size() * sizeof(T));
    for (int64_t o = 0; o < panels_.count * panels_.width; ++o) {
      const bool has = bias_ != nullptr && o < p_.produced;
      biases_[o] = has ? bias_[group * p_.produced + o] : T(0);
    }
    if (kept_weights_) {
      return parallel_shares(
          ceil_div(grid_.count, tiles_), threads_,
          [&](int thread) { keep_weights(weight, scratch_of(thread)); },
          [&](int64_t block, int thread) {
            run_block(source, block * tiles_, scratch_of(thread), dest);
          });
    }
    for (int64_t first = 0; first < grid_.count; first += round_tiles_) {
      run_round(source, weight, first, min_of(first + round_tiles_, grid_.count), dest);
    }
  }

  void keep_weights(const T* weight, const Scratch& scratch) const {
    for (int64_t index = 0; index < panels_.count * parts_; ++index) {
      pack_weights(weight, index / parts_, index % parts_, scratch.packed);
      for_each_step([&](auto step) {
        transform_weights<step.value>(
            scratch.packed, index % parts_,
            scratch.weights + index * weights_size() + step.value * kStepFilters * filter_step());
      });
    }
  }

  void run_block(const T* source, int64_t first, const Scratch& scratch, T* dest) const {
    const int64_t end = min_of(first + tiles_, grid_.count);
    MemoryAhead ahead(scratch.ahead);
    reader(source).ahead(end, min_of(end + tiles_, grid_.count), ahead);
    pixels_ahead(first, end, dest, ahead);
    ahead.spread(panels_.count * parts_ * kOrder.count *
                 ceil_div(end - first, stride2_rows(panels_.vectors)));
    transform_tiles(source, first, end, scratch, scratch.image);
    for (int64_t panel = 0; panel < panels_.count; ++panel) {
      for (int64_t part = 0; part < parts_; ++part) {
        multiply(scratch.image, first, end - first, part, 0, Stride2::kFilters,
                 scratch.weights + (panel * parts_ + part) * weights_size(), scratch.sums, ahead);
      }
      write_tiles(panel, first, end, scratch, dest, false);
    }
  }

  // Tiles [first, end) of a convolution with many channels.
  void run_round(const T* source, const T* weight, int64_t first, int64_t end, T* dest) {
    parallel_for(ceil_div(end - first, kTileRows), threads_, [&](int64_t index, int thread) {
      const int64_t tile = first + index * kTileRows;
      transform_tiles(source, tile, min_of(tile + kTileRows, end), scratch_of(thread),
                      image_ + (tile - first) * tile_step_);
      stream_fence();
    });
    const int64_t blocks = ceil_div(end - first, tiles_);
    const bool stream =
        streams_outputs(dest, p_.dest, grid_.count * p_.produced * kTilePixels * kTilePixels);
    parallel_for(panels_.count * blocks, threads_, [&](int64_t index, int thread) {
      const Scratch scratch = scratch_of(thread);
      const int64_t panel = index / blocks, tile = first + index % blocks * tiles_;
      const int64_t tile_end = min_of(tile + tiles_, end);
      MemoryAhead ahead(nullptr);
      for (int64_t part = 0; part < parts_; ++part) {
        pack_weights(weight, panel, part, scratch.packed);
        for_each_step([&](auto step) {
          constexpr int kFirst = step.value * kStepFilters;
          transform_weights<step.value>(scratch.packed, part, scratch.weights);
          multiply(image_ + (tile - first) * tile_step_, tile, tile_end - tile, part, kFirst,
                   kFirst + kStepFilters, scratch.weights, scratch.sums, ahead);
        });
      }
      write_tiles(panel, tile, tile_end, scratch, dest, stream);
      stream_fence();
    });
  }

  // packed[tap][c][o] for the channels of one part and the outputs of one panel.
  void pack_weights(const T* weight, int64_t panel, int64_t part, T* packed) const {
    TapConv conv = {};
    conv.taps = p_.taps;
    conv.tap_count = 9;
    conv.reduced = valid_channels(part);
    conv.produced = p_.produced;
    conv.weight_reduced = p_.weight_reduced;
    conv.weight_produced = p_.weight_produced;
    pack_weight_panel(conv, weight + part * part_channels_ * conv.weight_reduced,
                      panel * panels_.width, panels_.width, packed);
  }
  int64_t valid_channels(int64_t part) const {
    return min_of(part_channels_, p_.reduced - part * part_channels_);
  }

  // The filters of one step: to[filter * filter_step() + c * width + o].
  template <int kStep>
  void transform_weights(const T* packed, int64_t part, T* to) const {
    const int64_t channels = min_of(part_channels_, channels_ - part * part_channels_);
    transform_stride2_weights<kStep * kStepFilters, kStepFilters>(
        packed, valid_channels(part) * panels_.width, channels * panels_.width, to, filter_step());
  }

  template <int kStep = 0, typename Use>
  static GDFAST_INLINE void for_each_step(const Use& use) {
    use(std::integral_constant<int, kStep>());
    if constexpr (kStep + 1 < Pass::kSteps) for_each_step<kStep + 1>(use);
  }

  Reader reader(const T* source) const {
    return Reader(grid_, source, p_.source, p_.reduced, p_.source_height, p_.source_width, p_.low_h,
                  p_.low_w);
  }

  // Adds the pixels of tiles [first, end).
  void pixels_ahead(int64_t first, int64_t end, const T* dest, MemoryAhead& ahead) const {
    if (p_.dest.c != 1) return;
    for (int64_t tile = first; tile < end;) {
      const Pixels at = pixels_of(tile);
      tile += grid_.run_from(tile, end);
      const Pixels last = pixels_of(tile - 1);
      const int64_t pixels = last.w + last.columns - at.w;
      const T* to = dest + at.n * p_.dest.n + at.h * p_.dest.h + at.w * p_.dest.w;
      for (int64_t i = 0; i < at.rows; ++i) {
        ahead.add(to + i * p_.dest.h, (pixels - 1) * p_.dest.w + p_.produced, true);
      }
    }
  }

  // Transforms what tiles [first, end) see; tile `first` goes to column 0 of `to`. Columns up to a
  // multiple of kTileRows are left as they are: their sums are never looked at.
  void transform_tiles(const T* source, int64_t first, int64_t end, const Scratch& scratch,
                       T* to) const {
    kept_weights_ ? transform_tiles<false>(source, first, end, scratch.stage, to)
                  : transform_tiles<true>(source, first, end, scratch.stage, to);
  }
  template <bool kStream>
  void transform_tiles(const T* source, int64_t first, int64_t end, T* stage, T* to) const {
    // As constants where they are the same for all problems.
    const int odd_h = Pass::kStep == 2 ? 1 : p_.odd_h, odd_w = Pass::kStep == 2 ? 1 : p_.odd_w;
    const int64_t place_step = place_step_;
    reader(source).read(first, end, zeros_, stage,
                        [&](const T* const* from, int64_t offset, int64_t c, int64_t tile) {
                          T* line = to + (tile - first) * tile_step_ +
                                    c / stretch_ * stretch_step_ + c % stretch_;
                          const auto put = [&](int product, Vec<T> value) GDFAST_INLINE_LAMBDA {
                            put_vector(line + kOrder.place[product] * place_step, value, kStream);
                          };
                          transform_stride2_tile<Pass::kStep>(from, offset, odd_h, odd_w, put);
                        });
  }

  // Those sums of tiles [first, first + tiles) that need them and whose filters are [first_filter,
  // end_filter): sums (+)= image x weights over the channels of one part.
  void multiply(const T* image, int64_t first, int64_t tiles, int64_t part, int first_filter,
                int end_filter, const T* weights, T* sums, MemoryAhead& ahead) const {
    const int64_t channels = min_of(part_channels_, channels_ - part * part_channels_);
    const int64_t width = panels_.width;
    Stride2Products products;
    products.row_step = tile_step_;
    products.product_step = place_step_;
    products.stretches = channels / stretch_;
    products.stretch = stretch_;
    products.stretch_step = stretch_step_;
    products.accumulate = part > 0;
    image += part * part_channels_ / stretch_ * stretch_step_;
    for (int sum = 0; sum < kOrder.count; ++sum) {
      const int place = kOrder.first[sum];
      const int filter = Stride2::filter_of(kOrder.product[place]);
      if (filter < first_filter || filter >= end_filter) continue;
      products.count = kOrder.products[sum];
      for (int i = 0; i < products.count; ++i) {
        const int own = Stride2::filter_of(kOrder.product[place + i]);
        products.panels[i] = weights + (own - first_filter) * filter_step();
      }
      products.rows = image + place * place_step_;
      products.next = products.count * place_step_;
      products.sums = sums + sum * block_tiles_ * width;
      for (const TileRange& range :
           grid_.needing(kOrder.last_row[sum], kOrder.last_column[sum]).part) {
        const TileRange own = range.within(first, first + tiles);
        if (own.empty()) continue;
        with_vectors(panels_.vectors, [&](auto vectors) {
          multiply_stride2_tiles<vectors.value>(
              own.end - own.begin, products.from_tile(own.begin - first, width), ahead);
        });
      }
    }
  }

  // Transforms the sums of tiles [first, end) back and writes their pixels, with `stream` past the
  // caches.
  void write_tiles(int64_t panel, int64_t first, int64_t end, const Scratch& scratch, T* dest,
                   bool stream) const {
    const int64_t width = panels_.width;
    const int64_t outputs = min_of(width, p_.produced - panel * width);
    const T* biases = biases_ + panel * width;
    dest += panel * width * p_.dest.c;
    const int64_t in_place = p_.dest.c == 1 ? outputs / kWidth * kWidth : static_cast<int64_t>(0);
    for (int64_t tile = first; in_place > 0 && tile < end; ++tile) {
      const Pixels at = pixels_of(tile);
      T* to = dest + at.n * p_.dest.n + at.h * p_.dest.h + at.w * p_.dest.w;
      for (int64_t o = 0; o < in_place; o += kWidth) {
        write_pixels(scratch.sums + (tile - first) * width + o, load(biases + o), at, to + o,
                     p_.dest.h, p_.dest.w, stream);
      }
    }
    for (int64_t o = in_place; o < outputs; o += kWidth) {
      for (int64_t tile = first; tile < end;) {
        const Pixels begin = pixels_of(tile);
        const int64_t run = grid_.run_from(tile, end);
        int64_t columns = 0;
        for (int64_t x = 0; x < run; ++x, ++tile) {
          const Pixels at = pixels_of(tile);
          write_pixels(scratch.sums + (tile - first) * width + o, load(biases + o), at,
                       scratch.stage + (at.w - begin.w) * kWidth, kRunOut * kWidth, kWidth, false);
          columns = at.w - begin.w + at.columns;
        }
        unstage(scratch.stage, min_of(kWidth, outputs - o), begin, columns, dest + o * p_.dest.c);
      }
    }
  }

  // The pixels of a tile that lie within the image.
  struct Pixels {
    int64_t n, h, w, rows, columns;
  };
  Pixels pixels_of(int64_t tile) const {
    const typename Grid::At at = grid_.at(tile);
    const int64_t h = at.h * Pass::kPixels, w = at.w * Pass::kPixels;
    return {at.n, h, w, min_of(at.rows * Pass::kPixels, p_.dest_height - h),
            min_of(at.columns * Pass::kPixels, p_.dest_width - w)};
  }

  void write_pixels(const T* from, Vec<T> bias, const Pixels& at, T* to, int64_t row_step,
                    int64_t step, bool stream) const {
    const int64_t sum_step = block_tiles_ * panels_.width;
    const auto sum = [&](int number)
                         GDFAST_INLINE_LAMBDA { return load(from + number * sum_step); };
    const auto put = [&](int i, int j, Vec<T> value) GDFAST_INLINE_LAMBDA {
      if (i < at.rows && j < at.columns) put_vector(to + i * row_step + j * step, value, stream);
    };
    if constexpr (Pass::kPixels > 1) {
      Pass::transform_sums(sum, p_.even_h, p_.even_w, put);
    } else {
      constexpr int kOut = Stride2::kOut;
      Vec<T> out[1][kOut * kOut];
      Pass::transform_sums(sum, 0, 0, [&](int i, int j, Vec<T> value) GDFAST_INLINE_LAMBDA {
        out[0][i * kOut + j] = value + bias;
      });
      finish_sums<1, kOut * kOut>(p_.ending, out);
      T* values = reinterpret_cast<T*>(out);
      finish_rows(p_.ending, &values, 1, kOut * kOut * kWidth);
#pragma GCC unroll 9
      for (int i = 0; i < kOut * kOut; ++i) put(i / kOut, i % kOut, out[0][i]);
    }
  }

  // Writes staged pixels [i][x][lane] of a run of tiles.
  void unstage(const T* stage, int64_t channels, const Pixels& at, int64_t columns, T* dest) const {
    for (int64_t i = 0; i < at.rows; ++i, stage += kRunOut * kWidth) {
      T* to = dest + at.n * p_.dest.n + (at.h + i) * p_.dest.h + at.w * p_.dest.w;
      if (p_.dest.w == 1) {
        transpose_widened(stage, kWidth, channels, columns, columns, to, p_.dest.c);
      } else {
        for (int64_t x = 0; x < columns; ++x) {
          copy_narrowed(stage + x * kWidth, channels, to + x * p_.dest.w, p_.dest.c);
        }
      }
    }
  }

  const Stride2Problem p_;
  const T* source_;
  const T* weight_;
  const T* bias_;
  T* dest_;
  int threads_;
  Grid grid_;
  Panels<T> panels_;
  int64_t channels_;  // reduced ones, padded to whole vectors
  int64_t stretch_;
  int64_t part_channels_, parts_;
  bool kept_weights_;
  int64_t tiles_;        // of a block
  int64_t round_tiles_;  // of a round, in which the image is transformed at once
  int64_t block_tiles_;  // padded
  int64_t tile_step_, stretch_step_, place_step_;  // of the image
  T* image_;
  T* zeros_;
  T* biases_;
  Scratch scratch_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
