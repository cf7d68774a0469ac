// Tiles of pooled convolutions on AVX-512, where masks tell the places of 2x2 windows apart and the
// 16 factors or sums of a tile fit the registers. For float and one input channel.
//
// A tile is one of F(2x2, 3x3), see window_lanes.h. Place 2 * a + b has row a and column b of the
// window; kNowhere, whose bits are all set, is that of a window without a value above 0.
#pragma once

#include "pool.h"

namespace gdfast::cpu {
namespace {

#if defined(__AVX512F__)

template <typename T>
constexpr bool kHasMasks = kSame<T, float>;

// In assembly, because GCC 12 would keep the operands in only 16 of the 32 registers.
GDFAST_INLINE void add_product(__m512& sum, __m512 a, const float* b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "m"(*reinterpret_cast<const __m512_u*>(b)));
}
GDFAST_INLINE void add_product(__m512& sum, __m512 a, const float* b, __mmask16 where) {
  asm("vfmadd231ps %2, %1, %0 %{%3%}"
      : "+v"(sum)
      : "v"(a), "m"(*reinterpret_cast<const __m512_u*>(b)), "Yk"(where));
}
GDFAST_INLINE void subtract_product(__m512& sum, __m512 a, const float* b) {
  asm("vfnmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "m"(*reinterpret_cast<const __m512_u*>(b)));
}
GDFAST_INLINE __m512 multiply(__m512 a, const float* b) {
  __m512 product;
  asm("vmulps %2, %1, %0" : "=v"(product) : "v"(a), "m"(*reinterpret_cast<const __m512_u*>(b)));
  return product;
}

// The largest value of each of `count` windows in one output channel, at least 0, and its place;
// of equal values the first. weights: bias, then the 16 of a tile.
[[maybe_unused]] __attribute__((noinline)) void largest_of_tiles(const float* factors,
                                                                 const float* weights,
                                                                 int64_t count, float* values,
                                                                 uint8_t* places) {
  __m512 weight[4][4];
  const __m512 bias = (__m512)broadcast(weights[0]), zero{};
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) weight[i / 4][i % 4] = (__m512)broadcast(weights[1 + i]);
  for (int64_t i = 0; i < count; i += 16, factors += 16 * 16) {
    __m512 upper[4], lower[4];  // what each column of the tile adds to both rows of the window
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const auto factor = [&](int y) { return factors + (y * 4 + x) * 16; };
      // One of the products counts in all four values: the bias goes with it. Sums of two products
      // are taken by units of their own.
      __m512 one = bias;
      if (x == 1) {
        add_product(one, weight[1][x], factor(1));
      } else {
        one = multiply(weight[1][x], factor(1));
      }
      const __m512 two = multiply(weight[2][x], factor(2));
      upper[x] = one + two;
      lower[x] = one - two;
      add_product(upper[x], weight[0][x], factor(0));
      subtract_product(lower[x], weight[3][x], factor(3));
    }
    const auto left = [](const __m512(&row)[4]) { return row[0] + row[1] + row[2]; };
    const auto right = [](const __m512(&row)[4]) { return row[1] - row[2] - row[3]; };
    const auto larger = [](__m512 a, __m512 b, __mmask16* is_second) {
      *is_second = _mm512_cmp_ps_mask(b, a, _CMP_GT_OQ);
      return _mm512_mask_mov_ps(a, *is_second, b);  // not max_ps, whose units multiply
    };
    __mmask16 right_above, right_below, is_below;
    const __m512 above = larger(left(upper), right(upper), &right_above);
    const __m512 below = larger(left(lower), right(lower), &right_below);
    const __m512 value = larger(above, below, &is_below);
    const __mmask16 positive = _mm512_cmp_ps_mask(value, zero, _CMP_GT_OQ);
    const __m512 rectified = _mm512_maskz_mov_ps(positive, value);
    const auto place_of = [](int place) { return _mm_set1_epi8(static_cast<char>(place)); };
    __m128i place = _mm_maskz_mov_epi8(right_above, place_of(1));
    place = _mm_mask_mov_epi8(place, is_below,
                              _mm_mask_mov_epi8(place_of(2), right_below, place_of(3)));
    place = _mm_mask_mov_epi8(place_of(kNowhere), positive, place);
    if (count - i >= 16) {
      _mm512_storeu_ps(values + i, rectified);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(places + i), place);
    } else {
      _mm512_mask_storeu_ps(values + i, first_lanes(count - i), rectified);
      _mm_mask_storeu_epi8(places + i, first_lanes(count - i), place);
    }
  }
}

// Adds to the 16 sums of a tile, and to that of the bias, the products of factors with what each
// gradient of `count` windows is as the four of its tile: itself at its place, 0 at the others.
[[maybe_unused]] __attribute__((noinline)) void add_gradients_of_tiles(const float* grads,
                                                                       const uint8_t* places,
                                                                       int64_t count,
                                                                       const float* factors,
                                                                       float* sums, float* bias) {
  __m512 sum[4][4], bias_sum = (__m512)load(bias);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = (__m512)load(sums + i * 16);
  for (int64_t i = 0; i < count; i += 16, factors += 16 * 16) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m128i place = _mm_mask_loadu_epi8(_mm_set1_epi8(kNowhere), lanes, places + i);
    const __mmask16 somewhere = _knot_mask16(_mm_movepi8_mask(place));
    const __mmask16 last_row = _mm_test_epi8_mask(place, _mm_set1_epi8(2));
    const __mmask16 last_column = _mm_test_epi8_mask(place, _mm_set1_epi8(1));
    const __mmask16 first_row = _knot_mask16(last_row), first_column = _knot_mask16(last_column);
    const auto negated = [](__m512 value, __mmask16 where) __attribute__((always_inline)) {
      return _mm512_mask_xor_ps(value, where, value, _mm512_set1_ps(-0.0f));
    };
    const __m512 grad = _mm512_maskz_loadu_ps(somewhere, grads + i);
    bias_sum += grad;
    // A y of the two gradients y of a column, but the last with the other sign; then of a row.
    const __m512 rows[4] = {_mm512_maskz_mov_ps(first_row, grad), grad, negated(grad, last_row),
                            _mm512_maskz_mov_ps(last_row, grad)};
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      const float* factor = factors + y * 4 * 16;
      add_product(sum[y][0], rows[y], factor, first_column);
      add_product(sum[y][1], rows[y], factor + 16);
      add_product(sum[y][2], negated(rows[y], last_column), factor + 32);
      add_product(sum[y][3], rows[y], factor + 48, last_column);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store<float>(sums + i * 16, (Vec<float>)sum[i / 4][i % 4]);
  store<float>(bias, (Vec<float>)bias_sum);
}

#else

template <typename T>
constexpr bool kHasMasks = false;

#endif

}  // namespace
}  // namespace gdfast::cpu
