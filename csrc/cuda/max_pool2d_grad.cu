// grad_input of max_pool2d: every pixel gathers from the windows that took it.
//
// Each value is written once, as a sum in the order of the windows: no pass of zeros, no atomics.
#include "kernels.h"
#include "max_pool2d.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "max_pool2d_grad";

// The windows [first, last] of an axis whose extent has a position.
struct Windows {
  int first, last;

  GDFAST_DEVICE Windows of(int position, int stride, int dilation, int taps, int windows) {
    const int beyond = position - (taps - 1) * dilation;
    const int last = position / stride;
    return {beyond > 0 ? (beyond + stride - 1) / stride : 0, last < windows ? last : windows - 1};
  }
};

template <typename T, int kVector, typename Place>
GDFAST_KERNEL(kImageThreads, 4)
max_pool2d_grad_kernel(const GDFAST_GRID_CONSTANT PoolArguments a, const T* grad_output,
                       const Place* argmax, T* grad_input) {
  using A = SumOf<T>;
  const ImagePlace at = place_in_image(a.walk);
  if (!at.exists) return;
  // From the edge of the padding.
  const int h = at.row + a.pad_h, w = at.column + a.pad_w;
  const Windows rows = Windows::of(h, a.stride_h, a.dilation_h, a.R, a.P);
  const Windows columns = Windows::of(w, a.stride_w, a.dilation_w, a.S, a.Q);
  const int channel = at.group * kVector;
  for (int n = static_cast<int>(blockIdx.y); n < a.walk.N; n += static_cast<int>(gridDim.y)) {
    const T* const grads = grad_output + n * a.output.n + channel * a.output.c;
    const Place* const places = argmax + n * a.argmax.n + channel * a.argmax.c;
    A sums[kVector] = {};
    for (int p = rows.first; p <= rows.last; ++p) {
      const int down = h - p * a.stride_h, r = a.dilation_h == 1 ? down : down / a.dilation_h;
      if (r * a.dilation_h != down) continue;  // the position lies between two taps
#pragma unroll 2
      for (int q = columns.first; q <= columns.last; ++q) {
        const int right = w - q * a.stride_w, s = a.dilation_w == 1 ? right : right / a.dilation_w;
        if (s * a.dilation_w != right) continue;
        const auto pack = load_pack<kVector>(places + p * a.argmax.h + q * a.argmax.w);
        Place place[kVector];
        std::memcpy(place, &pack, sizeof pack);
        A values[kVector];
        load_values<kVector>(grads + p * a.output.h + q * a.output.w, values);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sums[i] += place[i] == static_cast<Place>(r * a.S + s) ? values[i] : A(0);
        }
      }
    }
    store_values<kVector>(grad_input + n * a.input.n + channel * a.input.c + at.row * a.input.h +
                              at.column * a.input.w,
                          sums);
  }
}

}  // namespace

void max_pool2d_grad(const MaxPool2dProblem& problem, const void* grad_output, const void* argmax,
                     void* grad_input, int device, uintptr_t stream) {
  if (problem.N * problem.C == 0) return;
  const DeviceGuard guard(kOp, device);
  with_dtype(problem.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = are_aligned(grad_output, argmax, grad_input);
    with_pool_vectors<T>(problem, aligned, [&](auto vector, auto place) {
      using Place = decltype(place);
      constexpr int kVector = decltype(vector)::value;
      const auto arguments = PoolArguments::of(problem, kVector, problem.H, problem.W);
      launch(kOp, max_pool2d_grad_kernel<T, kVector, Place>, arguments.walk.grid(), kImageThreads,
             0, stream, arguments, static_cast<const T*>(grad_output),
             static_cast<const Place*>(argmax), static_cast<T*>(grad_input));
    });
  });
}

}  // namespace gdfast::cuda
