// Convolution: a block makes kM positions by kN filters, summing over taps.
#include "activation.h"
#include "conv2d_launch.h"
#include "device.h"

namespace gdfast::cuda {
namespace {

struct Arguments {
  Operand<Positions, Taps> image;
  Operand<Channels, Taps> weight;
  Output output;
  const void* bias;
  uint32_t column_tiles;
  Activation activation;
  double negative_slope;
  void* sums;           // [blocks of positions, threads of a column, K, 2], or null
  const double* shift;  // [K]
  int64_t all_filters;
};

template <typename Math>
using Memory = BlockMemory<Math, false, false>;

template <typename Math, bool kChunked>
GDFAST_KERNEL(Math::kThreads, 2)
conv2d_kernel(GDFAST_GRID_CONSTANT const Arguments a) {
  using Element = typename Math::Element;
  using Sum = typename Math::Sum;
  using Its = Memory<Math>;
  // Blocks that share positions follow one another: the weight stays in L2 anyway.
  const int64_t first_row = int64_t{blockIdx.x / a.column_tiles} * Math::kM;
  const auto first_column = static_cast<int32_t>(blockIdx.x % a.column_tiles) * Math::kN;
  const int group = static_cast<int>(blockIdx.z);

  Operand<Positions, Taps> image = a.image;
  start_at(image.rows, first_row, Math::kM);
  typename Math::Sums sums;
  sum_products<Math, Its, kChunked>(
      sums, staged<typename Its::A, Math::kThreads, kChunked>(image, group, 0),
      staged<typename Its::B, Math::kThreads, kChunked>(a.weight, group, first_column),
      a.image.columns.count, [](const unsigned char*) {});

  keep_results<Math, Its>(sums);
  Positions rows = a.output.rows;
  start_at(rows, first_row, Math::kM);
  const int32_t filters = a.weight.rows.count;
  const int64_t before = int64_t{group} * filters;  // filters of other groups
  const auto finish = [&](auto& values, int filter) {
    if (a.bias != nullptr) {
      const Element* bias = static_cast<const Element*>(a.bias) + (before + filter);
      for (Sum& value : values) value += to_float(*bias++);
    }
    activate(values, a.activation, static_cast<Sum>(a.negative_slope));
  };
  if (a.sums != nullptr) {
    const int64_t first_sum = first_row / Math::kM * kThreadsOfColumn<Math> * a.all_filters;
    sum_results<Math, Its>(static_cast<Sum*>(a.sums) + (first_sum + before) * 2, a.all_filters,
                           a.shift + before, rows.count, first_column, filters, finish);
  }
  write_results<Math, Its>(a.output, rows, group, first_column, finish);
}

// Adds up in order what the blocks have summed: a few threads for each filter, whose sums are added
// up in their order too.
constexpr int kJoined = 32, kJoinThreads = 512, kJoinParts = kJoinThreads / kJoined;

struct JoinArguments {
  const void* sums;  // [count, filters, 2]
  int64_t count, filters;
  double *sum, *squares;
};

template <typename Sum>
GDFAST_KERNEL(kJoinThreads, 1)
conv2d_join_sums_kernel(GDFAST_GRID_CONSTANT const JoinArguments a) {
  const int64_t filter = int64_t{blockIdx.x} * kJoined + this_thread() % kJoined;
  const int part = this_thread() / kJoined;
  double sum = 0, squares = 0;
  if (filter < a.filters) {
    const Sum* const from = static_cast<const Sum*>(a.sums) + filter * 2;
#pragma unroll 4
    for (int64_t i = part; i < a.count; i += kJoinParts) {
      sum += from[i * a.filters * 2];
      squares += from[i * a.filters * 2 + 1];
    }
  }
  double* const parts = reinterpret_cast<double*>(shared_memory());
  parts[this_thread()] = sum;
  parts[kJoinThreads + this_thread()] = squares;
  sync_block();
  if (part > 0 || filter >= a.filters) return;
  for (int other = 1; other < kJoinParts; ++other) {
    sum += parts[other * kJoined + this_thread()];
    squares += parts[kJoinThreads + other * kJoined + this_thread()];
  }
  a.sum[filter] = sum;
  a.squares[filter] = squares;
}

}  // namespace

void conv2d(const Conv2dProblem& p, const Conv2dWay& way, const void* input, const void* weight,
            const void* bias, void* output, const Conv2dSums& sums, const Where& where) {
  const int64_t positions = p.N * p.P * p.Q, K = p.K / p.groups, C = p.C / p.groups;
  if (positions == 0) return;
  const int64_t bytes = bytes_of(p.dtype);
  const Arguments arguments{
      input_operand(p, input, window_positions(p), window_taps(p)),
      weight_operand(p, weight, filters(p, p.weight.n), weight_taps(p)),
      {static_cast<unsigned char*>(output), K * p.output.c * bytes, small(p.P), small(p.Q),
       output_positions(p), filters(p, p.output.c),
       has_chunks(output, p.output, K, p.N, p.P, p.Q, bytes), p.output.c <= p.output.w},
      bias,
      0,
      p.activation,
      p.negative_slope,
      sums.workspace,
      sums.shift,
      p.K};
  const bool chunked = has_chunks(input, p.input, C, p.N, p.H, p.W, bytes) &&
                       has_chunks(weight, p.weight, C, p.K, p.R, p.S, bytes);
  const DeviceGuard guard("conv2d", where.device);
  with_instance(p.dtype, way, chunked, [&](auto instance) {
    using Math = typename decltype(instance)::Math;
    Arguments a = arguments;
    a.column_tiles = static_cast<uint32_t>(blocks_for(K, Math::kN));
    const int64_t row_tiles = blocks_for(positions, Math::kM);
    const dim3 grid(static_cast<unsigned>(row_tiles * a.column_tiles), 1,
                    static_cast<unsigned>(p.groups));
    launch("conv2d", conv2d_kernel<Math, decltype(instance)::kChunked>, grid, Math::kThreads,
           Memory<Math>::kSize, where.stream, a);
    if (sums.workspace == nullptr) return;
    const JoinArguments join{sums.workspace, row_tiles * kThreadsOfColumn<Math>, p.K, sums.sum,
                             sums.sum_of_squares};
    launch("conv2d", conv2d_join_sums_kernel<typename Math::Sum>,
           dim3(static_cast<unsigned>(blocks_for(p.K, kJoined))), kJoinThreads,
           2 * kJoinThreads * sizeof(double), where.stream, join);
  });
}

int64_t conv2d_sums_workspace(const Conv2dProblem& p) {
  // Whatever the instance is, it has no more blocks and threads of a column than these.
  const bool plain = p.dtype == DType::kFloat64 || p.dtype == DType::kFloat32;
  return blocks_for(p.N * p.P * p.Q, 64) * (plain ? 4 : 2) * p.K * 2 *
         (p.dtype == DType::kFloat64 ? 8 : 4);
}

}  // namespace gdfast::cuda
