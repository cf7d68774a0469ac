// output = max_pool2d(input), and where in its window each value was.
#include <cmath>

#include "kernels.h"
#include "max_pool2d.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "max_pool2d";
constexpr int kNowhere = -1;

// The taps [first, end) of an axis that see the image from a window which begins at start.
struct Taps {
  int first, end;

  GDFAST_DEVICE Taps of(int start, int dilation, int taps, int size) {
    const int first = start >= 0 ? 0 : (dilation - 1 - start) / dilation;
    const int end = start >= size ? 0 : (size - 1 - start) / dilation + 1;
    return {first, end < taps ? end : taps};
  }
};

template <typename T, int kVector, typename Place>
GDFAST_KERNEL(kImageThreads, 4)
max_pool2d_kernel(const GDFAST_GRID_CONSTANT PoolArguments a, const T* input, T* output,
                  Place* argmax) {
  using A = SumOf<T>;
  const ImagePlace at = place_in_image(a.walk);
  if (!at.exists) return;
  const int top = at.row * a.stride_h - a.pad_h, left = at.column * a.stride_w - a.pad_w;
  const Taps rows = Taps::of(top, a.dilation_h, a.R, a.H);
  const Taps columns = Taps::of(left, a.dilation_w, a.S, a.W);
  const bool sees = rows.first < rows.end && columns.first < columns.end;
  const int channel = at.group * kVector;
  for (int n = static_cast<int>(blockIdx.y); n < a.walk.N; n += static_cast<int>(gridDim.y)) {
    const T* const image = input + n * a.input.n + channel * a.input.c;
    A best[kVector];
    int place[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      best[i] = -static_cast<A>(INFINITY);
      place[i] = sees ? rows.first * a.S + columns.first : kNowhere;
    }
    for (int r = rows.first; r < rows.end; ++r) {
      const T* const line = image + (top + r * a.dilation_h) * a.input.h + left * a.input.w;
#pragma unroll 3
      for (int s = columns.first; s < columns.end; ++s) {
        A values[kVector];
        load_values<kVector>(line + s * a.dilation_w * a.input.w, values);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          // Of equal values the first counts, of several NaN the last.
          const bool better = values[i] > best[i] || values[i] != values[i];
          best[i] = better ? values[i] : best[i];
          place[i] = better ? r * a.S + s : place[i];
        }
      }
    }
    Place places[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (a.relu && best[i] <= 0) {
        best[i] = 0;
        place[i] = kNowhere;
      }
      places[i] = static_cast<Place>(place[i]);
    }
    store_values<kVector>(output + n * a.output.n + channel * a.output.c + at.row * a.output.h +
                              at.column * a.output.w,
                          best);
    PackOf<Place, kVector> pack;
    std::memcpy(&pack, places, sizeof pack);
    store_pack<kVector>(argmax + n * a.argmax.n + channel * a.argmax.c + at.row * a.argmax.h +
                            at.column * a.argmax.w,
                        pack);
  }
}

}  // namespace

void max_pool2d(const MaxPool2dProblem& problem, const void* input, void* output, void* argmax,
                int device, uintptr_t stream) {
  if (problem.N * problem.C == 0) return;
  const DeviceGuard guard(kOp, device);
  with_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_pool_vectors<T>(problem, are_aligned(input, output, argmax), [&](auto vector, auto place) {
      using Place = decltype(place);
      constexpr int kVector = decltype(vector)::value;
      const auto arguments = PoolArguments::of(problem, kVector, problem.P, problem.Q);
      launch(kOp, max_pool2d_kernel<T, kVector, Place>, arguments.walk.grid(), kImageThreads, 0,
             stream, arguments, static_cast<const T*>(input), static_cast<T*>(output),
             static_cast<Place*>(argmax));
    });
  });
}

}  // namespace gdfast::cuda
