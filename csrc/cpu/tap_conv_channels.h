// TapConv with a tile of channels x pixels: for a dest whose pixels lie side by side (NCHW).
//
// A task takes a panel of neighbouring pixels. Part by part of the reduction it copies what the
// panel's pixels see into lines of vectors (zeros where a tap falls outside), and multiplies them
// with all output channels. The weights are the broadcast operand: read in place where a channel's
// weights lie in the order of the reduction, which is that of a contiguous KCRS tensor.
#pragma once

#include "tap_conv_pixels.h"

namespace gdfast::cpu {
namespace {

template <typename T>
class ChannelTiles {
  using A = typename Accumulator<T>::type;
  static constexpr int kWidth = kPanelWidth<A>;

 public:
  ChannelTiles(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
               int threads)
      : conv_(conv),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        threads_(threads),
        depth_(conv.reduced * conv.tap_count),
        panels_(ceil_div(conv.pixels(), kWidth)),
        rows_(round_up(conv.produced, kTileRows)) {
    weights_in_place_ = kSame<T, A> && depth_ > 0 && conv.weight_reduced == conv.tap_count;
    for (int64_t t = 0; t < conv.tap_count; ++t) {
      weights_in_place_ = weights_in_place_ && conv.taps[t].weight == t;
    }
    channels_at_once_ = conv.tap_count == 0 ? conv.reduced : max_of(1, kDepth / conv.tap_count);
    channels_at_once_ = min_of(channels_at_once_, conv.reduced);
    // Split the output channels too where there are not enough panels for all threads.
    const int64_t wanted = ceil_div(4 * threads, panels_ * conv.groups);
    rows_at_once_ = max_of(8 * kTileRows, round_up(ceil_div(rows_, wanted), kTileRows));
    rows_at_once_ = min_of(rows_at_once_, rows_);
    row_groups_ = ceil_div(rows_, rows_at_once_);
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    parallel_for(conv_.groups, 1, [&](int64_t group, int) { pack_biases(group); });
    if (!weights_in_place_) {
      const int64_t rows = pack_rows(), blocks = ceil_div(conv_.produced, rows);
      parallel_for(conv_.groups * blocks, threads_, [&](int64_t index, int) {
        pack_weights(index / blocks, index % blocks * rows);
      });
    }
    // Neighbouring panels go to one thread: where they meet they share cache lines of dest.
    const int64_t together = max_of(1, min_of(8, panels_ / (8 * threads_)));
    const int64_t runs = ceil_div(panels_, together);
    parallel_for(conv_.groups * row_groups_ * runs, threads_, [&](int64_t index, int thread) {
      const int64_t first = index % runs * together;
      for (int64_t x = first; x < min_of(first + together, panels_); ++x) {
        panel(index / runs * panels_ + x, thread);
      }
    });
  }

 private:
  // Neighbouring pixels of one line of dest.
  struct Run {
    GridPoint at;
    int64_t count, column;  // pixels, and where they begin in the panel
  };

  struct Scratch {
    A* lines;   // [depth of a part][kWidth]
    A* sums;    // [rows_at_once][kWidth], where dest can't hold them
    A* unused;  // one line, for the rows of the last tile that lie past the end
    Run* runs;  // [kWidth]
  };

  int64_t part_depth() const { return channels_at_once_ * conv_.tap_count; }

  int64_t carve(Carver carver) {
    packed_weights_ =
        carver.template take<A>(weights_in_place_ ? 0 : conv_.groups * conv_.produced * depth_);
    biases_ = carver.template take<A>(conv_.groups * rows_);
    const int64_t before = carver.used();
    scratch_.lines = carver.template take<A>(part_depth() * kWidth);
    scratch_.sums = carver.template take<A>(rows_at_once_ * kWidth);
    scratch_.unused = carver.template take<A>(kWidth);
    scratch_.runs = carver.template take<Run>(kWidth);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](auto* part) {
      return reinterpret_cast<decltype(part)>(reinterpret_cast<uintptr_t>(part) +
                                              scratch_bytes_ * thread);
    };
    return {move(scratch_.lines), move(scratch_.sums), move(scratch_.unused), move(scratch_.runs)};
  }

