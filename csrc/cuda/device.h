// The only door between kernels and the machine that runs them. nvcc gets CUDA (device_cuda.h),
// any other compiler the simulator (simulator.h), in which every CUDA thread is a fiber on the CPU:
// one source of a kernel serves both. Only .cu files include this header: bindings, which g++
// compiles in both builds, would see the simulator.
//
//   GDFAST_DEVICE, GDFAST_HOST_DEVICE      before an inline function
//   GDFAST_KERNEL(threads, blocks)         before a kernel, in the place of its return type: how
//                                          many threads a block has at most, and how many blocks a
//                                          multiprocessor shall hold
//   GDFAST_POINTERS_MAY_LEAVE              before that: a pointer may be stepped outside of its
//   array
//                                          where nobody reads by it, for want of a register
//   GDFAST_GRID_CONSTANT                   before a kernel's const argument that is not copied
//   threadIdx, blockIdx, blockDim, gridDim as in CUDA; blocks have one axis, grids up to three
//   warp_lane(), warp_index()
//   shared_memory()                        unsigned char*, 1024-byte aligned, never initialised
//   sync_block(), sync_warp()
//   sync_threads_of(id, threads)           a barrier of whole warps among themselves, id 1 to 15
//   shuffle_xor(value, mask), shuffle_down(value, delta), shuffle(value, lane)
//                                          float, double, int; all lanes of a warp take part
//   any_of_warp(condition)                 whether it holds in one of them
//   load_16, load_16_streaming, store_16, store_16_streaming
//                                          one access of 16 bytes, at such an address; streaming
//                                          keeps what is used once from pushing out the rest
//   store_16_global                        store_16 that surely is one access, to global memory
//   cp_async_16(shared, global, valid), cp_async_commit(), cp_async_wait<N>()
//                                          zeros, and no look at global, where not valid
//   ldmatrix_x4, ldmatrix_x4_transposed    (uint32_t (&)[4], a row of 16 bytes in shared memory)
//   mma_m16n8k16<T>(d, a, b), mma_m16n8k8<T>(d, a, b), mma_m16n8k8_tf32(d, a, b)
//                                          d += a b, with PTX's fragments
//   Half, BFloat16; to_float(T), from_float<T>(float); double passes through as double
//   pack_two<T>(low, high)                 two floats as the half types of one 32-bit register
//   low_halves(a, b), high_halves(a, b)    of two such registers, in one
//   bytes_of(a, b, which)                  as each digit of `which` says, the least one first: 0
//                                          to 3 for a byte of a, 4 to 7 for one of b
//   opaque(value), opaque_global(address)  the same value, which the compiler knows nothing of: it
//                                          stays in a register instead of being computed again
//   to_tf32(float)                         rounded to nearest, ties away from zero
//
// On the host:
//   launch(op, kernel, grid, threads, shared_bytes, stream, arguments...)    stream as uintptr_t
//   DeviceGuard guard(op, device)          makes a device the current one as long as it lives
//   multiprocessors(op)                    of the current device
//
// What goes wrong is thrown as std::runtime_error("op: CUDA: ...").
#pragma once

#include <cstddef>
#include <cstdint>

namespace gdfast::cuda {

// What one 16-byte access moves.
struct alignas(16) Pack16 {
  uint32_t words[4];
};

constexpr int kWarp = 32;

}  // namespace gdfast::cuda

#if defined(__CUDACC__)
#include "device_cuda.h"
#else
#include "simulator.h"
#endif
