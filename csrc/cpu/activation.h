// Activations and their gradients on vectors.
#pragma once

#include "../batch_norm_problem.h"
#include "simd.h"

namespace gdfast::cpu {
namespace {

template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};

// Calls f with the tag of an activation.
template <typename F>
inline void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kNone:
      return f(ActivationTag<Activation::kNone>{});
    case Activation::kRelu:
      return f(ActivationTag<Activation::kRelu>{});
    case Activation::kRelu6:
      return f(ActivationTag<Activation::kRelu6>{});
    case Activation::kLeakyRelu:
      return f(ActivationTag<Activation::kLeakyRelu>{});
    case Activation::kSilu:
      return f(ActivationTag<Activation::kSilu>{});
  }
}

// How the exponent of a floating-point type is stored, and how many terms of the power series of
// exp its precision needs for |r| <= ln(2) / 2 = 0.3466.
template <typename A>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr int kTerms = 7;              // 0.3466^8 / 8! = 5e-9, a tenth of half an epsilon
  static constexpr float kLargest = 88.72283f;  // ln of the largest finite value
  static constexpr float kSmallest = -87.33654f;   // ln of the smallest normal value
  static constexpr float kRounder = 12582912.0f;   // 1.5 * 2^23: adding it rounds to whole numbers
  static constexpr float kLn2High = 0.693359375f;  // 9 bits, so that its multiples are exact
  static constexpr float kLn2Low = -2.12194440e-4f;
};

template <>
struct ExpTraits<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr int kTerms = 13;  // 0.3466^14 / 14! = 4e-18
  static constexpr double kLargest = 709.782712893384;
  static constexpr double kSmallest = -708.396418532264;
  static constexpr double kRounder = 6755399441055744.0;    // 1.5 * 2^52
  static constexpr double kLn2High = 0.693147180369123816;  // the last 20 bits are zero
  static constexpr double kLn2Low = 1.90821492927058770e-10;
};

// exp(x) = 2^n * exp(r), r = x - n ln 2. Infinite from the largest x on, never below the smallest
// normal number; a NaN stays one.
template <typename A>
GDFAST_INLINE Vec<A> exp_of(Vec<A> x) {
  using Traits = ExpTraits<A>;
  using Int = typename Traits::Int;
  const Vec<A> largest = broadcast(Traits::kLargest), smallest = broadcast(Traits::kSmallest);
  const Vec<A> infinite = broadcast(static_cast<A>(__builtin_inf()));
  Vec<A> inside = x < smallest ? smallest : x;
  inside = inside > largest ? largest : inside;
  const Vec<A> rounder = broadcast(Traits::kRounder);
  const Vec<A> shifted = inside * static_cast<A>(1.4426950408889634) + rounder;
  const Vec<A> n = shifted - rounder;
  const Vec<A> r = (inside - n * Traits::kLn2High) - n * Traits::kLn2Low;
  Vec<A> sum = broadcast(A(1));
#pragma GCC unroll 16
  for (int k = Traits::kTerms; k > 0; --k) sum = sum * r * (A(1) / A(k)) + A(1);
  // n stands in the low bits of `shifted`. Half of it at a time: 2^128 is no float.
  const Vec<Int> whole = ((Vec<Int>)shifted - (Vec<Int>)rounder);
  const Vec<Int> half = whole >> 1, rest = whole - half;
  const Vec<A> low = (Vec<A>)((half + Traits::kBias) << Traits::kMantissaBits);
  const Vec<A> high = (Vec<A>)((rest + Traits::kBias) << Traits::kMantissaBits);
  const Vec<A> result = sum * low * high;
  return x > largest ? infinite : result;
}

// activation(z). A NaN stays one, as in native PyTorch.
template <Activation kActivation, typename A>
GDFAST_INLINE Vec<A> activate(Vec<A> z, Vec<A> negative_slope) {
  const Vec<A> zero{};
  if constexpr (kActivation == Activation::kRelu) {
    return z < zero ? zero : z;
  } else if constexpr (kActivation == Activation::kRelu6) {
    const Vec<A> six = broadcast(A(6));
    const Vec<A> low = z < zero ? zero : z;
    return low > six ? six : low;
  } else if constexpr (kActivation == Activation::kLeakyRelu) {
    return z > zero ? z : z * negative_slope;
  } else if constexpr (kActivation == Activation::kSilu) {
    return z / (exp_of<A>(-z) + A(1));
  } else {
    return z;
  }
}

// grad * activation'(z). For relu, relu6 and leaky_relu with a slope of at least 0, activation(z)
// in the place of z gives the same.
template <Activation kActivation, typename A>
GDFAST_INLINE Vec<A> activation_gradient(Vec<A> grad, Vec<A> z, Vec<A> negative_slope) {
  const Vec<A> zero{};
  if constexpr (kActivation == Activation::kRelu) {
    return z <= zero ? zero : grad;
  } else if constexpr (kActivation == Activation::kRelu6) {
    const Vec<A> six = broadcast(A(6));
    const Vec<A> above = z <= zero ? zero : grad;
    return z >= six ? zero : above;
  } else if constexpr (kActivation == Activation::kLeakyRelu) {
    return z > zero ? grad : grad * negative_slope;
  } else if constexpr (kActivation == Activation::kSilu) {
    const Vec<A> sigmoid = A(1) / (exp_of<A>(-z) + A(1));
    return grad * (sigmoid * (z * (A(1) - sigmoid) + A(1)));
  } else {
    return grad;
  }
}

}  // namespace
}  // namespace gdfast::cpu
