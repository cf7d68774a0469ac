// Sums in two passes, each in a fixed order: threads of a block join what they have and write it
// for their split; then one block for a few sums joins the splits.
#pragma once

#include "vectors.h"

namespace gdfast::cuda {

constexpr int kSumThreads = 256;
// Blocks of the first pass: several for each multiprocessor of a large GPU. Not what this GPU has,
// so that sums have the same bits on every one.
constexpr int64_t kSumBlocks = 1024;
// Threads of a block of the second pass: so many sums, and so many threads for each.
constexpr int kJoinChannels = 8;
constexpr int kJoinThreads = 32;

// Bytes from the values of one thread in shared memory to those of the next: an odd number of
// words, which spreads them over the banks.
template <typename Values>
constexpr size_t kValuesStep = sizeof(Values) | alignof(Values);

// Joins what the threads of a block have for the same column, in a fixed order; those of the first
// row end up with the result. Values::join adds what a later row has. All threads take part, and
// the block has shared memory for one kValuesStep of each.
template <typename Values>
GDFAST_DEVICE void join_rows(Values& values, int tile_row, int tile_rows, int tile_columns) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto slot = [](int index) {
    return reinterpret_cast<Values*>(shared_memory() + index * kValuesStep<Values>);
  };
  int half = 1;
  while (2 * half < tile_rows) half *= 2;
  for (; half >= 1; half /= 2) {
    // Rows from `half` on give what they have to those below.
    if (tile_row >= half && tile_row < 2 * half) *slot(thread - half * tile_columns) = values;
    sync_block();
    if (tile_row < half && tile_row + half < tile_rows) Values::join(values, *slot(thread));
    sync_block();
  }
}

}  // namespace gdfast::cuda
