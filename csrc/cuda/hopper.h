// What device.h is for every GPU, for Hopper's (sm_90a): boxes of a tensor copied to shared memory
// by the TMA unit, barriers that count what has arrived, and products by a warpgroup (four warps).
//
// Only kernels whose body stands under GDFAST_HOPPER may use it: other architectures, for which the
// same file is compiled, have none of it.
//
//   TensorMap, tensor_map<T>(op, address, axes, box)     host: a tensor of four axes, of T: a half
//                                          type or float
//   read_once(op, map, kept_bytes)         host: the map; what is loaded by it leaves the L2 first
//                                          if the so many bytes that others will read fit half of
//                                          that: otherwise they would be gone before they are read
//   load_box(shared, map, at, barrier)     one thread starts it; what lies outside of the tensor is
//                                          zero. A box is rows of 128 bytes, the first axis, and
//                                          begins where 128 divides. Within each 1024 bytes of
//                                          shared memory the 16-byte chunk c of row r lies in the
//                                          place of chunk c ^ r. Of a box of 64 bytes a row that is
//                                          chunk c ^ r / 2, within 512 bytes
//   load_line(shared, from, bytes, barrier)
//                                          likewise, bytes that lie side by side: a multiple of 16,
//                                          from and to such addresses, in the order they have
//   expect_boxes(map)                      one thread says that it will load boxes
//   store_box(map, at, shared)             one thread starts it, to a box that lies likewise, after
//                                          whoever wrote there has called stores_ready() and met,
//                                          or it has met them and called that; what lies behind the
//                                          tensor's end is not written, and nothing may lie before
//                                          its beginning. Products of what threads wrote themselves
//                                          ask for the same
//   stores_commit(), stores_wait_read<kPending>(), stores_wait<kPending>()
//                                          that thread's boxes as a group; until all groups but the
//                                          last few are read from shared memory, or written
//   stmatrix_x2_transposed(shared_row, first, second)
//                                          a warp's two 8x8 matrices, each lane's pairs as
//                                          mma_m16n8k16 has rows 0 to 7 and 8 to 15 of d: their
//                                          columns become rows of 16 bytes, from where lanes 0 to 7
//                                          and 8 to 15 say
//   stmatrix_x4(shared_row, words)         a warp's four 8x8 matrices, each lane's words as they
//                                          are ldmatrix_x4's: rows of 16 bytes, where each eight
//                                          lanes say
//   barrier_init(barrier, arrivals), then barriers_ready() and sync_block()
//   barrier_arrive(barrier), barrier_arrive_expecting(barrier, bytes)
//   barrier_wait(barrier, parity)          until the phase of that parity is over; the first is 0
//   rows_matrix(shared, byte), columns_matrix(shared, byte, next)
//                                          what a product reads: rows of a box that hold the axis
//                                          summed over, from a byte of each on, and from any row
//                                          on: chunks change places by the address; or columns, the
//                                          axis summed over going down the rows: the box of the
//                                          next 64 columns is `next` bytes away
//   warpgroup_begin(), warpgroup_multiply<T, kN, kColumnsB, kColumnsA>(d, a, b, accumulate),
//   warpgroup_commit(), warpgroup_wait<kPending>(), and then warpgroup_take(d) before d is read
//                                          d (+)= a b, [64, 16] x [16, kN]; d is the thread's part,
//                                          as for mma_m16n8k16: warp w has rows 16 w to 16 w + 15
//   warpgroup_multiply<kN, kColumnsB>(d, a, b, accumulate)
//                                          the same in bfloat16, of a in registers: PTX's fragment
//                                          of mma_m16n8k16, which must not change before the wait
//                                          that covers it, nor be forgotten: warpgroup_take(a)
//   give_registers<kCount>(), take_registers<kCount>()        of each thread of a warpgroup
//   near_quotient(a, b)                    a / b but for two units in the last place; 0 where b is
//                                          beyond 2^126
//   computed_again(value)                  the value; what follows from it is not kept in registers
//                                          from one turn of a loop to the next
#pragma once

#include "device.h"

namespace gdfast::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kBoxRow = 128;  // bytes
constexpr int kHalfBoxRow = kBoxRow / 2;

// One axis of a tensor. Bytes between its elements: a multiple of 16 but in the first axis.
struct Axis {
  int64_t size, bytes;
};

}  // namespace gdfast::cuda

#if defined(__CUDACC__)
#include "hopper_cuda.h"
#else
#include "hopper_simulator.h"
#endif
