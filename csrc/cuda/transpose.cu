// Transposes matrices: bound by memory alone, so all of a thread's reads are under way before it
// writes. Two ways:
//
//   in registers: a thread reads a few packs below each other, of 16 bytes where the sizes allow
//     it, and writes packs of their columns. A warp has 8 packs along a column by 4 along a row,
//     where there are so many: it reads and writes whole sectors of 32 bytes.
//   by shared memory: any sizes. Warps read rows and write columns, element by element.
#include "divisor.h"
#include "transpose.h"
#include "vectors.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "transpose";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 64;  // rows and columns of a block's tile in shared memory

// Blocks one by one: those across a matrix, then those down, then the matrices.
struct Tiling {
  int64_t rows, columns;
  Divisor across, down;
};

struct Tile {
  int down, across;
  int64_t matrix;  // where it begins, in elements
};

GDFAST_DEVICE Tile tile_of_block(const Tiling& tiling) {
  const Divided across = divide(static_cast<int>(blockIdx.x), tiling.across);
  const Divided down = divide(across.quotient, tiling.down);
  return {down.rest, across.rest, down.quotient * tiling.rows * tiling.columns};
}

// What a block has of a matrix of packs, `high` by `wide`: lanes and warps, each in powers of two.
struct Packs {
  int high, wide;
  int log_lanes;  // of a warp, below each other
  int log_warps;  // of a block, side by side

  static int log_covering(int64_t count, int most) {
    int log = 0;
    while (log < most && (int64_t{1} << log) < count) ++log;
    return log;
  }
  static Packs of(int64_t high, int64_t wide) {
    const int across = log_covering(wide, 5), down = log_covering(high, 3);
    // What a small matrix has not got below is taken side by side, and the other way round.
    const int log_lanes = across < 2 ? 5 - across : down;
    const int64_t warps_wide = (wide - 1) / (kWarp >> log_lanes) + 1;
    return {static_cast<int>(high), static_cast<int>(wide), log_lanes, log_covering(warps_wide, 3)};
  }
  int tile_high() const { return (1 << log_lanes) * (kWarps >> log_warps); }
  int tile_wide() const { return (kWarp >> log_lanes) << log_warps; }
};

template <typename T, int kRows, int kColumns>
GDFAST_KERNEL(kThreads, 4)
transpose_packs_kernel(const GDFAST_GRID_CONSTANT Tiling tiling,
                       const GDFAST_GRID_CONSTANT Packs packs, const T* from, T* to) {
  const Tile tile = tile_of_block(tiling);
  const int lane = warp_lane(), warp = warp_index();
  const int warps_wide = 1 << packs.log_warps, lanes_high = 1 << packs.log_lanes;
  const int down =
      ((tile.down * (kWarps >> packs.log_warps) + (warp >> packs.log_warps)) << packs.log_lanes) +
      (lane & (lanes_high - 1));
  const int across =
      ((tile.across << packs.log_warps) + (warp & (warps_wide - 1))) * (kWarp >> packs.log_lanes) +
      (lane >> packs.log_lanes);
  if (down >= packs.high || across >= packs.wide) return;
  const int64_t row = int64_t{down} * kRows, column = int64_t{across} * kColumns;
  const T* const read = from + tile.matrix + row * tiling.columns + column;
  T* const write = to + tile.matrix + column * tiling.rows + row;
  PackOf<T, kColumns> in[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) in[i] = load_pack<kColumns>(read + i * tiling.columns);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    PackOf<T, kRows> out;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < kRows; i += 2) {
        const int shift = j % 2 * 16;
        const uint32_t low = in[i].words[j / 2] >> shift & 0xffffu;
        out.words[i / 2] = low | in[i + 1].words[j / 2] >> shift << 16;
      }
    } else {
      constexpr int kWords = sizeof(T) / 4;
#pragma unroll
      for (int i = 0; i < kRows * kWords; ++i) {
        out.words[i] = in[i / kWords].words[j * kWords + i % kWords];
      }
    }
    if constexpr (sizeof(T) * kRows == 16) {
      store_16_global(write + j * tiling.rows, out);
    } else {
      store_pack<kRows>(write + j * tiling.rows, out);
    }
  }
}

