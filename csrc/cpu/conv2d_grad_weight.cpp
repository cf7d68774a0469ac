// conv2d_grad_weight: a product whose reduction runs over the pixels of the output.
//
//   grad_weight[k, c, r, s] = sum over n, p, q of
//       grad_output[n, k, p, q] * input[n, c, p * stride_h - pad_h + r * dilation_h,
//                                            q * stride_w - pad_w + s * dilation_w]
//
// A tile is rows (c, r, s) x columns k. As q grows, the image value of a row moves on by a constant
// step, so rows are broadcast from the image where it lies, or from a copy with a border of zeros
// where there is padding. The panel is grad_output with its k side by side.
//
// A task owns a panel of k, a block of rows and a share of the output's lines. Shares are added up
// afterwards in a fixed order: the result depends on their number, which shape and threads decide,
// and never on timing.
#include "few_grad_weight.h"
#include "kernels.h"
#include "pack.h"
#include "pointwise_grad_weight.h"
#include "tile.h"
#include "weight_rows.h"
#include "widened.h"
#include "winograd_grad_weight.h"
#include "winograd_stride2_grad_weight.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

// Pixels of a chunk: their panel of grad_output stays in L1 (128 x 256 bytes = 32 KB of 48 with
// AVX-512, 256 x 64 bytes = 16 KB elsewhere) while all rows pass by.
constexpr int64_t kChunkPixels = kVectorRegisters == 32 ? 128 : 256;
// Rows of a block, where there are enough for several.
constexpr int64_t kBlockRows = 64 * kTileRows;

// A 1x1 kernel sees no neighbours: image lines that follow each other in memory become one.
Conv2dProblem with_lines_merged(Conv2dProblem p) {
  const bool pointwise = p.R == 1 && p.S == 1 && p.stride_h == 1 && p.stride_w == 1 &&
                         p.pad_h == 0 && p.pad_w == 0 && p.P == p.H && p.Q == p.W;
  if (pointwise && p.input.h == p.W * p.input.w && p.output.h == p.W * p.output.w) {
    p.W = p.Q = p.H * p.W;
    p.H = p.P = 1;
    if (p.N > 0 && p.input.n == p.W * p.input.w && p.output.n == p.W * p.output.w) {
      p.W = p.Q = p.N * p.W;
      p.N = 1;
    }
  }
  return p;
}

template <typename T>
class GradWeight {
  using A = typename Accumulator<T>::type;

