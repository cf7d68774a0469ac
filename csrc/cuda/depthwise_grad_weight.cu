// Depthwise convolution, gradients in the weight and the bias:
//
//   grad_weight[k, 0, r, s] = sum over n, p, q of grad_output[n, k, p, q] * input[n, c, h, w]
//   grad_bias[k] = sum over n, p, q of grad_output[n, k, p, q]
//   h = p * stride_h - pad_h + r * dilation_h, w likewise
//
// Sums are taken in two passes. In the first a thread has some taps of a filter, or of a vector of
// them, and walks through the outputs of its split; what the threads of a block have is joined in a
// fixed order. In the second each sum joins the splits in theirs.
#include "depthwise.h"
#include "sums.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";
constexpr int kStrip = 4;  // outputs of a row that a thread takes at a time
constexpr int kTaps = 9;   // that a thread has of a filter of any shape

// Blocks have threads for some vectors of filters, side by side, times parts of the filter, times
// strips of outputs. Blocks divide the strips.
struct WeightWalk {
  int groups, parts;  // vectors of filters; into how many parts the taps of each are divided
  int tile_groups, tile_strips;
  int strips, strips_per_split, splits;
  Divisor wide, high;  // strips of a row, rows of an image

  static WeightWalk of(const Conv2dProblem& p, int vector, int strip, int parts,
                       bool parts_in_block) {
    const int64_t groups = p.K / vector;
    const int64_t wide = ceil_div(p.Q, strip), strips = p.N * p.P * wide;
    // In channels_last threads side by side read side by side; else strips of a row do.
    const int64_t most = p.output.c == 1 ? 16 * kDepthwiseVector / vector : 1;
    const int64_t tiles = ceil_div(groups, most);
    const int64_t tile_groups = ceil_div(groups, tiles);
    const int64_t threads = kSumThreads / (parts_in_block ? parts : 1);
    const int64_t tile_strips = threads / tile_groups;
    const int64_t blocks = tiles * (parts_in_block ? 1 : parts);
    int64_t splits = ceil_div(kSumBlocks, blocks);
    const int64_t most_splits = strips / (tile_strips * 4) + 1;  // one where there are no strips
    if (splits > most_splits) splits = most_splits;
    const int64_t per_split = strips / splits + 1;
    return {static_cast<int>(groups),
            parts,
            static_cast<int>(tile_groups),
            static_cast<int>(tile_strips),
            static_cast<int>(strips),
            static_cast<int>(per_split),
            static_cast<int>(strips / per_split + 1),
            Divisor::of(wide),
            Divisor::of(p.P)};
  }
};

// The taps that a thread has, of kVector filters side by side, and the sums of its outputs.
template <typename A, int kCount, int kVector>
struct WeightSums {
  A taps[kCount * kVector];
  A bias[kVector];

  GDFAST_DEVICE void join(WeightSums& to, const WeightSums& other) {
#pragma unroll
    for (int i = 0; i < kCount * kVector; ++i) to.taps[i] += other.taps[i];
#pragma unroll
    for (int i = 0; i < kVector; ++i) to.bias[i] += other.bias[i];
  }
};

// partial[split] is [K][R S] and, behind all of these, [K] of the bias.
template <typename A>
GDFAST_DEVICE A* partial_taps(A* partial, const DepthwiseArguments& a, int split, int k) {
  return partial + (int64_t{split} * a.K + k) * a.R * a.S;
}
template <typename A>
GDFAST_DEVICE A* partial_bias(A* partial, const DepthwiseArguments& a, int splits, int split,
                              int k) {
  return partial + int64_t{splits} * a.K * a.R * a.S + int64_t{split} * a.K + k;
}

// Common filters in channels_last: a thread has kTapRows rows of the taps, and of a strip the
// pixels that these see.
template <typename T, int kSize, int kStride, int kTapRows>
GDFAST_KERNEL(kSumThreads, 2)
depthwise_grad_weight_strip_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                                   const GDFAST_GRID_CONSTANT WeightWalk walk, const T* grad_output,
                                   const T* input, SumOf<T>* partial) {
  using A = SumOf<T>;
  constexpr int kVector = kDepthwiseVector, kWide = (kStrip - 1) * kStride + kSize;
  const int thread = static_cast<int>(threadIdx.x);
  const int columns = walk.tile_groups * walk.parts;  // of the threads
  const int lane = thread % walk.tile_groups, part = thread / walk.tile_groups % walk.parts;
  const int row = thread / columns, split = static_cast<int>(blockIdx.x);
  const int group = static_cast<int>(blockIdx.y) * walk.tile_groups + lane;
  const bool exists = group < walk.groups && row < walk.tile_strips;
  const int first_r = part * kTapRows, k = group * kVector;
  WeightSums<A, kTapRows * kSize, kVector> sums{};
  const int end = (split + 1) * walk.strips_per_split;
  const int last = exists ? (end < walk.strips ? end : walk.strips) : 0;
  for (int strip = split * walk.strips_per_split + row; strip < last; strip += walk.tile_strips) {
    const Divided line = divide(strip, walk.wide), image = divide(line.quotient, walk.high);
    const int n = image.quotient, p = image.rest, q0 = line.rest * kStrip;
    const int h0 = p * kStride - a.pad_h + first_r, w0 = q0 * kStride - a.pad_w;
    const T* const grads = grad_output + n * a.output.n + k + p * a.output.h + q0 * a.output.w;
    PackOf<T, kVector> packs[kStrip];
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      packs[i] = {};
      if (q0 + i < a.Q) packs[i] = load_pack<kVector>(grads + i * a.output.w);
    }
    A grad[kStrip][kVector];
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      unpack<T, kVector>(packs[i], grad[i]);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums.bias[v] += grad[i][v];
    }
