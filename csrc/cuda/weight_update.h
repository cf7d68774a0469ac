// The SGD update of a weight by elements of its gradient that a kernel has in its registers.
#pragma once

#include "conv2d.h"
#include "sgd_half.h"

namespace gdfast::cuda {

// As a kernel takes it; `Math` is what gradients are summed in.
template <typename Math>
struct WeightUpdate {
  void *param, *momentum, *master;  // param is null where nothing is updated
  bool wide;                        // whether param and momentum are Math, whatever images are
  const double* lr;                 // on the device, instead of the factors', or null
  SgdFactors<Math> factors;
  SgdMomentum kind;
};

template <typename Math>
WeightUpdate<Math> weight_update(const SgdWeight& weight) {
  constexpr DType kMath = sizeof(Math) == 8 ? DType::kFloat64 : DType::kFloat32;
  const SgdTensor& tensor = weight.tensor;
  return {tensor.param,
          tensor.momentum,
          tensor.master,
          weight.hyper.dtype == kMath,
          weight.lr,
          sgd_factors<Math>(weight.hyper),
          sgd_momentum_kind(weight.hyper)};
}

// Updates a few elements. All are read before any is written, so that they are waited for together.
template <SgdMomentum kMomentum, bool kMaster, typename T, int kCount, typename Math>
GDFAST_DEVICE void update_elements(const WeightUpdate<Math>& to, const int64_t (&places)[kCount],
                                   const Math (&gradients)[kCount]) {
  using State = SgdState<T, kMaster>;
  T* const params = static_cast<T*>(to.param);
  State* const momenta = static_cast<State*>(to.momentum);
  State* const masters = static_cast<State*>(to.master);
  SgdFactors<Math> factors = to.factors;
  if (to.lr != nullptr) factors.minus_lr = static_cast<Math>(-*to.lr);
  T param[kCount] = {};
  State momentum[kCount] = {}, master[kCount] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t at = places[i];
    if (at < 0) continue;
    param[i] = params[at];
    if (kMomentum == SgdMomentum::kRunning) momentum[i] = momenta[at];
    if (kMaster) master[i] = masters[at];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t at = places[i];
    if (at < 0) continue;
    Math gradient = gradients[i];
    sgd_update_stored<kMomentum, SgdGrad::kRead, kMaster>(factors, param[i], gradient, momentum[i],
                                                          master[i]);
    params[at] = param[i];
    if (kMomentum != SgdMomentum::kNone) momenta[at] = momentum[i];
    if (kMaster) masters[at] = master[i];
  }
}

template <bool kMaster, typename T, int kCount, typename Math>
GDFAST_DEVICE void update_elements(const WeightUpdate<Math>& to, const int64_t (&places)[kCount],
                                   const Math (&gradients)[kCount]) {
  switch (to.kind) {
    case SgdMomentum::kNone:
      return update_elements<SgdMomentum::kNone, kMaster, T>(to, places, gradients);
    case SgdMomentum::kFirst:
      return update_elements<SgdMomentum::kFirst, kMaster, T>(to, places, gradients);
    case SgdMomentum::kRunning:
      return update_elements<SgdMomentum::kRunning, kMaster, T>(to, places, gradients);
  }
}

// Updates the elements of a weight at some places, counted in elements; none at one that is
// negative. T is the type of the weight, unless that is wide.
template <typename T, int kCount, typename Math>
GDFAST_DEVICE void update_weight(const WeightUpdate<Math>& to, const int64_t (&places)[kCount],
                                 const Math (&gradients)[kCount]) {
  if constexpr (sizeof(T) == 2) {
    if (to.wide) return update_elements<false, Math>(to, places, gradients);
    if (to.master != nullptr) return update_elements<true, T>(to, places, gradients);
  }
  update_elements<false, T>(to, places, gradients);
}

}  // namespace gdfast::cuda
