// TapConv with few channels in, for a dest whose channels lie side by side: vectors run over the
// output channels.
//
// A task takes some lines of dest. It copies the source lines that they see once, widened and with
// a border of zeros, in the order that they come in: what a pixel sees through tap t of channel c
// then lies at a constant offset from it, and needs no pointer of its own. A tile is some
// neighbouring pixels, broadcast from the copy, x a panel of output channels.
#pragma once

#include "tap_conv_pixels.h"

namespace gdfast::cpu {
namespace {

// Pixels of a tile by the vectors of its panel: 16 x 1, 12 x 2, 8 x 3 and 6 x 4 take 16 to 24
// accumulators of 32 registers; 8 x 1 and 6 x 2 take 8 and 12 of 16.
constexpr int few_pixels(int vectors) {
  constexpr int kMost[] = {16, 12, 8, 6};
  return kVectorRegisters == 32 ? kMost[vectors - 1] : kMost[vectors - 1] / 2;
}

// A panel of weights longer than this leaves no room in L1 for the image, and is cut in two.
constexpr int64_t kFewPanelBytes = 24576;

template <typename A>
struct FewTileArgs {
  const A* image;  // what the first pixel sees through an offset of 0
  int64_t pixel_step;
  const int64_t* offsets;  // [depth]
  int64_t depth;
  const A* panel;  // [depth][kVectors whole vectors]
  int64_t panel_step;
  const A* start;  // kVectors whole vectors; null: add to what out holds
  A* out;
  int64_t out_step;  // from one pixel to the next
  int pixels;        // of kPixels that are stored
};

template <typename A, int kPixels, int kVectors>
void multiply_few(const FewTileArgs<A>& args) {
  constexpr int kWidth = kLanes<A>;
  Vec<A> sum[kPixels][kVectors] = {};
  const A* panel = args.panel;
  const int64_t step = args.pixel_step, panel_step = args.panel_step;
  for (int64_t x = 0; x < args.depth; ++x, panel += panel_step) {
    Vec<A> line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) line[v] = load(panel + v * kWidth);
    const A* image = args.image + args.offsets[x];
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
      Vec<A> value = broadcast(image[(i % 4) * step]);
      if (i % 4 == 3) image += 4 * step;
      if constexpr (kVectors > 1) keep_in_register<A>(value);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += value * line[v];
    }
  }
  // Copies, for the stores below might otherwise change what args hold.
  const A* start = args.start;
  A* out = args.out;
  const int64_t out_step = args.out_step;
  const int pixels = args.pixels;
  Vec<A> first[kVectors] = {};
  if (start != nullptr) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) first[v] = load(start + v * kWidth);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i, out += out_step) {
    if (i >= pixels) break;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> before = start == nullptr ? load(out + v * kWidth) : first[v];
      store<A>(out + v * kWidth, before + sum[i][v]);
    }
  }
}

// The smallest tile that holds so many pixels.
template <typename A, int kVectors>
GDFAST_INLINE void multiply_few(int pixels, const FewTileArgs<A>& args) {
  constexpr int kMost = few_pixels(kVectors);
  if (pixels > kMost / 2) return multiply_few<A, kMost, kVectors>(args);
  if constexpr (kMost >= 8) {
    if (pixels <= kMost / 4) return multiply_few<A, kMost / 4, kVectors>(args);
  }
  multiply_few<A, kMost / 2, kVectors>(args);
}

template <typename A>
GDFAST_INLINE void multiply_few(int vectors, int pixels, const FewTileArgs<A>& args) {
  switch (vectors) {
    case 1:
      return multiply_few<A, 1>(pixels, args);
    case 2:
      return multiply_few<A, 2>(pixels, args);
#if defined(__AVX512F__)
    case 3:
      return multiply_few<A, 3>(pixels, args);
    case 4:
      return multiply_few<A, 4>(pixels, args);
#endif
  }
}

template <typename T>
class FewChannels {
  using A = typename Accumulator<T>::type;

