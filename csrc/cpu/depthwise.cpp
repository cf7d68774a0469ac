// Depthwise convolution in all three passes, for conv2d and its gradients to call.
#include "depthwise.h"

#include "depthwise_grad_weight.h"
#include "depthwise_norm.h"
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
    if constexpr (kSame<T, typename Accumulator<T>::type>) {
      if (p.input.c == 1 && p.output.c == 1 && p.C >= kLanes<T> && DepthwisePhases<T>::takes(p)) {
        return depthwise_grad_input_channel_lines(p, static_cast<const T*>(grad_output),
                                                  static_cast<const T*>(weight),
                                                  static_cast<T*>(grad_input), threads);
      }
    }
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

void depthwise_norm(const Conv2dProblem& p, const BatchNormProblem& norm, const void* input,
                    const void* weight, const void* bias, const BatchNormForward& to, void* between,
                    double momentum, int threads) {
  Workspace tap_memory(p.R * p.S * sizeof(Tap));
  const TapConv conv = forward_tap_conv(p, reinterpret_cast<Tap*>(tap_memory.data()));
  const DepthwisePixels pixels(conv, static_cast<const float*>(input),
                               static_cast<const float*>(weight), static_cast<const float*>(bias),
                               static_cast<float*>(between), threads);
  batch_norm_pieces(norm, to, momentum, {DepthwisePixels::write, &pixels}, threads);
}

void depthwise_norm_backward(const Conv2dProblem& of_input, const Conv2dProblem& of_weight,
                             const BatchNormProblem& norm, const BatchNormBackward& to,
                             PreActivation from, const Conv2dGradients& conv, int threads) {
  Workspace tap_memory(DepthwiseNormGradients::tap_count(of_input) * sizeof(Tap));
  const DepthwiseNormGradients gradients(
      of_input, of_weight, static_cast<const float*>(conv.input),
      static_cast<const float*>(conv.weight), static_cast<float*>(conv.grad_input),
      static_cast<float*>(conv.grad_weight), static_cast<float*>(conv.grad_bias),
      reinterpret_cast<Tap*>(tap_memory.data()), threads);
  batch_norm_backward_pieces(norm, to, true, from, {DepthwiseNormGradients::run, &gradients},
                             threads);
}

}  // namespace gdfast::cpu::GDFAST_ISA
