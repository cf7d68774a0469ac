// The sum of a vector's lanes.
#pragma once

#include "simd.h"

namespace gdfast::cpu {
namespace {

template <typename T, int kBytes>
struct Lanes {
  typedef T type __attribute__((vector_size(kBytes)));
};

// Half to half, again and again: one lane after the other, each sum would wait for the one before.
template <typename T, int kBytes = kVectorBytes>
GDFAST_INLINE T sum_lanes(typename Lanes<T, kBytes>::type value) {
  if constexpr (kBytes > 16) {
    typename Lanes<T, kBytes / 2>::type halves[2];
    std::memcpy(halves, &value, sizeof halves);
    return sum_lanes<T, kBytes / 2>(halves[0] + halves[1]);
  } else if constexpr (sizeof(T) == 8) {
    return value[0] + value[1];
  } else {
    return (value[0] + value[2]) + (value[1] + value[3]);
  }
}

}  // namespace
}  // namespace gdfast::cpu
