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
  write_results<Math, Its>(a.output, rows, group, first_column, [&](auto& values, int filter) {
    if (a.bias != nullptr) {
      const Element* bias = static_cast<const Element*>(a.bias);
      bias += int64_t{group} * a.weight.rows.count + filter;
      for (Sum& value : values) value += to_float(*bias++);
    }
    activate(values, a.activation, static_cast<Sum>(a.negative_slope));
  });
}

}  // namespace

void conv2d(const Conv2dProblem& p, const Conv2dWay& way, const void* input, const void* weight,
            const void* bias, void* output, const Where& where) {
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
      p.negative_slope};
  const bool chunked = has_chunks(input, p.input, C, p.N, p.H, p.W, bytes) &&
                       has_chunks(weight, p.weight, C, p.K, p.R, p.S, bytes);
  const DeviceGuard guard("conv2d", where.device);
  with_instance(p.dtype, way, chunked, [&](auto instance) {
    using Math = typename decltype(instance)::Math;
    Arguments a = arguments;
    a.column_tiles = static_cast<uint32_t>(blocks_for(K, Math::kN));
    const int64_t blocks = blocks_for(positions, Math::kM) * a.column_tiles;
    const dim3 grid(static_cast<unsigned>(blocks), 1, static_cast<unsigned>(p.groups));
    launch("conv2d", conv2d_kernel<Math, decltype(instance)::kChunked>, grid, Math::kThreads,
           Memory<Math>::kSize, where.stream, a);
  });
}

}  // namespace gdfast::cuda
