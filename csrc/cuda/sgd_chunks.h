// How a launch of the CUDA kernel shares its elements among blocks and threads. No CUDA in here:
// g++ compiles it too, and the tests walk through every block and thread on the CPU.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../sgd_math.h"

namespace gdfast::cuda {

// Elements that a block updates at a time. A multiple of 16 bytes in every dtype, so that all
// chunks of a tensor are aligned as its beginning is.
constexpr int64_t kChunk = 8192;
constexpr int kThreads = 256;

// Kernel arguments have 4096 bytes; the batch leaves 128 of them to the rest.
constexpr int kMaxTensors = 82;

// The tensors of one launch, end to end: tensor t has the chunks [first_chunk[t],
// first_chunk[t + 1]).
struct SgdBatch {
  SgdTensor tensors[kMaxTensors];
  int64_t first_chunk[kMaxTensors + 1];
  int count;
};
static_assert(sizeof(SgdBatch) <= 4096 - 128, "the batch must fit into a kernel's arguments");

// Scalars that may lie on the device, so that nobody waits for their values; null where not given.
struct SgdScalars {
  const double* lr;  // instead of hyper.lr
  const float* grad_scale;
  const float* found_inf;  // nothing is updated unless it is 0
};

// Takes the next tensors into a batch; returns how many.
inline int64_t sgd_fill(const SgdTensor* tensors, int64_t count, SgdBatch& batch) {
  batch.count = static_cast<int>(count < kMaxTensors ? count : kMaxTensors);
  batch.first_chunk[0] = 0;
  for (int t = 0; t < batch.count; ++t) {
    batch.tensors[t] = tensors[t];
    batch.first_chunk[t + 1] = batch.first_chunk[t] + (tensors[t].numel + kChunk - 1) / kChunk;
  }
  return batch.count;
}

// The tensor that a chunk belongs to: the last one whose first chunk is not beyond it.
GDFAST_SGD_FUNCTION int sgd_tensor_of(const SgdBatch& batch, int64_t chunk) {
  int low = 0, high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Elements that one access moves.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) SgdPack {
  T values[kWidth];
};

// How an element is stored and computed with. For float and double: as it is.
template <typename T>
struct SgdElement {
  using Math = T;
  GDFAST_SGD_FUNCTION T widen(T value) { return value; }
  GDFAST_SGD_FUNCTION T narrow(T value) { return value; }
};

// How momentum buffers and master copies are stored.
template <typename T, bool kMaster>
using SgdState = std::conditional_t<kMaster, typename SgdElement<T>::Math, T>;

// `Gradient` is T, or Math where a gradient was never rounded.
template <SgdMomentum kMomentum, SgdGrad kGrad, bool kMaster, typename T, typename Gradient,
          typename State, typename Math>
GDFAST_SGD_FUNCTION void sgd_update_stored(const SgdFactors<Math>& factors, T& param,
                                           Gradient& grad, State& momentum, State& master) {
  using Element = SgdElement<T>;
  Math p = Element::widen(param), g = SgdElement<Gradient>::widen(grad), m = Math(0);
  if (kMaster) {
    const Math kept = SgdElement<State>::widen(master);
    p = sgd_master(kept, Element::widen(Element::narrow(kept)), p);
  }
  if (kMomentum == SgdMomentum::kRunning) m = SgdElement<State>::widen(momentum);
  sgd_update<kMomentum, kGrad>(factors, p, g, m);
  param = Element::narrow(p);
  if (kMaster) master = SgdElement<State>::narrow(p);
  if (kGrad != SgdGrad::kRead) grad = SgdElement<Gradient>::narrow(g);
  if (kMomentum != SgdMomentum::kNone) momentum = SgdElement<State>::narrow(m);
}

// What one thread does in one chunk: whole packs first, where addresses allow, then what is left.
// Neighbouring threads take neighbouring packs, so that a warp's accesses make full cache lines.
template <SgdMomentum kMomentum, SgdGrad kGrad, bool kMaster, typename T, typename Math>
GDFAST_SGD_FUNCTION void sgd_chunk(const SgdBatch& batch, int64_t chunk,
                                   const SgdFactors<Math>& factors, int thread) {
  // 16 bytes of the wider type make the widest access there is.
  using State = SgdState<T, kMaster>;
  constexpr int kWidth = 16 / sizeof(State);
  using Pack = SgdPack<T, kWidth>;
  using StatePack = SgdPack<State, kWidth>;
  const int t = sgd_tensor_of(batch, chunk);
  const SgdTensor& tensor = batch.tensors[t];
  const int64_t begin = (chunk - batch.first_chunk[t]) * kChunk;
  const int64_t left = tensor.numel - begin;
  const int count = static_cast<int>(left < kChunk ? left : kChunk);
  constexpr bool kHasMomentum = kMomentum != SgdMomentum::kNone;
  T* const param = static_cast<T*>(tensor.param) + begin;
  T* const grad = static_cast<T*>(tensor.grad) + begin;
  State* const momentum = kHasMomentum ? static_cast<State*>(tensor.momentum) + begin : nullptr;
  State* const master = kMaster ? static_cast<State*>(tensor.master) + begin : nullptr;

  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad);
  const uintptr_t states =
      reinterpret_cast<uintptr_t>(momentum) | reinterpret_cast<uintptr_t>(master);
  const bool aligned = addresses % sizeof(Pack) == 0 && states % sizeof(StatePack) == 0;
  const int packs = aligned ? count / kWidth : 0;
  for (int i = thread; i < packs; i += kThreads) {
    Pack p = reinterpret_cast<Pack*>(param)[i];
    Pack g = reinterpret_cast<Pack*>(grad)[i];
    StatePack m{}, w{};
    if (kMomentum == SgdMomentum::kRunning) m = reinterpret_cast<StatePack*>(momentum)[i];
    if (kMaster) w = reinterpret_cast<StatePack*>(master)[i];
    for (int lane = 0; lane < kWidth; ++lane) {
      sgd_update_stored<kMomentum, kGrad, kMaster>(factors, p.values[lane], g.values[lane],
                                                   m.values[lane], w.values[lane]);
    }
    reinterpret_cast<Pack*>(param)[i] = p;
    if (kGrad != SgdGrad::kRead) reinterpret_cast<Pack*>(grad)[i] = g;
    if (kHasMomentum) reinterpret_cast<StatePack*>(momentum)[i] = m;
    if (kMaster) reinterpret_cast<StatePack*>(master)[i] = w;
  }
  for (int i = packs * kWidth + thread; i < count; i += kThreads) {
    State none{};
    sgd_update_stored<kMomentum, kGrad, kMaster>(
        factors, param[i], grad[i], kHasMomentum ? momentum[i] : none, kMaster ? master[i] : none);
  }
}

// What one thread does in one chunk of a step that is skipped.
template <typename T>
GDFAST_SGD_FUNCTION void sgd_zero_chunk(const SgdBatch& batch, int64_t chunk, int thread) {
  const int t = sgd_tensor_of(batch, chunk);
  const SgdTensor& tensor = batch.tensors[t];
  const int64_t begin = (chunk - batch.first_chunk[t]) * kChunk;
  const int64_t end = begin + kChunk < tensor.numel ? begin + kChunk : tensor.numel;
  T* const grad = static_cast<T*>(tensor.grad);
  for (int64_t i = begin + thread; i < end; i += kThreads) grad[i] = SgdElement<T>::narrow(0);
}

}  // namespace gdfast::cuda
