// Element types and their conversions to the type that sums are taken in.
#pragma once

#include <cstdint>
#include <cstring>

#include "../conv2d_problem.h"

namespace gdfast::cpu {
namespace {

// bfloat16: the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

// IEEE binary16.
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Shifted into float32's fields the exponent is 127 - 15 = 112 too small. Multiplying by 2^112
  // mends that, and makes normal numbers of binary16's subnormals on the way.
  const float scaled = from_bits(magnitude << 13) * from_bits((127u + 112u) << 23);
  const uint32_t infinite_or_nan = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return from_bits(bits_of(scaled) | infinite_or_nan | sign);
}

template <typename T>
inline T narrow(float value);
template <typename T>
inline T narrow(double value);

template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline double narrow<double>(double value) {
  return value;
}

// Round to nearest, ties to even; a NaN stays one.
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded >> 16)};
}

template <>
inline Float16 narrow<Float16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520: halfway between the largest half and 2^16
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // 2^-14: the result is subnormal
    // Adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the hardware.
    half = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

// The type that products of T are summed in.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// Calls f with a value of the element type that dtype names.
template <typename F>
inline void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace
}  // namespace gdfast::cpu