 public:
  GradWeight(const Conv2dProblem& problem, const T* grad_output, const T* input, T* grad_weight,
             T* grad_bias, int threads)
      : p_(with_lines_merged(problem)),
        grad_output_(grad_output),
        input_(input),
        grad_weight_(grad_weight),
        grad_bias_(grad_bias),
        threads_(threads),
        channels_(p_.C / p_.groups),
        produced_(p_.K / p_.groups),
        weight_rows_(p_) {
    const int64_t vectors = ceil_div(produced_, kLanes<A>);
    vectors_ = static_cast<int>(ceil_div(vectors, ceil_div(vectors, kMaxVectors)));
    width_ = vectors_ * kLanes<A>;
    panels_ = ceil_div(produced_, width_);
    rows_ = round_up(weight_rows_.count(), kTileRows);

    const bool inside = p_.pad_h == 0 && p_.pad_w == 0 &&
                        (p_.P - 1) * p_.stride_h + (p_.R - 1) * p_.dilation_h < p_.H &&
                        (p_.Q - 1) * p_.stride_w + (p_.S - 1) * p_.dilation_w < p_.W;
    in_place_ = kSame<T, A> && inside;
    channels_last_image_ = p_.input.c == 1;

    lines_ = p_.N * p_.P;
    chunk_columns_ = ceil_div(p_.Q, ceil_div(p_.Q, kChunkPixels));
    chunk_lines_ = chunk_columns_ < p_.Q ? 1 : max_of(1, min_of(kChunkPixels / p_.Q, lines_));
    const bool lines_follow =
        chunk_lines_ == 1 ||
        (p_.output.h == p_.Q * p_.output.w && (p_.N == 1 || p_.output.n == p_.P * p_.output.h));
    // Lines of a panel that lie far apart share too few sets of L1.
    panel_in_place_ = kSame<T, A> && p_.output.c == 1 && produced_ % width_ == 0 &&
                      p_.output.w * static_cast<int64_t>(sizeof(T)) <= 512 && lines_follow;

    image_columns_ = (chunk_columns_ - 1) * p_.stride_w + (p_.S - 1) * p_.dilation_w + 1;
    // One vector more than the channels, or lines of a power of two would share sets of L1.
    image_channels_ = channels_last_image_ ? round_up(channels_, kLanes<A>) + kLanes<A> : channels_;
    row_step_ = p_.stride_w * (in_place_ ? p_.input.w : channels_last_image_ ? image_channels_ : 1);

    const int64_t owners = p_.groups * panels_;
    const auto enough = [&](int64_t parts) {
      return owners * parts % threads == 0 || owners * parts >= 4 * threads;
    };
    blocks_ = shares_ = 1;
    while (!enough(blocks_) && (blocks_ + 1) * kBlockRows <= rows_) ++blocks_;
    const int64_t chunks = ceil_div(lines_, chunk_lines_) * ceil_div(p_.Q, chunk_columns_);
    while (!enough(blocks_ * shares_) && shares_ < chunks) ++shares_;
    block_rows_ = round_up(ceil_div(rows_, blocks_), kTileRows);
    blocks_ = ceil_div(rows_, block_rows_);
    chunks_ = chunks;
  }

  void run() {
    Workspace workspace(carve(Carver()));
    carve(Carver(workspace.data()));
    std::memset(zeros_, 0, width_ * sizeof(A));
    for (int64_t row = 0; row < rows_; ++row) row_offsets_[row] = row_offset(row);
    const int64_t owners = p_.groups * panels_;
    parallel_for(owners * blocks_ * shares_, threads_,
                 [&](int64_t index, int thread) { task(index, thread); });
    const int64_t pieces = ceil_div(rows_, kBlockRows);
    parallel_for(owners * pieces, threads_, [&](int64_t index, int) {
      const int64_t row = index % pieces * kBlockRows;
      write(index / pieces, row, min_of(row + kBlockRows, weight_rows_.count()));
    });
  }

 private:
  // A share of the lines in the order of chunks: (lines, columns).
  struct Chunk {
    int64_t line, lines, column, columns;
  };

  struct Scratch {
    A* image;        // copies of image lines, where they can't be read in place
    A* panel;        // [chunk pixels][width]
    const A** rows;  // [chunk lines][kTileRows]
  };

  int64_t carve(Carver carver) {
    const int64_t owners = p_.groups * panels_;
    sums_ = carver.template take<A>(owners * shares_ * rows_ * width_);
    bias_sums_ = carver.template take<A>(owners * shares_ * width_);
    zeros_ = carver.template take<A>(width_);
    row_offsets_ = carver.template take<int64_t>(rows_);
    const int64_t before = carver.used();
    scratch_.image = carver.template take<A>(
        in_place_ ? 0 : chunk_lines_ * p_.R * image_columns_ * image_channels_);
    scratch_.panel =
        carver.template take<A>(panel_in_place_ ? 0 : chunk_lines_ * chunk_columns_ * width_);
    scratch_.rows = carver.template take<const A*>(kTileRows * chunk_lines_);
    scratch_bytes_ = carver.used() - before;
    return before + scratch_bytes_ * threads_;
  }

  Scratch scratch_of(int thread) const {
    const auto move = [&](auto* part) {
      return reinterpret_cast<decltype(part)>(reinterpret_cast<uintptr_t>(part) +
                                              scratch_bytes_ * thread);
    };
    return {move(scratch_.image), move(scratch_.panel), move(scratch_.rows)};
  }

