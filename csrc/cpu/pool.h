// What the pooling kernels share: vectors of places within a window, and lines of an image copied
// so that the values which neighbouring windows see through one tap lie side by side.
#pragma once

#include "../max_pool2d_problem.h"
#include "pack.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace gdfast::cpu {
namespace {

// An integer as wide as A, so that a vector of places has as many lanes as one of values.
template <typename A>
using PlaceOf = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <typename A>
using Places = Vec<PlaceOf<A>>;

constexpr int kNowhere = -1;

template <typename A>
GDFAST_INLINE Places<A> same_places(int64_t place) {
  return Places<A>{} + static_cast<PlaceOf<A>>(place);
}

// GCC 12 takes vectors of bytes below a whole register apart, hence the intrinsics.
template <typename A, typename I>
GDFAST_INLINE Places<A> load_places(const I* from) {
  [[maybe_unused]] constexpr bool kBytes = sizeof(I) == 1 && sizeof(A) == 4;
#if defined(__AVX512F__)
  if constexpr (kBytes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Places<A>)(std::is_signed_v<I> ? _mm512_maskz_cvtepi8_epi32(0xffff, bytes)
                                           : _mm512_maskz_cvtepu8_epi32(0xffff, bytes));
  }
#elif defined(__AVX2__)
  if constexpr (kBytes) {
    const __m128i bytes = _mm_loadu_si64(from);
    return (Places<A>)(std::is_signed_v<I> ? _mm256_cvtepi8_epi32(bytes)
                                           : _mm256_cvtepu8_epi32(bytes));
  }
#endif
  typedef I Narrow __attribute__((vector_size(kLanes<A> * sizeof(I))));
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return __builtin_convertvector(narrow, Places<A>);
}

template <typename A, typename I>
GDFAST_INLINE void store_places(I* to, Places<A> places) {
  [[maybe_unused]] constexpr bool kBytes = sizeof(I) == 1 && sizeof(A) == 4;
#if defined(__AVX512F__)
  if constexpr (kBytes) {
    const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)places);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (kBytes) {
    // The lowest bytes of each half's four places, then the two halves side by side.
    const __m256i lowest = _mm256_set1_epi32(0x0c080400);
    const __m256i packed = _mm256_shuffle_epi8((__m256i)places, lowest);
    const __m256i halves = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
    const __m256i joined = _mm256_permutevar8x32_epi32(packed, halves);
    _mm_storeu_si64(to, _mm256_castsi256_si128(joined));
    return;
  }
#endif
  typedef I Narrow __attribute__((vector_size(kLanes<A> * sizeof(I))));
  const Narrow narrow = __builtin_convertvector(places, Narrow);
  std::memcpy(to, &narrow, sizeof narrow);
}

// The same for two pairs of vectors of places below 128, or nowhere. Stores that are not aligned
// take as long for 8 bytes as for 16.
template <typename A>
GDFAST_INLINE void store_pairs_of_places(uint8_t* to, uint8_t* other_to,
                                         const Places<A> (&places)[2],
                                         const Places<A> (&other)[2]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32((__m256i)places[0], (__m256i)other[0]),
                           _mm256_packs_epi32((__m256i)places[1], (__m256i)other[1]));
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);  // of fours of places
    const __m256i both = _mm256_permutevar8x32_epi32(bytes, order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(both));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(other_to), _mm256_extracti128_si256(both, 1));
    return;
  }
#endif
  for (int i = 0; i < 2; ++i) {
    store_places<A>(to + i * kLanes<A>, places[i]);
    store_places<A>(other_to + i * kLanes<A>, other[i]);
  }
}

template <typename A, typename T>
GDFAST_INLINE Vec<A> load_widened(const T* from) {
  if constexpr (kSame<T, A>) {
    return load(from);
  } else {
    A lanes[kLanes<A>];
    copy_widened(from, 1, kLanes<A>, lanes);
    return load(lanes);
  }
}

template <typename A, typename T>
GDFAST_INLINE void store_narrowed(T* to, Vec<A> value) {
  if constexpr (kSame<T, A>) {
    store<A>(to, value);
  } else {
    A lanes[kLanes<A>];
    store<A>(lanes, value);
    copy_narrowed(lanes, kLanes<A>, to, 1);
  }
}

// What T makes of the sums: a convolution's output in a half type has equal values where float32
// still tells them apart.
template <typename T, typename A>
GDFAST_INLINE Vec<A> rounded(Vec<A> value) {
  if constexpr (kSame<T, A>) {
    return value;
  } else {
    A lanes[kLanes<A>];
    store<A>(lanes, value);
    for (int i = 0; i < kLanes<A>; ++i) lanes[i] = widen(narrow<T>(lanes[i]));
    return load(lanes);
  }
}

// The larger of each two numbers. GCC makes a comparison and a choice of it otherwise.
template <typename A>
GDFAST_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

// The largest values so far, and where they were.
template <typename A>
struct Best {
  Vec<A> value;
  Places<A> place;

