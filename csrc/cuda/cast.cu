// Converts between float32 and half types, bound by memory alone: all of a thread's reads are under
// way before it writes, neighbours in a warp beside each other.
#include "cast.h"
#include "vectors.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "cast";
constexpr int kThreads = 256;
constexpr int kEach = 8;  // numbers of a thread

template <typename From, typename To>
GDFAST_KERNEL(kThreads, 4)
cast_kernel(const From* from, To* to, int64_t count) {
  const int64_t first = int64_t{blockIdx.x} * kThreads * kEach + threadIdx.x;
  float values[kEach] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < count) values[i] = to_float(from[at]);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < count) to[at] = from_float<To>(values[i]);
  }
}

template <typename From, typename To>
void run(const void* from, void* to, int64_t count, uintptr_t stream) {
  const auto blocks = static_cast<unsigned>((count - 1) / (kThreads * kEach) + 1);
  launch(kOp, cast_kernel<From, To>, dim3(blocks), kThreads, 0, stream,
         static_cast<const From*>(from), static_cast<To*>(to), count);
}

}  // namespace

void cast(const void* from, void* to, int64_t count, DType half, bool to_half, const Where& where) {
  if (count == 0) return;
  const DeviceGuard guard(kOp, where.device);
  const bool is_bfloat16 = half == DType::kBFloat16;
  if (to_half) {
    return is_bfloat16 ? run<float, BFloat16>(from, to, count, where.stream)
                       : run<float, Half>(from, to, count, where.stream);
  }
  return is_bfloat16 ? run<BFloat16, float>(from, to, count, where.stream)
                     : run<Half, float>(from, to, count, where.stream);
}

}  // namespace gdfast::cuda
