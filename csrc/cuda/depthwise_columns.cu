// Depthwise convolution forward in channels_last, by threads that walk down columns.
#include <cmath>

#include "activation.h"
#include "depthwise_columns.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d";

// The weights of a block's channels as [tap][channel] in shared memory.
template <int kSize, typename T>
GDFAST_DEVICE void share_filters(const DepthwiseArguments& a, const T* weight, int first_channel,
                                 int channels, SumOf<T>* filters) {
  constexpr int kTaps = kSize * kSize;
  const auto threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < channels * kTaps; i += threads) {
    const int channel = i / kTaps, tap = i % kTaps, k = first_channel + channel;
    const int at = tap / kSize * a.weight_r + tap % kSize * a.weight_s;
    filters[tap * channels + channel] =
        k < a.K ? SumOf<T>(to_float(weight[k * a.weight_k + at])) : SumOf<T>(0);
  }
}

// kEnding: with a bias or an activation.
template <typename T, typename Filter, bool kEnding>
GDFAST_KERNEL(kColumnThreads, (kEnding && Filter::kSize == 3 ? 4 : Filter::kBlocks))
depthwise_columns_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                         const GDFAST_GRID_CONSTANT ColumnWalk walk, const T* input,
                         const T* weight, const T* bias, T* output) {
  using A = SumOf<T>;
  constexpr int kSize = Filter::kSize, kWide = Filter::kWide, kVector = Filter::kVector;
  constexpr int kAhead = kRowsAhead<T, Filter>;
  const Divided thread = divide(static_cast<int>(threadIdx.x), walk.lanes);
  const int item = static_cast<int>(blockIdx.x) * walk.tile_items + thread.quotient;
  const int first_group = static_cast<int>(blockIdx.y) * walk.tile_groups;
  const int channel = (first_group + thread.rest) * kVector;
  const bool exists = thread.quotient < walk.tile_items && item < walk.items &&
                      first_group + thread.rest < walk.groups;
  const ColumnPlace at = place_of_column<Filter>(a, walk, item, exists);

  using Row = ColumnRow<T, kVector, kWide>;
  Row row;
  Row::begin(
      row,
      input + at.n * a.input.n + int64_t{at.h} * a.input.h + int64_t{at.w} * a.input.w + channel,
      a.input.w);
  // Zeros stay where columns are outside.
  PackOf<T, kVector> pending[kAhead][kWide] = {};
  const auto load = [&](int step, PackOf<T, kVector>(&packs)[kWide]) {
    if (static_cast<uint32_t>(step) - at.first < at.within) Row::load(row, at.seen, packs);
    Row::next(row, a.input.h);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(i, pending[i]);

  auto* const filters = reinterpret_cast<A*>(shared_memory());
  const int channels = walk.tile_groups * kVector;
  share_filters<kSize>(a, weight, first_group * kVector, channels, filters);
  sync_block();
  A weights[Filter::kTaps][kVector];
#pragma unroll
  for (int tap = 0; tap < Filter::kTaps; ++tap) {
    load_values<kVector>(filters + tap * channels + thread.rest * kVector, weights[tap]);
  }

  auto* to =
      reinterpret_cast<unsigned char*>(output + at.n * a.output.n + int64_t{at.p} * a.output.h +
                                       int64_t{at.q} * a.output.w + channel);
  uint32_t beside[kColumns];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    beside[column] = static_cast<uint32_t>(column * a.output.w) * static_cast<uint32_t>(sizeof(T));
    opaque(beside[column]);
  }
  A sums[Filter::kAlive][kColumns * kVector] = {};
  // All threads take as many steps.
  const int steps = (walk.rows - 1) * Filter::kStride + kSize;
  for (int i = 0;; i += Filter::kPeriod) {
#pragma unroll
    for (int u = 0; u < Filter::kPeriod; ++u) {
      if (i + u >= steps) return;
      A pixels[kWide][kVector];
      take_row<T>(pending[u % kAhead], pixels);
      load(i + u + kAhead, pending[u % kAhead]);
      if (static_cast<uint32_t>(i + u) - at.first < at.within) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
#pragma unroll
          for (int r = 0; r < kSize; ++r) {
            const int alive = Filter::alive(u, r);
            if (alive < 0) continue;
#pragma unroll
            for (int column = 0; column < kColumns; ++column) {
              const int s = j - column * Filter::kStride;
              if (s < 0 || s >= kSize) continue;
#pragma unroll
              for (int v = 0; v < kVector; ++v) {
                sums[alive][column * kVector + v] += pixels[j][v] * weights[r * kSize + s][v];
              }
            }
          }
        }
      }

      // The output that sees this row last, if any.
      const int done = Filter::alive(u, kSize - 1), from_first = i + u - (kSize - 1);
      if (done < 0) continue;
      if (static_cast<uint32_t>(from_first) < at.rows * Filter::kStride) {
        if constexpr (kEnding) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            const A more = bias == nullptr || at.made == 0 ? A(0) : A(to_float(bias[channel + v]));
#pragma unroll
            for (int column = 0; column < kColumns; ++column) {
              sums[done][column * kVector + v] += more;
            }
          }
          activate(sums[done], a.activation, static_cast<A>(a.negative_slope));
        }
        uint32_t made = at.made;
        opaque(made);
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          A values[kVector];
#pragma unroll
          for (int v = 0; v < kVector; ++v) values[v] = sums[done][column * kVector + v];
          if (made >> column & 1u) {
            store_values<kVector>(reinterpret_cast<T*>(to + beside[column]), values);
          }
        }
        to += int64_t{a.output.h} * static_cast<int64_t>(sizeof(T));
      }
