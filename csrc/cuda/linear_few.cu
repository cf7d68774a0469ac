// Linear layers with few outputs: products of whole rows, which no tile of a matrix product fits.
//
//   forward   a block has one or a few rows of input and up to eight outputs; its threads divide
//   the
//             columns, and join their sums in a fixed order.
//   backward  blocks of two kinds in one launch. Those of grad_input have columns of weight in
//             registers for some rows. Those of grad_weight and grad_bias have a few columns for
//             all rows: nothing is written but the results, and sums have one order.
#include "linear_types.h"
#include "sums.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "linear";
constexpr char kBackwardOp[] = "linear_backward";

constexpr int kThreads = 256;
constexpr int kOutputs = 8;  // that a thread sums at a time
// Elements of an access: 16 bytes of float32, which half types are mixed with.
template <typename T>
constexpr int kLanes = sizeof(T) == 8 ? 1 : 4;

struct FewArguments {
  int64_t N, C, K, input_step;
  int outputs;  // of a block
};

// --- Forward ----------------------------------------------------------------------------------

// The sums of values over the lanes of a warp: those of the count-th lane / (32 / kCount).
template <int kCount, typename A>
GDFAST_DEVICE A sum_over_lanes(A (&values)[kCount]) {
  const int lane = warp_lane();
  int mask = kWarp / 2;
#pragma unroll
  for (int half = kCount / 2; half >= 1; half /= 2, mask /= 2) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A mine = upper ? values[i + half] : values[i];
      const A other = upper ? values[i] : values[i + half];
      values[i] = mine + shuffle_xor(other, mask);
    }
  }
#pragma unroll
  for (int i = kWarp / kCount / 2; i >= 1; i /= 2) values[0] += shuffle_xor(values[0], i);
  return values[0];
}

template <typename TI, typename TW, typename TO, int kVector, int kRows>
GDFAST_KERNEL(kThreads, 2)
linear_few_kernel(const GDFAST_GRID_CONSTANT FewArguments a, const TI* input, const TW* weight,
                  const TW* bias, TO* output) {
  using A = SumOf<TW>;
  constexpr int kWarps = kThreads / kWarp;
  const int64_t first_row = int64_t{kRows} * blockIdx.x;
  const int first_output = static_cast<int>(blockIdx.y) * a.outputs;
  const int left = static_cast<int>(a.K) - first_output;
  const int outputs = left < a.outputs ? left : a.outputs;
  const TI* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // What is behind the last row is not written.
    const int64_t row = first_row + r < a.N ? first_row + r : a.N - 1;
    rows[r] = input + row * a.input_step;
  }
  weight += first_output * a.C;
  A sums[kRows][kOutputs] = {};
  for (int64_t c = threadIdx.x * kVector; c < a.C; c += kThreads * kVector) {
    PackOf<TI, kVector> inputs[kRows];
    PackOf<TW, kVector> weights[kOutputs] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) inputs[r] = load_pack<kVector>(rows[r] + c);
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      if (k < outputs) weights[k] = load_pack<kVector>(weight + k * a.C + c);
    }
    A values[kRows][kVector];
#pragma unroll
    for (int r = 0; r < kRows; ++r) unpack<TI, kVector>(inputs[r], values[r]);
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      A factors[kVector];
      unpack<TW, kVector>(weights[k], factors);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[r][k] += values[r][i] * factors[i];
      }
    }
  }
  A* const of_warps = reinterpret_cast<A*>(shared_memory());
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const A sum = sum_over_lanes(sums[r]);
    if (warp_lane() % (kWarp / kOutputs) == 0) {
      of_warps[(r * kWarps + warp_index()) * kOutputs + warp_lane() / (kWarp / kOutputs)] = sum;
    }
  }
  sync_block();
  const int r = static_cast<int>(threadIdx.x) / kOutputs;
  const int k = static_cast<int>(threadIdx.x) % kOutputs;
  if (r >= kRows || k >= outputs || first_row + r >= a.N) return;
  A sum = bias == nullptr ? A(0) : A(to_float(bias[first_output + k]));
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[(r * kWarps + warp) * kOutputs + k];
  output[(first_row + r) * a.K + first_output + k] = from_float<TO>(sum);
}

// --- Backward ---------------------------------------------------------------------------------

// A block of the kind that makes grad_input, in vectors of columns.
constexpr int kInputColumns = 64, kRowsOfThread = 4;
constexpr int kInputRows = kThreads / kInputColumns * kRowsOfThread;
// Of the kind that makes grad_weight.
constexpr int kWeightColumns = 16, kTileRows = kThreads / kWeightColumns;
constexpr int kStagedRows = 256;  // of grad_output