  // A NaN is larger than all, where `kNumbers` does not promise that there is none.
  template <bool kNumbers = false>
  GDFAST_INLINE void offer(Vec<A> candidate, Places<A> candidate_place) {
    Places<A> better = candidate > value;
    if constexpr (!kNumbers) better |= candidate != candidate;
    value = better ? candidate : value;
    place = better ? candidate_place : place;
  }

  // max(0, value), which passes no gradient on where it is 0. NaN stays.
  GDFAST_INLINE void clamp() {
    const Places<A> clamped = value <= Vec<A>{};
    value = clamped ? Vec<A>{} : value;
    place = clamped ? same_places<A>(kNowhere) : place;
  }
};

// Taps [first, end) of an axis that see a pixel from one window: start + tap * dilation lies in the
// image.
struct TapRange {
  int64_t first, end;

  TapRange(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
    first = start >= 0 ? 0 : min_of(taps, ceil_div(-start, dilation));
    end = start >= size ? 0 : min_of(taps, (size - 1 - start) / dilation + 1);
    end = max_of(first, end);
  }
};

// a / b rounded towards minus infinity, for b > 0.
inline int64_t floor_quotient(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

#if defined(__AVX512F__)
// The first `count` of 16 lanes.
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << max_of(0, count)) - 1);
}

// Two phases of a line: 28 pixels are too few for whole vectors.
inline void split_pairs(const float* line, int64_t size, float* evens, float* odds) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  for (int64_t x = 0; 2 * x < size; x += 16) {
    const int64_t rest = size - 2 * x;
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(rest), line + 2 * x);
    const __m512 high = _mm512_maskz_loadu_ps(first_lanes(rest - 16), line + 2 * x + 16);
    _mm512_mask_storeu_ps(evens + x, first_lanes((rest + 1) / 2),
                          _mm512_permutex2var_ps(low, even, high));
    _mm512_mask_storeu_ps(odds + x, first_lanes(rest / 2), _mm512_permutex2var_ps(low, odd, high));
  }
}
#endif

// parts[k][x] = line[x * step + k] for every phase k below step; part k begins at k * part_step,
// and holds the `count` values that the line has for it.
template <typename A>
void split_phases(const A* line, int64_t size, int64_t step, A* parts, int64_t part_step) {
  int64_t x = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    if (step == 2) return split_pairs(line, size, parts, parts + part_step);
  }
#endif
#if !defined(__clang__)
  if (step == 2) {
    Places<A> even, odd;
    for (int i = 0; i < kLanes<A>; ++i) {
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
    }
    for (; 2 * (x + kLanes<A>) <= size; x += kLanes<A>) {
      const Vec<A> low = load(line + 2 * x), high = load(line + 2 * x + kLanes<A>);
      store<A>(parts + x, __builtin_shuffle(low, high, even));
      store<A>(parts + part_step + x, __builtin_shuffle(low, high, odd));
    }
    if (x > 0 && 2 * x < size) {  // the last vector ends where the line does
      x = size / 2 - kLanes<A>;
      const Vec<A> low = load(line + 2 * x), high = load(line + 2 * x + kLanes<A>);
      store<A>(parts + x, __builtin_shuffle(low, high, even));
      store<A>(parts + part_step + x, __builtin_shuffle(low, high, odd));
      x += kLanes<A>;
    }
  }
#endif
  for (int64_t phase = 0; phase < step; ++phase) {
    for (int64_t i = x; i * step + phase < size; ++i) {
      parts[phase * part_step + i] = line[i * step + phase];
    }
  }
}

// The reverse: line[x * step + k] = parts[k][x].
template <typename A>
void join_phases(const A* parts, int64_t part_step, int64_t step, A* line, int64_t size) {
  int64_t x = 0;
#if !defined(__clang__)
  if (step == 2) {
    Places<A> low, high;
    for (int i = 0; i < kLanes<A>; ++i) {
      low[i] = i / 2 + i % 2 * kLanes<A>;
      high[i] = low[i] + kLanes<A> / 2;
    }
    for (; 2 * (x + kLanes<A>) <= size; x += kLanes<A>) {
      const Vec<A> even = load(parts + x), odd = load(parts + part_step + x);
      store<A>(line + 2 * x, __builtin_shuffle(even, odd, low));
      store<A>(line + 2 * x + kLanes<A>, __builtin_shuffle(even, odd, high));
    }
  }
#endif
  for (int64_t phase = 0; phase < step; ++phase) {
    for (int64_t i = x; i * step + phase < size; ++i) {
      line[i * step + phase] = parts[phase * part_step + i];
    }
  }
}

// Calls f with a value of argmax's element type.
template <typename F>
inline void with_place_type(const MaxPool2dProblem& problem, F&& f) {
  if (problem.is_narrow()) {
    f(uint8_t{});
  } else {
    f(int32_t{});
  }
}

}  // namespace
}  // namespace gdfast::cpu