 public:
  FewChannels(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
              int threads)
      : conv_(conv),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        threads_(threads),
        depth_(conv.reduced * conv.tap_count) {
    int64_t vectors = ceil_div(conv.produced, kLanes<A>);
    int64_t most = kMaxVectors;
    while (most > 2 && depth_ * most * kVectorBytes > kFewPanelBytes) most /= 2;
    panels_ = ceil_div(vectors, most);
    vectors_ = static_cast<int>(ceil_div(vectors, panels_));
    panels_ = ceil_div(vectors, vectors_);
    width_ = vectors_ * kLanes<A>;
    tile_pixels_ = few_pixels(vectors_);

    low_h_ = conv.taps[0].dh;
    low_w_ = conv.taps[0].dw;
    int64_t high_h = low_h_, high_w = low_w_;
    for (int64_t t = 1; t < conv.tap_count; ++t) {
      low_h_ = min_of(low_h_, conv.taps[t].dh);
      low_w_ = min_of(low_w_, conv.taps[t].dw);
      high_h = max_of(high_h, conv.taps[t].dh);
      high_w = max_of(high_w, conv.taps[t].dw);
    }
    span_ = high_h - low_h_ + 1;
    // The rest of a line may be computed by a tile that is larger.
    columns_ = (conv.width + tile_pixels_ - 1) * conv.step_w + high_w - low_w_ + 1;
    channels_last_ = conv.source.c == 1;
    line_size_ = columns_ * conv.reduced;

    const int64_t line_bytes = line_size_ * static_cast<int64_t>(sizeof(A));
    lines_ = max_of(4, (kLinesBytes / line_bytes - span_) / conv.step_h + 1);
    const int64_t others = conv.batch * conv.groups;
    lines_ = min_of(lines_, ceil_div(conv.height, ceil_div(8 * threads, others)));
    lines_ = ceil_div(conv.height, ceil_div(conv.height, lines_));
    parts_ = ceil_div(depth_, kFewDepth);
    part_depth_ = ceil_div(depth_, parts_);
  }

