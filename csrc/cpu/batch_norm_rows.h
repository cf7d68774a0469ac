// Batch normalisation of channels_last tensors: a table with a row for each pixel and a column for
// each channel.
//
// Where the channels fill no whole number of vectors, several pixels make one row, whose columns
// repeat the channels. What is left over at the end is one row more, a short one.
#pragma once

#include "batch_norm.h"

namespace gdfast::cpu {
namespace {

template <typename T>
class Rows {
  using A = typename Accumulator<T>::type;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  explicit Rows(const BatchNormProblem& p) : channels_(p.C) {
    const int64_t pixels = p.N * p.S;
    int64_t repeats = 1;
    // Four vectors a row at least, unless that makes rows of many vectors.
    while (repeats < kWidth && (p.C * repeats % kWidth != 0)) repeats *= 2;
    while (p.C * repeats < 4 * kWidth) repeats *= 2;
    if (p.C >= kWidth && p.C * repeats > kMostColumns) repeats = 1;
    columns_ = p.C * repeats;
    rows_ = pixels / repeats;
    short_row_ = pixels * p.C - rows_ * columns_;
  }

  int64_t columns() const { return columns_; }
  // Index of some value of a channel.
  int64_t sample_of(int64_t channel) const { return channel; }

  // How many elements lie side by side between two places where vectors begin anew.
  int64_t pitch() const { return columns_; }
  // Scratch elements that a thread needs.
  int64_t scratch() const { return 3 * columns_; }

  Cut cut(int64_t streams, int threads) const {
    const int64_t bytes = columns_ * rows_ * static_cast<int64_t>(sizeof(T)) * streams;
    const int64_t most = max_of(1, bytes / kBytesPerRegion);
    // Fewer pixels than a row has are one region without rows, whose end is the short row.
    const int64_t height = max_of(1, ceil_div(rows_, min_of(most, kRegionsPerThread * threads)));
    return {false, max_of(1, ceil_div(rows_, height)), height};
  }

  Region region(const Cut& cut, int64_t index) const {
    const int64_t begin = index * cut.step, end = begin + cut.step;
    return {0, columns_, begin, min_of(end, rows_), 0, 0};
  }

  Region whole() const { return {0, columns_, 0, rows_, 0, 0}; }

  // visit(piece) for parts of a region, one after the other, that give the sums of the whole: they
  // begin where a sum does. With `many`, each fits a core's cache but for the last, half as large
  // again at most: a matrix product would read all weights for the few pixels of a short one.
  template <typename Visit>
  void for_pieces(const Region& g, bool many, const Visit& visit) const {
    const int64_t bytes = kSumLength * columns_ * static_cast<int64_t>(sizeof(T));
    const int64_t step = many ? kSumLength * sums_of_piece(bytes) : g.i_end - g.i;
    Region piece = g;
    for (; g.i_end - piece.i > step + step / 2; piece.i = piece.i_end) {
      piece.i_end = piece.i + step;
      visit(piece);
    }
    piece.i_end = g.i_end;
    visit(piece);
  }

  // The pixels of a region's rows, those of the short row with it.
  PixelRange pixels_of(const Region& g) const {
    const int64_t of_row = columns_ / channels_;
    const int64_t left_over = g.i_end == rows_ ? short_row_ / channels_ : 0;
    return {g.i * of_row, g.i_end * of_row + left_over};
  }

  // Adds to sums: the values less origin[channel], and their squares.
  void statistics(const Region& g, const T* input, const A* origin, A* scratch,
                  const Sums& sums) const {
    A* const shift = scratch;
    A* const first = scratch + columns_;
    A* const second = scratch + 2 * columns_;
    const int64_t columns = columns_;
    for_tables(g, [&](const Region& table) {
      for (int64_t begin = table.i; begin < table.i_end; begin += kSumLength) {
        const int64_t end = min_of(begin + kSumLength, table.i_end);
        // The mean of the first rows, which stay in the first-level cache for the sums about it.
        const int64_t near_end = min_of(begin + kNearRows, end);
        const A share = A(1) / static_cast<A>(near_end - begin);
        for_vectors(table, begin, near_end, [=](auto group, auto count, int64_t row, int64_t c) {
          Vec<A> sum = row == begin ? Vec<A>{} : load_group(group, shift + c);
          for_rows(count,
                   [&](int i) { sum += load_group(group, input + (row + i) * columns + c); });
          if (row + count == near_end) sum = finite<A>(sum * share);
          store_group(group, shift + c, sum);
        });
        for_vectors(table, begin, end, [=](auto group, auto count, int64_t row, int64_t c) {
          const Vec<A> near = load_group(group, shift + c);
          Vec<A> sum{}, squares{};
          if (row != begin) {
            sum = load_group(group, first + c);
            squares = load_group(group, second + c);
          }
          for_rows(count, [&](int i) {
            const Vec<A> d = load_group(group, input + (row + i) * columns + c) - near;
            sum += d;
            squares += d * d;
          });
          store_group(group, first + c, sum);
          store_group(group, second + c, squares);
        });
        // About another origin: sum of (v + d) and of (v + d)^2 over n values, d = shift - origin.
        const double n = static_cast<double>(end - begin);
        for (int64_t c = table.c; c < table.c_end; ++c) {
          const double d = static_cast<double>(shift[c]) - static_cast<double>(origin[c]);
          sums.first[c] += first[c] + n * d;
          sums.second[c] += second[c] + d * (2.0 * first[c] + n * d);
        }
      }
    });
  }

