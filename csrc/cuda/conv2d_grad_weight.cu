// The gradients in the weight and the bias: a block makes kM filters by kN taps, summing over the
// positions of one split. What the splits have summed is added up in order by a second kernel, so
// that the same numbers come out in every run. What is last, the second kernel or the only split,
// may update the weight by SGD instead of writing its gradient.
#include "conv2d_launch.h"
#include "conv2d_split_sums.h"
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

constexpr int kUpdatesAtOnce = 8;  // of a thread: enough to hide some of the way to memory

// Updates the part of a weight that the block has summed the gradient of.
template <typename Math, typename Memory>
GDFAST_DEVICE void update_tile(const WeightUpdate<typename Math::Sum>& update,
                               const WeightPlaces& places, typename Math::Sums& sums,
                               int64_t first_filter, int32_t rows, int32_t first_column,
                               int32_t columns) {
  using Element = typename Math::Element;
  constexpr int kStep = kUpdatesAtOnce * Math::kThreads;
  static_assert(Math::kM * Math::kN % kStep == 0, "steps are whole");
  keep_results<Math, Memory>(sums);
#pragma unroll 1
  for (int first = this_thread(); first < Math::kM * Math::kN; first += kStep) {
    typename Math::Sum gradients[kUpdatesAtOnce];
    int64_t at[kUpdatesAtOnce];
#pragma unroll
    for (int i = 0; i < kUpdatesAtOnce; ++i) {
      const int index = first + i * Math::kThreads;
      const int row = index / Math::kN, column = index % Math::kN;
      // Added to 0 as the sum of one split is, which makes 0 of -0.
      gradients[i] = typename Math::Sum(0) + result_row<Math, Memory>(row)[column];
      const bool inside = row < rows && column < columns;
      at[i] = inside ? place_of(places, first_filter + row, first_column + column) : -1;
    }
    update_weight<Element>(update, at, gradients);
  }
}

template <typename Math, bool kChunked>
GDFAST_KERNEL(Math::kThreads, 2)
conv2d_grad_weight_kernel(GDFAST_GRID_CONSTANT const Arguments a,
                          GDFAST_GRID_CONSTANT const WeightPlaces places,
                          GDFAST_GRID_CONSTANT const WeightUpdate<typename Math::Sum> update) {
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

  if (update.param != nullptr) {
    return update_tile<Math, Its>(update, places, sums, int64_t{group} * filters + first_row,
                                  filters - first_row, first_column, taps - first_column);
  }
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

int64_t sum_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

int64_t weight_elements(const Conv2dProblem& p) { return p.K * (p.C / p.groups) * p.R * p.S; }

}  // namespace

int64_t conv2d_grad_weight_workspace(const Conv2dProblem& p, int64_t splits, bool bias) {
  return splits * (weight_elements(p) + (bias ? p.K : 0)) * sum_bytes(p.dtype);
}

namespace {

// What is read, in splits; where sums go is left to the caller.
Arguments arguments_of(const Conv2dProblem& p, const void* grad_output, const void* input,
                       int64_t splits) {
  return {output_operand(p, grad_output, output_positions(p), filters(p, p.output.c)),
          input_operand(p, input, window_positions(p), window_taps(p)),
          nullptr,
          nullptr,
          blocks_for(p.N * p.P * p.Q, splits * kStepBytes) * kStepBytes,  // whole steps of any type
          small(p.groups),
          0};
}

bool is_chunked(const Conv2dProblem& p, const void* grad_output, const void* input) {
  const int64_t bytes = bytes_of(p.dtype);
  return has_chunks(grad_output, p.output, p.K / p.groups, p.N, p.P, p.Q, bytes) &&
         has_chunks(input, p.input, p.C / p.groups, p.N, p.H, p.W, bytes);
}

template <typename Instance>
void launch_products(const Conv2dProblem& p, Arguments a, int64_t splits,
                     const WeightUpdate<typename Instance::Math::Sum>& update, const Where& where) {
  using Math = typename Instance::Math;
  a.column_tiles = static_cast<uint32_t>(blocks_for(p.C / p.groups * p.R * p.S, int64_t{Math::kN}));
  const int64_t blocks = blocks_for(p.K / p.groups, Math::kM) * a.column_tiles;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(splits),
                  static_cast<unsigned>(p.groups));
  launch("conv2d_grad_weight", conv2d_grad_weight_kernel<Math, Instance::kChunked>, grid,
         Math::kThreads, Memory<Math>::kSize, where.stream, a, weight_places(p), update);
}

