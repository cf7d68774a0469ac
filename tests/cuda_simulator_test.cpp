// Kernels of one primitive each, for tests/test_cuda_simulator.py, which compiles this file with
// the simulator and calls the functions below through ctypes. nvcc compiles it too (-x cu).
#include <cstdio>
#include <exception>
#include <type_traits>

#include "../csrc/cuda/device.h"

namespace gdfast::cuda {
namespace {

GDFAST_KERNEL(128, 1) shuffle_kernel(const float* in, int mask, int delta, float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned n = gridDim.x * blockDim.x;
  out[i] = shuffle_xor(in[i], mask);
  out[n + i] = static_cast<float>(shuffle_down(static_cast<double>(in[i]), delta));
  out[2 * n + i] = static_cast<float>(shuffle(static_cast<int>(i), delta));
}

// Stores the registers of ldmatrix of four 8 x 8 matrices, 16 bytes a row, and then transposed.
GDFAST_KERNEL(32, 1) ldmatrix_kernel(const uint16_t* in, uint32_t* out) {
  auto* const rows = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = warp_lane();
  store_16(rows + 8 * lane, load_16(in + 8 * lane));
  sync_warp();
  uint32_t r[4];
  ldmatrix_x4(r, rows + 8 * lane);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
  ldmatrix_x4_transposed(r, rows + 8 * lane);
  for (int i = 0; i < 4; ++i) out[128 + 4 * lane + i] = r[i];
}

// Registers in, registers out: [lane][4], [lane][2], [lane][4].
template <typename T>
GDFAST_KERNEL(32, 1)
mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = warp_lane();
  uint32_t a_registers[4], b_registers[2];
  float d_registers[4];
  for (int i = 0; i < 4; ++i) a_registers[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) b_registers[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) d_registers[i] = d[4 * lane + i];
  if constexpr (std::is_same_v<T, float>) {
    mma_m16n8k8_tf32(d_registers, a_registers, b_registers);
  } else {
    mma_m16n8k16<T>(d_registers, a_registers, b_registers);
  }
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = d_registers[i];
}

GDFAST_KERNEL(256, 1) numbers_kernel(const float* in, int count, uint32_t* out) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    out[2 * i] = pack_two<BFloat16>(in[i], to_float(from_float<BFloat16>(in[i])));
    out[2 * i + 1] = pack_two<Half>(in[i], to_float(from_float<Half>(in[i])));
    out[2 * count + i] = to_tf32(in[i]);
  }
}

// Two stages of 16 bytes a thread. What is read is the neighbour's, so that both the wait and the
// barrier are needed; kind says which of them is left out.
enum CopyKind { kComplete, kNoWait, kTooFewGroups, kNoBarrier, kPastTheEnd };

GDFAST_KERNEL(64, 1) copy_kernel(const float* in, int valid, int kind, float* out) {
  auto* const stages = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int stage = 0; stage < 2; ++stage) {
    const int pack = stage * threads + thread + (kind == kPastTheEnd ? 1 : 0);
    cp_async_16(stages + 4 * pack, in + 4 * pack, pack < valid);
    cp_async_commit();
  }
  if (kind == kTooFewGroups) {
    cp_async_wait<1>();
  } else if (kind != kNoWait) {
    cp_async_wait<0>();
  }
  if (kind != kNoBarrier) sync_block();
  for (int stage = 0; stage < 2; ++stage) {
    const int pack = stage * threads + (thread ^ 1);
    for (int i = 0; i < 4; ++i) out[4 * pack + i] = stages[4 * pack + i];
  }
}

enum Mistake {
  kNone,
  kHalfABlock,
  kHalfAWarp,
  kAnotherCollective,
  kEarlyEnd,
  kUnaligned,
  kWaitsForever,
  kWriteBehind
};

GDFAST_KERNEL(64, 1) mistake_kernel(int mistake, float* out) {
  const int thread = static_cast<int>(threadIdx.x);
  if (mistake == kEarlyEnd && thread == 5) return;
  if (mistake == kHalfABlock && thread < 32) sync_block();
  if (mistake == kHalfAWarp && thread < 16) sync_warp();
  float value = 1;
  if (mistake == kAnotherCollective && thread % 2 == 1) {
    value = shuffle_xor(value, 1);
  } else {
    value = shuffle_down(value, 1);
  }
  if (mistake == kUnaligned) load_16(out + 1);
  if (mistake == kWaitsForever && thread < 32) sync_threads_of(1, 64);
  if (mistake == kWriteBehind) shared_memory()[64 + thread] = 0;
  sync_block();
  out[thread] = value;
}

// A warp that fills and one that sums take turns, each waiting for the other.
GDFAST_KERNEL(64, 1) turns_kernel(int turns, float* out) {
  auto* const buffer = reinterpret_cast<float*>(shared_memory());
  float sum = 0;
  for (int turn = 0; turn < turns; ++turn) {
    if (warp_index() == 0) buffer[warp_lane()] = static_cast<float>(turn + warp_lane());
    sync_threads_of(1, 64);
    if (warp_index() == 1) sum += buffer[31 - warp_lane()];
    sync_threads_of(2, 64);
  }
  if (warp_index() == 1) out[warp_lane()] = sum;
}

char error[4096];

template <typename... Parameters, typename... Arguments>
const char* run(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared,
                Arguments... arguments) {
  try {
    launch("test", kernel, blocks, threads, shared, 0, arguments...);
  } catch (const std::exception& thrown) {
    std::snprintf(error, sizeof error, "%s", thrown.what());
    return error;
  }
  return "";
}

}  // namespace
}  // namespace gdfast::cuda

using namespace gdfast::cuda;

// Each returns what went wrong, or "".
extern "C" {
const char* shuffles(const float* in, int blocks, int mask, int delta, float* out) {
  return run(shuffle_kernel, static_cast<unsigned>(blocks), 64, 0, in, mask, delta, out);
}
const char* ldmatrix(const uint16_t* in, uint32_t* out) {
  return run(ldmatrix_kernel, 1, 32, 512, in, out);
}
const char* mma_bfloat16(const uint32_t* a, const uint32_t* b, float* d) {
  return run(mma_kernel<BFloat16>, 1, 32, 0, a, b, d);
}
const char* mma_float16(const uint32_t* a, const uint32_t* b, float* d) {
  return run(mma_kernel<Half>, 1, 32, 0, a, b, d);
}
const char* mma_tf32(const uint32_t* a, const uint32_t* b, float* d) {
  return run(mma_kernel<float>, 1, 32, 0, a, b, d);
}
const char* numbers(const float* in, int count, uint32_t* out) {
  return run(numbers_kernel, 1, 256, 0, in, count, out);
}
const char* copies(const float* in, int valid, int kind, float* out) {
  return run(copy_kernel, 1, 64, 2 * 64 * 16, in, valid, kind, out);
}
const char* mistakes(int mistake, int threads, int shared, float* out) {
  return run(mistake_kernel, 1, static_cast<unsigned>(threads), static_cast<size_t>(shared),
             mistake, out);
}
const char* take_turns(int turns, float* out) { return run(turns_kernel, 1, 64, 128, turns, out); }
}
