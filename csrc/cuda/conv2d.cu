// Convolution: a block makes kM positions by kN filters, summing over taps.
#include "activation.h"
#include "conv2d_launch.h"
#include "device.h"
#include "moments.h"

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
  void* moments;  // [blocks of positions, threads of a column, 3, K], or null
  int32_t all_filters;
};

template <typename Math>
using Memory = BlockMemory<Math, false, false>;
using Smallest = TensorCores<HalfOperands<Half>, Block64x64>;

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
  if (a.moments != nullptr) {
    const int64_t first_part = first_row / Math::kM * kThreadsOfColumn<Math>;
    write_moments<Math, Its>(
        static_cast<Sum*>(a.moments) + 3 * first_part * a.all_filters + before, a.all_filters,
        first_column, filters, [&](int row) { return row < rows.count; }, finish);
  }
  write_results<Math, Its>(a.output, rows, group, first_column, finish);
}

struct JoinArguments {
  int64_t parts, of_split;
  int C;
};

// Joins what blocks have written to fewer parts.
template <typename Sum>
GDFAST_KERNEL(kJoinChannels* kJoinThreads, 1)
conv2d_moments_kernel(GDFAST_GRID_CONSTANT const JoinArguments a, const Sum* parts, Sum* moments) {
  const int64_t first = blockIdx.y * a.of_split, end = first + a.of_split;
  const int c = join_channel();
  const auto joint = join_parts(parts, a.C, c, first, end < a.parts ? end : a.parts);
  if (threadIdx.x >= kJoinChannels || c >= a.C) return;
  write_part(moments + int64_t{3} * blockIdx.y * a.C + c, a.C, joint);
}

}  // namespace

void conv2d(const Conv2dProblem& p, const Conv2dWay& way, const void* input, const void* weight,
            const void* bias, void* output, void* moments, void* workspace, const Where& where) {
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
      moments == nullptr ? nullptr : workspace,
      small(p.K)};
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
    if (moments == nullptr) return;
    join_moments(p, workspace, row_tiles * kThreadsOfColumn<Math>, moments, where);
  });
}

void join_moments(const Conv2dProblem& p, const void* parts, int64_t count, void* moments,
                  const Where& where) {
  const int64_t splits = conv2d_moment_splits(p);
  const JoinArguments join{count, blocks_for(count, splits), small(p.K)};
  const dim3 grid(static_cast<unsigned>(blocks_for(p.K, kJoinChannels)),
                  static_cast<unsigned>(splits));
  const auto run = [&](auto zero) {
    using Sum = decltype(zero);
    launch("conv2d", conv2d_moments_kernel<Sum>, grid, kJoinChannels * kJoinThreads, kJoinMemory,
           where.stream, join, static_cast<const Sum*>(parts), static_cast<Sum*>(moments));
  };
  p.dtype == DType::kFloat64 ? run(double{}) : run(float{});
}

int64_t conv2d_moment_splits(const Conv2dProblem& p) { return moment_splits(p.N * p.P * p.Q); }

int64_t conv2d_moments_workspace(const Conv2dProblem& p) {
  // No instance has more parts than these.
  const bool plain = p.dtype == DType::kFloat64 || p.dtype == DType::kFloat32;
  const int64_t parts = blocks_for(p.N * p.P * p.Q, 64) *
                        (plain ? kThreadsOfColumn<Plain<float>> : kThreadsOfColumn<Smallest>);
  return parts * 3 * p.K * (p.dtype == DType::kFloat64 ? 8 : 4);
}

}  // namespace gdfast::cuda
