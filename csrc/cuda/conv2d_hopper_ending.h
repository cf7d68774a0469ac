// What the Hopper convolutions do to sums before they are written.
#pragma once

#include <cmath>
#include <limits>

#include "../conv2d_problem.h"
#include "hopper.h"

namespace gdfast::cuda {
namespace {

// Lines and silu begin with a bias; lines are below * z or 0 on one side of 0, and z up to a limit
// on the other.
enum class Ending { kNone, kLines, kSilu, kZero };

// Tells a kernel's arguments, which have their bias.
template <typename Arguments>
void end_with(Arguments& a, Activation activation, double negative_slope) {
  using Kind = Activation;
  a.ending = activation == Kind::kSilu                        ? Ending::kSilu
             : activation == Kind::kNone && a.bias == nullptr ? Ending::kNone
                                                              : Ending::kLines;
  a.zero_below = activation == Kind::kRelu || activation == Kind::kRelu6;
  a.below = activation == Kind::kLeakyRelu ? static_cast<float>(negative_slope) : 1;
  a.most = activation == Kind::kRelu6 ? 6 : std::numeric_limits<float>::infinity();
}

// Two rows' sums, each of two neighbouring channels, with their bias and activation.
template <Ending kEnding, typename Arguments>
GDFAST_DEVICE void finish(const Arguments& a, float (&sums)[4], const float (&bias)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float& z = sums[i];
    z += bias[i % 2];
    if constexpr (kEnding == Ending::kSilu) {
      z = near_quotient(z, 1 + std::exp(-z));
    } else {
      const float below = a.below * z;
      z = z < 0 ? (a.zero_below ? 0 : below) : z > a.most ? a.most : z;
    }
  }
}

}  // namespace
}  // namespace gdfast::cuda
