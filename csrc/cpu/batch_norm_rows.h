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
    const int64_t column_bytes = rows_ * static_cast<int64_t>(sizeof(T)) * streams;
    const int64_t bytes = columns_ * column_bytes;
    const int64_t most = max_of(1, bytes / kBytesPerRegion);
    if (columns_ == channels_) {
      const int64_t share = ceil_div(columns_, min_of(most, 2 * threads));
      const int64_t slice = min_of(kCacheBytes / column_bytes, share) / kWidth * kWidth;
      if (slice >= kLeastSlice) return {true, ceil_div(columns_, slice), slice};
    }
    // Fewer pixels than a row has are one region without rows, whose end is the short row.
    const int64_t height = max_of(1, ceil_div(rows_, min_of(most, kRegionsPerThread * threads)));
    return {false, max_of(1, ceil_div(rows_, height)), height};
  }

  Region region(const Cut& cut, int64_t index) const {
    const int64_t begin = index * cut.step, end = begin + cut.step;
    if (cut.by_channel) return {begin, min_of(end, columns_), 0, rows_, 0, 0};
    return {0, columns_, begin, min_of(end, rows_), 0, 0};
  }

  // Adds to sums: the values less origin[channel], and their squares.
  void statistics(const Region& g, const T* input, const A* origin, A* scratch,
                  const Sums& sums) const {
    A* const shift = scratch;
    A* const first = scratch + columns_;
    A* const second = scratch + 2 * columns_;
    for_tables(g, [&](const Region& table) {
      for (int64_t begin = table.i; begin < table.i_end; begin += kSumLength) {
        const int64_t end = min_of(begin + kSumLength, table.i_end);
        for_bands(table, begin, end, false, [&](int64_t row, int64_t row_end) {
          for_groups<A, 4>(table.c, table.c_end, [&](auto group, int64_t c) {
            statistics_of(group, input, row, row_end, row == begin, c, shift, first, second);
          });
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
  void apply(const Region& g, const T* input, const T* residual, const Factors<A>& factors,
             A negative_slope, T* output, bool stream) const {
    const Vec<A> slope = broadcast(negative_slope);
    for_tables(g, [&](const Region& table) {
      for_bands(table, table.i, table.i_end, true, [&](int64_t row, int64_t row_end) {
        for_groups<A, 4>(table.c, table.c_end, [&](auto group, int64_t c) {
          constexpr int kVectors = decltype(group)::kVectors;
          Vec<A> mean[kVectors], scale[kVectors], bias[kVectors];
          load_all(group, factors.mean + c, mean);
          load_all(group, factors.scale + c, scale);
          load_all(group, factors.bias + c, bias);
          for (int64_t r = row; r < row_end; ++r) {
            const int64_t at = r * columns_ + c;
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              const int64_t here = at + v * kWidth;
              Vec<A> z = (load_group(group, input + here) - mean[v]) * scale[v] + bias[v];
              if (kResidual) z += load_group(group, residual + here);
              store_result(group, output + here, activate<kActivation, A>(z, slope), stream);
            }
          }
        });
      });
    });
  }

  // Adds to sums: the gradient before the activation, and its products with input - mean.
  template <Activation kActivation, PreActivation kFrom>
  void reduce(const Region& g, const Gradients<T>& at, const Factors<A>& factors, A negative_slope,
              bool stream, A* scratch, const Sums& sums) const {
    A* const first = scratch;
    A* const second = scratch + columns_;
    for_tables(g, [&](const Region& table) {
      for (int64_t begin = table.i; begin < table.i_end; begin += kSumLength) {
        const int64_t end = min_of(begin + kSumLength, table.i_end);
        for_bands(table, begin, end, false, [&](int64_t row, int64_t row_end) {
          for_groups<A, 4>(table.c, table.c_end, [&](auto group, int64_t c) {
            reduce_of<kActivation, kFrom>(group, at, row, row_end, row == begin, c, factors,
                                          negative_slope, stream, first, second);
          });
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
  void grad_input(const Region& g, const Gradients<T>& at, const Factors<A>& factors,
                  A negative_slope, bool training, bool stream) const {
    const Vec<A> leak = broadcast(negative_slope);
    for_tables(g, [&](const Region& table) {
      for_bands(table, table.i, table.i_end, true, [&](int64_t row, int64_t row_end) {
        for_groups<A, 4>(table.c, table.c_end, [&](auto group, int64_t c) {
          constexpr int kVectors = decltype(group)::kVectors;
          Vec<A> mean[kVectors], scale[kVectors], bias[kVectors], slope[kVectors], offset[kVectors];
          load_all(group, factors.mean + c, mean);
          load_all(group, factors.scale + c, scale);
          load_all(group, factors.bias + c, bias);
          load_all(group, factors.slope + c, slope);
          load_all(group, factors.offset + c, offset);
          for (int64_t r = row; r < row_end; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              const int64_t here = r * columns_ + c + v * kWidth;
              const Vec<A> centred = load_group(group, at.input + here) - mean[v];
              Vec<A> other{};
              if (kFrom != PreActivation::kInput) other = load_group(group, at.other + here);
              const Vec<A> grad =
                  grad_before<kActivation, kFrom, A>(load_group(group, at.grad_output + here),
                                                     centred, other, scale[v], bias[v], leak);
              if constexpr (kFrom != PreActivation::kInput) {
                if (at.grad_residual != nullptr) {
                  store_result(group, at.grad_residual + here, grad, stream);
                }
              }
              Vec<A> result = grad * scale[v];
              if (training) result += centred * slope[v] + offset[v];
              store_result(group, at.grad_input + here, result, stream);
            }
          }
        });
      });
    });
  }

 private:
  static constexpr int64_t kMostColumns = 4096;
  static constexpr int64_t kLeastSlice = 4 * kWidth;
  static constexpr int64_t kRegionsPerThread = 4;
  static constexpr int64_t kBandBytes = 16 * 1024;

  template <typename G>
  GDFAST_INLINE static void load_all(const G& group, const A* from, Vec<A> (&to)[G::kVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < G::kVectors; ++v) to[v] = load_group(group, from + v * kWidth);
  }

  // The region itself, and the short row where the region has the last of the others.
  template <typename Table>
  void for_tables(const Region& g, const Table& table) const {
    const bool has_short_row = short_row_ != 0 && g.i_end == rows_;
    const Region tables[] = {g, {0, short_row_, rows_, rows_ + 1, 0, 0}};
    for (int t = 0; t < (has_short_row ? 2 : 1); ++t) table(tables[t]);
  }

  // Bands of rows that stay in the first-level cache while the groups of columns go over them.
  template <typename Band>
  GDFAST_INLINE void for_bands(const Region& table, int64_t begin, int64_t end, bool backwards,
                               const Band& band) const {
    const int64_t row_bytes = (table.c_end - table.c) * static_cast<int64_t>(sizeof(T));
    const int64_t height = max_of(1, min_of(kSumLength, kBandBytes / row_bytes));
    const int64_t count = ceil_div(end - begin, height);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t row = begin + (backwards ? count - 1 - b : b) * height;
      band(row, min_of(row + height, end));
    }
  }

  template <typename G>
  GDFAST_INLINE void statistics_of(const G& group, const T* input, int64_t row, int64_t row_end,
                                   bool begins, int64_t c, A* shifts, A* firsts, A* seconds) const {
    constexpr int kVectors = G::kVectors;
    Vec<A> shift[kVectors], first[kVectors], second[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = c + v * kWidth;
      if (begins) {
        // The mean of the band, which stays in the first-level cache for the sums about it.
        Vec<A> sum{};
        for (int64_t r = row; r < row_end; ++r) {
          sum += load_group(group, input + r * columns_ + column);
        }
        shift[v] = finite<A>(sum * (A(1) / static_cast<A>(row_end - row)));
        first[v] = second[v] = Vec<A>{};
        store_group(group, shifts + column, shift[v]);
      } else {
        shift[v] = load_group(group, shifts + column);
        first[v] = load_group(group, firsts + column);
        second[v] = load_group(group, seconds + column);
      }
    }
    for (int64_t r = row; r < row_end; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<A> d = load_group(group, input + r * columns_ + c + v * kWidth) - shift[v];
        first[v] += d;
        second[v] += d * d;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store_group(group, firsts + c + v * kWidth, first[v]);
      store_group(group, seconds + c + v * kWidth, second[v]);
    }
  }

  template <Activation kActivation, PreActivation kFrom, typename G>
  GDFAST_INLINE void reduce_of(const G& group, const Gradients<T>& at, int64_t row, int64_t row_end,
                               bool begins, int64_t c, const Factors<A>& factors, A negative_slope,
                               bool stream, A* firsts, A* seconds) const {
    constexpr int kVectors = G::kVectors;
    const Vec<A> leak = broadcast(negative_slope);
    Vec<A> mean[kVectors], scale[kVectors], bias[kVectors], first[kVectors], second[kVectors];
    load_all(group, factors.mean + c, mean);
    load_all(group, factors.scale + c, scale);
    load_all(group, factors.bias + c, bias);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      first[v] = begins ? Vec<A>{} : load_group(group, firsts + c + v * kWidth);
      second[v] = begins ? Vec<A>{} : load_group(group, seconds + c + v * kWidth);
    }
    for (int64_t r = row; r < row_end; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t here = r * columns_ + c + v * kWidth;
        const Vec<A> centred = load_group(group, at.input + here) - mean[v];
        Vec<A> other{};
        if (kFrom != PreActivation::kInput) other = load_group(group, at.other + here);
        const Vec<A> grad = grad_before<kActivation, kFrom, A>(
            load_group(group, at.grad_output + here), centred, other, scale[v], bias[v], leak);
        if constexpr (kFrom != PreActivation::kInput) {
          if (at.grad_residual != nullptr) {
            store_result(group, at.grad_residual + here, grad, stream);
          }
        }
        first[v] += grad;
        second[v] += grad * centred;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store_group(group, firsts + c + v * kWidth, first[v]);
      store_group(group, seconds + c + v * kWidth, second[v]);
    }
  }

  int64_t channels_, columns_, rows_, short_row_;
};

}  // namespace
}  // namespace gdfast::cpu
