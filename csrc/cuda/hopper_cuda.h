// hopper.h for nvcc. Sources: PTX ISA 9.0, "mbarrier", "cp.async.bulk.tensor", "wgmma"; CUDA Driver
// API, cuTensorMapEncodeTiled.
#pragma once

#include <cuda.h>

#include <type_traits>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GDFAST_HOPPER
#endif

namespace gdfast::cuda {

// How the L2 is to treat what is loaded, as instructions take it: CUTLASS, CacheHintSm90.
enum class CachePolicy : uint64_t { kNormal = 0x1000000000000000, kFirst = 0x12f0000000000000 };

struct TensorMap : CUtensorMap {
  CachePolicy policy = CachePolicy::kNormal;
};

inline TensorMap read_once(const char* op, TensorMap map, int64_t kept_bytes) {
  int device = 0, l2_bytes = 0;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device));
  if (kept_bytes <= l2_bytes / 2) map.policy = CachePolicy::kFirst;
  return map;
}

// The driver's function is looked up at run time, so that the module loads without a driver.
template <typename T>
TensorMap tensor_map(const char* op, const void* address, const Axis (&axes)[4],
                     const int (&box)[4]) {
  static const auto encode = [op] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                               cudaEnableDefault, &found));
#else
    check(op,
          cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (function == nullptr || found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(
          std::string(op) + ": CUDA: the driver has no cuTensorMapEncodeTiled: it needs CUDA 12");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  cuuint64_t sizes[4], bytes[3];
  cuuint32_t boxes[4], steps[4];
  for (int i = 0; i < 4; ++i) {
    sizes[i] = static_cast<cuuint64_t>(axes[i].size);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) bytes[i - 1] = static_cast<cuuint64_t>(axes[i].bytes);
  }
  constexpr auto kType = std::is_same_v<T, float>  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                         : std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto swizzle = box[0] * static_cast<int>(sizeof(T)) == kBoxRow ? CU_TENSOR_MAP_SWIZZLE_128B
                                                                       : CU_TENSOR_MAP_SWIZZLE_64B;
  TensorMap map;
  const CUresult result =
      encode(&map, kType, 4, const_cast<void*>(address), sizes, bytes, boxes, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": CUDA: cuTensorMapEncodeTiled: error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

// --- Barriers ---------------------------------------------------------------------------------

GDFAST_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

GDFAST_DEVICE void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

GDFAST_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

GDFAST_DEVICE void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// The unit waits by itself for a while before it says no.
GDFAST_DEVICE bool barrier_is_over(uint64_t* barrier, int parity) {
  uint32_t over;
  asm volatile(
      "{ .reg .pred over;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
      "selp.b32 %0, 1, 0, over; }"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return over != 0;
}

GDFAST_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// Ends the kernel with an error. Not by a trap: ptxas lets no thread of a kernel that has one use
// more registers than at launch, whatever take_registers says.
GDFAST_DEVICE void give_up() {
  asm volatile("st.volatile.global.u32 [%0], 0;" ::"l"(uint64_t{0}) : "memory");
}

// What has not come after ten seconds never will: then an error, and not a GPU that hangs.
GDFAST_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  if (barrier_is_over(barrier, parity)) return;
  const uint64_t start = nanoseconds();
  while (!barrier_is_over(barrier, parity)) {
    if (nanoseconds() - start > 10000000000u) give_up();
  }
}

// --- Memory -----------------------------------------------------------------------------------

GDFAST_DEVICE void load_box(void* shared, const TensorMap& map, const int (&at)[4],
                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(shared_address(barrier)),
      "l"(map.policy)
      : "memory");
}

GDFAST_DEVICE void expect_boxes(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

GDFAST_DEVICE void load_line(void* shared, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

GDFAST_DEVICE void store_box(const TensorMap& map, const int (&at)[4], const void* shared) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group"
      " [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
      "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(shared_address(shared))
      : "memory");
}

// Between a thread's writes and the unit, which reads past the caches that threads write to.
GDFAST_DEVICE void stores_ready() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

GDFAST_DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

template <int kPending>
GDFAST_DEVICE void stores_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

template <int kPending>
GDFAST_DEVICE void stores_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

GDFAST_DEVICE void stmatrix_x2_transposed(void* shared_row, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                   shared_address(shared_row)),
               "r"(first), "r"(second)
               : "memory");
}

