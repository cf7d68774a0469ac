// SGD on the GPU: up to 82 tensors per launch, whose metadata travel as kernel arguments, so that
// a step allocates nothing, copies nothing and waits for nothing.
#include "kernels.h"
#include "sgd_half.h"

namespace gdfast::cuda {

namespace {

constexpr char kOp[] = "sgd_";

template <SgdMomentum kMomentum, SgdGrad kGrad, bool kMaster, typename T>
GDFAST_KERNEL(kThreads, 1)
sgd_kernel(const GDFAST_GRID_CONSTANT SgdBatch batch,
           SgdFactors<typename SgdElement<T>::Math> factors, SgdScalars scalars) {
  using Math = typename SgdElement<T>::Math;
  const int64_t chunks = batch.first_chunk[batch.count];
  if (scalars.found_inf != nullptr && *scalars.found_inf != 0) {
    if (!factors.zero_grad) return;
    for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
      sgd_zero_chunk<T>(batch, chunk, threadIdx.x);
    }
    return;
  }
  if (scalars.lr != nullptr) factors.minus_lr = static_cast<Math>(-*scalars.lr);
  if (kGrad == SgdGrad::kUnscale) factors.grad_scale = static_cast<Math>(*scalars.grad_scale);
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    sgd_chunk<kMomentum, kGrad, kMaster, T>(batch, chunk, factors, threadIdx.x);
  }
}

template <SgdMomentum kMomentum, SgdGrad kGrad, bool kMaster, typename T>
void sgd_launch(const SgdTensor* tensors, int64_t count, const SgdHyper& hyper,
                const SgdScalars& scalars, uintptr_t stream) {
  using Math = typename SgdElement<T>::Math;
  static_assert(sizeof(SgdBatch) + sizeof(SgdFactors<Math>) + sizeof(SgdScalars) <= 4096,
                "what a launch may take as arguments");
  constexpr int64_t kMaxBlocks = 2147483647;  // the grid's limit in x
  const auto factors = sgd_factors<Math>(hyper);
  SgdBatch batch;
  for (int64_t done = 0; done < count;) {
    done += sgd_fill(tensors + done, count - done, batch);
    const int64_t chunks = batch.first_chunk[batch.count];
    const auto blocks = static_cast<unsigned>(chunks < kMaxBlocks ? chunks : kMaxBlocks);
    launch(kOp, sgd_kernel<kMomentum, kGrad, kMaster, T>, blocks, kThreads, 0, stream, batch,
           factors, scalars);
  }
}

using Launch = void (*)(const SgdTensor*, int64_t, const SgdHyper&, const SgdScalars&, uintptr_t);

template <SgdMomentum kMomentum, bool kMaster, typename T>
Launch choose(SgdGrad grad) {
  switch (grad) {
    case SgdGrad::kRead:
      return sgd_launch<kMomentum, SgdGrad::kRead, kMaster, T>;
    case SgdGrad::kZero:
      return sgd_launch<kMomentum, SgdGrad::kZero, kMaster, T>;
    case SgdGrad::kUnscale:
      break;
  }
  return sgd_launch<kMomentum, SgdGrad::kUnscale, kMaster, T>;
}

template <bool kMaster, typename T>
Launch choose(SgdMomentum momentum, SgdGrad grad) {
  switch (momentum) {
    case SgdMomentum::kNone:
      return choose<SgdMomentum::kNone, kMaster, T>(grad);
    case SgdMomentum::kFirst:
      return choose<SgdMomentum::kFirst, kMaster, T>(grad);
    case SgdMomentum::kRunning:
      break;
  }
  return choose<SgdMomentum::kRunning, kMaster, T>(grad);
}

template <typename T>
Launch choose_half(const SgdHyper& hyper, SgdGrad grad) {
  const SgdMomentum momentum = sgd_momentum_kind(hyper);
  return hyper.master ? choose<true, T>(momentum, grad) : choose<false, T>(momentum, grad);
}

Launch choose(const SgdHyper& hyper, SgdGrad grad) {
  switch (hyper.dtype) {
    case DType::kFloat32:
      return choose<false, float>(sgd_momentum_kind(hyper), grad);
    case DType::kFloat64:
      return choose<false, double>(sgd_momentum_kind(hyper), grad);
    case DType::kBFloat16:
      return choose_half<BFloat16>(hyper, grad);
    case DType::kFloat16:
      break;
  }
  return choose_half<Half>(hyper, grad);
}

}  // namespace

std::string why_not_device(int device) {
#if defined(__CUDACC__)
  try {
    const DeviceGuard guard(kOp, device);
    // Asking loads it: that fails where the driver or the GPU is too old for what was built.
    cudaFuncAttributes attributes;
    check(kOp, cudaFuncGetAttributes(&attributes,
                                     sgd_kernel<SgdMomentum::kNone, SgdGrad::kRead, false, float>));
  } catch (const std::runtime_error& error) {
    return error.what();
  }
#else
  static_cast<void>(device);
#endif
  return "";
}

void sgd(const SgdTensor* tensors, int64_t count, const SgdHyper& hyper, const SgdScalars& scalars,
         int device, uintptr_t stream) {
  const SgdGrad grad = scalars.grad_scale != nullptr ? SgdGrad::kUnscale
                       : hyper.zero_grad             ? SgdGrad::kZero
                                                     : SgdGrad::kRead;
  const DeviceGuard guard(kOp, device);
  choose(hyper, grad)(tensors, count, hyper, scalars, stream);
}

}  // namespace gdfast::cuda
