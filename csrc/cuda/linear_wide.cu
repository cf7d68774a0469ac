// Wide linear layers of half types, and of float32 that is rounded to them as it is read, as
// autocast asks for: each product in one launch, without copies of weights in another type.
//
// Layers have few rows beside what a GPU can hold, so that a block's loop is bound by how long it
// waits for memory. Its groups of warps take turns at the steps of what is summed over, each with
// tiles of its own, and their sums are joined at the end, in one order.
#include "linear_types.h"
#include "matrix_product.h"
#include "sums.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "linear";
constexpr char kBackwardOp[] = "linear_backward";

constexpr int kRows = 32, kColumns = 64;  // of a block's sums
constexpr int kGroupThreads = 4 * kWarp;
constexpr int kWarpRows = 16, kWarpColumns = 32;
constexpr int kVector = 4;  // sums that a thread writes at a time
static_assert(kRows / kWarpRows * (kColumns / kWarpColumns) * kWarp == kGroupThreads,
              "the warps of a group share its sums");

// --- Operands ---------------------------------------------------------------------------------

// A matrix in global memory: rows `step` elements apart, columns side by side.
template <typename T>
struct Matrix {
  const T* data;
  int64_t step;
  int32_t rows, columns;
};

// What a thread copies at a time: 16 bytes as they lie in global memory, neighbours by neighbouring
// threads, which become elements of H in shared memory.
template <typename T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));

template <typename H, typename T>
GDFAST_DEVICE void store_rounded(unsigned char* to, const Pack16& piece) {
  if constexpr (sizeof(T) == sizeof(H)) {
    store_16(to, piece);
  } else {
    float values[kPiece<T>];
    unpack<T, kPiece<T>>(piece, values);
    store_values<kPiece<T>>(reinterpret_cast<H*>(to), values);
  }
}

// The part of a tile that a thread of a group copies.
template <typename Tile, typename T>
struct Part {
  static constexpr int kPieces = Tile::kColumns / kPiece<T>;  // of a row
  static constexpr int kRowsAtOnce = kGroupThreads / kPieces;
  static constexpr int kCount = Tile::kRows / kRowsAtOnce;
  static_assert(Tile::kRows % kRowsAtOnce == 0, "every thread copies as many pieces");
  Pack16 pieces[kCount];

  // Asks for the tile that begins at `outer`, and at `depth` of what is summed over; zeros outside
  // of the matrix.
  GDFAST_DEVICE void load(Part& part, const Matrix<T>& from, int outer, int depth) {
    const int thread = this_thread() % kGroupThreads;
    const int row = (Tile::kTransposed ? depth : outer) + thread / kPieces;
    const int column = (Tile::kTransposed ? outer : depth) + thread % kPieces * kPiece<T>;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = row + i * kRowsAtOnce;
      part.pieces[i] = {};
      if (at < from.rows && column < from.columns) {
        part.pieces[i] = load_16(from.data + at * from.step + column);
      }
    }
  }
  template <typename H>
  GDFAST_DEVICE void store(const Part& part, unsigned char* tile) {
    const int thread = this_thread() % kGroupThreads;
    const int column = thread % kPieces * kPiece<T>;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = thread / kPieces + i * kRowsAtOnce;
      store_rounded<H, T>(tile + chunk_offset<Tile>(row, column / Tile::kLanes) +
                              column % Tile::kLanes * static_cast<int>(sizeof(H)),
                          part.pieces[i]);
    }
  }
};

// --- Products ---------------------------------------------------------------------------------

constexpr int kResultRow = kColumns + 4;  // floats: rows begin at different banks
constexpr int kTileBytes = (kRows + kColumns) * kStepBytes;
constexpr int kGroupBytes =
    2 * kTileBytes > kRows * kResultRow * 4 ? 2 * kTileBytes : kRows * kResultRow * 4;

