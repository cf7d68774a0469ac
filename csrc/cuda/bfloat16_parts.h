// Float32 numbers as sums of three bfloat16, which Hopper's tensor cores multiply.
//
// The first part is a number cut off after 8 bits, so that it overflows nowhere; the second is the
// rest rounded to 8 bits, the third what is left, which has no more than 8. Of the nine products of
// two numbers' parts three are left out, together at most 2^-21 of the whole. Of numbers below
// 2^-110 the third part, and of those below 2^-118 the second, lose bits beyond 2^-133.
//
// A number that is not finite has itself as its first part and NaN as the others: products of first
// parts alone are then what float32 has. (A NaN whose upper 7 bits are those of an infinity, which
// no arithmetic makes, counts as one.)
#pragma once

#include "hopper.h"
#include "operands.h"

namespace gdfast::cuda {

constexpr int kFloatParts = 3;

// Of two numbers, the first one in the lower half of each register.
GDFAST_DEVICE void split_two(uint32_t first, uint32_t second, uint32_t (&parts)[kFloatParts]) {
  constexpr uint32_t kUpper = 0xffff0000u;
  parts[0] = first >> 16 | (second & kUpper);
  float rests[2] = {float_of(first) - float_of(first & kUpper),
                    float_of(second) - float_of(second & kUpper)};
  parts[1] = pack_two<BFloat16>(rests[0], rests[1]);
  rests[0] -= float_of(parts[1] << 16);
  rests[1] -= float_of(parts[1] & kUpper);
  parts[2] = pack_two<BFloat16>(rests[0], rests[1]);
}

// Four registers with pairs of `values`, as the fragment of a product: first along the depth.
GDFAST_DEVICE void split_fragment(const uint32_t (&values)[4][2],
                                  uint32_t (&fragments)[kFloatParts][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t parts[kFloatParts];
    split_two(values[i][0], values[i][1], parts);
#pragma unroll
    for (int part = 0; part < kFloatParts; ++part) fragments[part][i] = parts[part];
  }
}

// A product of float32 numbers by those of their parts: what first parts make is in `large`, begun
// anew where not `accumulate`, and all else, 2^-7 of it and less, in `small`. Tensor cores cut off
// what does not fit a sum, which adds up in large sums, and matters little in small ones.
// b(part): a matrix in shared memory.
template <int kN, bool kColumnsB, typename B>
GDFAST_DEVICE void multiply_parts(float (&large)[kN / 2], float (&small)[kN / 2],
                                  const uint32_t (&a)[kFloatParts][4], B&& b, bool accumulate) {
#pragma unroll
  for (int sum = kFloatParts - 1; sum > 0; --sum) {
#pragma unroll
    for (int part = 0; part <= sum; ++part) {
      warpgroup_multiply<kN, kColumnsB>(small, a[part], b(sum - part), true);
    }
  }
  warpgroup_multiply<kN, kColumnsB>(large, a[0], b(0), accumulate);
}

template <int kCount>
GDFAST_DEVICE void add_up(float (&sums)[kCount], const float (&more)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] += more[i];
}

// What both make. Without the small sums where these are no number: only of what is not finite.
GDFAST_DEVICE float sum_of_parts(float large, float small) {
  return fabsf(small) < INFINITY ? large + small : large;
}

}  // namespace gdfast::cuda