GDFAST_DEVICE void stmatrix_x4(void* shared_row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(shared_row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// --- Products ---------------------------------------------------------------------------------

// A matrix descriptor: addresses and distances in units of 16 bytes, and the 128-byte swizzle.
// Eight rows of a box are 1024 bytes apart from the next eight, whichever axis goes along them.
GDFAST_DEVICE uint64_t matrix_at(uint32_t address, int next) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{1024 / 16} << 32 | static_cast<uint64_t>(next / 16) << 16 |
         (address & 0x3ffffu) / 16;
}

GDFAST_DEVICE uint64_t rows_matrix(const void* shared, int byte) {
  return matrix_at(shared_address(shared) + byte, 0);
}

GDFAST_DEVICE uint64_t columns_matrix(const void* shared, int byte, int next) {
  return matrix_at(shared_address(shared) + byte, next);
}

GDFAST_DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

GDFAST_DEVICE void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
GDFAST_DEVICE void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler sees no connection between a wait and the registers that are ready after it.
template <int kCount>
GDFAST_DEVICE void warpgroup_take(float (&d)[kCount]) {
#pragma unroll
  for (float& value : d) asm volatile("" : "+f"(value)::"memory");
}

// Fragments of a product that is over: until then their registers are not used for anything else.
template <int kCount>
GDFAST_DEVICE void warpgroup_take(uint32_t (&fragment)[kCount]) {
#pragma unroll
  for (uint32_t& value : fragment) asm volatile("" : "+r"(value)::"memory");
}

// Operands: the sums, which are numbered first, then a, b, whether to add to the sums, and the
// order of a and of b.
#define GDFAST_SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GDFAST_SUMS_8(d, i) GDFAST_SUMS_4(d, i), GDFAST_SUMS_4(d, i + 4)
#define GDFAST_SUMS_32(d, i) \
  GDFAST_SUMS_8(d, i), GDFAST_SUMS_8(d, i + 8), GDFAST_SUMS_8(d, i + 16), GDFAST_SUMS_8(d, i + 24)
#define GDFAST_SUMS_96(d) GDFAST_SUMS_32(d, 0), GDFAST_SUMS_32(d, 32), GDFAST_SUMS_32(d, 64)

#define GDFAST_NAMES_32                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11"             \
  ", %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23" \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define GDFAST_NAMES_64                                          \
  GDFAST_NAMES_32                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43" \
  ", %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55" \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define GDFAST_NAMES_96                                          \
  GDFAST_NAMES_64                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75" \
  ", %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87" \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define GDFAST_NAMES_104 GDFAST_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define GDFAST_NAMES_116 \
  GDFAST_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115"
#define GDFAST_NAMES_124 GDFAST_NAMES_116 ", %116, %117, %118, %119, %120, %121, %122, %123"
#define GDFAST_NAMES_128 GDFAST_NAMES_124 ", %124, %125, %126, %127"

#define GDFAST_WGMMA(n, type, names, of_a, of_b, of_accumulate, of_columns_a, of_columns_b, ...) \
  asm volatile(                                                                                  \
      "{ .reg .pred accumulate;\n"                                                               \
      "setp.ne.b32 accumulate, %" #of_accumulate                                                 \
      ", 0;\n"                                                                                   \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names                 \
      "}, "                                                                                      \
      "%" #of_a ", %" #of_b ", accumulate, 1, 1, %" #of_columns_a ", %" #of_columns_b "; }"      \
      : __VA_ARGS__                                                                              \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kColumnsA ? 1 : 0),               \
        "n"(kColumnsB ? 1 : 0))
#define GDFAST_WGMMA_64(type) \
  GDFAST_WGMMA(64, type, GDFAST_NAMES_32, 32, 33, 34, 35, 36, GDFAST_SUMS_32(d, 0))
#define GDFAST_WGMMA_128(type)                                                       \
  GDFAST_WGMMA(128, type, GDFAST_NAMES_64, 64, 65, 66, 67, 68, GDFAST_SUMS_32(d, 0), \
               GDFAST_SUMS_32(d, 32))
#define GDFAST_WGMMA_192(type) \
  GDFAST_WGMMA(192, type, GDFAST_NAMES_96, 96, 97, 98, 99, 100, GDFAST_SUMS_96(d))
#define GDFAST_WGMMA_208(type)                                                          \
  GDFAST_WGMMA(208, type, GDFAST_NAMES_104, 104, 105, 106, 107, 108, GDFAST_SUMS_96(d), \
               GDFAST_SUMS_8(d, 96))
#define GDFAST_WGMMA_232(type)                                                          \
  GDFAST_WGMMA(232, type, GDFAST_NAMES_116, 116, 117, 118, 119, 120, GDFAST_SUMS_96(d), \
               GDFAST_SUMS_8(d, 96), GDFAST_SUMS_8(d, 104), GDFAST_SUMS_4(d, 112))
#define GDFAST_WGMMA_248(type)                                                          \
  GDFAST_WGMMA(248, type, GDFAST_NAMES_124, 124, 125, 126, 127, 128, GDFAST_SUMS_96(d), \
               GDFAST_SUMS_8(d, 96), GDFAST_SUMS_8(d, 104), GDFAST_SUMS_8(d, 112),      \
               GDFAST_SUMS_4(d, 120))