  // Where a row's values begin, from where the image of a line begins.
  int64_t row_offset(int64_t row) const {
    const WeightRows::Row at = weight_rows_.at(min_of(row, weight_rows_.count() - 1));
    const int64_t s = at.s * p_.dilation_w;
    if (in_place_) return at.c * p_.input.c + at.r * p_.dilation_h * p_.input.h + s * p_.input.w;
    if (channels_last_image_) return (at.r * image_columns_ + s) * image_channels_ + at.c;
    return (at.r * channels_ + at.c) * image_columns_ + s;
  }

  Chunk chunk_at(int64_t index) const {
    const int64_t across = ceil_div(p_.Q, chunk_columns_);
    const int64_t line = index / across * chunk_lines_, column = index % across * chunk_columns_;
    return {line, min_of(chunk_lines_, lines_ - line), column,
            min_of(chunk_columns_, p_.Q - column)};
  }

  void task(int64_t index, int thread) {
    const int64_t share = index % shares_;
    const int64_t block = index / shares_ % blocks_;
    const int64_t owner = index / shares_ / blocks_;
    const int64_t group = owner / panels_, first = owner % panels_ * width_;
    const Scratch scratch = scratch_of(thread);
    A* sums = sums_ + (owner * shares_ + share) * rows_ * width_;
    A* bias_sums = bias_sums_ + (owner * shares_ + share) * width_;
    const bool bias = grad_bias_ != nullptr && block == 0;
    if (bias) std::memset(bias_sums, 0, width_ * sizeof(A));
    const int64_t row0 = block * block_rows_, row_end = min_of(row0 + block_rows_, rows_);
    const int64_t begin = chunks_ * share / shares_, end = chunks_ * (share + 1) / shares_;
    if (begin == end) {
      std::memset(sums + row0 * width_, 0, (row_end - row0) * width_ * sizeof(A));
    }

    for (int64_t number = begin; number < end; ++number) {
      const Chunk chunk = chunk_at(number);
      TileArgs<A> args;
      args.row_step = row_step_;
      args.segments = chunk.lines;
      args.length = chunk.columns;
      args.start = zeros_;
      args.how = number == begin ? Start::kColumns : Start::kAccumulate;
      args.rows = scratch.rows;
      point_panel(chunk, group, first, scratch, args);
      if (bias) add_lines(args.panel, args.panel_step, chunk.lines * chunk.columns, bias_sums);
      if (!in_place_) copy_image(chunk, group, scratch.image);
      for (int64_t row = row0; row < row_end; row += kTileRows) {
        A* out[kTileRows];
        for (int i = 0; i < kTileRows; ++i) out[i] = sums + (row + i) * width_;
        args.out = out;
        point_rows(chunk, group, row, scratch);
        multiply_tile<A>(vectors_, args);
      }
    }
  }

  void point_rows(const Chunk& chunk, int64_t group, int64_t row, const Scratch& scratch) const {
    for (int64_t g = 0; g < chunk.lines; ++g) {
      const A* line = scratch.image + g * p_.R * image_columns_ * image_channels_;
      if constexpr (kSame<T, A>) {
        if (in_place_) {
          const int64_t n = (chunk.line + g) / p_.P, p = (chunk.line + g) % p_.P;
          line = input_ + group * channels_ * p_.input.c + n * p_.input.n +
                 p * p_.stride_h * p_.input.h + chunk.column * p_.stride_w * p_.input.w;
        }
      }
      for (int i = 0; i < kTileRows; ++i) {
        scratch.rows[g * kTileRows + i] = line + row_offsets_[row + i];
      }
    }
  }

