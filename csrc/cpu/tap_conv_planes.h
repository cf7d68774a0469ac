// TapConv where channels in or out are few: vectors run along the lines of the image.
//
// A task takes some lines of dest, of one image and of as many groups as fill a vector. It copies
// the source planes that they see, widened, with a border of zeros and their columns sorted by
// w % step_w: a vector of pixels is then one load through any tap. A tile is a few output channels
// x a few vectors of pixels, and its weights, which are few too, are broadcast. The last vector of
// a line ends at the last pixel, and computes some pixels again.
#pragma once

#include "band.h"

namespace gdfast::cpu {
namespace {

// Output channels of a tile. 8 x 3 vectors take 24 accumulators, 3 vectors of pixels and a
// broadcast: 28 of 32 registers. 4 x 3 take 16 of 16.
constexpr int kMostPlaneRows = kVectorRegisters == 32 ? 8 : 4;
constexpr int kMostPlaneVectors = 6;
constexpr int plane_vectors(int rows) {
  const int fit = (kVectorRegisters - 1) / (rows + 1);
  return fit < kMostPlaneVectors ? fit : kMostPlaneVectors;
}

// Terms that are summed in one go; longer sums are added up in two levels, which keeps their error
// small.
constexpr int64_t kPlaneDepth = 192;
// Source planes of a task, in bytes: half of a small L2.
constexpr int64_t kPlaneBytes = 1 << 17;
// Beyond this another way is better: the copy would leave L2.
constexpr int64_t kMostPlaneBytes = 3 << 18;

template <typename A>
struct PlaneTileArgs {
  const A* image;                       // what all vectors see through an offset of 0
  int64_t image_at[kMostPlaneVectors];  // where each vector begins
  const int64_t* offsets;               // [depth]
  int64_t depth;
  const A* weights;  // [depth][kRows]
  const A* start;    // [kRows]; null: add to what out holds
  A* out;
  int64_t out_at[kMostPlaneVectors];
  int64_t out_row;  // from one output channel to the next
  int rows;         // of kRows that are stored
  Ending<A> ending;
};

template <bool kEnds, typename A, int kRows, int kVectors>
GDFAST_INLINE void store_planes(const PlaneTileArgs<A>& args, Vec<A> (*sum)[kVectors]) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (i >= args.rows) break;
    A* out = args.out + i * args.out_row;
    // All loads before the stores: vectors may overlap.
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) {
      sum[i][v] += args.start == nullptr ? load(out + args.out_at[v]) : broadcast(args.start[i]);
    }
    if constexpr (kEnds) finish_sums<1, kVectors>(args.ending, sum + i);
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) store<A>(out + args.out_at[v], sum[i][v]);
  }
  if constexpr (kEnds) {
    // The vectors follow each other, but where the last one overlaps.
    const int64_t width = args.out_at[kVectors - 1] + kLanes<A> - args.out_at[0];
    finish_rows<kRows>(args.ending, args.out + args.out_at[0], args.out_row, args.rows, width);
  }
}

// out[i][v] (+)= start[i] + sum over x of weights[x][i] * image[offsets[x] + image_at[v]]
template <typename A, int kRows, int kVectors>
void multiply_planes(const PlaneTileArgs<A>& args) {
  Vec<A> sum[kRows][kVectors] = {};
  const A* from[kVectors];
  for (int v = 0; v < kVectors; ++v) from[v] = args.image + args.image_at[v];
  const A* weights = args.weights;
  for (int64_t x = 0; x < args.depth; ++x, weights += kRows) {
    const int64_t offset = args.offsets[x];
    Vec<A> line[kVectors];
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) line[v] = load(from[v] + offset);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      Vec<A> value = broadcast(weights[i]);
      keep_in_register<A>(value);
#pragma GCC unroll 6
      for (int v = 0; v < kVectors; ++v) sum[i][v] += value * line[v];
    }
  }
  if (args.ending.activation == Activation::kNone) {
    store_planes<false, A, kRows, kVectors>(args, sum);
  } else {
    store_planes<true, A, kRows, kVectors>(args, sum);
  }
}

