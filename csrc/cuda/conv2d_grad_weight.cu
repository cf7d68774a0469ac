// The gradients in the weight and the bias: a block makes kM filters by kN taps, summing over the
// positions of one split. What the splits have summed is added up in order by a second kernel, so
// that the same numbers come out in every run.
#include "conv2d_launch.h"
#include "device.h"

namespace gdfast::cuda {
namespace {

struct Arguments {
  Operand<Positions, Channels> grad;
  Operand<Positions, Taps> image;
  void* weight_sums;  // [splits, K, R, S, C / groups]
  void* bias_sums;    // [splits, K], or null
  int64_t split_positions;
  int32_t groups;
  uint32_t column_tiles;
};

template <typename Math>
using Memory = BlockMemory<Math, true, true>;

template <typename Math, bool kChunked>
GDFAST_KERNEL(Math::kThreads, 2)
conv2d_grad_weight_kernel(GDFAST_GRID_CONSTANT const Arguments a) {
  using Element = typename Math::Element;
  using Sum = typename Math::Sum;
  using Its = Memory<Math>;
  const auto first_row = static_cast<int32_t>(blockIdx.x / a.column_tiles) * Math::kM;
  const auto first_column = static_cast<int32_t>(blockIdx.x % a.column_tiles) * Math::kN;
  const int64_t split = blockIdx.y;
  const int group = static_cast<int>(blockIdx.z);
  const int32_t filters = a.grad.columns.count, taps = a.image.columns.count;

  Operand<Positions, Channels> grad = a.grad;
  Operand<Positions, Taps> image = a.image;
  start_at(grad.rows, split * a.split_positions, a.split_positions);
  start_at(image.rows, split * a.split_positions, a.split_positions);

  // A few threads for each filter add up the gradients that pass by in shared memory.
  constexpr int kParts = Math::kThreads / Math::kM;
  const int filter = this_thread() % Math::kM, part = this_thread() / Math::kM;
  const bool sums_bias = a.bias_sums != nullptr && first_column == 0;
  Sum bias_sum = 0;
  typename Math::Sums sums;
  sum_products<Math, Its, kChunked>(
      sums, staged<typename Its::A, Math::kThreads, kChunked>(grad, group, first_row),
      staged<typename Its::B, Math::kThreads, kChunked>(image, group, first_column),
      grad.rows.count, [&](const unsigned char* tile) {
        if (!sums_bias) return;
#pragma unroll
        for (int line = 0; line < Its::kDepth; line += kParts) {
          const int at = element_offset<typename Its::A>(filter, line + part);
          bias_sum += to_float(*reinterpret_cast<const Element*>(tile + at));
        }
      });

  const int64_t first_filter = (split * a.groups + group) * filters + first_row;
  Sum* const weight_sums = static_cast<Sum*>(a.weight_sums) + first_filter * taps + first_column;
  Math::for_each_pair(sums, [&](int row, int column, Sum& first, Sum& second) {
    Sum* const to = weight_sums + int64_t{row} * taps + column;
    if (first_row + row < filters && first_column + column < taps) to[0] = first;
    if (first_row + row < filters && first_column + column + 1 < taps) to[1] = second;
  });
  if (sums_bias) {
    Sum* const parts = reinterpret_cast<Sum*>(shared_memory());
    parts[this_thread()] = bias_sum;
    sync_block();
    if (part == 0 && first_row + filter < filters) {
      for (int other = 1; other < kParts; ++other) bias_sum += parts[other * Math::kM + filter];
      static_cast<Sum*>(a.bias_sums)[first_filter + filter] = bias_sum;
    }
  }
}

struct SplitSums {
  const void* sums;  // [splits, count]
  int64_t count, splits;
  void* to;
  Divisor taps;  // of one filter
  Taps places;
  int64_t filter_bytes;
};

constexpr int kSumThreads = 256;

template <typename T, typename Sum>
GDFAST_KERNEL(kSumThreads, 1)
sum_splits_kernel(GDFAST_GRID_CONSTANT const SplitSums a) {
  const int64_t index = int64_t{blockIdx.x} * kSumThreads + this_thread();
  if (index >= a.count) return;
  const Sum* from = static_cast<const Sum*>(a.sums) + index;
  Sum sum = 0;
#pragma unroll 8
  for (int64_t split = 0; split < a.splits; ++split, from += a.count) sum += *from;
  const Divided filter = divide(static_cast<int32_t>(index), a.taps);
  const int64_t offset = filter.quotient * a.filter_bytes + place_at(a.places, filter.rest).offset;
  *reinterpret_cast<T*>(static_cast<unsigned char*>(a.to) + offset) = from_float<T>(sum);
}

template <typename Math>
void sum_splits(const SplitSums& a, const Where& where) {
  launch("conv2d_grad_weight", sum_splits_kernel<typename Math::Element, typename Math::Sum>,
         dim3(static_cast<unsigned>(blocks_for(a.count, kSumThreads))), kSumThreads, 0,
         where.stream, a);
}

int64_t sum_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

int64_t weight_elements(const Conv2dProblem& p) { return p.K * (p.C / p.groups) * p.R * p.S; }

}  // namespace

int64_t conv2d_grad_weight_workspace(const Conv2dProblem& p, int64_t splits, bool bias) {
  return splits * (weight_elements(p) + (bias ? p.K : 0)) * sum_bytes(p.dtype);
}

void conv2d_grad_weight(const Conv2dProblem& p, const Conv2dWay& way, const void* grad_output,
                        const void* input, void* grad_weight, void* grad_bias, void* workspace,
                        int64_t splits, const Where& where) {
  const int64_t C = p.C / p.groups, K = p.K / p.groups, bytes = bytes_of(p.dtype);
  const int64_t positions = p.N * p.P * p.Q, weights = weight_elements(p);
  // The sums of no positions are zeros.
  const int64_t used = positions == 0 ? 0 : splits;
  void* const bias_sums = grad_bias == nullptr ? nullptr
                                               : static_cast<unsigned char*>(workspace) +
                                                     splits * weights * sum_bytes(p.dtype);
  const Arguments arguments{
      output_operand(p, grad_output, output_positions(p), filters(p, p.output.c)),
      input_operand(p, input, window_positions(p), window_taps(p)),
      workspace,
      bias_sums,
      blocks_for(positions, splits * kStepBytes) * kStepBytes,  // whole steps in every type
      small(p.groups),
      0};
  const SplitSums weight_sums{
      workspace,      weights,           used, grad_weight, Divisor::of(C * p.R * p.S),
      weight_taps(p), p.weight.n * bytes};
  const SplitSums all_bias_sums{bias_sums,      p.K,  used, grad_bias, Divisor::of(1),
                                weight_taps(p), bytes};
  const bool chunked = has_chunks(grad_output, p.output, K, p.N, p.P, p.Q, bytes) &&
                       has_chunks(input, p.input, C, p.N, p.H, p.W, bytes);
  const DeviceGuard guard("conv2d_grad_weight", where.device);
  with_instance(p.dtype, way, chunked, [&](auto instance) {
    using Math = typename decltype(instance)::Math;
    if (used > 0) {
      Arguments a = arguments;
      a.column_tiles = static_cast<uint32_t>(blocks_for(C * p.R * p.S, Math::kN));
      const int64_t blocks = blocks_for(K, Math::kM) * a.column_tiles;
      const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(splits),
                      static_cast<unsigned>(p.groups));
      launch("conv2d_grad_weight", conv2d_grad_weight_kernel<Math, decltype(instance)::kChunked>,
             grid, Math::kThreads, Memory<Math>::kSize, where.stream, a);
    }
    sum_splits<Math>(weight_sums, where);
    if (grad_bias != nullptr) sum_splits<Math>(all_bias_sums, where);
  });
}

}  // namespace gdfast::cuda