  // Bytes of a thread's copy, for who has to decide whether this is the right way.
  int64_t image_bytes() const { return image_size() * static_cast<int64_t>(sizeof(A)); }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    for (int64_t t = 0; t < conv_.tap_count; ++t) {
      const Tap& tap = conv_.taps[t];
      for (int64_t c = 0; c < conv_.reduced; ++c) {
        offsets_[t * conv_.reduced + c] =
            (tap.dh - low_h_) * line_size_ + (tap.dw - low_w_) * column_step() + c * channel_step();
      }
    }
    parallel_for(conv_.groups * panels_, depth_ * width_ > 4096 ? threads_ : 1,
                 [&](int64_t index, int) { pack(index); });
    const int64_t parts = ceil_div(conv_.height, lines_);
    parallel_for(conv_.batch * conv_.groups * parts, threads_, [&](int64_t index, int thread) {
      task(index / parts / conv_.groups, index / parts % conv_.groups, index % parts * lines_,
           thread);
    });
  }

 private:
  // Terms that are summed in one go: two levels of summation keep the error of long sums small.
  static constexpr int64_t kFewDepth = 192;
  static constexpr int64_t kLinesBytes = 1 << 16;

  int64_t column_step() const { return channels_last_ ? conv_.reduced : 1; }
  int64_t channel_step() const { return channels_last_ ? 1 : columns_; }
  int64_t image_size() const { return ((lines_ - 1) * conv_.step_h + span_) * line_size_; }

  int64_t carve(Carver carver) {
    offsets_ = carver.template take<int64_t>(depth_);
    weights_ = carver.template take<A>(conv_.groups * panels_ * depth_ * width_);
    biases_ = carver.template take<A>(conv_.groups * panels_ * width_);
    const int64_t before = carver.used();
    image_ = carver.template take<A>(image_size());
    sums_ = carver.template take<A>(tile_pixels_ * width_);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  A* of_thread(A* part, int thread) const {
    return part + scratch_bytes_ / static_cast<int64_t>(sizeof(A)) * thread;
  }

  void pack(int64_t index) {
    const int64_t group = index / panels_, first = index % panels_ * width_;
    pack_weight_panel(conv_, weight_ + group * conv_.weight_group, first, width_,
                      weights_ + index * depth_ * width_);
    for (int64_t o = 0; o < width_; ++o) {
      const bool has = bias_ != nullptr && first + o < conv_.produced;
      biases_[index * width_ + o] = has ? widen(bias_[group * conv_.produced + first + o]) : A(0);
    }
  }

  void task(int64_t n, int64_t group, int64_t line0, int thread) {
    const int64_t lines = min_of(lines_, conv_.height - line0);
    A* image = of_thread(image_, thread);
    copy_image(n, group, line0, lines, image);
    FewTileArgs<A> args;
    args.pixel_step = conv_.step_w * column_step();
    args.panel_step = width_;
    for (int64_t line = 0; line < lines; ++line) {
      T* to = dest_ + n * conv_.dest.n + group * conv_.dest_group + (line0 + line) * conv_.dest.h;
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const int64_t number = group * panels_ + panel, k = panel * width_;
        const int64_t valid = min_of(width_, conv_.produced - k);
        for (int64_t j = 0; j < conv_.width; j += tile_pixels_) {
          args.image = image + line * conv_.step_h * line_size_ + j * args.pixel_step;
          args.pixels = static_cast<int>(min_of(tile_pixels_, conv_.width - j));
          T* out = to + j * conv_.dest.w + k;
          args.out = of_thread(sums_, thread);
          args.out_step = width_;
          bool in_dest = false;
          if constexpr (kSame<T, A>) {
            in_dest = valid == width_;
            if (in_dest) {
              args.out = out;
              args.out_step = conv_.dest.w;
            }
          }
          for (int64_t x = 0; x < depth_; x += part_depth_) {
            args.offsets = offsets_ + x;
            args.depth = min_of(part_depth_, depth_ - x);
            args.panel = weights_ + (number * depth_ + x) * width_;
            args.start = x == 0 ? biases_ + number * width_ : nullptr;
            multiply_few<A>(vectors_, args.pixels, args);
          }
          if (in_dest) continue;
          for (int i = 0; i < args.pixels; ++i) {
            copy_narrowed(args.out + i * width_, valid, out + i * conv_.dest.w, 1);
          }
        }
      }
    }
  }

  // Copies the source lines that dest lines [line0, line0 + lines) see; zeros beyond the image.
  void copy_image(int64_t n, int64_t group, int64_t line0, int64_t lines, A* to) const {
    const int64_t top = line0 * conv_.step_h + low_h_;
    const int64_t end = top + (lines - 1) * conv_.step_h + span_;
    const int64_t begin = min_of(max_of(-low_w_, 0), columns_);
    const int64_t stop = max_of(begin, min_of(columns_, conv_.source_width - low_w_));
    const T* image = source_ + n * conv_.source.n + group * conv_.source_group;
    for (int64_t h = top; h < end; ++h, to += line_size_) {
      if (h < 0 || h >= conv_.source_height || begin == stop) {
        std::memset(to, 0, line_size_ * sizeof(A));
        continue;
      }
      const T* from = image + h * conv_.source.h + (low_w_ + begin) * conv_.source.w;
      if (!channels_last_) {
        for (int64_t c = 0; c < conv_.reduced; ++c) {
          copy_line(from + c * conv_.source.c, conv_.source.w, begin, stop, columns_,
                    to + c * columns_);
        }
      } else if (conv_.source.w == conv_.reduced) {
        copy_line(from, 1, begin * conv_.reduced, stop * conv_.reduced, line_size_, to);
      } else {
        std::memset(to, 0, begin * conv_.reduced * sizeof(A));
        for (int64_t x = begin; x < stop; ++x, from += conv_.source.w) {
          copy_widened(from, 1, conv_.reduced, to + x * conv_.reduced);
        }
        std::memset(to + stop * conv_.reduced, 0, (columns_ - stop) * conv_.reduced * sizeof(A));
      }
    }
  }

  // to[x] = from[(x - begin) * step] for x in [begin, stop), zeros elsewhere below size.
  static void copy_line(const T* from, int64_t step, int64_t begin, int64_t stop, int64_t size,
                        A* to) {
    std::memset(to, 0, begin * sizeof(A));
    copy_widened(from, step, stop - begin, to + begin);
    std::memset(to + stop, 0, (size - stop) * sizeof(A));
  }

  const TapConv& conv_;
  const T* source_;
  const T* weight_;
  const T* bias_;
  T* dest_;
  int threads_;
  int64_t depth_;  // terms of a sum
  int vectors_;
  int64_t width_, panels_, tile_pixels_;
  int64_t low_h_, low_w_, span_;  // source lines from step_h * i + low_h_ on are seen
  int64_t columns_, line_size_, lines_;
  bool channels_last_;
  int64_t parts_, part_depth_;
  int64_t* offsets_;
  A* weights_;
  A* biases_;
  A* image_;
  A* sums_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