template <typename A, int kRows>
GDFAST_INLINE void multiply_planes(int vectors, const PlaneTileArgs<A>& args) {
  constexpr int kMost = plane_vectors(kRows);
  if constexpr (kMost >= 6) {
    if (vectors == 6) return multiply_planes<A, kRows, 6>(args);
  }
  if constexpr (kMost >= 5) {
    if (vectors == 5) return multiply_planes<A, kRows, 5>(args);
  }
  if constexpr (kMost >= 4) {
    if (vectors == 4) return multiply_planes<A, kRows, 4>(args);
  }
  if (vectors == 3) return multiply_planes<A, kRows, 3>(args);
  if (vectors == 2) return multiply_planes<A, kRows, 2>(args);
  multiply_planes<A, kRows, 1>(args);
}

// Calls the tile of the given size; rows is 1 to 4 or kMostPlaneRows.
template <typename A>
GDFAST_INLINE void multiply_planes(int rows, int vectors, const PlaneTileArgs<A>& args) {
  switch (rows) {
    case 1:
      return multiply_planes<A, 1>(vectors, args);
    case 2:
      return multiply_planes<A, 2>(vectors, args);
    case 3:
      return multiply_planes<A, 3>(vectors, args);
    case 4:
      return multiply_planes<A, 4>(vectors, args);
#if defined(__AVX512F__)
    default:
      return multiply_planes<A, kMostPlaneRows>(vectors, args);
#endif
  }
}

template <typename T>
class PlaneTiles {
  using A = typename Accumulator<T>::type;

 public:
  PlaneTiles(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
             int threads)
      : conv_(conv),
        source_(source),
        weight_(weight),
        bias_(bias),
        dest_(dest),
        threads_(threads),
        ending_(Ending<A>::of(conv)),
        band_(conv),
        depth_(conv.reduced * conv.tap_count) {
    low_ = conv.taps[0].dh;
    int64_t high = low_;
    for (int64_t t = 1; t < conv.tap_count; ++t) {
      low_ = min_of(low_, conv.taps[t].dh);
      high = max_of(high, conv.taps[t].dh);
    }
    span_ = high - low_ + 1;
    // Channels side by side are read and written together, whole vectors of them.
    const bool side_by_side = conv.source.c == 1 || conv.dest.c == 1;
    sets_ = side_by_side ? max_of(1, kLanes<A> / max_of(conv.reduced, conv.produced)) : 1;
    sets_ = min_of(sets_, conv.groups);
    set_count_ = ceil_div(conv.groups, sets_);

    const int64_t line_bytes =
        sets_ * conv.reduced * band_.line_size() * static_cast<int64_t>(sizeof(A));
    lines_ = max_of(4, (kPlaneBytes / line_bytes - span_) / conv.step_h + 1);
    // Enough tasks for all threads to end together.
    const int64_t others = conv.batch * set_count_;
    lines_ = min_of(lines_, ceil_div(conv.height, ceil_div(8 * threads, others)));
    lines_ = ceil_div(conv.height, ceil_div(conv.height, lines_));
    // Planes a power of two apart would share sets of L1.
    const int64_t rows = (lines_ - 1) * conv.step_h + span_;
    plane_size_ = (ceil_div(rows * band_.line_size(), kLanes<A>) | 1) * kLanes<A>;

    rows_ = conv.produced <= 4                    ? static_cast<int>(conv.produced)
            : conv.produced <= kMostPlaneRows / 2 ? 4
                                                  : kMostPlaneRows;
    blocks_ = ceil_div(conv.produced, rows_);
    parts_ = ceil_div(depth_, kPlaneDepth);
    part_depth_ = ceil_div(depth_, parts_);
    narrow_ = conv.width < kLanes<A>;
    in_dest_ = kSame<T, A> && conv.dest.w == 1 && !narrow_;
    lines_at_once_ = narrow_ ? min_of(lines_, plane_vectors(rows_)) : 1;
    sums_width_ = round_up(conv.width, kLanes<A>);
  }

