// What the forward pass and grad_input of winograd_stride2.h differ in: which products go into
// which sum, how sums become pixels, and where a tile lies.
#pragma once

#include "ending.h"
#include "winograd_stride2_transforms.h"

namespace gdfast::cpu {
namespace {

inline bool winograd_stride2_fits(const Conv2dProblem& p) {
  return p.dtype == DType::kFloat32 && p.N > 0 && p.R == 3 && p.S == 3 && p.stride_h == 2 &&
         p.stride_w == 2 && p.dilation_h == 1 && p.dilation_w == 1;
}

// Which products go into which sum, and where a tile's image keeps them: those of one sum side by
// side, of the products that have been numbered row by row.
struct Stride2Order {
  int axis, count;  // of sums, along one axis and in all
  int first[Stride2::kProducts + 1] = {}, products[Stride2::kProducts] = {};  // of a sum
  int place[Stride2::kProducts] = {}, product[Stride2::kProducts] = {};  // of a product, at a place
  int sum_of[Stride2::kProducts] = {};
  bool last_row[Stride2::kProducts] = {}, last_column[Stride2::kProducts] = {};

  // Along one axis, axis_sum_of[product] of `sums`; from `last` on only whole tiles need them.
  constexpr Stride2Order(const int (&axis_sum_of)[Stride2::kAxis], int sums, int last)
      : axis(sums), count(sums * sums) {
    int next = 0;
    for (int sum = 0; sum < count; ++sum) {
      first[sum] = next;
      last_row[sum] = sum / sums >= last;
      last_column[sum] = sum % sums >= last;
      for (int number = 0; number < Stride2::kProducts; ++number) {
        const int i = number / Stride2::kAxis, j = number % Stride2::kAxis;
        if (axis_sum_of[i] * sums + axis_sum_of[j] != sum) continue;
        sum_of[number] = sum;
        place[number] = next;
        product[next++] = number;
      }
      products[sum] = next - first[sum];
    }
    first[count] = next;
  }
};

// The points of the tile are outputs, and it sees 7x7 pixels of the input.
struct Stride2Forward {
  static constexpr int kStep = 2, kPixels = 1;  // pixels of a point, seen and written, on each axis
  static constexpr Stride2Order kOrder{Stride2::kSumOf, Stride2::kAxisSums, Stride2::kLastSum};
  // Sums are taken in so many steps, for the weights of one step to stay in L2, and over parts of
  // so many channels, for those of one sum to stay in L1: here each channel has up to 4 lines of
  // them.
  static constexpr int kSteps = 1;
  static constexpr int64_t kPartChannels = kDepth / 4;

  // Calls put(i, j, sum) for each output.
  template <typename Sum, typename Put>
  static GDFAST_INLINE void transform_sums(const Sum& sum, int, int, const Put& put) {
    constexpr int kAxis = Stride2::kAxisSums;
    const auto back = [](Vec<float>(&s)[kAxis], Vec<float>(&out)[3]) GDFAST_INLINE_LAMBDA {
      const Vec<float> even[4] = {s[0], s[1], s[2], s[4]};
      transform_even_sums<float>(even, out);
      out[1] += s[3];
    };
    Vec<float> half[3][kAxis], out[3];
#pragma GCC unroll 5
    for (int j = 0; j < kAxis; ++j) {
      Vec<float> column[kAxis];
#pragma GCC unroll 5
      for (int i = 0; i < kAxis; ++i) column[i] = sum(i * kAxis + j);
      back(column, out);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) half[i][j] = out[i];
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      back(half[i], out);
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) put(i, j, out[j]);
    }
  }
};

// The points of the tile are 2x2 pixels of grad_input, and it sees 4x4 of grad_output.
struct Stride2GradInput {
  static constexpr int kStep = 1, kPixels = 2;
  static constexpr int kOwn[Stride2::kAxis] = {0, 1, 2, 3, 4, 5, 6};
  static constexpr Stride2Order kOrder{kOwn, Stride2::kAxis, Stride2::kLastProduct};
  static constexpr int kSteps = Stride2::kAxisFilters;
  static constexpr int64_t kPartChannels = kDepth;

