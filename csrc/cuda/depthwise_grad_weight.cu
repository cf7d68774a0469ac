// Depthwise convolution, gradients in the weight and the bias:
//
//   grad_weight[k, 0, r, s] = sum over n, p, q of grad_output[n, k, p, q] * input[n, c, h, w]
//   grad_bias[k] = sum over n, p, q of grad_output[n, k, p, q]
//   h = p * stride_h - pad_h + r * dilation_h, w likewise
//
// Sums are taken in two passes. In the first a thread has some taps of a filter and walks through
// the outputs of its split; what the threads of a block have is joined in a fixed order. In the
// second each sum joins the splits in theirs. Common filters in channels_last have a first pass of
// their own (depthwise_columns_grad_weight.cu).
#include <algorithm>

#include "conv2d_split_sums.h"
#include "depthwise_boxes.h"
#include "depthwise_columns.h"
#include "depthwise_rows.h"
#include "depthwise_tensor.h"
#include "depthwise_toeplitz.h"
#include "depthwise_weight_sums.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";
constexpr int kTaps = 9;  // that a thread has of a filter

// Blocks have threads for some filters, side by side, times outputs. Blocks divide the outputs, and
// the taps into parts.
struct WeightWalk {
  int groups, parts;
  int tile_groups, tile_outputs;
  int outputs, outputs_per_split, splits;
  Divisor wide, high;  // outputs of a row, rows of an image

  static WeightWalk of(const Conv2dProblem& p) {
    const int64_t parts = ceil_div(p.R * p.S, kTaps), outputs = p.N * p.P * p.Q;
    // In channels_last threads side by side read side by side; else outputs of a row do.
    const int64_t most = p.output.c == 1 ? 64 : 1;
    const int64_t tiles = ceil_div(p.K, most), tile_groups = ceil_div(p.K, tiles);
    const int64_t tile_outputs = kSumThreads / tile_groups;
    int64_t splits = ceil_div(kSumBlocks, tiles * parts);
    const int64_t most_splits = outputs / (tile_outputs * 4) + 1;  // one where there are none
    if (splits > most_splits) splits = most_splits;
    const int64_t per_split = outputs / splits + 1;
    return {static_cast<int>(p.K),
            static_cast<int>(parts),
            static_cast<int>(tile_groups),
            static_cast<int>(tile_outputs),
            static_cast<int>(outputs),
            static_cast<int>(per_split),
            static_cast<int>(outputs / per_split + 1),
            Divisor::of(p.Q),
            Divisor::of(p.P)};
  }
};

// Any filter, layout and type: a thread has up to kTaps taps of one filter, an output at a time.
template <typename T>
GDFAST_KERNEL(kSumThreads, 2)
depthwise_grad_weight_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                             const GDFAST_GRID_CONSTANT WeightWalk walk, const T* grad_output,
                             const T* input, SumOf<T>* partial) {
  using A = SumOf<T>;
  let_next_begin();
  const int thread = static_cast<int>(threadIdx.x), split = static_cast<int>(blockIdx.x);
  const int lane = thread % walk.tile_groups, row = thread / walk.tile_groups;
  const int part = static_cast<int>(blockIdx.z);
  const int k = static_cast<int>(blockIdx.y) * walk.tile_groups + lane;
  const bool exists = k < walk.groups && row < walk.tile_outputs;
  const int first_tap = part * kTaps, taps = a.R * a.S;
  int down[kTaps], right[kTaps];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    // What is no tap looks far outside of the image.
    const int tap = first_tap + i;
    down[i] = tap < taps ? tap / a.S * a.dilation_h - a.pad_h : -(1 << 30);
    right[i] = tap % a.S * a.dilation_w - a.pad_w;
  }
  WeightSums<A, kTaps, 1> sums{};
  const int end = (split + 1) * walk.outputs_per_split;
  const int last = exists ? (end < walk.outputs ? end : walk.outputs) : 0;
  for (int at = split * walk.outputs_per_split + row; at < last; at += walk.tile_outputs) {
    const Divided line = divide(at, walk.wide), image = divide(line.quotient, walk.high);
    const int n = image.quotient, p = image.rest, q = line.rest;
    const A grad =
        to_float(grad_output[n * a.output.n + k * a.output.c + p * a.output.h + q * a.output.w]);
    const T* const pixels = input + n * a.input.n + k / a.multiplier * a.input.c;
    sums.bias[0] += grad;
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      const int h = p * a.stride_h + down[i], w = q * a.stride_w + right[i];
      if (static_cast<unsigned>(h) >= static_cast<unsigned>(a.H)) continue;
      if (static_cast<unsigned>(w) >= static_cast<unsigned>(a.W)) continue;
      sums.taps[i] += grad * to_float(pixels[h * a.input.h + w * a.input.w]);
    }
  }

  join_rows(sums, row, walk.tile_outputs, walk.tile_groups);
  if (row > 0 || !exists) return;
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    if (first_tap + i < taps) partial_taps(partial, a, split, k)[first_tap + i] = sums.taps[i];
  }
  if (part == 0) *partial_bias(partial, a, walk.splits, split, k) = sums.bias[0];
}