// The sums of no positions are zeros.
int64_t used_splits(const Conv2dProblem& p, int64_t splits) {
  return p.N * p.P * p.Q == 0 ? 0 : splits;
}

void grad_weight_of(const Conv2dProblem& p, const Conv2dWay& way, const void* grad_output,
                    const void* input, void* grad_weight, void* grad_bias, void* workspace,
                    int64_t splits, const Where& where, bool wide) {
  const int64_t weights = weight_elements(p), used = used_splits(p, splits);
  Arguments arguments = arguments_of(p, grad_output, input, splits);
  arguments.weight_sums = workspace;
  if (grad_bias != nullptr) {
    arguments.bias_sums =
        static_cast<unsigned char*>(workspace) + splits * weights * sum_bytes(p.dtype);
  }
  const SplitSums weight_sums = weight_split_sums(p, workspace, used);
  const SplitSums bias_sums = bias_split_sums(p, arguments.bias_sums, used);
  const DeviceGuard guard("conv2d_grad_weight", where.device);
  with_instance(p.dtype, way, is_chunked(p, grad_output, input), [&](auto instance) {
    using Instance = decltype(instance);
    if (used > 0 && grad_output != nullptr) {
      launch_products<Instance>(p, arguments, splits, {}, where);
    }
    using Math = typename Instance::Math;
    using Element = typename Math::Element;
    using Sum = typename Math::Sum;
    if (grad_weight != nullptr) {
      if (wide && sizeof(Element) == 2) {
        launch_sum_splits<Element, Sum, Sum>(weight_sums, grad_weight, where);
      } else {
        launch_sum_splits<Element, Sum>(weight_sums, grad_weight, where);
      }
    }
    if (grad_bias != nullptr) launch_sum_splits<Element, Sum>(bias_sums, grad_bias, where);
  });
}

void sum_splits_sgd(const Conv2dProblem& p, const void* workspace, int64_t splits,
                    const SgdWeight& weight, const Where& where) {
  const SplitSums a = weight_split_sums(p, workspace, used_splits(p, splits));
  switch (weight.hyper.dtype) {
    case DType::kFloat32:
      return launch_sum_splits_sgd<float, float>(a, weight, where);
    case DType::kFloat64:
      return launch_sum_splits_sgd<double, double>(a, weight, where);
    case DType::kBFloat16:
      return launch_sum_splits_sgd<BFloat16, float>(a, weight, where);
    case DType::kFloat16:
      return launch_sum_splits_sgd<Half, float>(a, weight, where);
  }
}

}  // namespace

void conv2d_grad_weight(const Conv2dProblem& p, const Conv2dWay& way, const void* grad_output,
                        const void* input, void* grad_weight, void* grad_bias, void* workspace,
                        int64_t splits, const Where& where) {
  grad_weight_of(p, way, grad_output, input, grad_weight, grad_bias, workspace, splits, where,
                 false);
}

void conv2d_grad_weight_wide(const Conv2dProblem& p, const Conv2dWay& way, const void* grad_output,
                             const void* input, void* grad_weight, void* workspace, int64_t splits,
                             const Where& where) {
  grad_weight_of(p, way, grad_output, input, grad_weight, nullptr, workspace, splits, where, true);
}

void conv2d_grad_weight_sgd(const Conv2dProblem& p, const Conv2dWay& way, const void* grad_output,
                            const void* input, const void* workspace, int64_t splits,
                            const SgdWeight& weight, const Where& where) {
  const DeviceGuard guard("conv2d_grad_weight", where.device);
  if (grad_output == nullptr) return sum_splits_sgd(p, workspace, splits, weight, where);
  with_instance(p.dtype, way, is_chunked(p, grad_output, input), [&](auto instance) {
    using Instance = decltype(instance);
    launch_products<Instance>(p, arguments_of(p, grad_output, input, 1), 1,
                              weight_update<typename Instance::Math::Sum>(weight), where);
  });
}

}  // namespace gdfast::cuda
