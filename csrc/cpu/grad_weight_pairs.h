// conv2d_grad_weight in bfloat16: GradWeight's way with pairs of pixels.
//
// A pair is a column of two lines of the output that follow each other, be they of one image or of
// two: so a line that is left over has a line of zeros beside it, in both operands, and nothing
// else is ever multiplied by a zero. Both operands are copied, as their pairs lie nowhere.
#pragma once

#include "bf16_pairs.h"
#include "pixel_major.h"
#include "weight_rows.h"

namespace gdfast::cpu {
namespace {

class PairGradWeight {
 public:
  PairGradWeight(const Conv2dProblem& problem, const PixelMajor& grad_output,
                 const PixelMajor& input, BFloat16* grad_weight, BFloat16* grad_bias, int threads)
      : p_(problem),
        grad_output_(grad_output),
        input_(input),
        grad_weight_(grad_weight),
        grad_bias_(grad_bias),
        threads_(threads),
        channels_(p_.C / p_.groups),
        produced_(p_.K / p_.groups),
        weight_rows_(p_),
        rows_(round_up(weight_rows_.count(), kTileRows)),
        lines_(p_.N * p_.P) {
    const int64_t vectors = ceil_div(produced_, kLanes<float>);
    vectors_ = static_cast<int>(ceil_div(vectors, ceil_div(vectors, kMaxVectors)));
    width_ = vectors_ * kLanes<float>;
    panels_ = ceil_div(produced_, width_);

    const int64_t line_pairs = ceil_div(lines_, 2);
    chunk_columns_ = ceil_div(p_.Q, ceil_div(p_.Q, kChunkPairs));
    chunk_lines_ = chunk_columns_ < p_.Q ? 1 : max_of(1, min_of(kChunkPairs / p_.Q, line_pairs));
    chunks_ = ceil_div(line_pairs, chunk_lines_) * ceil_div(p_.Q, chunk_columns_);
    image_columns_ = (chunk_columns_ - 1) * p_.stride_w + (p_.S - 1) * p_.dilation_w + 1;
    // One vector more than the channels, or lines of a power of two would share sets of L1.
    const bool few = channels_ < kLanes<float>;
    image_channels_ = few ? channels_ : round_up(channels_, kLanes<float>) + kLanes<float>;

    const int64_t owners = p_.groups * panels_;
    const auto enough = [&](int64_t parts) {
      return owners * parts % threads == 0 || owners * parts >= 4 * threads;
    };
    int64_t blocks = 1;
    shares_ = 1;
    while (!enough(blocks) && (blocks + 1) * kBlockRows <= rows_) ++blocks;
    while (!enough(blocks * shares_) && shares_ < chunks_) ++shares_;
    block_rows_ = round_up(ceil_div(rows_, blocks), kTileRows);
    blocks_ = ceil_div(rows_, block_rows_);
  }

  void run() {
    const ThreadScratch memory(
        threads_, [&](Carver& carver) { carve(carver); },
        [&](Carver& carver) { scratch_from(carver); });
    std::memset(zeros_, 0, width_ * sizeof *zeros_);
    for (int64_t row = 0; row < rows_; ++row) row_offsets_[row] = row_offset(row);
    const int64_t owners = p_.groups * panels_;
    parallel_for(owners * blocks_ * shares_, threads_, [&](int64_t index, int thread) {
      Carver carver = memory.of(thread);
      task(index, scratch_from(carver));
    });
    const int64_t pieces = ceil_div(rows_, kBlockRows);
    parallel_for(owners * pieces, threads_, [&](int64_t index, int) {
      const int64_t row = index % pieces * kBlockRows;
      write(index / pieces, row, min_of(row + kBlockRows, weight_rows_.count()));
    });
  }

 private:
  // Pairs of pixels of a chunk: 96 x 256 bytes = 24 KB of a panel leave room in an L1 of 32 KB for
  // the lines of the image that pass by.
  static constexpr int64_t kChunkPairs = 96;
  // Rows of a block, where there are enough for several.
  static constexpr int64_t kBlockRows = 64 * kTileRows;

  // Pairs of lines [pair, pair + pairs), and columns of theirs.
  struct Chunk {
    int64_t pair, pairs, column, columns;
  };

  struct Scratch {
    BFloat16Pair* image;        // [pair of lines][r][column][channel]
    BFloat16Pair* panel;        // [pair of lines][column][width]
    const BFloat16Pair** rows;  // [pair of lines][kTileRows]
  };