// How many groups a block has, and how many steps of each are under way at a time. The forward pass
// has few blocks, the backward pass many.
template <int kGroupCount, int kStepsAhead>
struct Groups {
  static constexpr int kGroups = kGroupCount, kAhead = kStepsAhead;
  static constexpr int kThreads = kGroups * kGroupThreads;
  static constexpr size_t kMemory = kGroups * kGroupBytes;
};
using Forward = Groups<4, 2>;
using Backward = Groups<2, 1>;

// a b over `depth`, for a block of rows from first_row and columns from first_column. Calls
// write(row, column, four sums side by side) for all of them.
template <typename H, typename Pass, bool kTransposedA, bool kTransposedB, typename TA, typename TB,
          typename Write>
GDFAST_DEVICE void multiply(const Matrix<TA>& a, const Matrix<TB>& b, int32_t depth, int first_row,
                            int first_column, Write&& write) {
  using TileA = SharedTile<2, kRows, kTransposedA>;
  using TileB = SharedTile<2, kColumns, kTransposedB>;
  constexpr int kDepth = TileA::kDepth, kGroups = Pass::kGroups, kAhead = Pass::kAhead;
  const int group = this_thread() / kGroupThreads, warp = warp_index() % (kGroupThreads / kWarp);
  const int warp_row = warp / 2 * kWarpRows, warp_column = warp % 2 * kWarpColumns;
  unsigned char* const memory = shared_memory() + group * 2 * kTileBytes;
  const int steps = (depth + kDepth - 1) / kDepth;
  Part<TileA, TA> parts_a[kAhead];
  Part<TileB, TB> parts_b[kAhead];
  const auto load = [&](int slot, int step) {
    Part<TileA, TA>::load(parts_a[slot], a, first_row, step * kDepth);
    Part<TileB, TB>::load(parts_b[slot], b, first_column, step * kDepth);
  };
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) {
    if (group + slot * kGroups < steps) load(slot, group + slot * kGroups);
  }
  float sums[kWarpColumns / 8][4] = {};
  for (int first = group; first < steps; first += kAhead * kGroups) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      const int step = first + slot * kGroups;
      if (step >= steps) break;
      // Two tiles take turns: whoever is behind reads the other one.
      unsigned char* const tile = memory + (step / kGroups) % 2 * kTileBytes;
      unsigned char* const tile_b = tile + TileA::kSize;
      Part<TileA, TA>::template store<H>(parts_a[slot], tile);
      Part<TileB, TB>::template store<H>(parts_b[slot], tile_b);
      if (step + kAhead * kGroups < steps) load(slot, step + kAhead * kGroups);
      sync_threads_of(1 + group, kGroupThreads);
#pragma unroll
      for (int chunk = 0; chunk < kStepBytes / 16; chunk += 2) {
        uint32_t left[4];
        load_operands<TileA, true>(left, tile, warp_row, 0, chunk);
#pragma unroll
        for (int j = 0; j < kWarpColumns / 16; ++j) {
          uint32_t right[4];
          load_operands<TileB, false>(right, tile_b, warp_column, j, chunk);
          mma_m16n8k16<H>(sums[2 * j], left, {right[0], right[1]});
          mma_m16n8k16<H>(sums[2 * j + 1], left, {right[2], right[3]});
        }
      }
    }
  }
  sync_block();  // results take the place of tiles
  float* const results = reinterpret_cast<float*>(shared_memory());
  const auto result = [&](int of_group, int row, int column) {
    return results + (of_group * kRows + row) * kResultRow + column;
  };
  const int row = warp_row + warp_lane() / 4, column = warp_column + warp_lane() % 4 * 2;