  // Points the tile to the chunk's grad_output, or to a copy with k side by side.
  void point_panel(const Chunk& chunk, int64_t group, int64_t first, const Scratch& scratch,
                   TileArgs<A>& args) const {
    const T* grad =
        grad_output_ + (group * produced_ + first) * p_.output.c + chunk.column * p_.output.w;
    if constexpr (kSame<T, A>) {
      if (panel_in_place_) {
        args.panel = grad + chunk.line / p_.P * p_.output.n + chunk.line % p_.P * p_.output.h;
        args.panel_step = p_.output.w;
        return;
      }
    }
    args.panel = scratch.panel;
    args.panel_step = width_;
    const int64_t valid = min_of(width_, produced_ - first);
    A* to = scratch.panel;
    for (int64_t g = 0; g < chunk.lines; ++g) {
      const int64_t n = (chunk.line + g) / p_.P, p = (chunk.line + g) % p_.P;
      const T* from = grad + n * p_.output.n + p * p_.output.h;
      if (p_.output.w == 1 && p_.output.c != 1) {
        transpose_widened(from, p_.output.c, chunk.columns, valid, width_, to, width_);
        to += chunk.columns * width_;
        continue;
      }
      for (int64_t q = 0; q < chunk.columns; ++q, to += width_) {
        copy_widened(from + q * p_.output.w, p_.output.c, valid, to);
        for (int64_t k = valid; k < width_; ++k) to[k] = A(0);
      }
    }
  }

  // sums[j] += panel[x * step + j] over all x. One sum would wait for itself at every pixel, and
  // its error would grow with each: several run side by side and are added up in pairs.
  void add_lines(const A* panel, int64_t step, int64_t pixels, A* sums) const {
    constexpr int kParts = 8;
    for (int64_t j = 0; j < width_; j += kLanes<A>) {
      Vec<A> part[kParts] = {};
      int64_t x = 0;
      for (; x + kParts <= pixels; x += kParts) {
#pragma GCC unroll 8
        for (int i = 0; i < kParts; ++i) part[i] += load(panel + (x + i) * step + j);
      }
      for (int i = 0; x < pixels; ++i, ++x) part[i] += load(panel + x * step + j);
      for (int half = kParts / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
      }
      store<A>(sums + j, load(sums + j) + part[0]);
    }
  }

  // Copies the image lines that the chunk's output lines see, each with its own border of zeros:
  // [line][r][column][c] from a channels_last image, else [line][r][c][column].
  void copy_image(const Chunk& chunk, int64_t group, A* to) const {
    const T* image = input_ + group * channels_ * p_.input.c;
    const int64_t w0 = chunk.column * p_.stride_w - p_.pad_w;
    const int64_t columns = (chunk.columns - 1) * p_.stride_w + (p_.S - 1) * p_.dilation_w + 1;
    const int64_t begin = min_of(max_of(-w0, 0), columns);
    const int64_t end = max_of(begin, min_of(columns, p_.W - w0));
    for (int64_t g = 0; g < chunk.lines; ++g) {
      const int64_t n = (chunk.line + g) / p_.P, p = (chunk.line + g) % p_.P;
      for (int64_t r = 0; r < p_.R; ++r, to += image_columns_ * image_channels_) {
        const int64_t h = p * p_.stride_h - p_.pad_h + r * p_.dilation_h;
        if (h < 0 || h >= p_.H || begin == end) {
          std::memset(to, 0, image_columns_ * image_channels_ * sizeof(A));
          continue;
        }
        const T* from = image + n * p_.input.n + h * p_.input.h + (w0 + begin) * p_.input.w;
        if (channels_last_image_) {
          std::memset(to, 0, begin * image_channels_ * sizeof(A));
          for (int64_t x = begin; x < end; ++x, from += p_.input.w) {
            copy_widened(from, 1, channels_, to + x * image_channels_);
          }
          std::memset(to + end * image_channels_, 0, (columns - end) * image_channels_ * sizeof(A));
        } else {
          for (int64_t c = 0; c < channels_; ++c, from += p_.input.c) {
            A* line = to + c * image_columns_;
            std::memset(line, 0, begin * sizeof(A));
            copy_widened(from, p_.input.w, end - begin, line + begin);
            std::memset(line + end, 0, (columns - end) * sizeof(A));
          }
        }
      }
    }
  }