  void pack_biases(int64_t group) {
    for (int64_t o = 0; o < rows_; ++o) {
      const bool has = bias_ != nullptr && o < conv_.produced;
      biases_[group * rows_ + o] = has ? widen(bias_[group * conv_.produced + o]) : A(0);
    }
  }

  // Output channels packed together. In a 1x1 grad_input it is them that lie side by side, and a
  // line of memory should serve several; with more taps, one at a time was measured to be faster.
  int64_t pack_rows() const { return conv_.tap_count == 1 ? 8 : 1; }

  // The weights of some output channels, each in the order channel, tap.
  void pack_weights(int64_t group, int64_t first) {
    const int64_t end = min_of(first + pack_rows(), conv_.produced);
    for (int64_t c = 0; c < conv_.reduced; ++c) {
      for (int64_t o = first; o < end; ++o) {
        const T* from = weight_ + group * conv_.weight_group + o * conv_.weight_produced +
                        c * conv_.weight_reduced;
        A* to = packed_weights_ + (group * conv_.produced + o) * depth_ + c * conv_.tap_count;
        for (int64_t t = 0; t < conv_.tap_count; ++t) to[t] = widen(from[conv_.taps[t].weight]);
      }
    }
  }

  const A* weights_of(int64_t group, int64_t o) const {
    if constexpr (kSame<T, A>) {
      if (weights_in_place_) {
        return weight_ + group * conv_.weight_group + o * conv_.weight_produced;
      }
    }
    return packed_weights_ + (group * conv_.produced + o) * depth_;
  }

  void panel(int64_t index, int thread) {
    // Panels of one group of rows follow each other: its weights stay in cache.
    const int64_t number = index % panels_;
    const int64_t row_group = index / panels_ % row_groups_;
    const int64_t group = index / panels_ / row_groups_;
    const int64_t first = number * kWidth;
    const int64_t pixels = min_of(kWidth, conv_.pixels() - first);
    const int64_t row0 = row_group * rows_at_once_;
    const int64_t row_end = min_of(row0 + rows_at_once_, rows_);
    const Scratch scratch = scratch_of(thread);
    const T* source = source_ + group * conv_.source_group;
    T* dest = dest_ + group * conv_.dest_group;
    const int64_t runs = find_runs(first, pixels, scratch.runs);
    const int vectors = static_cast<int>(ceil_div(pixels, kLanes<A>));

    // Whole vectors of pixels that lie side by side can be summed where they belong.
    const int64_t at_dest = scratch.runs[0].at.n * conv_.dest.n +
                            scratch.runs[0].at.i * conv_.dest.h +
                            scratch.runs[0].at.j * conv_.dest.w;
    const bool plane = conv_.dest.w == 1 &&
                       (runs == 1 || conv_.dest.h == conv_.width || conv_.height == 1) &&
                       scratch.runs[0].at.n == scratch.runs[runs - 1].at.n;
    const bool in_dest = kSame<T, A> && plane && pixels % kLanes<A> == 0;

    for (int64_t c = 0; c == 0 || c < conv_.reduced; c += channels_at_once_) {
      const int64_t channels =
          conv_.tap_count == 0 ? 0 : min_of(channels_at_once_, conv_.reduced - c);
      pack_lines(source + c * conv_.source.c, channels, scratch, runs, pixels, vectors);
      TileArgs<A> args;
      const A* rows[kTileRows];
      A* out[kTileRows];
      args.rows = rows;
      args.out = out;
      args.row_step = 1;
      args.panel = scratch.lines;
      args.panel_step = vectors * kLanes<A>;
      args.segments = 1;
      args.length = channels * conv_.tap_count;
      args.how = c == 0 ? Start::kRows : Start::kAccumulate;
      if (c + channels == conv_.reduced || conv_.tap_count == 0) args.ending = Ending<A>::of(conv_);
      for (int64_t row = row0; row < row_end; row += kTileRows) {
        args.start = biases_ + group * rows_ + row;
        for (int i = 0; i < kTileRows; ++i) {
          const bool valid = row + i < conv_.produced;
          const int64_t o = valid ? row + i : conv_.produced - 1;
          rows[i] = weights_of(group, o) + c * conv_.tap_count;
          out[i] = scratch.sums + (row + i - row0) * kWidth;
          if constexpr (kSame<T, A>) {
            if (in_dest) out[i] = valid ? dest + o * conv_.dest.c + at_dest : scratch.unused;
          }
        }
        multiply_tile<A>(vectors, args);
      }
      if (conv_.tap_count == 0) break;
    }
    if (in_dest) return;
    for (int64_t o = row0; o < min_of(row_end, conv_.produced); ++o) {
      for (int64_t r = 0; r < runs; ++r) {
        const Run& run = scratch.runs[r];
        copy_narrowed(scratch.sums + (o - row0) * kWidth + run.column, run.count,
                      dest + run.at.n * conv_.dest.n + o * conv_.dest.c + run.at.i * conv_.dest.h +
                          run.at.j * conv_.dest.w,
                      conv_.dest.w);
      }
    }
  }