  void carve(Carver& carver) {
    const int64_t owners = p_.groups * panels_;
    sums_ = carver.take<float>(owners * shares_ * rows_ * width_);
    bias_sums_ = carver.take<float>(owners * shares_ * width_);
    zeros_ = carver.take<float>(width_);
    row_offsets_ = carver.take<int64_t>(rows_);
  }

  Scratch scratch_from(Carver& carver) const {
    Scratch scratch;
    scratch.image =
        carver.take<BFloat16Pair>(chunk_lines_ * p_.R * image_columns_ * image_channels_);
    scratch.panel = carver.take<BFloat16Pair>(chunk_lines_ * chunk_columns_ * width_);
    scratch.rows = carver.take<const BFloat16Pair*>(chunk_lines_ * kTileRows);
    return scratch;
  }

  // Where a row's pairs begin, from where the image of a pair of lines begins.
  int64_t row_offset(int64_t row) const {
    const WeightRows::Row at = weight_rows_.at(min_of(row, weight_rows_.count() - 1));
    return (at.r * image_columns_ + at.s * p_.dilation_w) * image_channels_ + at.c;
  }

  Chunk chunk_at(int64_t index) const {
    const int64_t across = ceil_div(p_.Q, chunk_columns_);
    const int64_t pair = index / across * chunk_lines_, column = index % across * chunk_columns_;
    return {pair, min_of(chunk_lines_, ceil_div(lines_, 2) - pair), column,
            min_of(chunk_columns_, p_.Q - column)};
  }

  void task(int64_t index, const Scratch& scratch) const {
    const int64_t share = index % shares_;
    const int64_t block = index / shares_ % blocks_;
    const int64_t owner = index / shares_ / blocks_;
    const int64_t group = owner / panels_, first = owner % panels_ * width_;
    float* sums = sums_ + (owner * shares_ + share) * rows_ * width_;
    float* bias_sums = bias_sums_ + (owner * shares_ + share) * width_;
    const bool bias = grad_bias_ != nullptr && block == 0;
    if (bias) std::memset(bias_sums, 0, width_ * sizeof *bias_sums);
    const int64_t row0 = block * block_rows_, row_end = min_of(row0 + block_rows_, rows_);
    const int64_t begin = chunks_ * share / shares_, end = chunks_ * (share + 1) / shares_;

    for (int64_t number = begin; number < end; ++number) {
      const Chunk chunk = chunk_at(number);
      copy_panel(chunk, group, first, scratch.panel);
      copy_image(chunk, group, scratch.image);
      if (bias) add_pairs(scratch.panel, chunk.pairs * chunk.columns, bias_sums);
      TileArgs<BFloat16Pair> args;
      args.row_step = p_.stride_w * image_channels_;
      args.panel = scratch.panel;
      args.panel_step = width_;
      args.segments = chunk.pairs;
      args.length = chunk.columns;
      args.start = zeros_;
      args.how = number == begin ? Start::kColumns : Start::kAccumulate;
      args.rows = scratch.rows;
      for (int64_t row = row0; row < row_end; row += kTileRows) {
        float* out[kTileRows];
        for (int i = 0; i < kTileRows; ++i) out[i] = sums + (row + i) * width_;
        args.out = out;
        for (int64_t g = 0; g < chunk.pairs; ++g) {
          const BFloat16Pair* image = scratch.image + g * p_.R * image_columns_ * image_channels_;
          for (int i = 0; i < kTileRows; ++i) {
            scratch.rows[g * kTileRows + i] = image + row_offsets_[row + i];
          }
        }
        multiply_tile(vectors_, args);
      }
    }
  }

  // Where a line of the output begins; null for the one that the last line may lack.
  const BFloat16* grad_line(int64_t line, int64_t group, int64_t first) const {
    if (line >= lines_) return nullptr;
    return grad_output_.data() + group * grad_output_.group_step() + first +
           line / p_.P * grad_output_.strides().n + line % p_.P * grad_output_.strides().h;
  }

  void copy_panel(const Chunk& chunk, int64_t group, int64_t first, BFloat16Pair* to) const {
    const int64_t valid = min_of(width_, produced_ - first), step = grad_output_.strides().w;
    for (int64_t g = 0; g < chunk.pairs; ++g) {
      const BFloat16* a = grad_line(2 * (chunk.pair + g), group, first);
      const BFloat16* b = grad_line(2 * (chunk.pair + g) + 1, group, first);
      for (int64_t q = chunk.column; q < chunk.column + chunk.columns; ++q, to += width_) {
        interleave(a + q * step, b == nullptr ? nullptr : b + q * step, valid, to);
        std::memset(to + valid, 0, (width_ - valid) * sizeof *to);
      }
    }
  }

