// Depthwise convolution in all three passes, for conv2d and its gradients to call.
#include "depthwise.h"

#include "depthwise_grad_weight.h"
#include "grad_input_phases.h"
#include "kernels.h"

namespace gdfast::cpu::GDFAST_ISA {

void depthwise(const Conv2dProblem& p, const void* input, const void* weight, const void* bias,
               void* output, int threads) {
  Workspace tap_memory(p.R * p.S * sizeof(Tap));
  const TapConv conv = forward_tap_conv(p, reinterpret_cast<Tap*>(tap_memory.data()));
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    run_depthwise(conv, static_cast<const T*>(input), static_cast<const T*>(weight),
                  static_cast<const T*>(bias), static_cast<T*>(output), threads);
  });
}

void depthwise_grad_input(const Conv2dProblem& p, const void* grad_output, const void* weight,
                          void* grad_input, int threads) {
  Workspace tap_memory(p.R * p.S * sizeof(Tap));
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_phase(
        p, reinterpret_cast<Tap*>(tap_memory.data()), [&](const TapConv& conv, int64_t offset) {
          run_depthwise<T>(conv, static_cast<const T*>(grad_output), static_cast<const T*>(weight),
                           nullptr, static_cast<T*>(grad_input) + offset, threads);
        });
  });
}

void depthwise_grad_weight(const Conv2dProblem& p, const void* grad_output, const void* input,
                           void* grad_weight, void* grad_bias, int threads) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    run_depthwise_grad_weight(p, static_cast<const T*>(grad_output), static_cast<const T*>(input),
                              static_cast<T*>(grad_weight), static_cast<T*>(grad_bias), threads);
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
