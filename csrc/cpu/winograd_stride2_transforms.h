// The linear maps of Winograd's way through a 3x3 kernel with stride 2, on vectors of channels.
//
// Along one axis the kernel's taps (a, b, c) see every second pixel: a and c the even ones d, b the
// odd ones r, counted from where a tile begins:
//   y[i] = a d[i] + c d[i + 1] + b r[i]
// The even part is F(3, 2), Toom-Cook with the points 0, +-1 and infinity: 4 products for 3
// outputs. The odd part is direct: 3 more. That is 7 products instead of 9, in two dimensions 49
// instead of 81. In the order in which a line of products is kept, with the sums that they go into:
//   0  (d0 - d2) a             s0
//   1  r0 b                    s0
//   2  (d1 + d2) (a + c) / 2   s1     y0 = s0 + (s1 + s2)
//   3  (d2 - d1) (a - c) / 2   s2     y1 = s3 + (s1 - s2)
//   4  r1 b                    s3     y2 = s4 + (s1 + s2)
//   5  (d3 - d1) c             s4
//   6  r2 b                    s4
// Products at 0 and infinity go into one output each, as the odd ones do, and share its sum: 5 sums
// are left to be transformed back. The last two products are not needed for tiles of 2 outputs.
//
// grad_input is of the same form, for the pixels that the even and the odd taps see:
//   grad_d[i] = c g[i] + a g[i + 1],   grad_r[i] = b g[i]
// where every product has a sum of its own. grad_weight multiplies the products' image values by
// what the sums, transposed, make of g, and adds up what belongs to the same of 5 filters:
// a, b, (a + c) / 2, (a - c) / 2, c.
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, for the
// even part.
#pragma once

#include "simd.h"

#define GDFAST_INLINE_LAMBDA __attribute__((always_inline))

namespace gdfast::cpu {
namespace {

struct Stride2 {
  static constexpr int kOut = 3;        // outputs of a tile along one axis
  static constexpr int kEven = 4;       // values d that they see, and products of them
  static constexpr int kAxis = 7;       // products along one axis
  static constexpr int kProducts = 49;  // of a tile
  static constexpr int kAxisSums = 5, kSums = 25;
  static constexpr int kAxisFilters = 5, kFilters = 25;
  // Where products of even and of odd values stand in a line.
  static constexpr int kEvenAt[kEven] = {0, 2, 3, 5}, kOddAt[kOut] = {1, 4, 6};
  static constexpr int kSumOf[kAxis] = {0, 0, 1, 2, 3, 4, 4};
  static constexpr int kFilterOf[kAxis] = {0, 1, 2, 3, 1, 4, 1};
  // The first product, or sum, along an axis that tiles of 2 outputs do not need.
  static constexpr int kLastProduct = 5, kLastSum = 4;

