// 1x1 convolutions of float32 whose channels lie side by side on both sides: a matrix product.
//
//   dest[pixel, o] = activation(start[o] + sum over c of source[pixel, c] * weight[o, c])
//
// The weights are packed once per call into panels of up to kPanelWidth output channels. A task
// takes a block of pixels and walks the channels in parts, short enough for the panel's part to
// stay in L1 while all of the block's pixels pass by; those stay in L2. The first panel to need a
// part of the pixels fetches them, tile by tile, while it multiplies the tile before. Pixels that
// lie far apart would meet in few sets of the caches: they are copied side by side on the way.
#pragma once

#include "pack.h"
#include "pixel_lines.h"
#include "tap_conv.h"
#include "tap_conv_pixels.h"
#include "tile_column.h"

namespace gdfast::cpu {
namespace {

// Whether a TapConv of float32 is one of these.
inline bool is_pointwise(const TapConv& conv) {
  return conv.tap_count == 1 && conv.groups == 1 && conv.source.c == 1 && conv.dest.c == 1 &&
         conv.taps[0].dh == 0 && conv.taps[0].dw == 0 &&
         (conv.height - 1) * conv.step_h < conv.source_height &&
         (conv.width - 1) * conv.step_w < conv.source_width;
}

class Pointwise {
  using T = float;
  // Bytes of pixels in a block's part: a quarter of the smallest L2 in question, 512 KB, which
  // holds what they were copied from and their sums too.
  static constexpr int64_t kBlockBytes = 128 * 1024;
  // Tiles of a block: enough for a panel's part to be used often, once L1 has it.
  static constexpr int64_t kLeastTiles = 16, kMostTiles = 64;
  // Channels of a part. The panel's part is 16 KB with AVX2, for L1, and 64 KB with AVX-512, where
  // a product takes in the time of four loads from L2.
  static constexpr int64_t kDepth = 256;
  // Panels packed together, so that half a kilobyte is read in a row.
  static constexpr int64_t kPanelsAtOnce = 512 / (kMaxVectors * kVectorBytes);
  // Pixels whose lines lie further apart, in bytes, are copied where more panels than these read
  // them.
  static constexpr int64_t kMostStep = 1024;
  // Bytes of weights and of a part's pixels from which, and up to which, has_few_pixels() is true.
  static constexpr int64_t kManyWeights = 1024 * 1024, kFewPixels = 512 * 1024;
  static constexpr int64_t kMostInPlace = kVectorRegisters == 32 ? 2 : 0;

 public:
  Pointwise(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
            int threads)
      : conv_(conv),
        source_(PixelLines<const T>::source(conv, source)),
        weight_(weight),
        bias_(bias),
        dest_(PixelLines<T>::dest(conv, dest)),
        threads_(threads),
        vectors_(ceil_div(conv.produced, kLanes<T>)),
        panel_vectors_(ceil_div(vectors_, ceil_div(vectors_, kMaxVectors))),
        panels_(ceil_div(vectors_, panel_vectors_)),
        parts_(ceil_div(conv.reduced, kDepth)),
        depth_(ceil_div(conv.reduced, parts_)),
        tiles_(ceil_div(conv.pixels(), kTileRows)) {
    const int64_t step = conv.step_w * conv.source.w * static_cast<int64_t>(sizeof(T));
    copied_ = (parts_ > 1 || step > kMostStep) && panels_ > kMostInPlace;
    const int64_t fitting = kBlockBytes / (kTileRows * depth_ * static_cast<int64_t>(sizeof(T)));
    const int64_t most = min_of(max_of(fitting, kLeastTiles), kMostTiles);
    // Blocks of equal size, so that the threads end together; where that would make them small,
    // the threads share out the panels instead.
    blocks_ = ceil_div(tiles_, most);
    if (tiles_ >= threads * kLeastTiles / 2) blocks_ = round_up(blocks_, threads);
    blocks_ = min_of(blocks_, tiles_);
    panel_groups_ = min_of(ceil_div(threads, blocks_), panels_);
    block_tiles_ = ceil_div(tiles_, blocks_);
  }

  // Whether it can add to what dest holds, with the roundings of a sum of both: all of a pixel's
  // channels are in one part, and none is written by way of a buffer.
  bool adds_at_once() const { return parts_ == 1 && ends_whole(); }

  void run() {
    packs_own_ = has_few_pixels();
    if (packs_own_) {
      blocks_ = 1;
      panel_groups_ = threads_;
      block_tiles_ = tiles_;
    }
    const ThreadScratch scratch = make_scratch();
    if (packs_own_) {
      set_starts(0, vectors_ * kLanes<T>);
    } else {
      pack_weights();
    }
    parallel_for(blocks_ * panel_groups_, threads_, [&](int64_t index, int thread) {
      const int64_t at = index / panel_groups_;
      const int64_t first = tiles_ * at / blocks_ * kTileRows;
      const int64_t end = min_of(tiles_ * (at + 1) / blocks_ * kTileRows, conv_.pixels());
      Carver carver = scratch.of(thread);
      block(first, end, index % panel_groups_, panel_groups_, nullptr, carve(carver));
    });
  }

