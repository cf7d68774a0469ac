// SGD on the GPU: up to 96 tensors per launch, whose metadata travel as kernel arguments, so that
// a step allocates nothing, copies nothing and waits for nothing.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace gdfast::cuda {

// Half types: float32 arithmetic, rounded once at each store.
template <>
struct SgdElement<__half> {
  using Math = float;
  GDFAST_SGD_FUNCTION float widen(__half value) { return __half2float(value); }
  GDFAST_SGD_FUNCTION __half narrow(float value) { return __float2half_rn(value); }
};

template <>
struct SgdElement<__nv_bfloat16> {
  using Math = float;
  GDFAST_SGD_FUNCTION float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
  GDFAST_SGD_FUNCTION __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
};

namespace {

template <SgdMomentum kMomentum, SgdGrad kGrad, typename T>
__global__ void __launch_bounds__(kThreads)
    sgd_kernel(const __grid_constant__ SgdBatch batch,
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
    sgd_chunk<kMomentum, kGrad, T>(batch, chunk, factors, threadIdx.x);
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("sgd_: CUDA: ") + cudaGetErrorString(error));
  }
}

// Makes a device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

template <SgdMomentum kMomentum, SgdGrad kGrad, typename T>
void launch(const SgdTensor* tensors, int64_t count, const SgdHyper& hyper,
            const SgdScalars& scalars, cudaStream_t stream) {
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
    sgd_kernel<kMomentum, kGrad, T><<<blocks, kThreads, 0, stream>>>(batch, factors, scalars);
    check(cudaGetLastError());
  }
}

using Launch = void (*)(const SgdTensor*, int64_t, const SgdHyper&, const SgdScalars&,
                        cudaStream_t);

template <SgdMomentum kMomentum, typename T>
Launch choose(SgdGrad grad) {
  switch (grad) {
    case SgdGrad::kRead:
      return launch<kMomentum, SgdGrad::kRead, T>;
    case SgdGrad::kZero:
      return launch<kMomentum, SgdGrad::kZero, T>;
    case SgdGrad::kUnscale:
      break;
  }
  return launch<kMomentum, SgdGrad::kUnscale, T>;
}

template <typename T>
Launch choose(SgdMomentum momentum, SgdGrad grad) {
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

Launch choose(DType dtype, SgdMomentum momentum, SgdGrad grad) {
  switch (dtype) {
    case DType::kFloat32:
      return choose<float>(momentum, grad);
    case DType::kFloat64:
      return choose<double>(momentum, grad);
    case DType::kBFloat16:
      return choose<__nv_bfloat16>(momentum, grad);
    case DType::kFloat16:
      break;
  }
  return choose<__half>(momentum, grad);
}

}  // namespace

void sgd(const SgdTensor* tensors, int64_t count, const SgdHyper& hyper, const SgdScalars& scalars,
         int device, uintptr_t stream) {
  const SgdGrad grad = scalars.grad_scale != nullptr ? SgdGrad::kUnscale
                       : hyper.zero_grad             ? SgdGrad::kZero
                                                     : SgdGrad::kRead;
  const DeviceGuard guard(device);
  choose(hyper.dtype, sgd_momentum_kind(hyper), grad)(tensors, count, hyper, scalars,
                                                      reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace gdfast::cuda
