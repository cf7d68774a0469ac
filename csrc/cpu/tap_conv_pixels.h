// TapConv with a tile of pixels x channels: for a dest whose channels lie side by side.
//
// The weights are packed once per call into panels of up to kPanelWidth output channels. A task
// takes a block of pixels and walks the reduction in parts of about kDepth lines, short enough for
// the panel's part to stay in L1 while all of the block's pixels pass by. The sums of a block stay
// in L2, in dest itself where it can hold them. Image values are broadcast from where they lie:
// each tap of each pixel is a pointer, to a line of zeros where the tap falls outside. Where
// channels are few, the taps of one line of the kernel are read as one.
#pragma once

#include "pack.h"
#include "tap_conv.h"
#include "tile.h"

namespace gdfast::cpu {
namespace {

// Lines of a panel's part: 128 x 256 bytes = 32 KB of a 48 KB L1 on machines with AVX-512,
// 256 x 64 bytes = 16 KB elsewhere.
constexpr int64_t kDepth = kVectorRegisters == 32 ? 128 : 256;

// Pixels of a block, a multiple of kTileRows: enough for one load of a panel's part to be used
// often (33 tiles), few enough for their sums to stay in L2.
constexpr int64_t kBlockPixels = 33 * kTileRows;
// Output channels of a task: 198 pixels x 512 channels x 4 bytes = 400 KB of sums.
constexpr int64_t kBlockBytesOfChannels = 2048;

// The output channels of one group, cut into panels of equal width.
template <typename A>
struct Panels {
  int vectors;    // of one panel
  int64_t width;  // channels of one panel, padded
  int64_t count;

  explicit Panels(int64_t channels) {
    const int64_t all = ceil_div(channels, kLanes<A>);
    count = ceil_div(all, kMaxVectors);
    vectors = static_cast<int>(ceil_div(all, count));
    width = vectors * kLanes<A>;
    count = ceil_div(all, vectors);
  }
};

// A part of the reduction: taps [tap, tap + taps) of channels [channel, channel + channels).
struct ReductionPart {
  int64_t tap, taps, channel, channels;
};

// Cuts taps x channels into parts of about kDepth, in the order in which the panels hold them:
// several whole taps a part where the channels are few, else a range of one tap's channels.
struct Reduction {
  int64_t taps, channels;
  int64_t taps_at_once, channels_at_once;

  Reduction(int64_t taps, int64_t channels) : taps(taps), channels(channels) {
    taps_at_once = max_of(1, kDepth / channels);
    channels_at_once = ceil_div(channels, ceil_div(channels, kDepth));
  }
  int64_t parts() const {
    return ceil_div(taps, taps_at_once) * ceil_div(channels, channels_at_once);
  }
  ReductionPart part(int64_t index) const {
    const int64_t per_tap = ceil_div(channels, channels_at_once);
    const int64_t tap = index / per_tap * taps_at_once;
    const int64_t channel = index % per_tap * channels_at_once;
    return {tap, min_of(taps_at_once, taps - tap), channel,
            min_of(channels_at_once, channels - channel)};
  }
};

// panel[(tap * reduced + c) * width + o] = weight[first + o, c, tap], zero where o is past the end.
template <typename T, typename A>
void pack_weight_panel(const TapConv& conv, const T* weight, int64_t first, int64_t width,
                       A* panel) {
  const int64_t valid = min_of(width, conv.produced - first), taps = conv.tap_count;
  const int64_t produced = conv.weight_produced, reduced = conv.weight_reduced;
  weight += first * produced;
  const auto line = [&](int64_t tap, int64_t c) {
    return panel + (tap * conv.reduced + c) * width;
  };

  // In a contiguous KCRS tensor all taps of all c of one k follow each other: transpose them as
  // one.
  constexpr int64_t kMostTaps = 64;
  int64_t tap_at[kMostTaps];
  bool follow = taps > 1 && taps <= kMostTaps && reduced == taps;
  for (int64_t t = 0; t < taps && follow; ++t) tap_at[t] = -1;
  for (int64_t t = 0; t < taps && follow; ++t) {
    const int64_t offset = conv.taps[t].weight;
    follow = offset >= 0 && offset < taps && tap_at[offset] < 0;
    if (follow) tap_at[offset] = t;
  }
  if (follow) {
    transpose_lines<A>(weight, produced, conv.reduced * taps, valid, width,
                       [&](int64_t x) { return line(tap_at[x % taps], x / taps); });
    return;
  }
  for (int64_t t = 0; t < taps; ++t) {
    const T* from = weight + conv.taps[t].weight;
    if (reduced == 1) {
      transpose_widened(from, produced, conv.reduced, valid, width, line(t, 0), width);
      continue;
    }
    for (int64_t c = 0; c < conv.reduced; ++c) {
      A* to = line(t, c);
      copy_widened(from + c * reduced, produced, valid, to);
      for (int64_t o = valid; o < width; ++o) to[o] = A(0);
    }
  }
}

template <typename T>
class PixelTiles {
  using A = typename Accumulator<T>::type;

