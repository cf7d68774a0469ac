// Vectors of the type that sums are taken in, loaded from and stored to any element type.
#pragma once

#include "numeric.h"
#include "simd.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace gdfast::cpu {
namespace {

// Half a register of 16-bit elements makes a whole one of float.
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));

GDFAST_INLINE Vec<float> load_widened(const float* from) { return load(from); }
GDFAST_INLINE Vec<double> load_widened(const double* from) { return load(from); }

GDFAST_INLINE Vec<float> load_widened(const BFloat16* from) {
  HalfVec bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}

GDFAST_INLINE Vec<float> load_widened(const Float16* from) {
#if defined(__AVX512F__)
  // Masked, though with every lane: GCC 12 warns of the unmasked one's undefined operand.
  return (Vec<float>)_mm512_maskz_cvtph_ps(
      0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec<float> value;
  for (int lane = 0; lane < kLanes<float>; ++lane) value[lane] = widen(from[lane]);
  return value;
#endif
}

GDFAST_INLINE void store_narrowed(float* to, Vec<float> value) { store<float>(to, value); }
GDFAST_INLINE void store_narrowed(double* to, Vec<double> value) { store<double>(to, value); }

// Round to nearest, ties to even; a NaN stays one.
GDFAST_INLINE void store_narrowed(BFloat16* to, Vec<float> value) {
  const Vec<uint32_t> bits = (Vec<uint32_t>)value;
  const Vec<uint32_t> rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Vec<uint32_t> nan = Vec<uint32_t>{} + 0x7fc00000u;
  const Vec<uint32_t> chosen = value == value ? rounded : nan;
  const HalfVec half = __builtin_convertvector(chosen >> 16, HalfVec);
  std::memcpy(to, &half, sizeof half);
}

GDFAST_INLINE void store_narrowed(Float16* to, Vec<float> value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = narrow<Float16>(value[lane]);
#endif
}

// The same for the first `count` lanes alone: no other element is touched.
template <typename T>
GDFAST_INLINE auto load_some(const T* from, int64_t count) {
  T elements[kLanes<typename Accumulator<T>::type>] = {};
  std::memcpy(elements, from, count * sizeof(T));
  return load_widened(elements);
}

template <typename T, typename A>
GDFAST_INLINE void store_some(T* to, const A& value, int64_t count) {
  T elements[kLanes<typename Accumulator<T>::type>];
  store_narrowed(elements, value);
  std::memcpy(to, elements, count * sizeof(T));
}

// Elements of memory side by side.
template <typename T>
void widen_elements(const T* from, int64_t count, float* to) {
  int64_t x = 0;
  for (; x + kLanes<float> <= count; x += kLanes<float>) {
    store<float>(to + x, load_widened(from + x));
  }
  for (; x < count; ++x) to[x] = widen(from[x]);
}

template <typename T>
void narrow_elements(const float* from, int64_t count, T* to) {
  int64_t x = 0;
  for (; x + kLanes<float> <= count; x += kLanes<float>) store_narrowed(to + x, load(from + x));
  for (; x < count; ++x) to[x] = narrow<T>(from[x]);
}

}  // namespace
}  // namespace gdfast::cpu
