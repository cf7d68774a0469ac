// From the types of a linear layer's tensors to the instances of its kernels.
#pragma once

#include "linear.h"
#include "vectors.h"

namespace gdfast::cuda {

template <typename InputType, typename WeightType, typename OutputType>
struct LinearTypes {
  using Input = InputType;
  using Weight = WeightType;
  using Output = OutputType;
};

// Calls f(LinearTypes) with those of a layer whose output is of a half type.
template <typename H, typename F>
void with_half_types(const Linear& p, F&& f) {
  if (p.weight == p.output) return f(LinearTypes<H, H, H>{});
  if (p.input == p.output) return f(LinearTypes<H, float, H>{});
  f(LinearTypes<float, float, H>{});
}

template <typename F>
void with_linear_types(const Linear& p, F&& f) {
  with_dtype(p.output, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      with_half_types<T>(p, f);
    } else {
      f(LinearTypes<T, T, T>{});
    }
  });
}

}  // namespace gdfast::cuda