  template <Activation kActivation, bool kResidual>
  void apply(const Region& g, const T* input, const T* residual, const Factors<A>& given,
             A negative_slope, T* output, bool stream) const {
    const Vec<A> slope = broadcast(negative_slope);
    const Factors<A> factors = given;
    const int64_t columns = columns_;
    for_tables_backwards(g, [&](const Region& table) {
      for_vectors(table, table.i, table.i_end, [=](auto group, auto count, int64_t row, int64_t c) {
        const Vec<A> mean = load_group(group, factors.mean + c);
        const Vec<A> scale = load_group(group, factors.scale + c);
        const Vec<A> bias = load_group(group, factors.bias + c);
        for_rows(count, [&](int i) {
          const int64_t here = (row + i) * columns + c;
          Vec<A> z = (load_group(group, input + here) - mean) * scale + bias;
          if (kResidual) z += load_group(group, residual + here);
          store_result(group, output + here, activate<kActivation, A>(z, slope), stream);
        });
      });
    });
  }

  // Adds to sums: the gradient before the activation, and its products with input - mean.
  template <Activation kActivation, PreActivation kFrom>
  void reduce(const Region& g, const Gradients<T>& to, const Factors<A>& given, A negative_slope,
              bool stream, A* scratch, const Sums& sums) const {
    A* const first = scratch;
    A* const second = scratch + columns_;
    const Vec<A> leak = broadcast(negative_slope);
    const Gradients<T> at = to;
    const Factors<A> factors = given;
    const int64_t columns = columns_;
    for_tables(g, [&](const Region& table) {
      for (int64_t begin = table.i; begin < table.i_end; begin += kSumLength) {
        const int64_t end = min_of(begin + kSumLength, table.i_end);
        for_vectors(table, begin, end, [=](auto group, auto count, int64_t row, int64_t c) {
          const Vec<A> mean = load_group(group, factors.mean + c);
          const Vec<A> scale = load_group(group, factors.scale + c);
          const Vec<A> bias = load_group(group, factors.bias + c);
          Vec<A> sum{}, products{};
          if (row != begin) {
            sum = load_group(group, first + c);
            products = load_group(group, second + c);
          }
          for_rows(count, [&](int i) {
            const int64_t here = (row + i) * columns + c;
            const Vec<A> centred = load_group(group, at.input + here) - mean;
            const Vec<A> grad =
                grad_at<kActivation, kFrom>(group, at, here, centred, scale, bias, leak, stream);
            sum += grad;
            products += grad * centred;
          });
          store_group(group, first + c, sum);
          store_group(group, second + c, products);
        });
        for (int64_t c = table.c; c < table.c_end; ++c) {
          sums.first[c] += first[c];
          sums.second[c] += second[c];
        }
      }
    });
  }

  // Writes grad_input, in evaluation without the share of the statistics.
  template <Activation kActivation, PreActivation kFrom>
  void grad_input(const Region& g, const Gradients<T>& to, const Factors<A>& given,
                  A negative_slope, bool training, bool stream) const {
    const Vec<A> leak = broadcast(negative_slope);
    const Gradients<T> at = to;
    const Factors<A> factors = given;
    const int64_t columns = columns_;
    for_tables_backwards(g, [&](const Region& table) {
      for_vectors(table, table.i, table.i_end, [=](auto group, auto count, int64_t row, int64_t c) {
        const Vec<A> mean = load_group(group, factors.mean + c);
        const Vec<A> scale = load_group(group, factors.scale + c);
        const Vec<A> bias = load_group(group, factors.bias + c);
        const Vec<A> slope = load_group(group, factors.slope + c);
        const Vec<A> offset = load_group(group, factors.offset + c);
        for_rows(count, [&](int i) {
          const int64_t here = (row + i) * columns + c;
          const Vec<A> centred = load_group(group, at.input + here) - mean;
          Vec<A> result =
              grad_at<kActivation, kFrom>(group, at, here, centred, scale, bias, leak, stream) *
              scale;
          if (training) result += centred * slope + offset;
          store_result(group, at.grad_input + here, result, stream);
        });
      });
    });
  }