  // What run_pixels() needs, beside pack_weights() in front of it.
  ThreadScratch make_scratch() {
    return ThreadScratch(
        threads_,
        [&](Carver& carver) {
          packed_ = carver.template take<T>(packs_own_ ? 0 : vectors_ * kLanes<T> * conv_.reduced);
          starts_ = carver.template take<T>(vectors_ * kLanes<T>);
        },
        [&](Carver& carver) { carve(carver); });
  }

  void pack_weights() {
    const int64_t packs = ceil_div(panels_, kPanelsAtOnce);
    parallel_for(packs, threads_, [&](int64_t index, int) {
      const int64_t first = index * kPanelsAtOnce;
      pack(first, min_of(first + kPanelsAtOnce, panels_));
    });
  }

  // Pixels [first, end) of dest, on the calling thread alone; with `lines`, those of source lie
  // there, side by side.
  void run_pixels(int64_t first, int64_t end, const T* lines, const ThreadScratch& scratch,
                  int thread) const {
    Carver carver = scratch.of(thread);
    const Own own = carve(carver);
    const int64_t tiles = ceil_div(end - first, kTileRows), blocks = ceil_div(tiles, own_tiles());
    for (int64_t at = 0; at < blocks; ++at) {
      const int64_t begin = tiles * at / blocks * kTileRows;
      const int64_t stop = min_of(tiles * (at + 1) / blocks * kTileRows, end - first);
      block(first + begin, first + stop, 0, 1,
            lines == nullptr ? nullptr : lines + begin * conv_.reduced, own);
    }
  }

 private:
  struct Own {
    const T** source;  // [pixels], and a tile more: where a part of each pixel lies
    const T** rows;    // [pixels], the same or its copy
    T** out;           // [pixels]
    T* copy;           // [pixels][depth]
    T* panel;          // [depth][kPanelWidth], of a thread that packs its own panels
    T* narrow;         // [pixels][kPanelWidth], sums of a panel that dest has no whole vectors for
    T** narrow_out;    // [pixels], its lines
    T* unused;         // a line of dest, for pixels past the end
  };

  // Tiles of a block at most. Whoever asks for some pixels has them in a cache, however many: all
  // of them at once read the weights once.
  int64_t own_tiles() const { return 2 * block_tiles_; }

  Own carve(Carver& carver) const {
    Own own;
    const int64_t pixels = own_tiles() * kTileRows;
    own.source = carver.template take<const T*>(pixels + kTileRows);
    own.rows = carver.template take<const T*>(pixels);
    own.out = carver.template take<T*>(pixels + kTileRows);
    own.copy = carver.template take<T>(copied_ ? pixels * depth_ : 0);
    own.panel = carver.template take<T>(packs_own_ ? depth_ * kPanelWidth<T> : 0);
    own.narrow = carver.template take<T>(ends_whole() ? 0 : (pixels + kTileRows) * kPanelWidth<T>);
    own.narrow_out = carver.template take<T*>(ends_whole() ? 0 : pixels + kTileRows);
    own.unused = carver.template take<T>(vectors_ * kLanes<T>);
    return own;
  }

  // All panels but the last have one width.
  int64_t first_channel(int64_t panel) const {
    return min_of(panel * panel_vectors_, vectors_) * kLanes<T>;
  }
  int64_t vectors(int64_t panel) const {
    return min_of(panel_vectors_, vectors_ - panel * panel_vectors_);
  }
  T* packed(int64_t panel) const { return packed_ + first_channel(panel) * conv_.reduced; }
  bool ends_whole() const { return conv_.produced % kLanes<T> == 0; }

  void pack(int64_t panel, int64_t end) {
    const int64_t first = first_channel(panel);
    set_starts(first, first_channel(end));
    if (conv_.weight_produced == 1 && first_channel(end) <= conv_.produced) {
      copy_panels(panel, end);
      return;
    }
    for (; panel < end; ++panel) {
      pack_weight_panel(conv_, weight_, first_channel(panel), vectors(panel) * kLanes<T>,
                        packed(panel));
    }
  }

  void set_starts(int64_t first, int64_t end) {
    for (int64_t o = first; o < end; ++o) {
      starts_[o] = bias_ != nullptr && o < conv_.produced ? bias_[o] : T(0);
    }
  }

  // Where weights are many and pixels few, each thread multiplies panels of its own with all of
  // the pixels, and packs them as it comes to them: what it packs it finds in its own cache. Packed
  // by all they would go by way of the last cache, half of them from the other core.
  bool has_few_pixels() const {
    const int64_t size = static_cast<int64_t>(sizeof(T));
    return threads_ > 1 && panels_ % threads_ == 0 &&
           conv_.reduced * conv_.produced * size >= kManyWeights &&
           tiles_ * kTileRows * depth_ * size <= kFewPixels;
  }

