// Products of pairs of bfloat16, summed in float32: one instruction of AVX512_BF16, two products in
// each lane. Everything else in the kernels that are built on it is written as for any vectors, and
// is tested with that instruction emulated.
#pragma once

#include "numeric.h"
#include "simd.h"
#include "tile.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#elif !defined(GDFAST_EMULATE_AVX512)
#error "expected -mavx512bf16 or GDFAST_EMULATE_AVX512"
#endif

namespace gdfast::cpu {
namespace {

// Two neighbours along the reduction, as they share a lane.
struct BFloat16Pair {
  BFloat16 first, second;
};

#if defined(__AVX512BF16__)

GDFAST_INLINE Vec<float> add_pair_products(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

#else

// Vectors that any processor has in one register.
typedef float Floats4 __attribute__((vector_size(16)));
typedef uint32_t Bits4 __attribute__((vector_size(16)));

// The instruction takes subnormal numbers for zeros, and makes zeros of them.
GDFAST_INLINE Floats4 flushed(Bits4 bits) {
  return (Floats4)((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

// As the instruction: the second products first, and each sum rounded once. The product of two
// bfloat16 is exact in float32 unless it leaves the range of normal numbers; only there an FMA
// could give something else. Never inlined: it would be most of the code of its callers.
__attribute__((noinline)) void add_pair_products(Vec<float>* sum, const Vec<uint32_t>* a,
                                                 const Vec<uint32_t>* b) {
  for (int lane = 0; lane < kLanes<float>; lane += 4) {
    Bits4 sums, x, y;
    std::memcpy(&sums, reinterpret_cast<char*>(sum) + 4 * lane, sizeof sums);
    std::memcpy(&x, reinterpret_cast<const char*>(a) + 4 * lane, sizeof x);
    std::memcpy(&y, reinterpret_cast<const char*>(b) + 4 * lane, sizeof y);
    const Floats4 second = flushed(x & 0xffff0000u) * flushed(y & 0xffff0000u);
    const Floats4 first = flushed(x << 16) * flushed(y << 16);
    const Floats4 once = flushed((Bits4)(flushed(sums) + second));
    sums = (Bits4)flushed((Bits4)(once + first));
    std::memcpy(reinterpret_cast<char*>(sum) + 4 * lane, &sums, sizeof sums);
  }
}

GDFAST_INLINE Vec<float> add_pair_products(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
  add_pair_products(&sum, &a, &b);
  return sum;
}

#endif

template <>
struct Operand<BFloat16Pair> {
  using Sum = float;
  using Lane = uint32_t;

  static GDFAST_INLINE Vec<uint32_t> line(const BFloat16Pair* from) {
    Vec<uint32_t> pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return pairs;
  }
  static GDFAST_INLINE Vec<uint32_t> spread(const BFloat16Pair* from) {
    uint32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return broadcast(pair);
  }
  static GDFAST_INLINE void add_product(Vec<float>& sum, Vec<uint32_t> value, Vec<uint32_t> line) {
    sum = add_pair_products(sum, value, line);
  }
};

// to[x] = (first[x], second[x]); null stands for zeros.
inline void interleave(const BFloat16* first, const BFloat16* second, int64_t count,
                       BFloat16Pair* __restrict to) {
  if (first != nullptr && second != nullptr) {
    for (int64_t x = 0; x < count; ++x) to[x] = {first[x], second[x]};
  } else if (first != nullptr) {
    for (int64_t x = 0; x < count; ++x) to[x] = {first[x], BFloat16{0}};
  } else if (second != nullptr) {
    for (int64_t x = 0; x < count; ++x) to[x] = {BFloat16{0}, second[x]};
  } else {
    std::memset(to, 0, count * sizeof *to);
  }
}

// Whether the kernels of pairs take a problem: groups of few channels would leave most lanes empty.
inline bool pairs_fit(const Conv2dProblem& p) {
  const int64_t least = min_of(p.C, p.K) / p.groups;
  return p.algorithm == Algorithm::kBf16 && p.dtype == DType::kBFloat16 && p.N > 0 &&
         (p.groups == 1 || least >= kLanes<float>);
}

}  // namespace
}  // namespace gdfast::cpu