#pragma unroll
      for (A& sum : sums[done]) sum = 0;
    }
  }
}

template <typename T>
struct Tensors {
  const T* input;
  const T* weight;
  const T* bias;
  T* output;
};

template <typename T, typename Filter>
void launch_columns(const DepthwiseArguments& a, const Tensors<T>& tensors, uintptr_t stream) {
  constexpr int kPrologue = 4;  // what begins a walk takes as long as so many rows
  const double resident = double{kColumnThreads} * Filter::kBlocks * multiprocessors(kOp);
  const auto walk = column_walk<Filter>(a, sizeof(T), [&](const ColumnWalk& w) {
    const int steps = (w.rows - 1) * Filter::kStride + Filter::kSize + kPrologue;
    const double rounds =
        static_cast<double>(w.item_tiles() * w.channel_tiles() * w.threads()) / resident;
    const double whole = std::floor(rounds), rest = rounds - whole;
    // With few threads a multiprocessor waits for memory.
    constexpr double kAlone = 0.4;
    return (whole + (rest > 0 ? kAlone + (1 - kAlone) * rest : 0)) * steps;
  });
  const dim3 grid(static_cast<unsigned>(walk.item_tiles()),
                  static_cast<unsigned>(walk.channel_tiles()));
  const size_t shared = sizeof(SumOf<T>) * Filter::kTaps * walk.tile_groups * Filter::kVector;
  const bool ending = tensors.bias != nullptr || a.activation != Activation::kNone;
  // With a stride there is less to gain: one instance for both.
  const auto kernel = ending || Filter::kStride > 1
                          ? depthwise_columns_kernel<T, Filter, true>
                          : depthwise_columns_kernel<T, Filter, Filter::kStride != 1>;
  launch(kOp, kernel, grid, walk.threads(), shared, stream, a, walk, tensors.input, tensors.weight,
         tensors.bias, tensors.output);
}

}  // namespace

bool depthwise_columns(DType dtype, const DepthwiseArguments& a, const void* input,
                       const void* weight, const void* bias, void* output, uintptr_t stream) {
  bool done = false;
  if (!has_column_offsets(a)) return done;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < 8) {
      const Tensors<T> tensors{static_cast<const T*>(input), static_cast<const T*>(weight),
                               static_cast<const T*>(bias), static_cast<T*>(output)};
      done = with_common_filter(a, [&](auto filter) {
        using Filter = decltype(filter);
        launch_columns<T, ColumnFilter<Filter::kSize, Filter::kStride>>(a, tensors, stream);
      });
    }
  });
  return done;
}

}  // namespace gdfast::cuda