  // Of weights whose output channels lie side by side, as in grad_input.
  void copy_panels(int64_t panel0, int64_t end) {
    const T* line = weight_ + conv_.taps[0].weight + first_channel(panel0);
    for (int64_t c = 0; c < conv_.reduced; ++c, line += conv_.weight_reduced) {
      const T* from = line;
      for (int64_t panel = panel0; panel < end; ++panel) {
        const int64_t width = vectors(panel) * kLanes<T>;
        T* to = packed(panel) + c * width;
        for (int64_t j = 0; j < width; j += kLanes<T>) store<T>(to + j, load(from + j));
        from += width;
      }
    }
  }

  void block(int64_t first, int64_t end, int64_t panel_group, int64_t panel_groups, const T* lines,
             const Own& own) const {
    const int64_t pixels = end - first, tiles = ceil_div(pixels, kTileRows);
    const int64_t panel0 = panels_ * panel_group / panel_groups;
    const int64_t panel_end = panels_ * (panel_group + 1) / panel_groups;
    point_out(first, pixels, own);
    for (int64_t part = 0; part < parts_; ++part) {
      const int64_t channel = part * depth_;
      ColumnArgs<T> args;
      args.length = min_of(depth_, conv_.reduced - channel);
      if (part == parts_ - 1) args.ending = Ending<T>::of(conv_);
      point_rows(first, pixels, channel, lines, own);
      for (int64_t panel = panel0; panel < panel_end; ++panel) {
        const bool narrow = !ends_whole() && panel == panels_ - 1;
        args.column = narrow ? 0 : first_channel(panel);
        args.panel_step = vectors(panel) * kLanes<T>;
        if (packs_own_) {
          pack_weight_part(conv_, weight_, channel, args.length, first_channel(panel),
                           args.panel_step, own.panel);
          args.panel = own.panel;
        } else {
          args.panel = packed(panel) + channel * args.panel_step;
        }
        args.start = part == 0 && !conv_.adds ? starts_ + first_channel(panel) : nullptr;
        args.rows = own.rows;
        args.out = narrow ? own.narrow_out : own.out;
        args.out_ahead = args.out + kTileRows;
        if (panel == panel0) {
          multiply_fetching(args, tiles, vectors(panel), own);
        } else {
          args.ahead = nullptr;
          args.tiles = tiles;
          multiply_column(vectors(panel), args);
        }
      }
    }
    if (!ends_whole() && panel_end == panels_) write_narrow(pixels, own);
  }

  // A column whose rows nobody has read before.
  void multiply_fetching(ColumnArgs<T>& args, int64_t tiles, int64_t vectors,
                         const Own& own) const {
    args.tiles = 1;
    args.ahead = own.source;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (copied_) {
        for (int64_t x = tile * kTileRows; x < (tile + 1) * kTileRows; ++x) {
          std::memcpy(own.copy + x * depth_, own.source[x], args.length * sizeof(T));
        }
      }
      args.ahead += kTileRows;
      multiply_column(vectors, args);
      args.rows += kTileRows;
      args.out += kTileRows;
      args.out_ahead += kTileRows;
    }
  }

  void point_rows(int64_t first, int64_t pixels, int64_t channel, const T* lines,
                  const Own& own) const {
    const int64_t padded = round_up(pixels, kTileRows);
    source_.point_block(first, pixels, padded + kTileRows, channel, lines, own.source);
    for (int64_t x = 0; x < padded; ++x) {
      own.rows[x] = copied_ ? own.copy + x * depth_ : own.source[x];
    }
  }

  void point_out(int64_t first, int64_t pixels, const Own& own) const {
    dest_.point(first, pixels, 0, own.out);
    const int64_t end = round_up(pixels, kTileRows) + kTileRows;
    for (int64_t x = pixels; x < end; ++x) own.out[x] = own.unused;
    if (ends_whole()) return;
    for (int64_t x = 0; x < end; ++x) own.narrow_out[x] = own.narrow + x * kPanelWidth<T>;
  }

  void write_narrow(int64_t pixels, const Own& own) const {
    const int64_t first = first_channel(panels_ - 1);
    for (int64_t x = 0; x < pixels; ++x) {
      std::memcpy(own.out[x] + first, own.narrow_out[x], (conv_.produced - first) * sizeof(T));
    }
  }

  const TapConv& conv_;
  PixelLines<const T> source_;
  const T* weight_;
  const T* bias_;
  PixelLines<T> dest_;
  int threads_;
  int64_t vectors_, panel_vectors_, panels_;
  int64_t parts_, depth_;  // of the channels
  int64_t tiles_, blocks_, panel_groups_, block_tiles_;
  bool copied_;
  bool packs_own_ = false;  // see has_few_pixels()
  T* packed_;
  T* starts_;
};

}  // namespace
}  // namespace gdfast::cpu
