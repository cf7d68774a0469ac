// Division by a number that is known before the launch: a multiplication and a shift.
#pragma once

#include <cstdint>

#include "device.h"

namespace gdfast::cuda {

// For numerators and divisors from 0 (1) to 2^31 - 1.
// Source: Granlund and Montgomery, 1994, "Division by Invariant Integers using Multiplication".
struct Divisor {
  uint32_t divisor, factor, shift;

  // With 2^(shift - 1) < divisor <= 2^shift and factor = ceil(2^(31 + shift) / divisor), the error
  // of n factor / 2^(31 + shift) is less than 1 / divisor for every n below 2^31.
  static Divisor of(int64_t divisor) {
    uint32_t bits = 0;
    while ((int64_t{1} << bits) < divisor) ++bits;
    const uint64_t numerator = uint64_t{1} << (31 + bits);
    const auto unsigned_divisor = static_cast<uint64_t>(divisor);
    const uint64_t factor = (numerator + unsigned_divisor - 1) / unsigned_divisor;
    return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(factor), bits};
  }
};

struct Divided {
  int quotient, rest;
};

GDFAST_DEVICE Divided divide(int numerator, const Divisor& by) {
  const auto n = static_cast<uint32_t>(numerator);
  const uint64_t product = static_cast<uint64_t>(n) * by.factor;
  const auto quotient = static_cast<uint32_t>(product >> (31 + by.shift));
  return {static_cast<int>(quotient), static_cast<int>(n - quotient * by.divisor)};
}

}  // namespace gdfast::cuda
