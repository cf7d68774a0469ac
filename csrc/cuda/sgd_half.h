// How the SGD update stores half types: float32 arithmetic, rounded once at each store.
#pragma once

#include "device.h"
#include "sgd_chunks.h"

namespace gdfast::cuda {

template <typename T>
struct SgdHalfElement {
  using Math = float;
  GDFAST_SGD_FUNCTION float widen(T value) { return to_float(value); }
  GDFAST_SGD_FUNCTION T narrow(float value) { return from_float<T>(value); }
};
template <>
struct SgdElement<Half> : SgdHalfElement<Half> {};
template <>
struct SgdElement<BFloat16> : SgdHalfElement<BFloat16> {};

}  // namespace gdfast::cuda
