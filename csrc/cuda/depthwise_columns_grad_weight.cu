// Depthwise convolution in channels_last, gradient in the weight: the first pass for common
// filters, by threads that walk down columns.
//
// A thread keeps the sums of all taps of its channels, and the gradients of the rows of outputs
// that see the row of the image which it looks at: it reads and converts each number once for its
// strip.
#include <cmath>

#include "depthwise_columns.h"
#include "depthwise_weight_sums.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";
// What the plan is made for. Not what this GPU has, so that sums have the same bits on every one.
constexpr int kMultiprocessors = 132;

// Blocks of a multiprocessor, as many as registers allow.
template <typename Filter>
constexpr int kBlocks = Filter::kSize == 3 ? 4 : 3;

struct WeightPlan {
  ColumnWalk walk;
  int items_per_split, splits;
};

template <typename T, typename Filter>
GDFAST_KERNEL(kColumnThreads, kBlocks<Filter>)
depthwise_columns_grad_weight_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                                     const GDFAST_GRID_CONSTANT WeightPlan plan,
                                     const T* grad_output, const T* input, bool with_bias,
                                     SumOf<T>* partial) {
  using A = SumOf<T>;
  constexpr int kSize = Filter::kSize, kStride = Filter::kStride, kWide = Filter::kWide;
  constexpr int kVector = Filter::kVector, kAhead = kRowsAhead<T, Filter>;
  using Pixels = ColumnRow<T, kVector, kWide>;
  using Gradients = ColumnRow<T, kVector, kColumns>;
  let_next_begin();
  const ColumnWalk& walk = plan.walk;
  const Divided thread = divide(static_cast<int>(threadIdx.x), walk.lanes);
  const int split = static_cast<int>(blockIdx.x);
  const int group = static_cast<int>(blockIdx.y) * walk.tile_groups + thread.rest;
  const int k = group * kVector;
  const bool exists = thread.quotient < walk.tile_items && group < walk.groups;
  // All threads take as many steps.
  const int steps = (walk.rows - 1) * kStride + kSize;
  const int end = (split + 1) * plan.items_per_split;
  const int last = exists ? (end < walk.items ? end : walk.items) : 0;
  WeightSums<A, Filter::kTaps, kVector> sums{};
  for (int item = split * plan.items_per_split + thread.quotient; item < last;
       item += walk.tile_items) {
    const ColumnPlace at = place_of_column<Filter>(a, walk, item, true);
    Pixels row;
    Pixels::begin(
        row, input + at.n * a.input.n + int64_t{at.h} * a.input.h + int64_t{at.w} * a.input.w + k,
        a.input.w);
    Gradients grads;
    Gradients::begin(grads,
                     grad_output + at.n * a.output.n + int64_t{at.p} * a.output.h +
                         int64_t{at.q} * a.output.w + k,
                     a.output.w);
    // Zeros stay where columns are outside.
    PackOf<T, kVector> pixels_ahead[kAhead][kWide] = {}, grads_ahead[kAhead][kColumns] = {};
    const auto load_pixels = [&](int step, PackOf<T, kVector>(&packs)[kWide]) {
      if (static_cast<uint32_t>(step) - at.first < at.within) Pixels::load(row, at.seen, packs);
      Pixels::next(row, a.input.h);
    };
    const auto load_grads = [&](int p, PackOf<T, kVector>(&packs)[kColumns]) {
      if (static_cast<uint32_t>(p) < at.rows) Gradients::load(grads, at.made, packs);
      Gradients::next(grads, a.output.h);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      load_grads(i, grads_ahead[i]);
      load_pixels(i, pixels_ahead[i]);
    }

    A alive_grads[Filter::kAlive][kColumns][kVector] = {};
    for (int i = 0; i < steps; i += Filter::kPeriod) {
#pragma unroll
      for (int u = 0; u < Filter::kPeriod; ++u) {
        if (i + u >= steps) break;
        A pixels[kWide][kVector];
        take_row<T>(pixels_ahead[u % kAhead], pixels);
        load_pixels(i + u + kAhead, pixels_ahead[u % kAhead]);
        // The first row that an output sees brings its gradient in.
        const int fresh = Filter::alive(u, 0);
        if (fresh >= 0) {
          const int p = (i + u) / kStride;
          auto& packs = grads_ahead[u / kStride % kAhead];
          if (static_cast<uint32_t>(p) < at.rows) {
            take_row<T>(packs, alive_grads[fresh]);
            load_grads(p + kAhead, packs);
            if (with_bias) {
#pragma unroll
              for (int column = 0; column < kColumns; ++column) {
#pragma unroll
                for (int v = 0; v < kVector; ++v) sums.bias[v] += alive_grads[fresh][column][v];
              }
            }
          } else {
#pragma unroll
            for (int column = 0; column < kColumns; ++column) {
#pragma unroll
              for (int v = 0; v < kVector; ++v) alive_grads[fresh][column][v] = 0;
            }
          }
        }
        if (static_cast<uint32_t>(i + u) - at.first >= at.within) continue;
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
#pragma unroll
          for (int r = 0; r < kSize; ++r) {
            const int alive = Filter::alive(u, r);
            if (alive < 0) continue;
#pragma unroll
            for (int column = 0; column < kColumns; ++column) {
              const int s = j - column * kStride;
              if (s < 0 || s >= kSize) continue;
#pragma unroll
              for (int v = 0; v < kVector; ++v) {
                sums.taps[(r * kSize + s) * kVector + v] +=
                    alive_grads[alive][column][v] * pixels[j][v];
              }
            }
          }
        }
      }
    }
  }

  join_rows(sums, thread.quotient, walk.tile_items, walk.tile_groups);
  if (thread.quotient > 0 || !exists) return;
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    A* const to = partial_taps(partial, a, split, k + v);
#pragma unroll
    for (int tap = 0; tap < Filter::kTaps; ++tap) to[tap] = sums.taps[tap * kVector + v];
    *partial_bias(partial, a, plan.splits, split, k + v) = sums.bias[v];
  }
}

