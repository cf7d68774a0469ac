// conv2d forward: implicit GEMM over the taps of the kernel.
#include "kernels.h"
#include "run_tap_conv.h"
#include "widened.h"
#include "winograd_stride2.h"

namespace gdfast::cpu::GDFAST_ISA {

void conv2d(const Conv2dProblem& p, const void* input, const void* weight, const void* bias,
            void* output, int threads) {
  if (p.is_depthwise()) return depthwise(p, input, weight, bias, output, threads);
  const auto widened = [&](auto as) { as.forward(input, weight, bias, output, conv2d); };
  if (with_widened(p, threads, widened)) return;
  Workspace tap_memory(p.R * p.S * sizeof(Tap));
  const TapConv conv = forward_tap_conv(p, reinterpret_cast<Tap*>(tap_memory.data()));
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kSame<T, float>) {
      if (p.algorithm == Algorithm::kWinograd && winograd_stride2_fits(p)) {
        Stride2Tiles<Stride2Forward>(Stride2Problem::forward(p), p.N, static_cast<const T*>(input),
                                     static_cast<const T*>(weight), static_cast<const T*>(bias),
                                     static_cast<T*>(output), threads)
            .run();
        return;
      }
    }
    run_tap_conv(p.algorithm, conv, static_cast<const T*>(input), static_cast<const T*>(weight),
                 static_cast<const T*>(bias), static_cast<T*>(output), threads);
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