template <typename T>
int launch_any(const Conv2dProblem& p, const DepthwiseArguments& a, const T* grad_output,
               const T* input, SumOf<T>* partial, uintptr_t stream) {
  const auto walk = WeightWalk::of(p);
  const dim3 grid(static_cast<unsigned>(walk.splits),
                  static_cast<unsigned>(ceil_div(walk.groups, walk.tile_groups)),
                  static_cast<unsigned>(walk.parts));
  launch(kOp, depthwise_grad_weight_kernel<T>, grid, kSumThreads,
         kSumThreads * kValuesStep<WeightSums<SumOf<T>, kTaps, 1>>, stream, a, walk, grad_output,
         input, partial);
  return walk.splits;
}

}  // namespace

int64_t depthwise_conv2d_grad_weight_workspace(const Conv2dProblem& p, DepthwiseWay wanted) {
  // Which kernel it is depends on addresses too: room for any.
  const DepthwiseArguments a = depthwise_arguments(p);
  int64_t splits = WeightWalk::of(p).splits;
  const int64_t of_columns = depthwise_columns_splits(a, p.dtype);
  if (of_columns > splits) splits = of_columns;
  int64_t of_way = 0;
  const DepthwiseWay way = depthwise_way(p, wanted, true);
  if (way == DepthwiseWay::kRows) {
    of_way = depthwise_rows_splits(a);
  } else if (way == DepthwiseWay::kBoxes) {
    of_way = depthwise_boxes_splits(a);
  } else if (way == DepthwiseWay::kToeplitz) {
    of_way = std::max(depthwise_toeplitz_splits(a, true), depthwise_toeplitz_splits(a, false));
  } else if (way >= DepthwiseWay::kSlabs) {
    of_way = depthwise_tensor_splits(a, way == DepthwiseWay::kSlabs);
  }
  if (of_way > splits) splits = of_way;
  const int64_t bytes = p.dtype == DType::kFloat64 ? 8 : 4;
  return splits * p.K * (p.R * p.S + 1) * bytes;
}

void depthwise_conv2d_grad_weight(const Conv2dProblem& problem, DepthwiseWay wanted,
                                  const void* grad_output, const void* input, void* grad_weight,
                                  void* grad_bias, void* workspace, const Where& where) {
  const DeviceGuard guard(kOp, where.device);
  const DepthwiseArguments a = depthwise_arguments(problem);
  int splits = 0;
  const DepthwiseWay way = depthwise_way(problem, wanted, are_aligned(grad_output, input));
  if (way == DepthwiseWay::kRows) {
    splits = depthwise_rows_splits(a);
    depthwise_rows_grad_weight(problem.dtype, a, grad_output, input, grad_bias != nullptr,
                               workspace, where.stream);
  } else if (way == DepthwiseWay::kBoxes) {
    splits = depthwise_boxes_splits(a);
    depthwise_boxes_grad_weight(problem.dtype, a, grad_output, input, workspace, where.stream);
  } else if (way == DepthwiseWay::kToeplitz) {
    splits = depthwise_toeplitz_splits(a, grad_bias != nullptr);
    depthwise_toeplitz_grad_weight(problem.dtype, a, grad_output, input, grad_bias != nullptr,
                                   workspace, where.stream);
  } else if (way >= DepthwiseWay::kSlabs) {
    const bool wide = way == DepthwiseWay::kSlabs;
    splits = depthwise_tensor_splits(a, wide);
    depthwise_tensor_grad_weight(problem.dtype, a, wide, grad_output, input, workspace,
                                 where.stream);
  } else if (way == DepthwiseWay::kVectors) {
    splits = depthwise_columns_grad_weight(problem.dtype, a, grad_output, input,
                                           grad_bias != nullptr, workspace, where.stream);
  }
  with_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* const partial = static_cast<SumOf<T>*>(workspace);
    if (splits == 0) {
      splits = launch_any<T>(problem, a, static_cast<const T*>(grad_output),
                             static_cast<const T*>(input), partial, where.stream);
    }
    launch_sum_splits<T, SumOf<T>>(weight_split_sums(problem, partial, splits), grad_weight, where);
    if (grad_bias == nullptr) return;
    const SumOf<T>* const bias = partial_bias(partial, a, splits, 0, 0);
    launch_sum_splits<T, SumOf<T>>(bias_split_sums(problem, bias, splits), grad_bias, where);
  });
}

}  // namespace gdfast::cuda