// One round of blocks; the rows of a part are chosen so that items fill it.
template <typename Filter>
WeightPlan weight_plan(const DepthwiseArguments& a, int64_t element_bytes) {
  constexpr int kPrologue = 4;  // what begins a walk takes as long as so many rows
  constexpr double kResident = double{kColumnThreads} * kBlocks<Filter> * kMultiprocessors;
  const auto splits_of = [](const ColumnWalk& walk) {
    const auto blocks = static_cast<int64_t>(kResident / walk.threads());
    const int64_t most = blocks / walk.channel_tiles() > 0 ? blocks / walk.channel_tiles() : 1;
    // As few as give as many items to each thread.
    const int64_t each = ceil_div(walk.items, most * walk.tile_items);
    return each == 0 ? 1 : ceil_div(walk.items, each * walk.tile_items);
  };
  const auto walk = column_walk<Filter>(a, element_bytes, [&](const ColumnWalk& w) {
    const int64_t splits = splits_of(w), each = ceil_div(w.items, splits * w.tile_items);
    const double share = static_cast<double>(splits * w.channel_tiles() * w.threads()) / kResident;
    const int steps = (w.rows - 1) * Filter::kStride + Filter::kSize + kPrologue;
    // With few threads a multiprocessor waits for memory.
    constexpr double kAlone = 0.4;
    return (kAlone + (1 - kAlone) * share) * static_cast<double>(each * steps);
  });
  const int64_t splits = splits_of(walk);
  const int64_t per_split = ceil_div(walk.items, splits);
  return {walk, static_cast<int>(per_split), static_cast<int>(splits)};
}

// Calls f with the kind of filter; returns whether there are kernels for it.
template <typename F>
bool with_column_filter(const DepthwiseArguments& a, F&& f) {
  return has_column_offsets(a) && a.multiplier == 1 && with_common_filter(a, [&](auto filter) {
           using Filter = decltype(filter);
           f(ColumnFilter<Filter::kSize, Filter::kStride>{});
         });
}

}  // namespace

int depthwise_columns_splits(const DepthwiseArguments& a, DType dtype) {
  int splits = 0;
  if (a.K < kDepthwiseVector) return splits;
  const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  with_column_filter(a,
                     [&](auto filter) { splits = weight_plan<decltype(filter)>(a, bytes).splits; });
  return splits;
}

int depthwise_columns_grad_weight(DType dtype, const DepthwiseArguments& a, const void* grad_output,
                                  const void* input, bool bias, void* partial, uintptr_t stream) {
  int splits = 0;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < 8) {
      with_column_filter(a, [&](auto filter) {
        using Filter = decltype(filter);
        const WeightPlan plan = weight_plan<Filter>(a, sizeof(T));
        int half = 1;
        while (2 * half < plan.walk.tile_items) half *= 2;
        constexpr size_t kBytes = kValuesStep<WeightSums<SumOf<T>, Filter::kTaps, Filter::kVector>>;
        const dim3 grid(static_cast<unsigned>(plan.splits),
                        static_cast<unsigned>(plan.walk.channel_tiles()));
        launch(kOp, depthwise_columns_grad_weight_kernel<T, Filter>, grid, plan.walk.threads(),
               kBytes * half * plan.walk.tile_groups, stream, a, plan,
               static_cast<const T*>(grad_output), static_cast<const T*>(input), bias,
               static_cast<SumOf<T>*>(partial));
        splits = plan.splits;
      });
    }
  });
  return splits;
}

}  // namespace gdfast::cuda