  int64_t find_runs(int64_t first, int64_t pixels, Run* runs) const {
    int64_t count = 0;
    GridPoint at = GridPoint::at(conv_, first);
    for (int64_t x = 0; x < pixels;) {
      const int64_t length = min_of(pixels - x, conv_.width - at.j);
      runs[count++] = {at, length, x};
      x += length;
      at.j += length - 1;
      at.advance(conv_);
    }
    return count;
  }

  // lines[(c * taps + t) * width + x] = what pixel x sees of channel c through tap t.
  void pack_lines(const T* source, int64_t channels, const Scratch& scratch, int64_t runs,
                  int64_t pixels, int vectors) const {
    const int64_t width = vectors * kLanes<A>;
    const int64_t step = conv_.step_w * conv_.source.w;
    const int64_t line_step = conv_.tap_count * width;
    for (int64_t t = 0; t < conv_.tap_count; ++t) {
      const Tap& tap = conv_.taps[t];
      A* tap_lines = scratch.lines + t * width;
      for (int64_t r = 0; r < runs; ++r) {
        const Run& run = scratch.runs[r];
        A* to = tap_lines + run.column;
        const int64_t h = run.at.i * conv_.step_h + tap.dh;
        // Pixels [begin, end) of the run see the image: 0 <= w0 + x * step_w < source_width.
        const int64_t w0 = run.at.j * conv_.step_w + tap.dw;
        int64_t begin = w0 >= 0 ? 0 : ceil_div(-w0, conv_.step_w);
        int64_t end =
            w0 >= conv_.source_width ? 0 : ceil_div(conv_.source_width - w0, conv_.step_w);
        if (h < 0 || h >= conv_.source_height) end = 0;
        end = min_of(end, run.count);
        begin = min_of(begin, run.count);
        if (end <= begin) {
          for (int64_t c = 0; c < channels; ++c) {
            for (int64_t x = 0; x < run.count; ++x) to[c * line_step + x] = A(0);
          }
          continue;
        }
        const T* from = source + run.at.n * conv_.source.n + h * conv_.source.h +
                        (w0 + begin * conv_.step_w) * conv_.source.w;
        for (int64_t c = 0; c < channels; ++c, from += conv_.source.c, to += line_step) {
          for (int64_t x = 0; x < begin; ++x) to[x] = A(0);
          copy_widened(from, step, end - begin, to + begin);
          for (int64_t x = end; x < run.count; ++x) to[x] = A(0);
        }
      }
      if (pixels == width) continue;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t x = pixels; x < width; ++x) tap_lines[c * line_step + x] = A(0);
      }
    }
  }

  const TapConv& conv_;
  const T* source_;
  const T* weight_;
  const T* bias_;
  T* dest_;
  int threads_;
  int64_t depth_, panels_, rows_;
  bool weights_in_place_;
  int64_t channels_at_once_;
  int64_t rows_at_once_, row_groups_;
  A* packed_weights_;
  A* biases_;
  Scratch scratch_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