#define GDFAST_WGMMA_256(type)                                                             \
  GDFAST_WGMMA(256, type, GDFAST_NAMES_128, 128, 129, 130, 131, 132, GDFAST_SUMS_32(d, 0), \
               GDFAST_SUMS_32(d, 32), GDFAST_SUMS_32(d, 64), GDFAST_SUMS_32(d, 96))

template <typename T, int kN, bool kColumnsB, bool kColumnsA = false>
GDFAST_DEVICE void warpgroup_multiply(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(
      kN == 64 || kN == 128 || kN == 192 || kN == 208 || kN == 232 || kN == 248 || kN == 256,
      "the shapes that kernels use");
  constexpr bool kHalf = std::is_same_v<T, Half>;
  if constexpr (kN == 64 && kHalf) GDFAST_WGMMA_64("f16");
  if constexpr (kN == 64 && !kHalf) GDFAST_WGMMA_64("bf16");
  if constexpr (kN == 128 && kHalf) GDFAST_WGMMA_128("f16");
  if constexpr (kN == 128 && !kHalf) GDFAST_WGMMA_128("bf16");
  if constexpr (kN == 192 && kHalf) GDFAST_WGMMA_192("f16");
  if constexpr (kN == 192 && !kHalf) GDFAST_WGMMA_192("bf16");
  if constexpr (kN == 208 && kHalf) GDFAST_WGMMA_208("f16");
  if constexpr (kN == 208 && !kHalf) GDFAST_WGMMA_208("bf16");
  if constexpr (kN == 232 && kHalf) GDFAST_WGMMA_232("f16");
  if constexpr (kN == 232 && !kHalf) GDFAST_WGMMA_232("bf16");
  if constexpr (kN == 248 && kHalf) GDFAST_WGMMA_248("f16");
  if constexpr (kN == 248 && !kHalf) GDFAST_WGMMA_248("bf16");
  if constexpr (kN == 256 && kHalf) GDFAST_WGMMA_256("f16");
  if constexpr (kN == 256 && !kHalf) GDFAST_WGMMA_256("bf16");
}

#define GDFAST_WGMMA_REGISTERS_64                                                              \
  asm volatile(                                                                                \
      "{ .reg .pred accumulate;\n"                                                             \
      "setp.ne.b32 accumulate, %37, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"                                   \
      " {"                                                                                     \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "      \
      "{%32, %33, %34, %35}, %36, accumulate, 1, 1, %38; }"                                    \
      : GDFAST_SUMS_32(d, 0)                                                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
        "n"(kColumnsB ? 1 : 0))
#define GDFAST_WGMMA_REGISTERS_128                                                             \
  asm volatile(                                                                                \
      "{ .reg .pred accumulate;\n"                                                             \
      "setp.ne.b32 accumulate, %69, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"                                  \
      " {"                                                                                     \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "       \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "       \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "      \
      "{%64, %65, %66, %67}, %68, accumulate, 1, 1, %70; }"                                    \
      : GDFAST_SUMS_32(d, 0), GDFAST_SUMS_32(d, 32)                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
        "n"(kColumnsB ? 1 : 0))

template <int kN, bool kColumnsB>
GDFAST_DEVICE void warpgroup_multiply(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  static_assert(kN == 64 || kN == 128, "the shapes that kernels use");
  if constexpr (kN == 64) GDFAST_WGMMA_REGISTERS_64;
  if constexpr (kN == 128) GDFAST_WGMMA_REGISTERS_128;
}

#undef GDFAST_WGMMA_REGISTERS_128
#undef GDFAST_WGMMA_REGISTERS_64
#undef GDFAST_WGMMA_256
#undef GDFAST_WGMMA_248
#undef GDFAST_WGMMA_232
#undef GDFAST_WGMMA_208
#undef GDFAST_WGMMA_192
#undef GDFAST_WGMMA_128
#undef GDFAST_WGMMA_64
#undef GDFAST_WGMMA
#undef GDFAST_NAMES_128
#undef GDFAST_NAMES_124
#undef GDFAST_NAMES_116
#undef GDFAST_NAMES_104
#undef GDFAST_NAMES_96
#undef GDFAST_NAMES_64
#undef GDFAST_NAMES_32
#undef GDFAST_SUMS_96
#undef GDFAST_SUMS_32
#undef GDFAST_SUMS_8
#undef GDFAST_SUMS_4

// --- Registers --------------------------------------------------------------------------------

GDFAST_DEVICE float near_quotient(float a, float b) { return __fdividef(a, b); }

GDFAST_DEVICE int computed_again(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <int kCount>
GDFAST_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
GDFAST_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace gdfast::cuda