  // The line of the image that a line of the output sees through row r of the kernel.
  const BFloat16* image_line(int64_t line, int64_t r, int64_t group) const {
    const int64_t h = line % p_.P * p_.stride_h - p_.pad_h + r * p_.dilation_h;
    if (line >= lines_ || h < 0 || h >= p_.H) return nullptr;
    return input_.data() + group * input_.group_step() + line / p_.P * input_.strides().n +
           h * input_.strides().h;
  }

  // Copies the image lines that the chunk sees, each with its own border of zeros.
  void copy_image(const Chunk& chunk, int64_t group, BFloat16Pair* to) const {
    const int64_t w0 = chunk.column * p_.stride_w - p_.pad_w, step = input_.strides().w;
    const int64_t columns = (chunk.columns - 1) * p_.stride_w + (p_.S - 1) * p_.dilation_w + 1;
    for (int64_t g = 0; g < chunk.pairs; ++g) {
      for (int64_t r = 0; r < p_.R; ++r, to += image_columns_ * image_channels_) {
        const BFloat16* a = image_line(2 * (chunk.pair + g), r, group);
        const BFloat16* b = image_line(2 * (chunk.pair + g) + 1, r, group);
        for (int64_t x = 0; x < columns; ++x) {
          const int64_t w = w0 + x;
          const bool inside = w >= 0 && w < p_.W;
          interleave(inside && a != nullptr ? a + w * step : nullptr,
                     inside && b != nullptr ? b + w * step : nullptr, channels_,
                     to + x * image_channels_);
        }
      }
    }
  }

  // sums[j] += both of panel[x * width + j] over all x, several sums side by side.
  void add_pairs(const BFloat16Pair* panel, int64_t pairs, float* sums) const {
    constexpr int kParts = 4;
    for (int64_t j = 0; j < width_; j += kLanes<float>) {
      Vec<float> part[kParts][2] = {};
      for (int64_t x = 0; x < pairs; ++x) {
        const Vec<uint32_t> both = Operand<BFloat16Pair>::line(panel + x * width_ + j);
        part[x % kParts][0] += (Vec<float>)(both << 16);
        part[x % kParts][1] += (Vec<float>)(both & 0xffff0000u);
      }
      Vec<float> sum = load(sums + j);
      for (int i = 0; i < kParts; ++i) sum += part[i][0] + part[i][1];
      store<float>(sums + j, sum);
    }
  }

  // Adds up the shares of rows [row, end) and writes them where they belong.
  void write(int64_t owner, int64_t row, int64_t end) const {
    const int64_t group = owner / panels_, first = owner % panels_ * width_;
    const int64_t valid = min_of(width_, produced_ - first);
    float* sums = sums_ + owner * shares_ * rows_ * width_;
    for (int64_t share = 1; share < shares_; ++share) {
      const float* more = sums + share * rows_ * width_;
      for (int64_t x = row * width_; x < end * width_; ++x) sums[x] += more[x];
    }
    weight_rows_.write(sums + row * width_, width_, valid, row, end,
                       grad_weight_ + (group * produced_ + first) * p_.weight.n);
    if (grad_bias_ == nullptr || end != weight_rows_.count()) return;
    float* bias_sums = bias_sums_ + owner * shares_ * width_;
    for (int64_t share = 1; share < shares_; ++share) {
      for (int64_t k = 0; k < valid; ++k) bias_sums[k] += bias_sums[share * width_ + k];
    }
    copy_narrowed(bias_sums, valid, grad_bias_ + group * produced_ + first, 1);
  }

  const Conv2dProblem& p_;
  const PixelMajor& grad_output_;
  const PixelMajor& input_;
  BFloat16* grad_weight_;
  BFloat16* grad_bias_;
  int threads_;
  int64_t channels_, produced_;
  WeightRows weight_rows_;
  int64_t rows_;  // padded to whole tiles
  int64_t lines_;
  int vectors_;
  int64_t width_, panels_;
  int64_t chunk_lines_, chunk_columns_, chunks_;  // chunk_lines_: pairs of lines
  int64_t image_columns_, image_channels_;
  int64_t blocks_, block_rows_, shares_;
  float* sums_;
  float* bias_sums_;
  float* zeros_;
  int64_t* row_offsets_;
};

}  // namespace
}  // namespace gdfast::cpu
