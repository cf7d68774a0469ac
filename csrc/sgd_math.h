// The one SGD update. The loops that the compiler turns into SIMD, the scalar tails and the CUDA
// kernels all instantiate sgd_update().
#pragma once

#include <cstdint>

#include "conv2d_problem.h"

#if defined(__CUDACC__)
#define GDFAST_SGD_FUNCTION static __host__ __device__ __forceinline__
#else
// Internal linkage: a copy compiled for AVX-512 must never serve the baseline.
#define GDFAST_SGD_FUNCTION static inline __attribute__((always_inline))
#endif

namespace gdfast {

// One parameter. All have the same memory order, without gaps, and the same dtype, but for a
// parameter of a half type that has a master copy: then this and the momentum are float32.
struct SgdTensor {
  void* param;
  void* grad;
  void* momentum;  // null where momentum is 0
  void* master;    // null where there is none
  int64_t numel;
};

// What all tensors of one call share.
struct SgdHyper {
  DType dtype;
  double lr, momentum, dampening, weight_decay;
  double grad_scale;  // gradients are divided by it and stored so; 1 leaves them alone
  bool nesterov, maximize;
  bool first_step;  // the momentum buffers are new: they become the gradient, undamped
  bool zero_grad;   // gradients are zero afterwards
  bool master;      // every tensor has a master copy
};

// What happens to the momentum buffer: there is none; it is written; it is read and written.
enum class SgdMomentum { kNone, kFirst, kRunning };

// What happens to the gradient: it is only read; it is zeroed; it is divided by grad_scale and
// then stored so, or zeroed.
enum class SgdGrad { kRead, kZero, kUnscale };

GDFAST_SGD_FUNCTION SgdMomentum sgd_momentum_kind(const SgdHyper& hyper) {
  if (hyper.momentum == 0) return SgdMomentum::kNone;
  return hyper.first_step ? SgdMomentum::kFirst : SgdMomentum::kRunning;
}

GDFAST_SGD_FUNCTION SgdGrad sgd_grad_kind(const SgdHyper& hyper) {
  if (hyper.grad_scale != 1) return SgdGrad::kUnscale;
  return hyper.zero_grad ? SgdGrad::kZero : SgdGrad::kRead;
}

// The hyperparameters in the type of the arithmetic, rounded once as PyTorch rounds its scalars.
template <typename T>
struct SgdFactors {
  T minus_lr, momentum, undamped, weight_decay, grad_scale;
  T sign;  // -1 to maximize: exact, and cheaper than a branch
  bool decay, nesterov, zero_grad;
};

template <typename T>
GDFAST_SGD_FUNCTION SgdFactors<T> sgd_factors(const SgdHyper& hyper) {
  return {static_cast<T>(-hyper.lr),
          static_cast<T>(hyper.momentum),
          static_cast<T>(1 - hyper.dampening),
          static_cast<T>(hyper.weight_decay),
          static_cast<T>(hyper.grad_scale),
          static_cast<T>(hyper.maximize ? -1 : 1),
          hyper.weight_decay != 0,
          hyper.nesterov,
          hyper.zero_grad};
}

// a * b + c, rounded once wherever the hardware can: PyTorch's add(c, b, alpha=a) does the same.
// Spelled out, because a contraction left to the compiler may pick the other product.
GDFAST_SGD_FUNCTION float sgd_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

GDFAST_SGD_FUNCTION double sgd_multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// The value that an update starts from where a parameter has a master copy: the master, as long as
// it rounds to what the parameter is. Otherwise somebody has changed that since the last update.
template <typename T>
GDFAST_SGD_FUNCTION T sgd_master(T master, T rounded, T param) {
  return rounded == param ? master : param;
}

// Updates one element in place, in the order of roundings of torch.optim.SGD's default loop. The
// kinds are compile-time because they change which memory is touched; the flags in `factors` are
// the same for every element, so that a vectorizer blends or hoists them.
template <SgdMomentum kMomentum, SgdGrad kGrad, typename T>
GDFAST_SGD_FUNCTION void sgd_update(const SgdFactors<T>& factors, T& param, T& grad, T& momentum) {
  if (kGrad == SgdGrad::kUnscale) grad = grad / factors.grad_scale;
  T direction = factors.sign * grad;
  // Not simply a factor of 0: an infinite parameter would become NaN.
  const T decayed = sgd_multiply_add(factors.weight_decay, param, direction);
  direction = factors.decay ? decayed : direction;
  if (kMomentum != SgdMomentum::kNone) {
    momentum = kMomentum == SgdMomentum::kFirst
                   ? direction
                   : sgd_multiply_add(factors.undamped, direction, factors.momentum * momentum);
    const T ahead = sgd_multiply_add(factors.momentum, momentum, direction);
    direction = factors.nesterov ? ahead : momentum;
  }
  param = sgd_multiply_add(factors.minus_lr, direction, param);
  if (kGrad == SgdGrad::kZero) grad = T(0);
  if (kGrad == SgdGrad::kUnscale) grad = factors.zero_grad ? T(0) : grad;
}

}  // namespace gdfast