#pragma unroll
  for (int j = 0; j < kWarpColumns / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const to = result(group, row + half * 8, column + j * 8);
      to[0] = sums[j][2 * half];
      to[1] = sums[j][2 * half + 1];
    }
  }
  sync_block();
  for (int i = this_thread(); i < kRows * kColumns / kVector; i += Pass::kThreads) {
    const int to_row = i / (kColumns / kVector), to_column = i % (kColumns / kVector) * kVector;
    float joined[kVector] = {};
#pragma unroll
    for (int of_group = 0; of_group < kGroups; ++of_group) {
      float values[kVector];
      load_values<kVector>(result(of_group, to_row, to_column), values);
#pragma unroll
      for (int lane = 0; lane < kVector; ++lane) joined[lane] += values[lane];
    }
    write(first_row + to_row, first_column + to_column, joined);
  }
}

// Rounds four sums and writes them to a matrix.
template <typename T>
struct Destination {
  T* data;
  int64_t step;
  int32_t rows, columns;

  GDFAST_DEVICE void write(const Destination& to, int row, int column,
                           const float (&values)[kVector]) {
    if (row >= to.rows || column >= to.columns) return;
    store_values<kVector>(to.data + row * to.step + column, values);
  }
};

template <typename TI, typename TW, typename TO>
GDFAST_KERNEL(Forward::kThreads, 1)
linear_wide_kernel(const GDFAST_GRID_CONSTANT Matrix<TI> input,
                   const GDFAST_GRID_CONSTANT Matrix<TW> weight, const TW* bias,
                   const GDFAST_GRID_CONSTANT Destination<TO> output) {
  const int first_row = static_cast<int>(blockIdx.x) * kRows;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  multiply<TO, Forward, false, false>(input, weight, input.columns, first_row, first_column,
                                      [&](int row, int column, float (&values)[kVector]) {
                                        if (bias != nullptr && column < output.columns) {
#pragma unroll
                                          for (int i = 0; i < kVector; ++i)
                                            values[i] += to_float(bias[column + i]);
                                        }
                                        Destination<TO>::write(output, row, column, values);
                                      });
}

// --- Backward ---------------------------------------------------------------------------------

// Columns of a block that makes grad_bias, and threads of each.
constexpr int kBiasColumns = 32, kBiasRows = Backward::kThreads / kBiasColumns;

struct BiasSum {
  float value;
  GDFAST_DEVICE void join(BiasSum& to, const BiasSum& other) { to.value += other.value; }
};
static_assert(Backward::kThreads * kValuesStep<BiasSum> <= Backward::kMemory, "they fit");

// Which blocks make what: those of grad_bias come first, then those of grad_input.
struct WideBlocks {
  int bias, input;
  int columns;  // blocks side by side in grad_input and in grad_weight
};

template <typename TI, typename TW, typename TO>
struct WideBackward {
  Matrix<TO> grad_output;
  Matrix<TI> input;
  Matrix<TW> weight;
  Destination<TI> grad_input;
  Destination<TW> grad_weight;
  TW* grad_bias;
};

template <typename TI, typename TW, typename TO>
GDFAST_KERNEL(Backward::kThreads, 3)
linear_wide_backward_kernel(const GDFAST_GRID_CONSTANT WideBlocks blocks,
                            const GDFAST_GRID_CONSTANT WideBackward<TI, TW, TO> a) {
  int block = static_cast<int>(blockIdx.x);
  if (block < blocks.bias) {
    const int column = this_thread() % kBiasColumns, tile_row = this_thread() / kBiasColumns;
    const int k = block * kBiasColumns + column;
    BiasSum sum{0};
    if (k < a.grad_output.columns) {
#pragma unroll 8
      for (int row = tile_row; row < a.grad_output.rows; row += kBiasRows) {
        sum.value += to_float(a.grad_output.data[row * a.grad_output.step + k]);
      }
    }
    join_rows(sum, tile_row, kBiasRows, kBiasColumns);
    if (tile_row == 0 && k < a.grad_output.columns) a.grad_bias[k] = from_float<TW>(sum.value);
    return;
  }
  block -= blocks.bias;
  if (block < blocks.input) {
    multiply<TO, Backward, false, true>(
        a.grad_output, a.weight, a.grad_output.columns, block / blocks.columns * kRows,
        block % blocks.columns * kColumns, [&](int row, int column, float (&values)[kVector]) {
          Destination<TI>::write(a.grad_input, row, column, values);
        });
    return;
  }
  block -= blocks.input;
  multiply<TO, Backward, true, true>(
      a.grad_output, a.input, a.grad_output.rows, block / blocks.columns * kRows,
      block % blocks.columns * kColumns, [&](int row, int column, float (&values)[kVector]) {
        Destination<TW>::write(a.grad_weight, row, column, values);
      });
}