template <typename TI, typename TW, typename TO>
struct FewBackward {
  const TO* grad_output;
  const TI* input;
  const TW* weight;
  TI* grad_input;
  TW *grad_weight, *grad_bias;
  int input_blocks;   // the first ones; then come those of grad_weight
  int column_blocks;  // side by side, of what makes grad_input
  int weight_blocks;  // side by side, of what makes grad_weight
};

// What a thread has of grad_weight's columns, and of grad_bias.
template <typename A, int kVector>
struct WeightSums {
  A weight[kOutputs][kVector];
  A bias[kOutputs];

  GDFAST_DEVICE void join(WeightSums& to, const WeightSums& other) {
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) to.weight[k][i] += other.weight[k][i];
      to.bias[k] += other.bias[k];
    }
  }
};

// Copies grad_output of rows from first_row and columns from first_output to shared memory, zeros
// around them.
template <typename A, typename TO>
GDFAST_DEVICE void stage_gradients(const FewArguments& a, const TO* grad_output, A* staged,
                                   int64_t first_row, int rows, int first_output, int outputs,
                                   int padded) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * padded; i += kThreads) {
    const int64_t row = first_row + i / padded;
    const int k = i % padded;
    const bool exists = row < a.N && k < outputs;
    staged[i] = exists ? A(to_float(grad_output[row * a.K + first_output + k])) : A(0);
  }
  sync_block();
}

// grad_input[n, c] = sum over k of grad_output[n, k] weight[k, c]
template <int kVector, typename TI, typename TW, typename TO>
GDFAST_DEVICE void make_grad_input(const FewArguments& a, const FewBackward<TI, TW, TO>& at) {
  using A = SumOf<TW>;
  A* const staged = reinterpret_cast<A*>(shared_memory());
  const int block = static_cast<int>(blockIdx.x);
  const int64_t first_row = int64_t{block / at.column_blocks} * kInputRows;
  const int padded = static_cast<int>((a.K + kOutputs - 1) / kOutputs) * kOutputs;
  stage_gradients(a, at.grad_output, staged, first_row, kInputRows, 0, static_cast<int>(a.K),
                  padded);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t c =
      (int64_t{block % at.column_blocks} * kInputColumns + thread % kInputColumns) * kVector;
  const int own = thread / kInputColumns * kRowsOfThread;  // the first of the thread's rows
  if (c >= a.C) return;
  A sums[kRowsOfThread][kVector] = {};
  for (int first = 0; first < a.K; first += kOutputs) {
    PackOf<TW, kVector> weights[kOutputs] = {};
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      if (first + k < a.K) weights[k] = load_pack<kVector>(at.weight + (first + k) * a.C + c);
    }
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      A factors[kVector];
      unpack<TW, kVector>(weights[k], factors);
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        const A grad = staged[(own + r) * padded + first + k];
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[r][i] += grad * factors[i];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) {
    const int64_t row = first_row + own + r;
    if (row < a.N) store_values<kVector>(at.grad_input + row * a.C + c, sums[r]);
  }
}

// grad_weight[k, c] = sum over n of grad_output[n, k] input[n, c], grad_bias[k] that of
// grad_output.
template <int kVector, typename TI, typename TW, typename TO>
GDFAST_DEVICE void make_grad_weight(const FewArguments& a, const FewBackward<TI, TW, TO>& at) {
  using A = SumOf<TW>;
  A* const staged = reinterpret_cast<A*>(shared_memory());
  const int block = static_cast<int>(blockIdx.x) - at.input_blocks;
  const int thread = static_cast<int>(threadIdx.x);
  const int tile_row = thread / kWeightColumns;
  const int64_t column =
      int64_t{block % at.weight_blocks} * kWeightColumns + thread % kWeightColumns;
  const int64_t c = column * kVector;
  const int first_output = block / at.weight_blocks * a.outputs;
  const int left = static_cast<int>(a.K) - first_output;
  const int outputs = left < a.outputs ? left : a.outputs;
  const bool reads = at.grad_weight != nullptr && c < a.C;
  WeightSums<A, kVector> sums{};
  for (int64_t first = 0; first < a.N; first += kStagedRows) {
    const int rows = a.N - first < kStagedRows ? static_cast<int>(a.N - first) : kStagedRows;
    sync_block();  // nobody reads the last rows any more
    stage_gradients(a, at.grad_output, staged, first, rows, first_output, outputs, kOutputs);
#pragma unroll 4
    for (int row = tile_row; row < rows; row += kTileRows) {
      A values[kVector] = {};
      if (reads) load_values<kVector>(at.input + (first + row) * a.input_step + c, values);
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) {
        const A grad = staged[row * kOutputs + k];
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums.weight[k][i] += grad * values[i];
        sums.bias[k] += grad;
      }
    }
  }
  sync_block();
  join_rows(sums, tile_row, kTileRows, kWeightColumns);
  if (tile_row != 0) return;
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
    if (k >= outputs) continue;
    if (reads) store_values<kVector>(at.grad_weight + (first_output + k) * a.C + c, sums.weight[k]);
    if (column == 0 && at.grad_bias != nullptr) {
      at.grad_bias[first_output + k] = from_float<TW>(sums.bias[k]);
    }
  }
}