  // Calls put(i, j, sum) for each pixel; the even ones begin at even_h, even_w of a point.
  template <typename Sum, typename Put>
  static GDFAST_INLINE void transform_sums(const Sum& sum, int even_h, int even_w, const Put& put) {
    using S = Stride2;
    // The pixels of one line of products.
    const auto line = [&](int row, const auto& product) GDFAST_INLINE_LAMBDA {
      Vec<float> even[4], out[3];
#pragma GCC unroll 4
      for (int j = 0; j < S::kEven; ++j) even[j] = product(S::kEvenAt[j]);
      transform_even_sums<float>(even, out);
#pragma GCC unroll 3
      for (int j = 0; j < S::kOut; ++j) {
        put(row, 2 * j + even_w, out[j]);
        put(row, 2 * j + 1 - even_w, product(S::kOddAt[j]));
      }
    };
    Vec<float> half[S::kOut][S::kAxis];
#pragma GCC unroll 7
    for (int j = 0; j < S::kAxis; ++j) {
      Vec<float> even[4], out[3];
#pragma GCC unroll 4
      for (int i = 0; i < S::kEven; ++i) even[i] = sum(S::kEvenAt[i] * S::kAxis + j);
      transform_even_sums<float>(even, out);
#pragma GCC unroll 3
      for (int i = 0; i < S::kOut; ++i) half[i][j] = out[i];
    }
#pragma GCC unroll 3
    for (int i = 0; i < S::kOut; ++i) {
      line(2 * i + even_h, [&](int j) GDFAST_INLINE_LAMBDA { return half[i][j]; });
      line(2 * i + 1 - even_h,
           [&](int j) GDFAST_INLINE_LAMBDA { return sum(S::kOddAt[i] * S::kAxis + j); });
    }
  }
};

// What a pass reads and writes, beside the pointers.
struct Stride2Problem {
  int64_t groups, reduced, produced;  // channels of one group
  int64_t source_height, source_width, dest_height, dest_width;
  Strides4 source, dest;
  int64_t low_h, low_w;  // of the source, where the tile at the first point begins
  int odd_h, odd_w;      // pixels of a tile before the first odd one
  int even_h, even_w;    // pixels of a point before the first even one
  Tap taps[9];           // (a, b, c) down and across
  int64_t weight_reduced, weight_produced, weight_group;
  Ending<float> ending;

  static Stride2Problem forward(const Conv2dProblem& p) {
    Stride2Problem to = {};
    to.groups = p.groups;
    to.reduced = p.C / p.groups;
    to.produced = p.K / p.groups;
    to.source_height = p.H;
    to.source_width = p.W;
    to.dest_height = p.P;
    to.dest_width = p.Q;
    to.source = p.input;
    to.dest = p.output;
    to.low_h = -p.pad_h;
    to.low_w = -p.pad_w;
    to.odd_h = to.odd_w = 1;
    for (int t = 0; t < 9; ++t) to.taps[t].weight = t / 3 * p.weight.h + t % 3 * p.weight.w;
    to.weight_reduced = p.weight.c;
    to.weight_produced = p.weight.n;
    to.weight_group = to.produced * p.weight.n;
    to.ending = {p.activation, static_cast<float>(p.negative_slope)};
    return to;
  }

  // With an even padding, the first pixel of a point is an even one, and its taps see outputs i - 1
  // and i; else it is an odd one, whose tap sees output i.
  static Stride2Problem grad_input(const Conv2dProblem& p) {
    Stride2Problem to = {};
    to.groups = p.groups;
    to.reduced = p.K / p.groups;
    to.produced = p.C / p.groups;
    to.source_height = p.P;
    to.source_width = p.Q;
    to.dest_height = p.H;
    to.dest_width = p.W;
    to.source = p.output;
    to.dest = p.input;
    to.low_h = (p.pad_h + 1) / 2 - 1;
    to.low_w = (p.pad_w + 1) / 2 - 1;
    to.even_h = static_cast<int>(p.pad_h % 2);
    to.even_w = static_cast<int>(p.pad_w % 2);
    to.odd_h = 1 - to.even_h;
    to.odd_w = 1 - to.even_w;
    for (int t = 0; t < 9; ++t) {
      to.taps[t].weight = (2 - t / 3) * p.weight.h + (2 - t % 3) * p.weight.w;
    }
    to.weight_reduced = p.weight.n;
    to.weight_produced = p.weight.c;
    to.weight_group = to.reduced * p.weight.n;
    return to;
  }
};

}  // namespace
}  // namespace gdfast::cpu
