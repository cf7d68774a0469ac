// The linear maps of Winograd's F(4x4, 3x3), one dimension at a time, on vectors of channels.
//
// Toom-Cook with the points 0, +-5/8, +-3/2 and infinity: 6 products give 4 outputs of a 3-tap
// filter. These points keep the error 4 to 5 times below that of the usual 0, +-1, +-2, infinity,
// at the same cost. With x, y, w for image, output and filter:
//   y = A^T [(G w) * (B^T x)]       forward
//   w = G^T [(B^T x) * (A y)]       grad_weight
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308.
#pragma once

#include "simd.h"

namespace gdfast::cpu {
namespace {

constexpr int kTileOut = 4;                   // outputs of a tile along one axis
constexpr int kTileIn = 6;                    // image values that they see, and products
constexpr int kProducts = kTileIn * kTileIn;  // of a tile

template <typename T>
struct Points {
  static constexpr T a = T(0.625), b = T(1.5);
  static constexpr T a2 = a * a, b2 = b * b, a3 = a2 * a, b3 = b2 * b;
  // The weights of Lagrange interpolation at 0, +-a and +-b.
  static constexpr T at_0 = 1 / (a2 * b2);
  static constexpr T at_a = 1 / (2 * a2 * (a2 - b2));
  static constexpr T at_b = 1 / (2 * b2 * (b2 - a2));
};

// out = B^T in; both hold 6 vectors, `step` apart.
template <typename T>
GDFAST_INLINE void transform_image(const Vec<T>* in, int in_step, Vec<T>* out, int out_step) {
  using P = Points<T>;
  const Vec<T> d0 = in[0], d1 = in[in_step], d2 = in[2 * in_step], d3 = in[3 * in_step],
               d4 = in[4 * in_step], d5 = in[5 * in_step];
  const Vec<T> even_a = d4 - P::b2 * d2, odd_a = P::a * (d3 - P::b2 * d1);
  const Vec<T> even_b = d4 - P::a2 * d2, odd_b = P::b * (d3 - P::a2 * d1);
  out[0] = P::a2 * P::b2 * d0 + (d4 - (P::a2 + P::b2) * d2);
  out[out_step] = even_a + odd_a;
  out[2 * out_step] = even_a - odd_a;
  out[3 * out_step] = even_b + odd_b;
  out[4 * out_step] = even_b - odd_b;
  out[5 * out_step] = P::a2 * P::b2 * d1 + (d5 - (P::a2 + P::b2) * d3);
}

// out = G in; 3 vectors to 6.
template <typename T>
GDFAST_INLINE void transform_filter(const Vec<T>* in, int in_step, Vec<T>* out, int out_step) {
  using P = Points<T>;
  const Vec<T> g0 = in[0], g1 = in[in_step], g2 = in[2 * in_step];
  const Vec<T> even_a = P::at_a * (g0 + P::a2 * g2), odd_a = P::at_a * P::a * g1;
  const Vec<T> even_b = P::at_b * (g0 + P::b2 * g2), odd_b = P::at_b * P::b * g1;
  out[0] = P::at_0 * g0;
  out[out_step] = even_a + odd_a;
  out[2 * out_step] = even_a - odd_a;
  out[3 * out_step] = even_b + odd_b;
  out[4 * out_step] = even_b - odd_b;
  out[5 * out_step] = g2;
}

// Outputs 0 and 2 of A^T in: they take the sums of the products at +-a and +-b.
template <typename T>
GDFAST_INLINE void transform_output_even(const Vec<T>* in, int in_step, Vec<T>& out_0,
                                         Vec<T>& out_2) {
  using P = Points<T>;
  const Vec<T> sum_a = in[in_step] + in[2 * in_step], sum_b = in[3 * in_step] + in[4 * in_step];
  out_0 = in[0] + sum_a + sum_b;
  out_2 = P::a2 * sum_a + P::b2 * sum_b;
}

// Outputs 1 and 3, which take their differences.
template <typename T>
GDFAST_INLINE void transform_output_odd(const Vec<T>* in, int in_step, Vec<T>& out_1,
                                        Vec<T>& out_3) {
  using P = Points<T>;
  const Vec<T> difference_a = in[in_step] - in[2 * in_step];
  const Vec<T> difference_b = in[3 * in_step] - in[4 * in_step];
  out_1 = P::a * difference_a + P::b * difference_b;
  out_3 = P::a3 * difference_a + (P::b3 * difference_b + in[5 * in_step]);
}

// out = A^T in; 6 vectors to 4.
template <typename T>
GDFAST_INLINE void transform_output(const Vec<T>* in, int in_step, Vec<T>* out, int out_step) {
  transform_output_even<T>(in, in_step, out[0], out[2 * out_step]);
  transform_output_odd<T>(in, in_step, out[out_step], out[3 * out_step]);
}

// out = A in; 4 vectors to 6.
template <typename T>
GDFAST_INLINE void transform_grad_output(const Vec<T>* in, int in_step, Vec<T>* out, int out_step) {
  using P = Points<T>;
  const Vec<T> y0 = in[0], y1 = in[in_step], y2 = in[2 * in_step], y3 = in[3 * in_step];
  const Vec<T> even_a = y0 + P::a2 * y2, odd_a = P::a * (y1 + P::a2 * y3);
  const Vec<T> even_b = y0 + P::b2 * y2, odd_b = P::b * (y1 + P::b2 * y3);
  out[0] = y0;
  out[out_step] = even_a + odd_a;
  out[2 * out_step] = even_a - odd_a;
  out[3 * out_step] = even_b + odd_b;
  out[4 * out_step] = even_b - odd_b;
  out[5 * out_step] = y3;
}

// out = G^T in; 6 vectors to 3.
template <typename T>
GDFAST_INLINE void transform_grad_filter(const Vec<T>* in, int in_step, Vec<T>* out, int out_step) {
  using P = Points<T>;
  const Vec<T> u0 = in[0], u1 = in[in_step], u2 = in[2 * in_step], u3 = in[3 * in_step],
               u4 = in[4 * in_step], u5 = in[5 * in_step];
  const Vec<T> sum_a = P::at_a * (u1 + u2), difference_a = P::at_a * (u1 - u2);
  const Vec<T> sum_b = P::at_b * (u3 + u4), difference_b = P::at_b * (u3 - u4);
  out[0] = P::at_0 * u0 + (sum_a + sum_b);
  out[out_step] = P::a * difference_a + P::b * difference_b;
  out[2 * out_step] = P::a2 * sum_a + (P::b2 * sum_b + u5);
}

}  // namespace
}  // namespace gdfast::cpu