template <typename TI, typename TW, typename TO, int kVector>
GDFAST_KERNEL(kThreads, 2)
linear_few_backward_kernel(const GDFAST_GRID_CONSTANT FewArguments a,
                           const GDFAST_GRID_CONSTANT FewBackward<TI, TW, TO> at) {
  if (static_cast<int>(blockIdx.x) < at.input_blocks) {
    make_grad_input<kVector>(a, at);
  } else {
    make_grad_weight<kVector>(a, at);
  }
}

// --- The host's side --------------------------------------------------------------------------

// Outputs of a block, in as equal shares as there are.
FewArguments few_arguments(const Linear& p) {
  const int64_t blocks = ceil_div(p.K, kOutputs);
  return {p.N, p.C, p.K, p.input_step, static_cast<int>(ceil_div(p.K, blocks))};
}

// Calls f with whether all accesses can be vectors.
template <typename T, typename F>
void with_lanes(const Linear& p, bool aligned, F&& f) {
  if constexpr (kLanes<T> > 1) {
    if (aligned && p.C % kLanes<T> == 0 && p.input_step % kLanes<T> == 0) {
      return f(Constant<kLanes<T>>{});
    }
  }
  f(Constant<1>{});
}

// Blocks of one row fill a large GPU up to here; more rows of each read the weight less often.
constexpr int64_t kFewRows = 512;

}  // namespace

void linear_few(const Linear& p, const void* input, const void* weight, const void* bias,
                void* output, const Where& where) {
  if (p.N == 0 || p.K == 0) return;
  const DeviceGuard guard(kOp, where.device);
  const FewArguments arguments = few_arguments(p);
  with_linear_types(p, [&](auto types) {
    using Types = decltype(types);
    using TI = typename Types::Input;
    using TW = typename Types::Weight;
    using TO = typename Types::Output;
    with_lanes<TW>(p, are_aligned(input, weight), [&](auto vector) {
      const auto run = [&](auto rows) {
        constexpr int kVector = decltype(vector)::value, kRows = decltype(rows)::value;
        const dim3 grid(static_cast<unsigned>(ceil_div(p.N, kRows)),
                        static_cast<unsigned>(ceil_div(p.K, arguments.outputs)));
        launch(kOp, linear_few_kernel<TI, TW, TO, kVector, kRows>, grid, kThreads,
               kRows * kThreads / kWarp * kOutputs * sizeof(SumOf<TW>), where.stream, arguments,
               static_cast<const TI*>(input), static_cast<const TW*>(weight),
               static_cast<const TW*>(bias), static_cast<TO*>(output));
      };
      if (p.N <= kFewRows) {
        run(Constant<1>{});
      } else {
        run(Constant<4>{});
      }
    });
  });
}

void linear_few_backward(const Linear& p, const void* grad_output, const void* input,
                         const void* weight, const LinearGradients& to, const Where& where) {
  if (p.K == 0 || p.C == 0) return;
  const DeviceGuard guard(kBackwardOp, where.device);
  const FewArguments arguments = few_arguments(p);
  with_linear_types(p, [&](auto types) {
    using Types = decltype(types);
    using TI = typename Types::Input;
    using TW = typename Types::Weight;
    using TO = typename Types::Output;
    using A = SumOf<TW>;
    with_lanes<TW>(p, are_aligned(input, weight, to.input, to.weight), [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const int64_t columns = ceil_div(p.C, kInputColumns * kVector);
      const int64_t of_input = to.input == nullptr ? 0 : columns * ceil_div(p.N, kInputRows);
      int64_t of_weight = to.bias == nullptr ? 0 : 1;
      if (to.weight != nullptr) of_weight = ceil_div(p.C, kWeightColumns * kVector);
      const int64_t blocks = of_input + of_weight * ceil_div(p.K, arguments.outputs);
      const FewBackward<TI, TW, TO> at{
          static_cast<const TO*>(grad_output), static_cast<const TI*>(input),
          static_cast<const TW*>(weight),      static_cast<TI*>(to.input),
          static_cast<TW*>(to.weight),         static_cast<TW*>(to.bias),
          static_cast<int>(of_input),          static_cast<int>(columns),
          static_cast<int>(of_weight)};
      if (blocks == 0) return;
      const size_t joined = kThreads * kValuesStep<WeightSums<A, kVector>>;
      const size_t staged = kStagedRows * kOutputs * sizeof(A);
      launch(kBackwardOp, linear_few_backward_kernel<TI, TW, TO, kVector>,
             dim3(static_cast<unsigned>(blocks)), kThreads, joined > staged ? joined : staged,
             where.stream, arguments, at);
    });
  });
}

}  // namespace gdfast::cuda
