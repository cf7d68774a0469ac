// device.h without a GPU: the primitives on the CPU, for tests of the very sources that nvcc gets.
//
// Blocks run one after the other; each thread of a block is a fiber, which runs until it has to
// wait for others. Beyond what results show, a kernel is stopped with an error where
//   - not all threads reach a collective (sync, shuffle, ldmatrix, mma), or not the same one;
//   - a 16-byte access is not at such an address, or shared memory is written past its end;
// and what it must not rely on is made to show:
//   - shared memory begins as NaN in every type;
//   - cp.async poisons its destination, and copies at the wait that covers it;
//   - GDFAST_CUDA_SIMULATOR_ORDER=descending runs blocks, warps and lanes in reverse order: where
//     results differ from those of "ascending", something is not synchronised.
// Not simulated: time, caches, bank conflicts, several blocks at once, registers, and the order in
// which tensor cores sum (here in float64, rounded once per instruction).
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../cpu/numeric.h"

#define GDFAST_DEVICE static inline
#define GDFAST_HOST_DEVICE static inline
#define GDFAST_KERNEL(threads, blocks) void
#define GDFAST_POINTERS_MAY_LEAVE __attribute__((no_sanitize("pointer-overflow")))
#define GDFAST_GRID_CONSTANT

namespace gdfast::cuda {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the fiber that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

GDFAST_DEVICE int warp_lane() { return static_cast<int>(threadIdx.x) % kWarp; }
GDFAST_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

unsigned char* shared_memory();

namespace simulator {

// The fiber waits until all lanes of its warp have come here with the same name. The last one's
// coming runs act on what the lanes have brought, in the order of lanes.
void meet_warp(const char* name, void* brought, void (*act)(void* const* lanes));

// Waits until `threads` of the block have come here with the same barrier.
void meet_threads(int barrier, int threads);

// Waits until ready says so; name is for the error where that never happens.
void wait_until(const char* name, bool (*ready)(const void*), const void* argument);

// How many blocks have begun in all, the one that runs included.
int64_t block_number();

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& what);

void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int pending);

void run(const char* op, dim3 grid, unsigned threads, size_t shared_bytes,
         const std::function<void()>& kernel);

inline void require_aligned(const char* name, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    fail(std::string(name) + ": expected an address that 16 divides");
  }
}

struct Shuffled {
  uint64_t value, result;
  int source;
};

inline void exchange(void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* const to = static_cast<Shuffled*>(lanes[lane]);
    // Without a source the instruction gives a lane its own value.
    const bool valid = to->source >= 0 && to->source < kWarp;
    to->result = static_cast<Shuffled*>(lanes[valid ? to->source : lane])->value;
  }
}

template <typename T>
T shuffle_from(const char* name, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "registers have 32 bits");
  Shuffled shuffled{0, 0, source};
  std::memcpy(&shuffled.value, &value, sizeof value);
  meet_warp(name, &shuffled, exchange);
  std::memcpy(&value, &shuffled.result, sizeof value);
  return value;
}

struct Matrices {
  const unsigned char* row;
  uint32_t* registers;
};

template <bool kTransposed>
void load_matrices(void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = kTransposed ? lane % 4 * 2 + i : lane / 4;
        const int column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
        const auto* const from = static_cast<const Matrices*>(lanes[8 * matrix + row]);
        std::memcpy(&pair[i], from->row + 2 * column, 2);
      }
      std::memcpy(&static_cast<Matrices*>(lanes[lane])->registers[matrix], pair, 4);
    }
  }
}

struct Product {
  float* d;
  const uint32_t *a, *b;
};

inline float element(Half, uint32_t bits, int half) {
  return cpu::widen(cpu::Float16{static_cast<uint16_t>(bits >> 16 * half)});
}
inline float element(BFloat16, uint32_t bits, int half) {
  return cpu::widen(cpu::BFloat16{static_cast<uint16_t>(bits >> 16 * half)});
}
// Tensor cores do not look at the lower 13 bits of what they take for TF32.
inline float element(float, uint32_t bits, int) { return cpu::from_bits(bits & 0xffffe000u); }

// One mma.m16n8: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8". Lane 4 g + t has
// rows g and g + 8 of a and d and column g of b. A register holds a pair of half types, or one
// TF32; the registers of a go down 8 rows first and then on by half of k, those of b by half of k.
template <typename T>
void multiply(void* const* lanes) {
  constexpr int kPerRegister = sizeof(T) == 4 ? 1 : 2;
  constexpr int kHalf = 4 * kPerRegister, kK = 2 * kHalf;
  float a[16][kK], b[kK][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* const from = static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < kPerRegister; ++half) {
      const int k = kPerRegister * t + half;
      for (int i = 0; i < 4; ++i)
        a[g + i % 2 * 8][k + i / 2 * kHalf] = element(T{}, from->a[i], half);
      for (int i = 0; i < 2; ++i) b[k + i * kHalf][g] = element(T{}, from->b[i], half);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* const d = static_cast<const Product*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = d[i];
      for (int k = 0; k < kK; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      d[i] = static_cast<float>(sum);
    }
  }
}

}  // namespace simulator

// --- Threads together -------------------------------------------------------------------------