  // Bytes of a thread's copy, for who has to decide whether this is the right way.
  int64_t image_bytes() const {
    return sets_ * conv_.reduced * plane_size_ * static_cast<int64_t>(sizeof(A));
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    for (int64_t c = 0; c < conv_.reduced; ++c) {
      for (int64_t t = 0; t < conv_.tap_count; ++t) {
        const Tap& tap = conv_.taps[t];
        offsets_[c * conv_.tap_count + t] =
            c * plane_size_ + (tap.dh - low_) * band_.line_size() + band_.offset_of(tap);
      }
    }
    parallel_for(conv_.groups * blocks_, depth_ * rows_ > 4096 ? threads_ : 1,
                 [&](int64_t index, int) { pack_weights(index); });
    const int64_t parts = ceil_div(conv_.height, lines_);
    parallel_for(conv_.batch * set_count_ * parts, threads_, [&](int64_t index, int thread) {
      task(index / parts / set_count_, index / parts % set_count_ * sets_, index % parts * lines_,
           thread);
    });
  }

 private:
  int64_t carve(Carver carver) {
    offsets_ = carver.template take<int64_t>(depth_);
    weights_ = carver.template take<A>(conv_.groups * blocks_ * depth_ * rows_);
    biases_ = carver.template take<A>(conv_.groups * blocks_ * rows_);
    const int64_t before = carver.used();
    image_ = carver.template take<A>(sets_ * conv_.reduced * plane_size_);
    sums_ = carver.template take<A>(
        in_dest_ ? 0 : sets_ * conv_.produced * lines_at_once_ * sums_width_);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  A* of_thread(A* part, int thread) const {
    return part + scratch_bytes_ / static_cast<int64_t>(sizeof(A)) * thread;
  }

  // weights_[group][block][c, tap][row], zero where a row is past the last output channel.
  void pack_weights(int64_t index) {
    const int64_t group = index / blocks_, first = index % blocks_ * rows_;
    A* to = weights_ + index * depth_ * rows_;
    for (int64_t i = 0; i < rows_; ++i) {
      const bool valid = first + i < conv_.produced;
      const T* from = weight_ + group * conv_.weight_group + (first + i) * conv_.weight_produced;
      biases_[index * rows_ + i] =
          valid && bias_ != nullptr ? widen(bias_[group * conv_.produced + first + i]) : A(0);
      for (int64_t x = 0; x < depth_; ++x) {
        const int64_t c = x / conv_.tap_count, t = x % conv_.tap_count;
        to[x * rows_ + i] =
            valid ? widen(from[c * conv_.weight_reduced + conv_.taps[t].weight]) : A(0);
      }
    }
  }

  void task(int64_t n, int64_t group0, int64_t line0, int thread) {
    const int64_t lines = min_of(lines_, conv_.height - line0);
    const int64_t groups = min_of(sets_, conv_.groups - group0);
    A* image = of_thread(image_, thread);
    A* sums = in_dest_ ? nullptr : of_thread(sums_, thread);
    copy_image(n, group0, groups, line0, lines, image);
    for (int64_t line = 0; line < lines; line += lines_at_once_) {
      const int64_t count = min_of(lines_at_once_, lines - line);
      T* to = dest_ + n * conv_.dest.n + group0 * conv_.dest_group + (line0 + line) * conv_.dest.h;
      for (int64_t g = 0; g < groups; ++g) {
        const A* from =
            image + g * conv_.reduced * plane_size_ + line * conv_.step_h * band_.line_size();
        A* out = sums + g * conv_.produced * lines_at_once_ * sums_width_;
        int64_t out_row = lines_at_once_ * sums_width_;
        if constexpr (kSame<T, A>) {
          if (in_dest_) {
            out = to + g * conv_.dest_group;
            out_row = conv_.dest.c;
          }
        }
        multiply_lines(group0 + g, from, count, out, out_row);
      }
      if (!in_dest_) write_out(sums, groups * conv_.produced, count, to);
    }
  }

  // One line of dest, or as many as lines_at_once_ where one is less than a vector.
  void multiply_lines(int64_t group, const A* from, int64_t lines, A* out, int64_t out_row) const {
    const int64_t vectors = narrow_ ? lines : ceil_div(conv_.width, kLanes<A>);
    const int64_t tiles = ceil_div(vectors, plane_vectors(rows_));
    PlaneTileArgs<A> args;
    args.image = from;
    args.out_row = out_row;
    args.ending = ending_;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = vectors * tile / tiles, end = vectors * (tile + 1) / tiles;
      for (int64_t v = first; v < end; ++v) {
        const int64_t column = min_of(v * kLanes<A>, conv_.width - kLanes<A>);
        args.image_at[v - first] = narrow_ ? v * conv_.step_h * band_.line_size() : column;
        args.out_at[v - first] = narrow_ ? v * sums_width_ : column;
      }
      for (int64_t block = 0; block < blocks_; ++block) {
        const int64_t number = group * blocks_ + block;
        args.out = out + block * rows_ * out_row;
        args.rows = static_cast<int>(min_of(rows_, conv_.produced - block * rows_));
        for (int64_t x = 0; x < depth_; x += part_depth_) {
          args.offsets = offsets_ + x;
          args.depth = min_of(part_depth_, depth_ - x);
          args.weights = weights_ + (number * depth_ + x) * rows_;
          args.start = x == 0 ? biases_ + number * rows_ : nullptr;
          if (parts_ > 1) args.ending = x + args.depth == depth_ ? ending_ : Ending<A>();
          multiply_planes<A>(rows_, static_cast<int>(end - first), args);
        }
      }
    }
  }

