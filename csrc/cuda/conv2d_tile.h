// What the three convolution kernels share: a block's loop over the tiles of its operands, and how
// its sums reach a tensor.
#pragma once

#include "matrix_product.h"
#include "moments.h"

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
  // 32 bytes more than a row has: what half a warp writes at a time goes to all banks.
  static constexpr int kResultRow = Math::kN * static_cast<int>(sizeof(typename Math::Sum)) + 32;
  static constexpr int kResults = Math::kM * kResultRow;
  static constexpr int kSize = kTiles > kResults ? kTiles : kResults;
};

// sums = a b over `depth`. Tiles are copied kStages - 1 steps ahead of the product; multiply_add is
// shown both of each step once they are there.
template <typename Math, typename Memory, typename A, typename B, typename MultiplyAdd>
GDFAST_DEVICE void for_each_step(const A& a, const B& b, int32_t depth,
                                 MultiplyAdd&& multiply_add) {
  constexpr int kStages = Math::kStages;
  unsigned char* const memory = shared_memory();
  const int steps = (depth + Memory::kDepth - 1) / Memory::kDepth;
  const auto stage_both = [&](int step) {
    unsigned char* const tile = memory + step % kStages * Memory::kStageSize;
    stage(a, tile, step * Memory::kDepth);
    stage(b, tile + Memory::A::kSize, step * Memory::kDepth);
  };
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
    multiply_add(tile, tile + Memory::A::kSize);
  }
  cp_async_wait<0>();
  sync_block();
}

// Whether it is true in any thread of the block, whose shared memory is free.
template <int kThreads>
GDFAST_DEVICE bool is_true_in_any(bool condition) {
  int any = condition ? 1 : 0;
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) any |= shuffle_xor(any, lane);
  int* const of_warps = reinterpret_cast<int*>(shared_memory());
  if (warp_lane() == 0) of_warps[warp_index()] = any;
  sync_block();
  for (int warp = 0; warp < kThreads / kWarp; ++warp) any |= of_warps[warp];
  sync_block();
  return any != 0;
}

// sums = a b over `depth`; `look` is shown each tile of a.
template <typename Math, typename Memory, bool kChunked, typename RowsA, typename ColumnsA,
          typename RowsB, typename ColumnsB, typename Look>
GDFAST_DEVICE void sum_products(
    typename Math::Sums& sums,
    const Staged<typename Memory::A, Math::kThreads, kChunked, RowsA, ColumnsA>& a,
    const Staged<typename Memory::B, Math::kThreads, kChunked, RowsB, ColumnsB>& b, int32_t depth,
    Look&& look) {
  using TileA = typename Memory::A;
  using TileB = typename Memory::B;
  for (auto& sum : Math::flat(sums)) sum = 0;
  for_each_step<Math, Memory>(a, b, depth,
                              [&](const unsigned char* at_a, const unsigned char* at_b) {
                                look(at_a);
                                Math::template multiply_add<TileA, TileB>(sums, at_a, at_b);
                              });
  if constexpr (Math::kMayRepeat) {
    bool is_number = true;
    for (const auto& sum : Math::flat(sums)) is_number = is_number && sum == sum;
    if (!is_true_in_any<Math::kThreads>(!is_number)) return;
    for (auto& sum : Math::flat(sums)) sum = 0;
    for_each_step<Math, Memory>(
        a, b, depth, [&](const unsigned char* at_a, const unsigned char* at_b) {
          Math::template multiply_add<TileA, TileB, typename Math::Careful>(sums, at_a, at_b);
        });
  }
}

// A row of the sums in shared memory.
template <typename Math, typename Memory>
GDFAST_DEVICE typename Math::Sum* result_row(int row) {
  return reinterpret_cast<typename Math::Sum*>(shared_memory() + row * Memory::kResultRow);
}

// Leaves the sums in shared memory, where all threads find them.
template <typename Math, typename Memory>
GDFAST_DEVICE void keep_results(typename Math::Sums& sums) {
  using Sum = typename Math::Sum;
  Math::for_each_pair(sums, [](int row, int column, Sum first, Sum second) {
    struct alignas(2 * sizeof(Sum)) Pair {
      Sum first, second;
    };
    *reinterpret_cast<Pair*>(result_row<Math, Memory>(row) + column) = {first, second};
  });
  sync_block();
}