template <typename T>
GDFAST_KERNEL(kThreads, 4)
transpose_elements_kernel(const GDFAST_GRID_CONSTANT Tiling tiling, const T* from, T* to) {
  // An odd number of words: elements below each other are in different banks.
  constexpr int kPitch = kTile + (sizeof(T) == 2 ? 2 : 1);
  constexpr int kRows = kTile / kWarps, kColumns = kTile / kWarp;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  const Tile tile = tile_of_block(tiling);
  const int lane = warp_lane(), warp = warp_index();
  const int64_t row0 = int64_t{tile.down} * kTile, column0 = int64_t{tile.across} * kTile;
  from += tile.matrix + row0 * tiling.columns + column0;
  to += tile.matrix + column0 * tiling.rows + row0;
  const auto rows = static_cast<int>(tiling.rows - row0 < kTile ? tiling.rows - row0 : kTile);
  const auto columns =
      static_cast<int>(tiling.columns - column0 < kTile ? tiling.columns - column0 : kTile);
  T values[kRows][kColumns];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int row = warp + i * kWarps, column = lane + j * kWarp;
      values[i][j] = {};
      if (row < rows && column < columns) values[i][j] = from[row * tiling.columns + column];
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      shared[(warp + i * kWarps) * kPitch + lane + j * kWarp] = values[i][j];
    }
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = warp + i * kWarps, row = lane + j * kWarp;
      if (row < rows && column < columns) {
        to[column * tiling.rows + row] = shared[row * kPitch + column];
      }
    }
  }
}

struct Matrices {
  const void* from;
  void* to;
  int64_t count, rows, columns;
  uintptr_t stream;

  bool in_packs(int64_t of_rows, int64_t of_columns) const {
    return are_aligned(from, to) && rows % of_rows == 0 && columns % of_columns == 0;
  }
};

dim3 grid_of(const Tiling& tiling, int64_t count) {
  return dim3(static_cast<unsigned>(count * tiling.across.divisor * tiling.down.divisor));
}

template <typename T, int kRows, int kColumns>
void launch_packs(const Matrices& m) {
  const Packs packs = Packs::of(m.rows / kRows, m.columns / kColumns);
  const Tiling tiling{m.rows, m.columns, Divisor::of(ceil_div(packs.wide, packs.tile_wide())),
                      Divisor::of(ceil_div(packs.high, packs.tile_high()))};
  launch(kOp, transpose_packs_kernel<T, kRows, kColumns>, grid_of(tiling, m.count), kThreads, 0,
         m.stream, tiling, packs, static_cast<const T*>(m.from), static_cast<T*>(m.to));
}

template <typename T>
void launch_elements(const Matrices& m) {
  const Tiling tiling{m.rows, m.columns, Divisor::of(ceil_div(m.columns, kTile)),
                      Divisor::of(ceil_div(m.rows, kTile))};
  launch(kOp, transpose_elements_kernel<T>, grid_of(tiling, m.count), kThreads,
         sizeof(T) * kTile * (kTile + 2), m.stream, tiling, static_cast<const T*>(m.from),
         static_cast<T*>(m.to));
}

}  // namespace

void transpose(const void* from, void* to, int64_t count, int64_t rows, int64_t columns,
               int element_bytes, const Where& where) {
  if (count * rows * columns == 0) return;
  const DeviceGuard guard(kOp, where.device);
  const Matrices m{from, to, count, rows, columns, where.stream};
  if (element_bytes == 2) {
    // Images of 14 x 14 pixels are a multiple of 4 alone.
    if (m.in_packs(8, 8)) return launch_packs<uint16_t, 8, 8>(m);
    if (m.in_packs(8, 4)) return launch_packs<uint16_t, 8, 4>(m);
    if (m.in_packs(4, 8)) return launch_packs<uint16_t, 4, 8>(m);
    return launch_elements<uint16_t>(m);
  }
  if (element_bytes == 4) {
    return m.in_packs(4, 4) ? launch_packs<uint32_t, 4, 4>(m) : launch_elements<uint32_t>(m);
  }
  if (element_bytes == 8) {
    return m.in_packs(2, 2) ? launch_packs<uint64_t, 2, 2>(m) : launch_elements<uint64_t>(m);
  }
  throw std::runtime_error(std::string(kOp) + ": element_bytes: expected 2, 4 or 8, got " +
                           std::to_string(element_bytes));
}

}  // namespace gdfast::cuda