 public:
  PixelTiles(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
             int threads)
      : conv_(conv),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        threads_(threads),
        panels_(conv.produced),
        fold_(taps_in_line(conv)),
        reduction_(conv.tap_count / fold_, conv.reduced * fold_),
        in_place_(fold_ > 1 ||
                  (kSame<T, A> && conv.source.c == 1 && 2 * conv.reduced >= kLanes<A>)) {
    taps_stay_inside_ = true;
    for (int64_t t = 0; t < conv.tap_count; ++t) {
      const Tap& tap = conv.taps[t];
      taps_stay_inside_ = taps_stay_inside_ && tap.dh >= 0 && tap.dw >= 0 &&
                          (conv.height - 1) * conv.step_h + tap.dh < conv.source_height &&
                          (conv.width - 1) * conv.step_w + tap.dw < conv.source_width;
    }
    // Blocks of equal size, so that the threads end together.
    int64_t blocks = ceil_div(conv.pixels(), kBlockPixels);
    if (blocks < 4 * threads) blocks = round_up(blocks, threads);
    block_pixels_ = round_up(ceil_div(conv.pixels(), blocks), kTileRows);
    blocks_ = ceil_div(conv.pixels(), block_pixels_);
    // A task takes as many panels as L2 can hold sums for; fewer where threads would stand idle.
    panels_at_once_ =
        max_of(1, kBlockBytesOfChannels / (panels_.width * static_cast<int64_t>(sizeof(A))));
    const int64_t wanted = ceil_div(2 * threads, blocks_ * conv.groups);
    if (wanted > 1) panels_at_once_ = min_of(panels_at_once_, ceil_div(panels_.count, wanted));
    panels_at_once_ = min_of(panels_at_once_, panels_.count);
    panel_groups_ = ceil_div(panels_.count, panels_at_once_);
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    const int64_t panels = conv_.groups * panels_.count;
    parallel_for(panels, threads_, [&](int64_t index, int) { pack(index); });
    parallel_for(conv_.groups * blocks_ * panel_groups_, threads_,
                 [&](int64_t index, int thread) { block(index, thread); });
  }

 private:
  struct Scratch {
    const A** rows;  // [tiles][taps of a part][kTileRows]
    A** out;         // [block_pixels]
    A* packed;       // [block_pixels][depth], what can't be read in place
    A* sums;         // [block_pixels][panels_at_once * width], where dest can't hold them
    A* unused;       // one line, for the rows of the last tile that lie past the end
  };

  // With few channels a tap alone is too short a segment. Where pixels follow each other without
  // gaps, all taps of one line of the kernel see one stretch of memory, which is read as if it were
  // a single tap of so many times the channels. How many that are, 1 where they don't.
  static int64_t taps_in_line(const TapConv& conv) {
    const bool no_gaps = conv.source.w == conv.reduced && (conv.reduced == 1 || conv.source.c == 1);
    if (!kSame<T, A> || !no_gaps || conv.groups > 1 || 2 * conv.reduced >= kLanes<A>) return 1;
    const Tap* taps = conv.taps;
    int64_t count = 1;
    while (count < conv.tap_count && taps[count].dh == taps[0].dh) ++count;
    if (count * conv.reduced > kDepth || conv.tap_count % count != 0) return 1;
    for (int64_t t = 0; t < conv.tap_count; ++t) {
      const Tap& first = taps[t / count * count];
      if (taps[t].dh != first.dh || taps[t].dw != first.dw + t % count) return 1;
    }
    return count;
  }

  int64_t panel_size() const { return conv_.tap_count * conv_.reduced * panels_.width; }
  int64_t sums_step() const { return panels_at_once_ * panels_.width; }
  int64_t depth() const { return reduction_.taps_at_once * reduction_.channels_at_once; }