// How many threads share a column of the results when moments are made of it.
template <typename Math>
constexpr int kThreadsOfColumn = Math::kThreads / Math::kN;

// Means and squared deviations of the columns of the results that are kept, as write_results will
// write them, over the rows that exist(row): a part for each thread of a column (moments.h).
// `parts` is where the first one's count of this group's first column goes; all groups have
// `all_columns`.
template <typename Math, typename Memory, typename Exists, typename Finish>
GDFAST_DEVICE void write_moments(typename Math::Sum* parts, int32_t all_columns,
                                 int32_t first_column, int32_t columns, Exists&& exists,
                                 Finish&& finish) {
  using Sum = typename Math::Sum;
  constexpr int kRows = Math::kM / kThreadsOfColumn<Math>;
  const int column = this_thread() % Math::kN, part = this_thread() / Math::kN;
  if (first_column + column >= columns) return;
  // Squares of what values differ from the first one lose little when the mean's are taken off.
  Sum count = 0, origin = 0, sum = 0, squares = 0;
  for (int row = part * kRows; row < (part + 1) * kRows; ++row) {
    if (!exists(row)) continue;
    Sum value[1] = {result_row<Math, Memory>(row)[column]};
    finish(value, first_column + column);
    const Sum rounded = to_float(from_float<typename Math::Element>(value[0]));
    if (count == 0) origin = rounded;
    const Sum away = rounded - origin;
    count += 1;
    sum += away;
    squares += away * away;
  }
  const Sum distance = count > 0 ? sum / count : Sum(0);
  write_part<Sum, Sum>(parts + int64_t{3} * part * all_columns + first_column + column, all_columns,
                       {count, {origin + distance}, {squares - sum * distance}});
}

// Rounds and writes the results that are kept, neighbours in memory by neighbouring threads.
// `finish` gets a few of a row, which it may change, and the column that they begin at.
template <typename Math, typename Memory, typename Rows, typename Finish>
GDFAST_DEVICE void write_results(const Output& to, const Rows& rows, int group,
                                 int32_t first_column, Finish&& finish) {
  using T = typename Math::Element;
  constexpr int kLanes = 16 / static_cast<int>(sizeof(T)), kChunks = Math::kN / kLanes;
  unsigned char* const data = to.data + group * to.group_bytes;
  const auto address_of = [&](int row, int column) -> unsigned char* {
    const Place there = place_at(rows, row), beside = place_at(to.columns, first_column + column);
    const bool inside = is_inside(to.height, to.width, there.h + beside.h, there.w + beside.w);
    return inside ? data + (there.offset + beside.offset) : nullptr;
  };
  if (to.in_chunks) {
    for (int i = this_thread(); i < Math::kM * kChunks; i += Math::kThreads) {
      const int row = i / kChunks, column = i % kChunks * kLanes;
      unsigned char* const address = address_of(row, column);
      if (address == nullptr) continue;
      typename Math::Sum values[kLanes];
      union {
        T elements[kLanes];
        Pack16 pack;
      } chunk;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        values[lane] = result_row<Math, Memory>(row)[column + lane];
      }
      finish(values, first_column + column);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) chunk.elements[lane] = from_float<T>(values[lane]);
      store_16(address, chunk.pack);
    }
  } else {
    for (int i = this_thread(); i < Math::kM * Math::kN; i += Math::kThreads) {
      const int row = to.columns_first ? i / Math::kN : i % Math::kM;
      const int column = to.columns_first ? i % Math::kN : i / Math::kM;
      unsigned char* const address = address_of(row, column);
      if (address == nullptr) continue;
      typename Math::Sum value[1] = {result_row<Math, Memory>(row)[column]};
      finish(value, first_column + column);
      *reinterpret_cast<T*>(address) = from_float<T>(value[0]);
    }
  }
}

}  // namespace gdfast::cuda