// Calls f(LinearTypes) where the output is of a half type, as in all wide layers.
template <typename F>
void with_wide_types(const Linear& p, F&& f) {
  if (p.output == DType::kBFloat16) return with_half_types<BFloat16>(p, f);
  with_half_types<Half>(p, f);
}

}  // namespace

void linear_wide(const Linear& p, const void* input, const void* weight, const void* bias,
                 void* output, const Where& where) {
  if (p.N == 0 || p.K == 0) return;
  const DeviceGuard guard(kOp, where.device);
  const auto N = static_cast<int32_t>(p.N), C = static_cast<int32_t>(p.C),
             K = static_cast<int32_t>(p.K);
  with_wide_types(p, [&](auto types) {
    using Types = decltype(types);
    using TI = typename Types::Input;
    using TW = typename Types::Weight;
    using TO = typename Types::Output;
    const dim3 grid(static_cast<unsigned>(ceil_div(N, kRows)),
                    static_cast<unsigned>(ceil_div(K, kColumns)));
    launch(kOp, linear_wide_kernel<TI, TW, TO>, grid, Forward::kThreads, Forward::kMemory,
           where.stream, Matrix<TI>{static_cast<const TI*>(input), p.input_step, N, C},
           Matrix<TW>{static_cast<const TW*>(weight), C, K, C}, static_cast<const TW*>(bias),
           Destination<TO>{static_cast<TO*>(output), K, N, K});
  });
}

void linear_wide_backward(const Linear& p, const void* grad_output, const void* input,
                          const void* weight, const LinearGradients& to, const Where& where) {
  if (p.K == 0 || p.C == 0) return;
  const DeviceGuard guard(kBackwardOp, where.device);
  const auto N = static_cast<int32_t>(p.N), C = static_cast<int32_t>(p.C),
             K = static_cast<int32_t>(p.K);
  with_wide_types(p, [&](auto types) {
    using Types = decltype(types);
    using TI = typename Types::Input;
    using TW = typename Types::Weight;
    using TO = typename Types::Output;
    const int64_t columns = ceil_div(C, kColumns);
    const int64_t of_bias = to.bias == nullptr ? 0 : ceil_div(K, kBiasColumns);
    const int64_t of_input = to.input == nullptr ? 0 : ceil_div(N, kRows) * columns;
    const int64_t of_weight = to.weight == nullptr ? 0 : ceil_div(K, kRows) * columns;
    const WideBlocks blocks{static_cast<int>(of_bias), static_cast<int>(of_input),
                            static_cast<int>(columns)};
    const int64_t all = of_bias + of_input + of_weight;
    if (all == 0) return;
    const WideBackward<TI, TW, TO> arguments{{static_cast<const TO*>(grad_output), K, N, K},
                                             {static_cast<const TI*>(input), p.input_step, N, C},
                                             {static_cast<const TW*>(weight), C, K, C},
                                             {static_cast<TI*>(to.input), C, N, C},
                                             {static_cast<TW*>(to.weight), C, K, C},
                                             static_cast<TW*>(to.bias)};
    launch(kBackwardOp, linear_wide_backward_kernel<TI, TW, TO>, dim3(static_cast<unsigned>(all)),
           Backward::kThreads, Backward::kMemory, where.stream, blocks, arguments);
  });
}

}  // namespace gdfast::cuda