  // Copies the source lines that dest lines [line0, line0 + lines) see; zeros beyond the image.
  void copy_image(int64_t n, int64_t group0, int64_t groups, int64_t line0, int64_t lines,
                  A* to) const {
    const int64_t top = line0 * conv_.step_h + low_;
    const int64_t end = top + (lines - 1) * conv_.step_h + span_;
    const int64_t first = min_of(max_of(top, 0), end);
    const int64_t last = max_of(first, min_of(end, conv_.source_height));
    const int64_t size = band_.line_size(), channels = groups * conv_.reduced;
    const T* from = source_ + n * conv_.source.n + group0 * conv_.source_group;
    const bool side_by_side = conv_.source.c == 1 && 2 * channels >= kLanes<A>;
    for (int64_t c = 0; c < channels; ++c) {
      A* plane = to + c * plane_size_;
      std::memset(plane, 0, (first - top) * size * sizeof(A));
      if (!side_by_side) {
        band_.copy(from + c * conv_.source.c, first, last, plane + (first - top) * size);
      }
      std::memset(plane + (last - top) * size, 0, (end - last) * size * sizeof(A));
    }
    if (side_by_side) {
      band_.copy_channels(from, channels, first, last, to + (first - top) * size, plane_size_);
    }
  }

  // sums is [channels][lines_at_once_][sums_width_]; to is where its first element belongs.
  void write_out(const A* sums, int64_t channels, int64_t lines, T* to) const {
    const int64_t channel_step = lines_at_once_ * sums_width_;
    for (int64_t line = 0; line < lines; ++line, sums += sums_width_, to += conv_.dest.h) {
      if constexpr (kSame<T, A>) {
        if (conv_.dest.c == 1 && 2 * channels >= kLanes<A>) {
          transpose_lines<A>(sums, channel_step, conv_.width, channels, channels,
                             [&](int64_t x) { return to + x * conv_.dest.w; });
          continue;
        }
      }
      for (int64_t k = 0; k < channels; ++k) {
        copy_narrowed(sums + k * channel_step, conv_.width, to + k * conv_.dest.c, conv_.dest.w);
      }
    }
  }

  const TapConv& conv_;
  const T* source_;
  const T* weight_;
  const T* bias_;
  T* dest_;
  int threads_;
  Ending<A> ending_;
  Band<T> band_;
  int64_t depth_;             // terms of a sum
  int64_t low_, span_;        // source lines that a line of dest sees: from step_h * i + low_ on
  int64_t sets_, set_count_;  // groups of a task
  int64_t lines_, plane_size_;
  int rows_;
  int64_t blocks_;
  int64_t parts_, part_depth_;
  bool narrow_;   // a line is less than a vector
  bool in_dest_;  // sums are taken in dest itself
  int64_t lines_at_once_, sums_width_;
  int64_t* offsets_;
  A* weights_;
  A* biases_;
  A* image_;
  A* sums_;
  int64_t scratch_bytes_;
};

}  // namespace
}  // namespace gdfast::cpu
