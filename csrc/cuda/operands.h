// What the matrix instruction multiplies: elements as they are, as one TF32 number, or as two.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "device.h"

namespace gdfast::cuda {

GDFAST_DEVICE float float_of(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both{bits};
  return both.value;
}

GDFAST_DEVICE uint32_t bits_of(float value) {
  union {
    float value;
    uint32_t bits;
  } both{value};
  return both.bits;
}

// How elements become operands of the matrix instruction. A 16 x 8 sum takes 32 bytes of both
// operands' depth; kTerms instructions of it make one product.
template <typename T>
struct HalfOperands {
  using Element = T;
  static constexpr int kTerms = 1;
  template <int kCount>
  GDFAST_DEVICE void convert(const uint32_t (&raw)[kCount], uint32_t (&operands)[1][kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) operands[0][i] = raw[i];
  }
  GDFAST_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[1][4],
                                  const uint32_t (&b)[1][2]) {
    mma_m16n8k16<T>(sum, a[0], b[0]);
  }
};

struct Tf32Operands {
  using Element = float;
  static constexpr int kTerms = 1;
  template <int kCount>
  GDFAST_DEVICE void convert(const uint32_t (&raw)[kCount], uint32_t (&operands)[1][kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) operands[0][i] = to_tf32(float_of(raw[i]));
  }
  GDFAST_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[1][4],
                                  const uint32_t (&b)[1][2]) {
    mma_m16n8k8_tf32(sum, a[0], b[0]);
  }
};

// Nearly float32: each number is the sum of two in TF32, and of their four products only that of
// the two rests, 2^-22 of the whole, is left out. Tensor cores cut off what does not fit a sum;
// over many steps that adds up, so that here they sum eight products and no more.
//
// A number that is not finite has no rest: corrections that it takes part in are left out, and the
// product of the larger parts is inf or NaN as float32's would be. Numbers within 2^-12 of the
// largest are infinite in TF32, and their products too.
struct Tf32x3Operands {
  using Element = float;
  static constexpr int kTerms = 2;
  template <int kCount>
  GDFAST_DEVICE void convert(const uint32_t (&raw)[kCount], uint32_t (&operands)[2][kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float value = float_of(raw[i]);
      operands[0][i] = to_tf32(value);
      operands[1][i] = to_tf32(value - float_of(operands[0][i]));
    }
  }
  GDFAST_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[2][4],
                                  const uint32_t (&b)[2][2]) {
    float part[4] = {0, 0, 0, 0};
    mma_m16n8k8_tf32(part, a[1], b[0]);
    mma_m16n8k8_tf32(part, a[0], b[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) part[i] = fabsf(part[i]) < INFINITY ? part[i] : 0;
    mma_m16n8k8_tf32(part, a[0], b[0]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }
};

// The same three products by fewer instructions, which is what bounds them: a number is rounded by
// an addition, and nobody looks for what is not finite. Of such a number the rest is NaN, and so is
// each sum that it takes part in. A block that finds a NaN sums again, with the operands above.
struct QuickTf32x3Operands {
  using Element = float;
  static constexpr int kTerms = 2;
  template <int kCount>
  GDFAST_DEVICE void convert(const uint32_t (&raw)[kCount], uint32_t (&operands)[2][kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      operands[0][i] = (raw[i] + 0x1000u) & 0xffffe000u;
      // Tensor cores cut the rest off after 11 of its 12 bits.
      operands[1][i] = bits_of(float_of(raw[i]) - float_of(operands[0][i]));
    }
  }
};

// How a loop multiplies first.
template <typename Operands>
struct FirstTry {
  using type = Operands;
};
template <>
struct FirstTry<Tf32x3Operands> {
  using type = QuickTf32x3Operands;
};

// sums[..][column + half] += left right[half]
template <typename Operands, int kRows, int kColumns>
GDFAST_DEVICE void multiply_add_pair(float (&sums)[kRows][kColumns][4], int column,
                                     const uint32_t (&left)[kRows][Operands::kTerms][4],
                                     const uint32_t (&right)[2][Operands::kTerms][2]) {
  if constexpr (std::is_same_v<Operands, QuickTf32x3Operands>) {
    // Each product waits for the one before it: those of four sums take turns.
    constexpr int kHalves = kRows > 2 ? 1 : 2;
#pragma unroll
    for (int first = 0; first < 2; first += kHalves) {
      float parts[kRows][kHalves][4] = {};
#pragma unroll
      for (int product = 0; product < 3; ++product) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            mma_m16n8k8_tf32(parts[i][half], left[i][product == 0],
                             right[first + half][product == 1]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][column + first + half][j] += parts[i][half][j];
        }
      }
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        Operands::multiply_add(sums[i][column + half], left[i], right[half]);
      }
    }
  }
}

}  // namespace gdfast::cuda
