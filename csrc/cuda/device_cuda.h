// device.h for nvcc: each primitive is one instruction, or one call of CUDA's run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "gdfast's kernels need compute capability 8.0: take lower ones out of TORCH_CUDA_ARCH_LIST"
#endif

#define GDFAST_DEVICE static __device__ __forceinline__
#define GDFAST_HOST_DEVICE static __host__ __device__ __forceinline__
#define GDFAST_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define GDFAST_POINTERS_MAY_LEAVE
#define GDFAST_GRID_CONSTANT __grid_constant__

namespace gdfast::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

GDFAST_DEVICE int warp_lane() { return static_cast<int>(threadIdx.x) % kWarp; }
GDFAST_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

GDFAST_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

GDFAST_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- Threads together -------------------------------------------------------------------------

GDFAST_DEVICE void sync_block() { __syncthreads(); }
GDFAST_DEVICE void sync_warp() { __syncwarp(); }

GDFAST_DEVICE void sync_threads_of(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <typename T>
GDFAST_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <typename T>
GDFAST_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(0xffffffffu, value, delta);
}

template <typename T>
GDFAST_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

GDFAST_DEVICE bool any_of_warp(bool condition) { return __any_sync(0xffffffffu, condition) != 0; }

// --- Numbers ----------------------------------------------------------------------------------

GDFAST_HOST_DEVICE float to_float(float value) { return value; }
GDFAST_HOST_DEVICE double to_float(double value) { return value; }
GDFAST_HOST_DEVICE float to_float(Half value) { return __half2float(value); }
GDFAST_HOST_DEVICE float to_float(BFloat16 value) { return __bfloat162float(value); }

template <typename T>
struct FromFloat;
template <>
struct FromFloat<float> {
  GDFAST_HOST_DEVICE float convert(float value) { return value; }
};
template <>
struct FromFloat<double> {
  GDFAST_HOST_DEVICE double convert(double value) { return value; }
};
template <>
struct FromFloat<Half> {
  GDFAST_HOST_DEVICE Half convert(float value) { return __float2half_rn(value); }
};
template <>
struct FromFloat<BFloat16> {
  GDFAST_HOST_DEVICE BFloat16 convert(float value) { return __float2bfloat16_rn(value); }
};

template <typename T, typename Number>
GDFAST_HOST_DEVICE T from_float(Number value) {
  return FromFloat<T>::convert(value);
}

GDFAST_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
GDFAST_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }
GDFAST_DEVICE uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t which) {
  return __byte_perm(a, b, which);
}

template <typename T>
GDFAST_DEVICE uint32_t pack_two(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_two<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_two<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

GDFAST_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// --- What the compiler shall not look through --------------------------------------------------

GDFAST_DEVICE void opaque(uint32_t& value) { asm volatile("" : "+r"(value)); }
GDFAST_DEVICE void opaque(float& value) { asm volatile("" : "+f"(value)); }
GDFAST_DEVICE void opaque_global(const unsigned char*& address) {
  asm volatile("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
}

// --- Memory -----------------------------------------------------------------------------------

GDFAST_DEVICE Pack16 load_16(const void* from) { return *static_cast<const Pack16*>(from); }
GDFAST_DEVICE void store_16(void* to, Pack16 pack) { *static_cast<Pack16*>(to) = pack; }

GDFAST_DEVICE Pack16 load_16_streaming(const void* from) {
  const uint4 words = __ldcs(static_cast<const uint4*>(from));
  return {{words.x, words.y, words.z, words.w}};
}

GDFAST_DEVICE void store_16_streaming(void* to, Pack16 pack) {
  __stcs(static_cast<uint4*>(to),
         make_uint4(pack.words[0], pack.words[1], pack.words[2], pack.words[3]));
}

GDFAST_DEVICE void store_16_global(void* to, Pack16 pack) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(pack.words[0]), "r"(pack.words[1]), "r"(pack.words[2]), "r"(pack.words[3])
               : "memory");
}

// Past L1: what a block brings to its shared memory it will not read from global memory again.
GDFAST_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

GDFAST_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
GDFAST_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- Tensor cores -----------------------------------------------------------------------------

GDFAST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

GDFAST_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

template <typename T>
GDFAST_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename T>
GDFAST_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b);
template <>
__device__ __forceinline__ void mma_m16n8k8<Half>(float (&d)[4], const uint32_t (&a)[2],
                                                  uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}
template <>
__device__ __forceinline__ void mma_m16n8k8<BFloat16>(float (&d)[4], const uint32_t (&a)[2],
                                                      uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

GDFAST_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- The host's side --------------------------------------------------------------------------

inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would be told of it
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
  }
}

class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    check(op, cudaGetDevice(&before_));
    changed_ = before_ != device;
    check(op, cudaSetDevice(device));
  }
  // Setting a device that nobody uses would make a context there.
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int multiprocessors(const char* op) {
  int device = 0, count = 0;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Lets a kernel have so much dynamic shared memory on the current device. The driver is told once,
// not at every launch.
inline void allow_shared_memory(const char* op, const void* kernel, size_t bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check(op, cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& known = allowed[{kernel, device}];
  if (bytes <= known) return;
  check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)));
  known = bytes;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            size_t shared_bytes, uintptr_t stream, const Arguments&... arguments) {
  allow_shared_memory(op, reinterpret_cast<const void*>(kernel), shared_bytes);
  kernel<<<grid, threads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
  check(op, cudaGetLastError());
}

}  // namespace gdfast::cuda
