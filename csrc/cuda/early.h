// A kernel that begins before the one before it in the stream is over, on Hopper. It takes little
// time itself; what it needs is then ready when the last of the other's blocks ends.
//
//   let_next_begin()           in the kernel before: the next one's blocks may come where its own
//                              have left room
//   wait_for_kernel_before()   until the kernel before is over, and all that it has written is
//                              there: in all threads before they look at any tensor, or in one of
//                              each block that all others' accesses wait for. No block may end
//                              without: what comes next waits for this kernel alone
//   launch_early(...)          as launch, where the kernel waits for the one before
#pragma once

#include "device.h"

namespace gdfast::cuda {

#if defined(__CUDACC__)

GDFAST_DEVICE void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

GDFAST_DEVICE void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether what runs of a kernel was compiled for GPUs on which it waits. A multiprocessor divides
// its memory anew only when it has no blocks: such a kernel takes its share as one does that has
// much shared memory.
inline bool may_begin_early(const char* op, const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;
  int device = 0;
  check(op, cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find({kernel, device});
  if (at != known.end()) return at->second;
  cudaFuncAttributes attributes;
  check(op, cudaFuncGetAttributes(&attributes, kernel));
  const bool may = attributes.ptxVersion >= 90;
  if (may) {
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared));
  }
  known[{kernel, device}] = may;
  return may;
}

template <typename... Parameters, typename... Arguments>
void launch_early(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                  size_t shared_bytes, uintptr_t stream, const Arguments&... arguments) {
  allow_shared_memory(op, reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = may_begin_early(op, reinterpret_cast<const void*>(kernel)) ? 1 : 0;
  check(op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

#else

GDFAST_DEVICE void let_next_begin() {}
GDFAST_DEVICE void wait_for_kernel_before() {}

template <typename... Arguments>
void launch_early(const Arguments&... arguments) {
  launch(arguments...);
}

#endif

}  // namespace gdfast::cuda