 private:
  static constexpr int64_t kRegionsPerThread = 4;
  static constexpr int64_t kPieceBytes = 128 * 1024, kMostPieceBytes = 384 * 1024;
  // Rows of so many sums are whole tiles of a matrix product, which have 6.
  static constexpr int64_t kWholeSums = 3;
  static constexpr int64_t kMostColumns = 4096;
  // Rows whose mean the sums are taken about, of kSumLength.
  static constexpr int64_t kNearRows = 8;
  static constexpr int kRowsAtOnce = 4;
  static constexpr int64_t kShortRow = 256;  // bytes
  // The second pass goes backwards in steps of so much, each of them forwards.
  static constexpr int64_t kBandBytes = 64 * 1024;

  static int64_t sums_of_piece(int64_t bytes_of_sum) {
    const int64_t fitting = kPieceBytes / bytes_of_sum;
    if (fitting >= kWholeSums) return fitting / kWholeSums * kWholeSums;
    return kWholeSums * bytes_of_sum <= kMostPieceBytes ? kWholeSums : 1;
  }

  // The gradient in front of the activation, written for the residual too where that is wanted.
  template <Activation kActivation, PreActivation kFrom, typename G>
  GDFAST_INLINE static Vec<A> grad_at(const G& group, const Gradients<T>& at, int64_t here,
                                      Vec<A> centred, Vec<A> scale, Vec<A> bias, Vec<A> leak,
                                      bool stream) {
    Vec<A> other{};
    if (kFrom != PreActivation::kInput) other = load_group(group, at.other + here);
    const Vec<A> grad = grad_before<kActivation, kFrom, A>(load_group(group, at.grad_output + here),
                                                           centred, other, scale, bias, leak);
    if constexpr (kFrom != PreActivation::kInput) {
      if (at.grad_residual != nullptr) store_result(group, at.grad_residual + here, grad, stream);
    }
    return grad;
  }

  template <typename Count, typename Visit>
  GDFAST_INLINE static void for_rows(Count, const Visit& visit) {
#pragma GCC unroll 4
    for (int i = 0; i < Count::value; ++i) visit(i);
  }

  // The region itself, and the short row where the region has the last of the others.
  template <typename Table>
  GDFAST_INLINE void for_tables(const Region& g, const Table& table) const {
    const bool has_short_row = short_row_ != 0 && g.i_end == rows_;
    const Region tables[] = {g, {0, short_row_, rows_, rows_ + 1, 0, 0}};
    for (int t = 0; t < (has_short_row ? 2 : 1); ++t) table(tables[t]);
  }

  // The same in bands of rows, the last one first.
  template <typename Table>
  GDFAST_INLINE void for_tables_backwards(const Region& g, const Table& table) const {
    const int64_t row_bytes = columns_ * static_cast<int64_t>(sizeof(T));
    const int64_t height = max_of(1, kBandBytes / row_bytes);
    for_tables(g, [&](const Region& whole) {
      Region band = whole;
      for (int64_t b = ceil_div(whole.i_end - whole.i, height); b-- > 0;) {
        band.i = whole.i + b * height;
        band.i_end = min_of(band.i + height, whole.i_end);
        table(band);
      }
    });
  }

  // visit(group, count, row, c) for each vector of columns, of `count` rows at a time. Memory is
  // read in order: short rows several at a time, which share their factors, long ones one by one,
  // since the processor foresees what is read next in a few places only. What the visit reads it
  // should have as values of its own: anything else might change with each store.
  template <typename Visit>
  GDFAST_INLINE void for_vectors(const Region& table, int64_t begin, int64_t end,
                                 Visit visit) const {
    using Several = std::integral_constant<int, kRowsAtOnce>;
    using One = std::integral_constant<int, 1>;
    const int64_t first = table.c, last = table.c_end;
    const int64_t whole = first + (last - first) / kWidth * kWidth;
    int64_t row = begin;
    if ((last - first) * static_cast<int64_t>(sizeof(T)) <= kShortRow) {
      for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) {
        for (int64_t c = first; c < whole; c += kWidth) {
          visit(Group<1, true>{kWidth}, Several(), row, c);
        }
      }
    }
    for (; row < end; ++row) {
      for (int64_t c = first; c < whole; c += kWidth) visit(Group<1, true>{kWidth}, One(), row, c);
    }
    if (whole == last) return;
    for (row = begin; row < end; ++row) visit(Group<1, false>{last - whole}, One(), row, whole);
  }

  int64_t channels_, columns_, rows_, short_row_;
};

}  // namespace
}  // namespace gdfast::cpu
