// Depthwise convolution, forward: which kernel makes it, and the one that takes every shape.
#include "depthwise_boxes.h"
#include "depthwise_columns.h"
#include "depthwise_rows.h"
#include "depthwise_strips.h"
#include "depthwise_tensor.h"
#include "depthwise_toeplitz.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d";

// One output, or kVector in neighbouring channels, for each thread.
template <typename T, int kVector>
GDFAST_KERNEL(kImageThreads, 2)
depthwise_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                 const GDFAST_GRID_CONSTANT ImageWalk walk, const T* input, const T* weight,
                 const T* bias, T* output) {
  using A = SumOf<T>;
  const ImagePlace at = place_in_image(walk);
  if (!at.exists) return;
  const int k = at.group * kVector, c = kVector > 1 ? k : k / a.multiplier;
  const int top = at.row * a.stride_h - a.pad_h, left = at.column * a.stride_w - a.pad_w;
  const T* const filter = weight + k * a.weight_k;
  for (int n = static_cast<int>(blockIdx.y); n < walk.N; n += static_cast<int>(gridDim.y)) {
    const T* const image = input + n * a.input.n + c * a.input.c;
    A sums[kVector] = {};
    for (int r = 0; r < a.R; ++r) {
      const int h = top + r * a.dilation_h;
      if (static_cast<unsigned>(h) >= static_cast<unsigned>(a.H)) continue;
#pragma unroll 3
      for (int s = 0; s < a.S; ++s) {
        const int w = left + s * a.dilation_w;
        if (static_cast<unsigned>(w) >= static_cast<unsigned>(a.W)) continue;
        A pixels[kVector];
        load_values<kVector>(image + h * a.input.h + w * a.input.w, pixels);
#pragma unroll
        for (int lane = 0; lane < kVector; ++lane) {
          const int tap = lane * a.weight_k + r * a.weight_r + s * a.weight_s;
          sums[lane] += pixels[lane] * to_float(filter[tap]);
        }
      }
    }
    if (bias != nullptr) {
#pragma unroll
      for (int lane = 0; lane < kVector; ++lane) sums[lane] += to_float(bias[k + lane]);
    }
    activate(sums, a.activation, static_cast<A>(a.negative_slope));
    T* const to = output + n * a.output.n + k * a.output.c;
    store_values<kVector>(to + at.row * a.output.h + at.column * a.output.w, sums);
  }
}

template <typename T>
struct Tensors {
  const T* input;
  const T* weight;
  const T* bias;
  T* output;
};

// A strip has 4 rows: threads side by side take columns.
template <typename T, int kVector, int kRows, int kColumns, typename Filter>
void launch_strips(const DepthwiseArguments& a, const Tensors<T>& tensors, uintptr_t stream) {
  const int64_t blocks = int64_t{kStripWaves} * multiprocessors(kOp);
  const auto walk = StripWalk::of(a, kVector, kRows, kColumns, kVector > 1, blocks);
  constexpr int kSize = Filter::kSize;
  const size_t shared = sizeof(SumOf<T>) * kSize * kSize * walk.tile_c * kVector;
  launch(kOp, depthwise_strip_kernel<T, kVector, kSize, Filter::kStride, kRows, kColumns>,
         walk.grid(a.N), kStripThreads, shared, stream, a, walk, tensors.input, tensors.weight,
         tensors.bias, tensors.output);
}

template <typename T, int kVector>
void launch_any(const DepthwiseArguments& a, const Tensors<T>& tensors, uintptr_t stream) {
  const bool channels_inside = a.output.c == 1 && a.K > 1;
  const auto walk = ImageWalk::of(a.N, a.K / kVector, a.P, a.Q, channels_inside);
  launch(kOp, depthwise_kernel<T, kVector>, walk.grid(), kImageThreads, 0, stream, a, walk,
         tensors.input, tensors.weight, tensors.bias, tensors.output);
}

template <typename T>
void forward(const DepthwiseArguments& a, bool vectors, const Tensors<T>& tensors,
             uintptr_t stream) {
  if constexpr (sizeof(T) < 8) {
    if (vectors) return launch_any<T, kDepthwiseVector>(a, tensors, stream);
    if (a.output.w == 1 && a.R == 3) {
      const bool done = with_common_filter(a, [&](auto filter) {
        using Filter = decltype(filter);
        if constexpr (Filter::kSize == 3) {
          launch_strips<T, 1, 4, 1, Filter>(a, tensors, stream);
        }
      });
      if (done) return;
    }
  }
  launch_any<T, 1>(a, tensors, stream);
}

}  // namespace

void depthwise_forward(DType dtype, const DepthwiseArguments& arguments, DepthwiseWay way,
                       const void* input, const void* weight, const void* bias, void* output,
                       uintptr_t stream) {
  if (way == DepthwiseWay::kRows) {
    return depthwise_rows(dtype, arguments, input, weight, bias, output, stream);
  }
  if (way == DepthwiseWay::kBoxes) {
    return depthwise_boxes(dtype, arguments, input, weight, bias, output, stream);
  }
  if (way == DepthwiseWay::kToeplitz) {
    return depthwise_toeplitz(dtype, arguments, input, weight, bias, output, stream);
  }
  if (way >= DepthwiseWay::kSlabs) {
    const bool wide = way == DepthwiseWay::kSlabs;
    return depthwise_tensor(dtype, arguments, wide, input, weight, bias, output, stream);
  }
  const bool vectors = way == DepthwiseWay::kVectors;
  if (vectors && depthwise_columns(dtype, arguments, input, weight, bias, output, stream)) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Tensors<T> tensors{static_cast<const T*>(input), static_cast<const T*>(weight),
                             static_cast<const T*>(bias), static_cast<T*>(output)};
    forward<T>(arguments, vectors, tensors, stream);
  });
}

void depthwise_conv2d(const Conv2dProblem& problem, DepthwiseWay wanted, const void* input,
                      const void* weight, const void* bias, void* output, const Where& where) {
  if (problem.N == 0) return;
  const DeviceGuard guard(kOp, where.device);
  DepthwiseArguments arguments = depthwise_arguments(problem);
  arguments.activation = problem.activation;
  arguments.negative_slope = problem.negative_slope;
  const DepthwiseWay way = depthwise_way(problem, wanted, are_aligned(input, output));
  depthwise_forward(problem.dtype, arguments, way, input, weight, bias, output, where.stream);
}

}  // namespace gdfast::cuda
