// Vectors of the widest registers of the instruction set that this file is compiled for.
//
// GCC's and Clang's vector extension rather than intrinsics: one source then serves every
// instruction set, float and double alike. a * b + c becomes one FMA (-ffp-contract=fast).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace gdfast::cpu {
namespace {

// Where kernels for AVX-512 are tested without it, the compiler makes up the vectors of that.
#if defined(__AVX512F__) || defined(GDFAST_EMULATE_AVX512)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

#define GDFAST_INLINE inline __attribute__((always_inline))

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
GDFAST_INLINE Vec<T> load(const T* from) {
  Vec<T> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
GDFAST_INLINE void store(T* to, Vec<T> value) {
  std::memcpy(to, &value, sizeof value);
}

// Past the caches, to memory aligned to a vector: nothing is read before it is overwritten, and
// what the caches hold stays there. stream_fence() makes the stores visible to other threads.
template <typename T>
GDFAST_INLINE void store_streaming(T* to, Vec<T> value) {
#if defined(__AVX512F__)
  asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<Vec<T>*>(to)) : "v"(value));
#elif defined(__AVX2__)
  asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<Vec<T>*>(to)) : "x"(value));
#elif defined(__x86_64__)
  asm volatile("movntps %1, %0" : "=m"(*reinterpret_cast<Vec<T>*>(to)) : "x"(value));
#else
  store<T>(to, value);
#endif
}

inline void stream_fence() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

template <typename T>
GDFAST_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // x - 0 is x for every x, -0 and NaN too; x + 0 would lose -0
}

// Has the compiler forget how an address or a distance came about: else it keeps every sum of it
// and a constant that a loop needs, on the stack where registers do not suffice, rather than add
// anew.
template <typename V>
GDFAST_INLINE void forget_origin(V& value) {
  asm("" : "+r"(value));
}

// Has the compiler hold a value in a register from here on.
template <typename T>
GDFAST_INLINE void keep_in_register(Vec<T>& value) {
#if defined(GDFAST_EMULATE_AVX512)
  (void)value;  // it fills several
#elif defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  (void)value;  // other processors name their vector registers otherwise
#endif
}

// Transposes a square of kLanes x kLanes values held in kLanes vectors: pairs of values change
// places, then squares of 2x2 values, then of 4x4, and so on.
template <typename T>
GDFAST_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int kCount = kLanes<T>;
#if defined(__clang__)
  T square[kCount][kCount], turned[kCount][kCount];
  std::memcpy(square, rows, sizeof square);
  for (int i = 0; i < kCount; ++i) {
    for (int j = 0; j < kCount; ++j) turned[j][i] = square[i][j];
  }
  std::memcpy(rows, turned, sizeof turned);
#else
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
#pragma GCC unroll 4
  for (int step = 1; step < kCount; step *= 2) {
    Vec<Index> upper{}, lower{};
    for (int i = 0; i < kCount; ++i) {
      upper[i] = i & step ? kCount + i - step : i;
      lower[i] = i & step ? kCount + i : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if (i & step) continue;
      const Vec<T> row = rows[i], other = rows[i + step];
      rows[i] = __builtin_shuffle(row, other, upper);
      rows[i + step] = __builtin_shuffle(row, other, lower);
    }
  }
#endif
}

}  // namespace
}  // namespace gdfast::cpu