#pragma unroll
    for (int r = 0; r < kTapRows; ++r) {
      const int h = h0 + r;
      if (static_cast<unsigned>(h) >= static_cast<unsigned>(a.H)) continue;
      const T* const pixels = input + n * a.input.n + k + h * a.input.h + w0 * a.input.w;
      PackOf<T, kVector> seen[kWide];
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        seen[j] = {};
        if (static_cast<unsigned>(w0 + j) < static_cast<unsigned>(a.W)) {
          seen[j] = load_pack<kVector>(pixels + j * a.input.w);
        }
      }
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        A pixel[kVector];
        unpack<T, kVector>(seen[j], pixel);
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
          const int s = j - i * kStride;
          if (s < 0 || s >= kSize) continue;
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            sums.taps[(r * kSize + s) * kVector + v] += grad[i][v] * pixel[v];
          }
        }
      }
    }
  }

  join_rows(sums, row, walk.tile_strips, columns);
  if (row > 0 || !exists) return;
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    A* const to = partial_taps(partial, a, split, k + v) + first_r * kSize;
#pragma unroll
    for (int tap = 0; tap < kTapRows * kSize; ++tap) to[tap] = sums.taps[tap * kVector + v];
    if (part == 0) *partial_bias(partial, a, walk.splits, split, k + v) = sums.bias[v];
  }
}

// Any filter, layout and type: a thread has up to kTaps taps of one filter, an output at a time.
template <typename T>
GDFAST_KERNEL(kSumThreads, 2)
depthwise_grad_weight_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                             const GDFAST_GRID_CONSTANT WeightWalk walk, const T* grad_output,
                             const T* input, SumOf<T>* partial) {
  using A = SumOf<T>;
  const int thread = static_cast<int>(threadIdx.x), split = static_cast<int>(blockIdx.x);
  const int lane = thread % walk.tile_groups, row = thread / walk.tile_groups;
  const int part = static_cast<int>(blockIdx.z);
  const int k = static_cast<int>(blockIdx.y) * walk.tile_groups + lane;
  const bool exists = k < walk.groups && row < walk.tile_strips;
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
  const int end = (split + 1) * walk.strips_per_split;
  const int last = exists ? (end < walk.strips ? end : walk.strips) : 0;
  for (int at = split * walk.strips_per_split + row; at < last; at += walk.tile_strips) {
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

  join_rows(sums, row, walk.tile_strips, walk.tile_groups);
  if (row > 0 || !exists) return;
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    if (first_tap + i < taps) partial_taps(partial, a, split, k)[first_tap + i] = sums.taps[i];
  }
  if (part == 0) *partial_bias(partial, a, walk.splits, split, k) = sums.bias[0];
}

template <typename A>
struct Total {
  A value;

  GDFAST_DEVICE void join(Total& to, const Total& other) { to.value += other.value; }
};

// Joins the splits of one table after the other: the weight's K R S sums, then the bias's K.
template <typename T>
GDFAST_KERNEL(kJoinChannels* kJoinThreads, 1)
join_splits_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a, int splits,
                   const SumOf<T>* partial, T* grad_weight, T* grad_bias) {
  using A = SumOf<T>;
  const int taps = a.R * a.S, weights = a.K * taps;
  const int index =
      static_cast<int>(blockIdx.x) * kJoinChannels + static_cast<int>(threadIdx.x) % kJoinChannels;
  const int thread = static_cast<int>(threadIdx.x) / kJoinChannels;
  const bool is_bias = index >= weights;
  const bool exists = index < (grad_bias == nullptr ? weights : weights + a.K);
  const int step = is_bias ? a.K : weights;
  const A* const from =
      is_bias ? partial + int64_t{splits} * weights + (index - weights) : partial + index;
  Total<A> total{};
  if (exists) {
    for (int split = thread; split < splits; split += kJoinThreads) {
      total.value += from[int64_t{split} * step];
    }
  }
  join_rows(total, thread, kJoinThreads, kJoinChannels);
  if (thread > 0 || !exists) return;
  if (is_bias) {
    grad_bias[index - weights] = from_float<T>(total.value);
  } else {
    const int k = index / taps, tap = index % taps;
    grad_weight[k * a.weight_k + tap / a.S * a.weight_r + tap % a.S * a.weight_s] =
        from_float<T>(total.value);
  }
}

