// The gradient in the input: a block makes kM pixels of one phase of the stride by kN channels,
// summing over the filters of the taps that reach the phase. Nothing is multiplied by the zeros
// between a stride's outputs.
#include "conv2d_launch.h"
#include "device.h"

namespace gdfast::cuda {
namespace {

struct Arguments {
  Operand<Positions, Taps> grad;
  Operand<Taps, Channels> weight;
  Output grad_input;
  PhaseAxis rows, columns;
  int32_t column_phases;
  uint32_t column_tiles;
};

template <typename Math>
using Memory = BlockMemory<Math, false, true>;

template <typename Math, bool kChunked>
GDFAST_KERNEL(Math::kThreads, 2)
conv2d_grad_input_kernel(GDFAST_GRID_CONSTANT const Arguments a) {
  using Its = Memory<Math>;
  const int64_t first_row = int64_t{blockIdx.x / a.column_tiles} * Math::kM;
  const auto first_column = static_cast<int32_t>(blockIdx.x % a.column_tiles) * Math::kN;
  const int group = static_cast<int>(blockIdx.z);
  const int32_t row_phase = static_cast<int32_t>(blockIdx.y) / a.column_phases;
  const int32_t column_phase = static_cast<int32_t>(blockIdx.y) % a.column_phases;
  const Phase rows = phase_of(a.rows, row_phase), columns = phase_of(a.columns, column_phase);

  Operand<Positions, Taps> grad = a.grad;
  start_at(grad.rows, first_row, Math::kM);
  grad.rows.first_h = rows.first;
  grad.rows.first_w = columns.first;
  Operand<Taps, Channels> weight = a.weight;
  weight.rows.first_h = rows.tap;
  weight.rows.first_w = columns.tap;
  const int32_t filters = static_cast<int32_t>(a.grad.columns.channels.divisor);
  const int32_t depth = filters * rows.taps * columns.taps;
  grad.columns.count = weight.rows.count = depth;
  grad.columns.columns = weight.rows.columns =
      columns.taps == static_cast<int32_t>(a.columns.most.divisor) ? a.columns.most
                                                                   : a.columns.fewest;
  typename Math::Sums sums;
  sum_products<Math, Its, kChunked>(
      sums, staged<typename Its::A, Math::kThreads, kChunked>(grad, group, 0),
      staged<typename Its::B, Math::kThreads, kChunked>(weight, group, first_column), depth,
      [](const unsigned char*) {});

  keep_results<Math, Its>(sums);
  Positions pixels = a.grad_input.rows;
  pixels.first_h = row_phase;
  pixels.first_w = column_phase;
  start_at(pixels, first_row, Math::kM);
  write_results<Math, Its>(a.grad_input, pixels, group, first_column, [](auto&, int) {});
}

}  // namespace

void conv2d_grad_input(const Conv2dProblem& p, const Conv2dWay& way, const void* grad_output,
                       const void* weight, void* grad_input, const Where& where) {
  if (p.N == 0) return;
  const int64_t C = p.C / p.groups, K = p.K / p.groups, bytes = bytes_of(p.dtype);
  const PhaseAxis rows = phase_axis(p.stride_h, p.dilation_h, p.pad_h, p.R);
  const PhaseAxis columns = phase_axis(p.stride_w, p.dilation_w, p.pad_w, p.S);
  const int64_t row_phases = p.stride_h < p.H ? p.stride_h : p.H;
  const int64_t column_phases = p.stride_w < p.W ? p.stride_w : p.W;
  // Every phase counts the pixels that the first one has: of the others some lie past the image.
  const int64_t height = blocks_for(p.H, p.stride_h), width = blocks_for(p.W, p.stride_w);
  const int64_t pixels = p.N * height * width;
  const Divisor by_pixels = Divisor::of(height * width), by_columns = Divisor::of(width);
  const Divisor by_filters = Divisor::of(K);

  const Arguments arguments{
      output_operand(
          p, grad_output,
          Positions{by_pixels, by_columns, image_steps(p.output, bytes), 1, 1, 0, 0, pixels},
          Taps{by_filters, columns.most, channel_steps(p.output, bytes), -rows.output_step,
               -columns.output_step, 0, 0, 0}),
      weight_operand(p, weight,
                     Taps{by_filters, columns.most,
                          Steps{p.weight.n * bytes, p.weight.h * bytes, p.weight.w * bytes},
                          rows.tap_step, columns.tap_step, 0, 0, 0},
                     Channels{p.weight.c * bytes, small(C)}),
      {static_cast<unsigned char*>(grad_input), C * p.input.c * bytes, small(p.H), small(p.W),
       Positions{by_pixels, by_columns, image_steps(p.input, bytes), small(p.stride_h),
                 small(p.stride_w), 0, 0, pixels},
       Channels{p.input.c * bytes, small(C)},
       has_chunks(grad_input, p.input, C, p.N, p.H, p.W, bytes), p.input.c <= p.input.w},
      rows,
      columns,
      small(column_phases),
      0};
  const bool chunked = has_chunks(grad_output, p.output, K, p.N, p.P, p.Q, bytes) &&
                       has_chunks(weight, p.weight, C, p.K, p.R, p.S, bytes);
  const DeviceGuard guard("conv2d_grad_input", where.device);
  with_instance(p.dtype, way, chunked, [&](auto instance) {
    using Math = typename decltype(instance)::Math;
    Arguments a = arguments;
    a.column_tiles = static_cast<uint32_t>(blocks_for(C, Math::kN));
    const int64_t blocks = blocks_for(pixels, Math::kM) * a.column_tiles;
    const dim3 grid(static_cast<unsigned>(blocks),
                    static_cast<unsigned>(row_phases * column_phases),
                    static_cast<unsigned>(p.groups));
    launch("conv2d_grad_input", conv2d_grad_input_kernel<Math, decltype(instance)::kChunked>, grid,
           Math::kThreads, Memory<Math>::kSize, where.stream, a);
  });
}

}  // namespace gdfast::cuda
