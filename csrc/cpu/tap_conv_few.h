// TapConv with few channels in, for a dest whose channels lie side by side: vectors run over the
// output channels.
//
// A task takes some lines of dest. It copies the source lines that they see once, widened and with
// a border of zeros, in the order that they come in: what a pixel sees through tap t of channel c
// then lies at a constant offset from it, and needs no pointer of its own. A tile is some
// neighbouring pixels, broadcast from the copy, x a panel of output channels.
#pragma once

#include "memory_ahead.h"
#include "shares.h"
#include "source_lines.h"
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
  bool stream;       // past the caches
  Ending<A> ending;
};

template <bool kEnds, typename A, int kPixels, int kVectors>
GDFAST_INLINE void store_few(const FewTileArgs<A>& args, Vec<A> (*sum)[kVectors]) {
  constexpr int kWidth = kLanes<A>;
  // Copies, for the stores below might otherwise change what args hold.
  const A* start = args.start;
  A* out = args.out;
  const int64_t out_step = args.out_step;
  const int pixels = args.pixels;
  const bool stream = args.stream;
  const Ending<A> ending = args.ending;
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
      sum[i][v] += start == nullptr ? load(out + v * kWidth) : first[v];
    }
    if constexpr (kEnds) finish_sums<1, kVectors>(ending, sum + i);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      A* const to = out + v * kWidth;
      stream ? store_streaming<A>(to, sum[i][v]) : store<A>(to, sum[i][v]);
    }
  }
  if constexpr (kEnds) {
    finish_rows<kPixels>(ending, args.out, out_step, pixels, kVectors * kWidth);
  }
}

template <typename A, int kPixels, int kVectors>
void multiply_few(const FewTileArgs<A>& args) {
  constexpr int kWidth = kLanes<A>;
  Vec<A> sum[kPixels][kVectors] = {};
  const A* panel = args.panel;
  const int64_t step = args.pixel_step, panel_step = args.panel_step;
  if (!args.stream) {  // where the next tile will be stored
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(args.out + (kPixels + i) * args.out_step + v * kWidth, 1);
      }
    }
  }
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
  if (args.ending.activation == Activation::kNone) {
    store_few<false, A, kPixels, kVectors>(args, sum);
  } else {
    store_few<true, A, kPixels, kVectors>(args, sum);
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
        ending_(Ending<A>::of(conv)),
        depth_(conv.reduced * conv.tap_count),
        panels_(panels_of(conv)),
        vectors_(static_cast<int>(ceil_div(ceil_div(conv.produced, kLanes<A>), panels_))),
        width_(vectors_ * kLanes<A>),
        tile_pixels_(few_pixels(vectors_)),
        // The rest of a line may be computed by a tile that is larger.
        source_lines_(conv, tile_pixels_, conv.source.c == 1) {
    lines_ = source_lines_.lines_of(kLinesBytes, conv.batch * conv.groups, threads);
    parts_ = ceil_div(depth_, kFewDepth);
    part_depth_ = ceil_div(depth_, parts_);
    stream_ = parts_ == 1 && conv.produced % width_ == 0 &&
              writes_past_caches(conv, dest, conv.groups * conv.produced);
  }

  // Bytes of a thread's copy, for who has to decide whether this is the right way.
  int64_t image_bytes() const { return image_size() * static_cast<int64_t>(sizeof(A)); }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    for (int64_t t = 0; t < conv_.tap_count; ++t) {
      const Tap& tap = conv_.taps[t];
      for (int64_t c = 0; c < conv_.reduced; ++c) {
        offsets_[t * conv_.reduced + c] = source_lines_.offset_of(tap, c);
      }
    }
    parallel_for(conv_.groups * panels_, depth_ * width_ > 4096 ? threads_ : 1,
                 [&](int64_t index, int) { pack(index); });
    const int64_t parts = ceil_div(conv_.height, lines_);
    parallel_shares(conv_.batch * conv_.groups * parts, threads_, [&](int64_t index, int thread) {
      task(index / parts / conv_.groups, index / parts % conv_.groups, index % parts * lines_,
           thread);
    });
  }

 private:
  // Terms that are summed in one go: two levels of summation keep the error of long sums small.
  static constexpr int64_t kFewDepth = 192;
  static constexpr int64_t kLinesBytes = 1 << 16;
  static constexpr int kMostAhead = 8;  // channels that lie apart

  // Panels of equal width, none wider than L1 has room for.
  static int64_t panels_of(const TapConv& conv) {
    const int64_t vectors = ceil_div(conv.produced, kLanes<A>);
    const int64_t depth = conv.reduced * conv.tap_count;
    int64_t most = kMaxVectors;
    while (most > 2 && depth * most * kVectorBytes > kFewPanelBytes) most /= 2;
    return ceil_div(vectors, ceil_div(vectors, ceil_div(vectors, most)));
  }

  int64_t image_size() const { return source_lines_.size(lines_); }

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
    source_lines_.copy(source_, n, group, line0, lines, image);
    FewTileArgs<A> args;
    args.pixel_step = source_lines_.pixel_step();
    args.panel_step = width_;
    args.stream = stream_;
    args.ending = ending_;
    MemoryAhead::Stretch room[kMostAhead];
    MemoryAhead ahead(room);
    source_lines_.fetch_ahead(source_, n, group, line0, lines, ahead);
    ahead.spread(lines * panels_ * ceil_div(conv_.width, tile_pixels_));
    for (int64_t line = 0; line < lines; ++line) {
      T* to = dest_ + n * conv_.dest.n + group * conv_.dest_group + (line0 + line) * conv_.dest.h;
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const int64_t number = group * panels_ + panel, k = panel * width_;
        const int64_t valid = min_of(width_, conv_.produced - k);
        for (int64_t j = 0; j < conv_.width; j += tile_pixels_) {
          args.image = image + line * source_lines_.line_step() + j * args.pixel_step;
          args.pixels = static_cast<int>(min_of(tile_pixels_, conv_.width - j));
          ahead.fetch();
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
            if (parts_ > 1) args.ending = x + args.depth == depth_ ? ending_ : Ending<A>();
            multiply_few<A>(vectors_, args.pixels, args);
          }
          if (in_dest) continue;
          for (int i = 0; i < args.pixels; ++i) {
            copy_narrowed(args.out + i * width_, valid, out + i * conv_.dest.w, 1);
          }
        }
      }
    }
    if (stream_) stream_fence();
  }

  const TapConv& conv_;
  const T* source_;
  const T* weight_;
  const T* bias_;
  T* dest_;
  int threads_;
  Ending<A> ending_;
  int64_t depth_;  // terms of a sum
  int64_t panels_;
  int vectors_;
  int64_t width_, tile_pixels_;
  SourceLines<T> source_lines_;
  int64_t lines_;  // of a task
  int64_t parts_, part_depth_;
  bool stream_;
  int64_t* offsets_;
  A* weights_;
  A* biases_;
  A* image_;
  A* sums_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