template <typename T, typename Filter>
WeightWalk launch_strips(const Conv2dProblem& p, const DepthwiseArguments& a, const T* grad_output,
                         const T* input, SumOf<T>* partial, uintptr_t stream) {
  constexpr int kSize = Filter::kSize;
  // A thread's registers hold the sums of a whole filter of 3 x 3, else of a row of it.
  constexpr int kTapRows = kSize == 3 ? 3 : 1;
  const auto walk = WeightWalk::of(p, kDepthwiseVector, kStrip, kSize / kTapRows, true);
  const dim3 grid(static_cast<unsigned>(walk.splits),
                  static_cast<unsigned>(ceil_div(walk.groups, walk.tile_groups)));
  launch(kOp, depthwise_grad_weight_strip_kernel<T, kSize, Filter::kStride, kTapRows>, grid,
         kSumThreads,
         kSumThreads * kValuesStep<WeightSums<SumOf<T>, kTapRows * kSize, kDepthwiseVector>>,
         stream, a, walk, grad_output, input, partial);
  return walk;
}

WeightWalk any_walk(const Conv2dProblem& p) {
  return WeightWalk::of(p, 1, 1, static_cast<int>(ceil_div(p.R * p.S, kTaps)), false);
}

template <typename T>
void grad_weight_of(const Conv2dProblem& p, bool vectors, const T* grad_output, const T* input,
                    T* grad_weight, T* grad_bias, SumOf<T>* partial, uintptr_t stream) {
  const DepthwiseArguments a = depthwise_arguments(p);
  WeightWalk walk{};
  bool done = false;
  if constexpr (sizeof(T) < 8) {
    done = vectors && with_common_filter(a, [&](auto filter) {
             using Filter = decltype(filter);
             walk = launch_strips<T, Filter>(p, a, grad_output, input, partial, stream);
           });
  }
  if (!done) {
    walk = any_walk(p);
    const dim3 grid(static_cast<unsigned>(walk.splits),
                    static_cast<unsigned>(ceil_div(walk.groups, walk.tile_groups)),
                    static_cast<unsigned>(walk.parts));
    launch(kOp, depthwise_grad_weight_kernel<T>, grid, kSumThreads,
           kSumThreads * kValuesStep<WeightSums<SumOf<T>, kTaps, 1>>, stream, a, walk, grad_output,
           input, partial);
  }
  const int64_t sums = p.K * p.R * p.S + (grad_bias == nullptr ? 0 : p.K);
  launch(kOp, join_splits_kernel<T>, dim3(static_cast<unsigned>(ceil_div(sums, kJoinChannels))),
         kJoinChannels * kJoinThreads, kJoinChannels * kJoinThreads * kValuesStep<Total<SumOf<T>>>,
         stream, a, walk.splits, partial, grad_weight, grad_bias);
}

}  // namespace

int64_t depthwise_conv2d_grad_weight_workspace(const Conv2dProblem& p) {
  // Which kernel it is depends on addresses too: room for either.
  int64_t splits = any_walk(p).splits;
  for (const int parts : {1, 5, 7}) {
    const int64_t strips = WeightWalk::of(p, kDepthwiseVector, kStrip, parts, true).splits;
    if (p.K >= kDepthwiseVector && strips > splits) splits = strips;
  }
  const int64_t bytes = p.dtype == DType::kFloat64 ? 8 : 4;
  return splits * p.K * (p.R * p.S + 1) * bytes;
}

void depthwise_conv2d_grad_weight(const Conv2dProblem& problem, const void* grad_output,
                                  const void* input, void* grad_weight, void* grad_bias,
                                  void* workspace, const Where& where) {
  const DeviceGuard guard(kOp, where.device);
  const bool vectors = has_depthwise_vectors(problem, are_aligned(grad_output, input));
  with_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    grad_weight_of<T>(problem, vectors, static_cast<const T*>(grad_output),
                      static_cast<const T*>(input), static_cast<T*>(grad_weight),
                      static_cast<T*>(grad_bias), static_cast<SumOf<T>*>(workspace), where.stream);
  });
}

}  // namespace gdfast::cuda