  static constexpr int filter_of(int product) {
    return kFilterOf[product / kAxis] * kAxisFilters + kFilterOf[product % kAxis];
  }
};

// 4 even values to their products.
template <typename T>
GDFAST_INLINE void transform_even(const Vec<T> (&d)[4], Vec<T> (&out)[4]) {
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[3] - d[1];
}

// The sums of 4 even products to 3 outputs; what goes into one output alone may hold more.
template <typename T>
GDFAST_INLINE void transform_even_sums(const Vec<T> (&s)[4], Vec<T> (&out)[3]) {
  const Vec<T> both = s[1] + s[2];
  out[0] = s[0] + both;
  out[1] = s[1] - s[2];
  out[2] = s[3] + both;
}

// 3 outputs to the 5 sums that they are made of, transposed.
template <typename T>
GDFAST_INLINE void transform_stride2_grads(const Vec<T>* in, int in_step, Vec<T>* out,
                                           int out_step) {
  const Vec<T> g0 = in[0], g1 = in[in_step], g2 = in[2 * in_step], ends = g0 + g2;
  out[0] = g0;
  out[out_step] = ends + g1;
  out[2 * out_step] = ends - g1;
  out[3 * out_step] = g1;
  out[4 * out_step] = g2;
}

// 3 taps to 5 filters.
template <typename T>
GDFAST_INLINE void transform_stride2_filter(const Vec<T>* in, int in_step, Vec<T>* out,
                                            int out_step) {
  const Vec<T> a = T(0.5) * in[0], c = T(0.5) * in[2 * in_step];
  out[0] = in[0];
  out[out_step] = in[in_step];
  out[2 * out_step] = a + c;
  out[3 * out_step] = a - c;
  out[4 * out_step] = in[2 * in_step];
}

// Filters [kFirst, kFirst + kCount) of `size` weights: packed[tap * valid + x], zero from `valid`
// on, to to[i * step + x].
template <int kFirst, int kCount>
void transform_stride2_weights(const float* packed, int64_t valid, int64_t size, float* to,
                               int64_t step) {
  using T = float;
  constexpr int kAxis = Stride2::kAxisFilters, kWidth = kLanes<T>;
  for (int64_t x = 0; x < size; x += kWidth) {
    Vec<T> tap[9], half[3 * kAxis], filter[kAxis * kAxis];
    for (int t = 0; t < 9; ++t) tap[t] = x < valid ? load(packed + t * valid + x) : Vec<T>{};
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) transform_stride2_filter<T>(tap + s, 3, half + s, 3);
#pragma GCC unroll 5
    for (int i = 0; i < kAxis; ++i) {
      transform_stride2_filter<T>(half + i * 3, 1, filter + i * kAxis, 1);
    }
#pragma GCC unroll 25
    for (int i = 0; i < kCount; ++i) store<T>(to + i * step + x, filter[kFirst + i]);
  }
}

// 5 filters to 3 taps, transposed.
template <typename T>
GDFAST_INLINE void transform_stride2_grad_filter(const Vec<T>* in, int in_step, Vec<T>* out,
                                                 int out_step) {
  const Vec<T> u2 = in[2 * in_step], u3 = in[3 * in_step];
  out[0] = in[0] + T(0.5) * (u2 + u3);
  out[out_step] = in[in_step];
  out[2 * out_step] = in[4 * in_step] + T(0.5) * (u2 - u3);
}

// Transforms the pixels of a tile, kSize x kSize of them at from[i * kSize + j] + offset, and calls
// to(product, value) for each of the 49. Even values lie kStep apart from the first pixel on, odd
// ones from pixel odd_h, odd_w on.
template <int kStep, typename To>
GDFAST_INLINE void transform_stride2_tile(const float* const* from, int64_t offset, int odd_h,
                                          int odd_w, const To& to) {
  using S = Stride2;
  constexpr int kSize = S::kOut * kStep + 1;
  const auto at = [&](int i, int j)
                      GDFAST_INLINE_LAMBDA { return load(from[i * kSize + j] + offset); };
  // The products of one line of pixels, or of lines that were transformed already.
  const auto line = [&](int row, const auto& pixel) GDFAST_INLINE_LAMBDA {
    Vec<float> even[4], products[4];
#pragma GCC unroll 4
    for (int j = 0; j < S::kEven; ++j) even[j] = pixel(j * kStep);
    transform_even<float>(even, products);
#pragma GCC unroll 4
    for (int j = 0; j < S::kEven; ++j) to(row * S::kAxis + S::kEvenAt[j], products[j]);
#pragma GCC unroll 3
    for (int j = 0; j < S::kOut; ++j) {
      to(row * S::kAxis + S::kOddAt[j], pixel(j * kStep + odd_w));
    }
  };
  Vec<float> half[S::kEven][kSize];
#pragma GCC unroll 7
  for (int j = 0; j < kSize; ++j) {
    Vec<float> even[4], products[4];
#pragma GCC unroll 4
    for (int i = 0; i < S::kEven; ++i) even[i] = at(i * kStep, j);
    transform_even<float>(even, products);
#pragma GCC unroll 4
    for (int i = 0; i < S::kEven; ++i) half[i][j] = products[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < S::kEven; ++i)
    line(S::kEvenAt[i], [&](int j) GDFAST_INLINE_LAMBDA { return half[i][j]; });
#pragma GCC unroll 3
  for (int i = 0; i < S::kOut; ++i) {
    line(S::kOddAt[i], [&](int j) GDFAST_INLINE_LAMBDA { return at(i * kStep + odd_h, j); });
  }
}

}  // namespace
}  // namespace gdfast::cpu
