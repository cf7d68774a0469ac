// conv2d_grad_input: one implicit GEMM for each phase of the stride.
#include "grad_input_phases.h"
#include "kernels.h"
#include "run_tap_conv.h"
#include "widened.h"
#include "winograd_stride2.h"

namespace gdfast::cpu::GDFAST_ISA {

void conv2d_grad_input(const Conv2dProblem& p, const void* grad_output, const void* weight,
                       void* grad_input, int threads) {
  if (p.N == 0) return;
  if (p.is_depthwise()) return depthwise_grad_input(p, grad_output, weight, grad_input, threads);
  const auto widened = [&](auto as) {
    as.grad_input(grad_output, weight, grad_input, conv2d_grad_input);
  };
  if (with_widened(p, threads, widened)) return;
  if (p.algorithm == Algorithm::kWinograd && winograd_stride2_fits(p)) {
    Stride2Tiles<Stride2GradInput>(
        Stride2Problem::grad_input(p), p.N, static_cast<const float*>(grad_output),
        static_cast<const float*>(weight), nullptr, static_cast<float*>(grad_input), threads)
        .run();
    return;
  }
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* const to = static_cast<T*>(grad_input);
    const bool zeros_first = p.input.c == 1 && (p.R < p.stride_h || p.S < p.stride_w);
    if (zeros_first) write_phases_without_taps(p, to, threads);
    Workspace tap_memory(p.R * p.S * sizeof(Tap));
    for_each_phase(p, reinterpret_cast<Tap*>(tap_memory.data()),
                   [&](const TapConv& conv, int64_t offset) {
                     if (zeros_first && conv.tap_count == 0) return;
                     run_tap_conv<T>(p.algorithm, conv, static_cast<const T*>(grad_output),
                                     static_cast<const T*>(weight), nullptr, to + offset, threads);
                   });
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