  int64_t carve(Carver carver) {
    weights_ = carver.template take<A>(conv_.groups * panels_.count * panel_size());
    biases_ = carver.template take<A>(conv_.groups * panels_.count * panels_.width);
    zeros_ = carver.template take<A>(max_of(depth(), panels_.width));
    const int64_t before = carver.used();
    scratch_ = carve_scratch(carver);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch carve_scratch(Carver& carver) const {
    Scratch scratch;
    scratch.rows = carver.template take<const A*>(block_pixels_ * reduction_.taps_at_once);
    scratch.out = carver.template take<A*>(block_pixels_);
    scratch.packed = carver.template take<A>(in_place_ && fold_ == 1 ? 0 : block_pixels_ * depth());
    scratch.sums = carver.template take<A>(block_pixels_ * sums_step());
    scratch.unused = carver.template take<A>(kPanelWidth<A>);
    return scratch;
  }

  // The scratch of thread 0, moved on by whole threads.
  Scratch scratch_of(int thread) const {
    const auto move = [&](auto* part) {
      return reinterpret_cast<decltype(part)>(reinterpret_cast<uintptr_t>(part) +
                                              scratch_bytes_ * thread);
    };
    return {move(scratch_.rows), move(scratch_.out), move(scratch_.packed), move(scratch_.sums),
            move(scratch_.unused)};
  }

  void pack(int64_t index) {
    const int64_t group = index / panels_.count;
    const int64_t first = index % panels_.count * panels_.width;
    pack_weight_panel(conv_, weight_ + group * conv_.weight_group, first, panels_.width,
                      weights_ + index * panel_size());
    for (int64_t o = 0; o < panels_.width; ++o) {
      const bool has = bias_ != nullptr && first + o < conv_.produced;
      biases_[index * panels_.width + o] =
          has ? widen(bias_[group * conv_.produced + first + o]) : A(0);
    }
    if (index == 0) std::memset(zeros_, 0, max_of(depth(), panels_.width) * sizeof(A));
  }

  void block(int64_t index, int thread) {
    const int64_t panel_group = index % panel_groups_;
    const int64_t pixel_block = index / panel_groups_ % blocks_;
    const int64_t group = index / panel_groups_ / blocks_;
    const int64_t first = pixel_block * block_pixels_;
    const int64_t pixels = min_of(block_pixels_, conv_.pixels() - first);
    const int64_t panel0 = panel_group * panels_at_once_;
    const int64_t panel_end = min_of(panel0 + panels_at_once_, panels_.count);
    const T* source = source_ + group * conv_.source_group;
    T* dest = dest_ + group * conv_.dest_group;
    const Scratch scratch = scratch_of(thread);

    const int64_t parts = max_of(1, reduction_.parts());
    for (int64_t part_index = 0; part_index < parts; ++part_index) {
      const ReductionPart part =
          reduction_.taps == 0 ? ReductionPart{0, 0, 0, 0} : reduction_.part(part_index);
      point_rows(part, source, first, pixels, scratch);
      TileArgs<A> args;
      args.row_step = 1;
      args.panel_step = panels_.width;
      args.segments = in_place_ ? part.taps : min_of(part.taps, 1);
      args.length = in_place_ ? part.channels : part.taps * part.channels;
      args.how = part_index == 0 ? Start::kColumns : Start::kAccumulate;
      if (part_index == parts - 1) args.ending = Ending<A>::of(conv_);
      for (int64_t panel = panel0; panel < panel_end; ++panel) {
        const int64_t number = group * panels_.count + panel;
        args.panel = weights_ + number * panel_size() +
                     (part.tap * reduction_.channels + part.channel) * panels_.width;
        args.start = biases_ + number * panels_.width;
        point_out(panel, panel0, dest, first, pixels, scratch);
        for (int64_t tile = 0; tile * kTileRows < pixels; ++tile) {
          args.rows = scratch.rows + tile * args.segments * kTileRows;
          const bool more = (tile + 1) * kTileRows < pixels;
          args.rows_ahead = more ? args.rows + args.segments * kTileRows : nullptr;
          args.out = scratch.out + tile * kTileRows;
          multiply_tile<A>(panels_.vectors, args);
        }
      }
    }
    for (int64_t panel = panel0; panel < panel_end; ++panel) {
      if (!in_dest(panel)) write_out(panel, panel0, dest, first, pixels, scratch);
    }
  }

  // Points every row of every tile to its image values, or to a packed copy of them.
  void point_rows(const ReductionPart& part, const T* source, int64_t first, int64_t pixels,
                  const Scratch& scratch) const {
    const int64_t part_depth = part.taps * part.channels;
    GridPoint at = GridPoint::at(conv_, first);
    if constexpr (kSame<T, A>) {
      // A 1x1 kernel without padding: nothing to check, a step from one pixel to the next.
      if (in_place_ && part.taps == 1 && taps_stay_inside_) {
        const Tap& tap = conv_.taps[part.tap * fold_];
        const T* corner = source + part.channel * conv_.source.c + tap.dh * conv_.source.h +
                          tap.dw * conv_.source.w;
        const T* line = nullptr;
        for (int64_t x = 0; x < pixels; ++x, at.advance(conv_)) {
          if (x == 0 || at.j == 0) {
            line = corner + at.n * conv_.source.n + at.i * conv_.step_h * conv_.source.h;
          }
          scratch.rows[x] = line + at.j * conv_.step_w * conv_.source.w;
        }
        for (int64_t x = pixels; x < round_up(pixels, kTileRows); ++x) {
          scratch.rows[x] = scratch.rows[x - 1];
        }
        return;
      }
    }
    for (int64_t x = 0; x < round_up(pixels, kTileRows); ++x) {
      const int64_t tile = x / kTileRows, lane = x % kTileRows;
      if (x >= pixels) {  // computed like the last pixel, and stored where nobody looks
        const int64_t segments = in_place_ ? part.taps : min_of(part.taps, 1);
        for (int64_t g = 0; g < segments; ++g) {
          const A** row = scratch.rows + (tile * segments + g) * kTileRows + lane;
          *row = row[-1];
        }
        continue;
      }
      const int64_t h0 = at.i * conv_.step_h, w0 = at.j * conv_.step_w;
      const T* image = source + at.n * conv_.source.n + part.channel * conv_.source.c;
      for (int64_t t = 0; t < part.taps; ++t) {
        const Tap& tap = conv_.taps[(part.tap + t) * fold_];
        const int64_t h = h0 + tap.dh, w = w0 + tap.dw;
        // Taps [begin, end) of those that are read as one see the image.
        const int64_t begin = max_of(0, -w), end = min_of(fold_, conv_.source_width - w);
        const bool inside = h >= 0 && h < conv_.source_height && begin < end;
        const T* from =
            inside ? image + h * conv_.source.h + (w + begin) * conv_.source.w : nullptr;
        if constexpr (kSame<T, A>) {
          if (inside && end - begin < fold_) {
            A* line = scratch.packed + x * depth() + t * part.channels;
            std::memset(line, 0, part.channels * sizeof(A));
            std::memcpy(line + begin * conv_.reduced, from,
                        (end - begin) * conv_.reduced * sizeof(A));
            scratch.rows[(tile * part.taps + t) * kTileRows + lane] = line;
            continue;
          }
          if (in_place_) {
            scratch.rows[(tile * part.taps + t) * kTileRows + lane] = inside ? from : zeros_;
            continue;
          }
        }
        A* to = scratch.packed + x * depth() + t * part.channels;
        if (inside) {
          copy_widened(from, conv_.source.c, part.channels, to);
        } else {
          std::memset(to, 0, part.channels * sizeof(A));
        }
      }
      if (!in_place_ && part_depth > 0) {
        scratch.rows[tile * kTileRows + lane] = scratch.packed + x * depth();
      }
      at.advance(conv_);
    }
  }

  // Whether the sums of a panel are taken in dest itself: whole vectors of the same type.
  bool in_dest(int64_t panel) const {
    return kSame<T, A> && conv_.dest.c == 1 && (panel + 1) * panels_.width <= conv_.produced;
  }

  void point_out(int64_t panel, int64_t panel0, T* dest, int64_t first, int64_t pixels,
                 const Scratch& scratch) const {
    if constexpr (kSame<T, A>) {
      if (in_dest(panel)) {
        GridPoint at = GridPoint::at(conv_, first);
        A* line = nullptr;
        for (int64_t x = 0; x < pixels; ++x, at.advance(conv_)) {
          if (x == 0 || at.j == 0) {
            line = dest + at.n * conv_.dest.n + at.i * conv_.dest.h + panel * panels_.width;
          }
          scratch.out[x] = line + at.j * conv_.dest.w;
        }
        for (int64_t x = pixels; x < round_up(pixels, kTileRows); ++x) {
          scratch.out[x] = scratch.unused;
        }
        return;
      }
    }
    A* sums = scratch.sums + (panel - panel0) * panels_.width;
    for (int64_t x = 0; x < round_up(pixels, kTileRows); ++x) {
      scratch.out[x] = sums + x * sums_step();
    }
  }

  void write_out(int64_t panel, int64_t panel0, T* dest, int64_t first, int64_t pixels,
                 const Scratch& scratch) const {
    const int64_t channel = panel * panels_.width;
    const int64_t channels = min_of(panels_.width, conv_.produced - channel);
    const A* sums = scratch.sums + (panel - panel0) * panels_.width;
    GridPoint at = GridPoint::at(conv_, first);
    for (int64_t x = 0; x < pixels; ++x, at.advance(conv_)) {
      T* to = dest + at.n * conv_.dest.n + at.i * conv_.dest.h + at.j * conv_.dest.w +
              channel * conv_.dest.c;
      copy_narrowed(sums + x * sums_step(), channels, to, conv_.dest.c);
    }
  }

  const TapConv& conv_;
  const T* source_;
  const T* weight_;
  const T* bias_;
  T* dest_;
  int threads_;
  Panels<A> panels_;
  int64_t fold_;  // taps that are read as one
  Reduction reduction_;
  bool in_place_, taps_stay_inside_;
  int64_t block_pixels_, blocks_;
  int64_t panels_at_once_, panel_groups_;
  A* weights_;
  A* biases_;
  A* zeros_;
  Scratch scratch_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