GDFAST_DEVICE void sync_block() { simulator::meet_threads(0, static_cast<int>(blockDim.x)); }
GDFAST_DEVICE void sync_warp() {
  simulator::meet_warp("sync_warp", nullptr, [](void* const*) {});
}
GDFAST_DEVICE void sync_threads_of(int id, int threads) { simulator::meet_threads(id, threads); }

template <typename T>
GDFAST_DEVICE T shuffle_xor(T value, int mask) {
  return simulator::shuffle_from("shuffle_xor", value, warp_lane() ^ mask);
}

template <typename T>
GDFAST_DEVICE T shuffle_down(T value, int delta) {
  return simulator::shuffle_from("shuffle_down", value, warp_lane() + delta);
}

template <typename T>
GDFAST_DEVICE T shuffle(T value, int lane) {
  return simulator::shuffle_from("shuffle", value, lane % kWarp);
}

GDFAST_DEVICE bool any_of_warp(bool condition) {
  int any = condition ? 1 : 0;
  for (int distance = 1; distance < kWarp; distance *= 2) any |= shuffle_xor(any, distance);
  return any != 0;
}

// --- Numbers ----------------------------------------------------------------------------------

GDFAST_DEVICE float to_float(float value) { return value; }
GDFAST_DEVICE double to_float(double value) { return value; }
GDFAST_DEVICE float to_float(Half value) { return cpu::widen(cpu::Float16{value.bits}); }
GDFAST_DEVICE float to_float(BFloat16 value) { return cpu::widen(cpu::BFloat16{value.bits}); }

template <typename T, typename Number>
GDFAST_DEVICE T from_float(Number value) {
  if constexpr (std::is_same_v<T, Half>) {
    return {cpu::narrow<cpu::Float16>(static_cast<float>(value)).bits};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {cpu::narrow<cpu::BFloat16>(static_cast<float>(value)).bits};
  } else {
    return static_cast<T>(value);
  }
}

GDFAST_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
GDFAST_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }
GDFAST_DEVICE uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = which >> 4 * i & 7;
    bytes |= (static_cast<uint32_t>(both >> 8 * digit) & 0xffu) << 8 * i;
  }
  return bytes;
}

template <typename T>
GDFAST_DEVICE uint32_t pack_two(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

GDFAST_DEVICE uint32_t to_tf32(float value) {
  const uint32_t bits = cpu::bits_of(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

// --- Memory -----------------------------------------------------------------------------------

GDFAST_DEVICE Pack16 load_16(const void* from) {
  simulator::require_aligned("load_16", from);
  Pack16 pack;
  std::memcpy(&pack, from, sizeof pack);
  return pack;
}

GDFAST_DEVICE void store_16(void* to, Pack16 pack) {
  simulator::require_aligned("store_16", to);
  std::memcpy(to, &pack, sizeof pack);
}

GDFAST_DEVICE void opaque(uint32_t&) {}
GDFAST_DEVICE void opaque(float&) {}
GDFAST_DEVICE void opaque_global(const unsigned char*&) {}

GDFAST_DEVICE Pack16 load_16_streaming(const void* from) { return load_16(from); }
GDFAST_DEVICE void store_16_global(void* to, Pack16 pack) { store_16(to, pack); }
GDFAST_DEVICE void store_16_streaming(void* to, Pack16 pack) { store_16(to, pack); }

GDFAST_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  simulator::require_aligned("cp_async_16: shared", shared);
  simulator::require_aligned("cp_async_16: global", valid ? global : nullptr);
  simulator::copy_later(shared, valid ? global : nullptr, 16);
}

GDFAST_DEVICE void cp_async_commit() { simulator::commit_copies(); }

template <int kPending>
GDFAST_DEVICE void cp_async_wait() {
  simulator::wait_for_copies(kPending);
}

// --- Tensor cores -----------------------------------------------------------------------------

GDFAST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  simulator::require_aligned("ldmatrix_x4", shared_row);
  simulator::Matrices matrices{static_cast<const unsigned char*>(shared_row), r};
  simulator::meet_warp("ldmatrix_x4", &matrices, simulator::load_matrices<false>);
}

GDFAST_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
  simulator::require_aligned("ldmatrix_x4_transposed", shared_row);
  simulator::Matrices matrices{static_cast<const unsigned char*>(shared_row), r};
  simulator::meet_warp("ldmatrix_x4_transposed", &matrices, simulator::load_matrices<true>);
}

template <typename T>
GDFAST_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simulator::Product product{d, a, b};
  simulator::meet_warp("mma_m16n8k16", &product, simulator::multiply<T>);
}

// Half of the depth: the other half is of zeros.
template <typename T>
GDFAST_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  const uint32_t whole_a[4] = {a[0], a[1], 0, 0}, whole_b[2] = {b, 0};
  simulator::Product product{d, whole_a, whole_b};
  simulator::meet_warp("mma_m16n8k8", &product, simulator::multiply<T>);
}

GDFAST_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simulator::Product product{d, a, b};
  simulator::meet_warp("mma_m16n8k8_tf32", &product, simulator::multiply<float>);
}

// --- The host's side --------------------------------------------------------------------------

class DeviceGuard {
 public:
  DeviceGuard(const char*, int) {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

// Few, so that blocks which walk through a problem take several steps.
inline int multiprocessors(const char*) { return 3; }

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            size_t shared_bytes, uintptr_t, const Arguments&... arguments) {
  simulator::run(op, grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace gdfast::cuda