  // Adds up the shares of rows [row, end) and writes them where they belong.
  void write(int64_t owner, int64_t row, int64_t end) {
    const int64_t group = owner / panels_, first = owner % panels_ * width_;
    const int64_t valid = min_of(width_, produced_ - first);
    A* sums = sums_ + owner * shares_ * rows_ * width_;
    for (int64_t share = 1; share < shares_; ++share) {
      const A* more = sums + share * rows_ * width_;
      for (int64_t x = row * width_; x < end * width_; ++x) sums[x] += more[x];
    }
    weight_rows_.write(sums + row * width_, width_, valid, row, end,
                       grad_weight_ + (group * produced_ + first) * p_.weight.n);
    if (grad_bias_ == nullptr || end != weight_rows_.count()) return;
    A* bias_sums = bias_sums_ + owner * shares_ * width_;
    for (int64_t share = 1; share < shares_; ++share) {
      for (int64_t k = 0; k < valid; ++k) bias_sums[k] += bias_sums[share * width_ + k];
    }
    copy_narrowed(bias_sums, valid, grad_bias_ + group * produced_ + first, 1);
  }

  const Conv2dProblem p_;
  const T* grad_output_;
  const T* input_;
  T* grad_weight_;
  T* grad_bias_;
  int threads_;
  int64_t channels_, produced_;
  int vectors_;
  int64_t width_, panels_;
  WeightRows weight_rows_;
  int64_t rows_;  // padded to whole tiles
  bool channels_last_image_;
  bool in_place_, panel_in_place_;
  int64_t lines_, chunk_lines_, chunk_columns_, chunks_;
  int64_t image_columns_, image_channels_, row_step_;
  int64_t blocks_, block_rows_, shares_;
  A* sums_;
  A* bias_sums_;
  A* zeros_;
  int64_t* row_offsets_;
  Scratch scratch_;
  int64_t scratch_bytes_;
};

}  // namespace

void conv2d_grad_weight(const Conv2dProblem& p, const void* grad_output, const void* input,
                        void* grad_weight, void* grad_bias, int threads) {
  if (p.is_depthwise()) {
    return depthwise_grad_weight(p, grad_output, input, grad_weight, grad_bias, threads);
  }
  const auto widened = [&](auto as) {
    as.grad_weight(grad_output, input, grad_weight, grad_bias, conv2d_grad_weight);
  };
  if (with_widened(p, threads, widened)) return;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](const T* grad_output, const T* input, T* grad_weight, T* grad_bias) {
      if constexpr (kSame<T, float>) {
        if (p.algorithm == Algorithm::kWinograd && p.N > 0 && winograd_grad_weight_fits<T>(p)) {
          run_winograd_grad_weight(p, grad_output, input, grad_weight, grad_bias, threads);
          return;
        }
        if (p.algorithm == Algorithm::kWinograd && winograd_stride2_fits(p)) {
          run_stride2_grad_weight(p, grad_output, input, grad_weight, grad_bias, threads);
          return;
        }
      }
      if (p.N > 0 && p.C / p.groups <= 8) {
        Workspace tap_memory(p.R * p.S * sizeof(Tap));
        const TapConv conv = forward_tap_conv(p, reinterpret_cast<Tap*>(tap_memory.data()));
        FewGradWeight<T> few(p, conv, grad_output, input, grad_weight, grad_bias, threads);
        if (few.fits()) {
          few.run();
          return;
        }
      }
      if constexpr (kSame<T, float>) {
        if (is_pointwise_grad_weight(p)) {
          PointwiseGradWeight(p, grad_output, input, grad_weight, grad_bias, threads).run();
          return;
        }
      }
      GradWeight<T>(p, grad_output, input, grad_weight, grad_bias, threads).run();
    };
    run(static_cast<const T*>(grad_output), static_cast<const T*>(input),
        static_cast<T*>(grad_weight), static_cast<T*>(grad_bias));
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
