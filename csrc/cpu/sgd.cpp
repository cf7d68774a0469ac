// SGD on the CPU: every element of all tensors in one pass over memory.
//
// The tensors are taken as one sequence of elements, end to end, of which each thread updates an
// equal part: a step on many small tensors costs one parallel region at most. Elements are
// independent, so that any number of threads gives the same result bit for bit.
#include <cstdint>
#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "shares.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

// A second thread pays from two parts of this many elements on where its core has half of the
// gradients in its cache; 64 thousand float32 with momentum that no other core has written take 5
// us on either one thread or two.
constexpr int64_t kElementsPerPart = 16 * 1024;

// Several parts per thread: one that another process interrupts does not hold up the others.
constexpr int64_t kPartsPerThread = 8;

// Parts begin at multiples of this many elements, so that two threads seldom share a cache line.
constexpr int64_t kPartAlignment = 64;

// Half types are widened this many elements at a time: three float arrays of 2 KB stay in the
// first-level cache.
constexpr int64_t kBlock = 512;

// Updates `count` elements of float or double where they lie. No two of the arrays overlap. The
// factors come by value: through a reference, a store to param might change them.
template <SgdMomentum kMomentum, SgdGrad kGrad, typename T>
void update(SgdFactors<T> factors, T* param, T* grad, T* momentum, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    T p = param[i];
    T g = grad[i];
    T m = kMomentum == SgdMomentum::kRunning ? momentum[i] : T(0);
    sgd_update<kMomentum, kGrad>(factors, p, g, m);
    param[i] = p;
    if (kGrad != SgdGrad::kRead) grad[i] = g;
    if (kMomentum != SgdMomentum::kNone) momentum[i] = m;
  }
}

// The same for a half type: block by block through float, rounded once at each store.
template <SgdMomentum kMomentum, SgdGrad kGrad, typename Half>
void update_half(const SgdFactors<float>& factors, Half* param, Half* grad, Half* momentum,
                 int64_t count) {
  float p[kBlock], g[kBlock], m[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t n = min_of(kBlock, count - i);
    widen_elements(param + i, n, p);
    widen_elements(grad + i, n, g);
    if (kMomentum == SgdMomentum::kRunning) widen_elements(momentum + i, n, m);
    update<kMomentum, kGrad>(factors, p, g, m, n);
    narrow_elements(p, n, param + i);
    if (kGrad != SgdGrad::kRead) narrow_elements(g, n, grad + i);
    if (kMomentum != SgdMomentum::kNone) narrow_elements(m, n, momentum + i);
  }
}

// Gives the master copy what somebody changed in the parameter since the last update.
template <typename Half>
void follow(float* master, const Half* param, int64_t count) {
  Half rounded[kBlock];
  narrow_elements(master, count, rounded);
  if (std::memcmp(rounded, param, count * sizeof(Half)) == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    master[i] = sgd_master(master[i], widen(rounded[i]), widen(param[i]));
  }
}

// The same where momentum and a master copy of the parameter are float: only the gradient is
// widened.
template <SgdMomentum kMomentum, SgdGrad kGrad, typename Half>
void update_master(const SgdFactors<float>& factors, Half* param, Half* grad, float* momentum,
                   float* master, int64_t count) {
  float g[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t n = min_of(kBlock, count - i);
    follow(master + i, param + i, n);
    widen_elements(grad + i, n, g);
    float* const m = kMomentum == SgdMomentum::kNone ? nullptr : momentum + i;
    update<kMomentum, kGrad>(factors, master + i, g, m, n);
    narrow_elements(master + i, n, param + i);
    if (kGrad != SgdGrad::kRead) narrow_elements(g, n, grad + i);
  }
}

// Where element `from` of a momentum buffer lies, or null where there is none.
template <SgdMomentum kMomentum, typename T>
T* at(void* momentum, int64_t from) {
  return kMomentum == SgdMomentum::kNone ? nullptr : static_cast<T*>(momentum) + from;
}

// Updates elements [begin, end) of the sequence that the tensors make end to end.
template <SgdMomentum kMomentum, SgdGrad kGrad, typename T>
void update_part(const SgdTensor* tensors, int64_t count, const SgdHyper& hyper, int64_t begin,
                 int64_t end) {
  const auto factors = sgd_factors<typename Accumulator<T>::type>(hyper);
  int64_t first = 0;  // the sequence's index of the tensor's first element
  for (int64_t t = 0; t < count && first < end; first += tensors[t++].numel) {
    const SgdTensor& tensor = tensors[t];
    const int64_t from = max_of(begin - first, 0);
    const int64_t to = min_of(end - first, tensor.numel);
    if (from >= to) continue;
    T* param = static_cast<T*>(tensor.param) + from;
    T* grad = static_cast<T*>(tensor.grad) + from;
    if constexpr (sizeof(T) == 2) {
      if (hyper.master) {
        float* momentum = at<kMomentum, float>(tensor.momentum, from);
        float* master = static_cast<float*>(tensor.master) + from;
        update_master<kMomentum, kGrad>(factors, param, grad, momentum, master, to - from);
      } else {
        T* momentum = at<kMomentum, T>(tensor.momentum, from);
        update_half<kMomentum, kGrad>(factors, param, grad, momentum, to - from);
      }
    } else {
      T* momentum = at<kMomentum, T>(tensor.momentum, from);
      update<kMomentum, kGrad>(factors, param, grad, momentum, to - from);
    }
  }
}

using UpdatePart = void (*)(const SgdTensor*, int64_t, const SgdHyper&, int64_t, int64_t);

template <SgdMomentum kMomentum, typename T>
UpdatePart choose(SgdGrad grad) {
  switch (grad) {
    case SgdGrad::kRead:
      return update_part<kMomentum, SgdGrad::kRead, T>;
    case SgdGrad::kZero:
      return update_part<kMomentum, SgdGrad::kZero, T>;
    case SgdGrad::kUnscale:
      break;
  }
  return update_part<kMomentum, SgdGrad::kUnscale, T>;
}

template <typename T>
UpdatePart choose(SgdMomentum momentum, SgdGrad grad) {
  switch (momentum) {
    case SgdMomentum::kNone:
      return choose<SgdMomentum::kNone, T>(grad);
    case SgdMomentum::kFirst:
      return choose<SgdMomentum::kFirst, T>(grad);
    case SgdMomentum::kRunning:
      break;
  }
  return choose<SgdMomentum::kRunning, T>(grad);
}

}  // namespace

void sgd(const SgdTensor* tensors, int64_t count, const SgdHyper& hyper, int threads) {
  UpdatePart update_part = nullptr;
  with_dtype(hyper.dtype, [&](auto element) {
    update_part = choose<decltype(element)>(sgd_momentum_kind(hyper), sgd_grad_kind(hyper));
  });
  int64_t numel = 0;
  for (int64_t t = 0; t < count; ++t) numel += tensors[t].numel;

  int64_t parts = max_of(1, min_of(numel / kElementsPerPart, kPartsPerThread * threads));
  if (parts > threads) parts = parts / threads * threads;
  const int64_t per_part = round_up(ceil_div(numel, parts), kPartAlignment);
  parallel_shares(parts, threads, [&](int64_t part, int) {
    const int64_t begin = part * per_part;
    update_part(tensors, count, hyper, begin, min_of(begin + per_part, numel));
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
