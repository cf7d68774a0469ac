// What the three convolution kernels share: a block's loop over the tiles of its operands, and how
// its sums reach a tensor.
#pragma once

#include "matrix_product.h"

namespace gdfast::cuda {

// The shared memory of a block: tiles of both operands for each stage, and after the loop, in their
// place, the results.
template <typename Math, bool kTransposedA, bool kTransposedB>
struct BlockMemory {
  using Element = typename Math::Element;
  using A = SharedTile<sizeof(Element), Math::kM, kTransposedA>;
  using B = SharedTile<sizeof(Element), Math::kN, kTransposedB>;
  static constexpr int kDepth = A::kDepth;
  static constexpr int kStageSize = A::kSize + B::kSize;
  static constexpr int kTiles = kStageSize * Math::kStages;
  // 16 bytes more than a row has: what a warp writes at a time goes to all banks.
  static constexpr int kResultRow = Math::kN * static_cast<int>(sizeof(Element)) + 16;
  static constexpr int kResults = Math::kM * kResultRow;
  static constexpr int kSize = kTiles > kResults ? kTiles : kResults;
};

// sums = a b over `depth`. Tiles are copied kStages - 1 steps ahead of the product; `look` is shown
// each tile of a once it is there.
template <typename Math, typename Memory, bool kChunked, typename RowsA, typename ColumnsA,
          typename RowsB, typename ColumnsB, typename Look>
GDFAST_DEVICE void sum_products(
    typename Math::Sums& sums,
    const Staged<typename Memory::A, Math::kThreads, kChunked, RowsA, ColumnsA>& a,
    const Staged<typename Memory::B, Math::kThreads, kChunked, RowsB, ColumnsB>& b, int32_t depth,
    Look&& look) {
  constexpr int kStages = Math::kStages;
  unsigned char* const memory = shared_memory();
  const int steps = (depth + Memory::kDepth - 1) / Memory::kDepth;
  const auto stage_both = [&](int step) {
    unsigned char* const tile = memory + step % kStages * Memory::kStageSize;
    stage(a, tile, step * Memory::kDepth);
    stage(b, tile + Memory::A::kSize, step * Memory::kDepth);
  };
  for (auto& sum : Math::flat(sums)) sum = 0;
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) stage_both(step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    sync_block();  // this step's tiles are there, and nobody reads the last step's any more
    const int ahead = step + kStages - 1;
    if (ahead < steps) stage_both(ahead);
    cp_async_commit();
    const unsigned char* const tile = memory + step % kStages * Memory::kStageSize;
    look(tile);
    Math::template multiply_add<typename Memory::A, typename Memory::B>(sums, tile,
                                                                        tile + Memory::A::kSize);
  }
  cp_async_wait<0>();
  sync_block();
}

template <typename T, typename Sum>
GDFAST_DEVICE void put_pair(unsigned char* to, Sum first, Sum second) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(to) = pack_two<T>(first, second);
  } else {
    reinterpret_cast<T*>(to)[0] = first;
    reinterpret_cast<T*>(to)[1] = second;
  }
}

// Rounds the sums and leaves them in shared memory, where all threads find them.
template <typename Math, typename Memory>
GDFAST_DEVICE void keep_results(typename Math::Sums& sums) {
  using T = typename Math::Element;
  unsigned char* const memory = shared_memory();
  Math::for_each_pair(sums, [&](int row, int column, auto& first, auto& second) {
    unsigned char* const to =
        memory + row * Memory::kResultRow + column * static_cast<int>(sizeof(T));
    put_pair<T>(to, first, second);
  });
  sync_block();
}

// Writes the results that are kept to the tensor, neighbours in memory by neighbouring threads.
template <typename Math, typename Memory>
GDFAST_DEVICE void write_results(const Output& to, const Positions& rows, int group,
                                 int32_t first_column) {
  using T = typename Math::Element;
  constexpr int kBytes = sizeof(T), kLanes = 16 / kBytes, kChunks = Math::kN / kLanes;
  const unsigned char* const memory = shared_memory();
  unsigned char* const data = to.data + group * to.group_bytes;
  const auto write = [&](int row, int column, auto put) {
    const Place there = place_at(rows, row), beside = place_at(to.columns, first_column + column);
    if (is_inside(to.height, to.width, there.h + beside.h, there.w + beside.w)) {
      put(data + (there.offset + beside.offset),
          memory + row * Memory::kResultRow + column * kBytes);
    }
  };
  if (to.in_chunks) {
    for (int i = this_thread(); i < Math::kM * kChunks; i += Math::kThreads) {
      write(i / kChunks, i % kChunks * kLanes,
            [](unsigned char* to, const unsigned char* from) { store_16(to, load_16(from)); });
    }
  } else {
    for (int i = this_thread(); i < Math::kM * Math::kN; i += Math::kThreads) {
      const int row = to.columns_first ? i / Math::kN : i % Math::kM;
      const int column = to.columns_first ? i % Math::kN : i / Math::kM;
      write(row, column, [](unsigned char* to, const unsigned char* from) {
        *reinterpret_cast<T*>(to) = *reinterpret_cast<const T*>(from);
      });
    }
  }
}

}  // namespace gdfast::cuda
