// conv2d forward: implicit GEMM over the taps of the kernel.
#include "kernels.h"
#include "tap_conv_channels.h"

namespace gdfast::cpu::GDFAST_ISA {

void conv2d(const Conv2dProblem& p, const void* input, const void* weight, const void* bias,
            void* output, int threads) {
  Workspace tap_memory(p.R * p.S * sizeof(Tap));
  Tap* taps = reinterpret_cast<Tap*>(tap_memory.data());
  for (int64_t r = 0; r < p.R; ++r) {
    for (int64_t s = 0; s < p.S; ++s) {
      taps[r * p.S + s] = {r * p.dilation_h - p.pad_h, s * p.dilation_w - p.pad_w,
                           r * p.weight.h + s * p.weight.w};
    }
  }
  TapConv conv;
  conv.batch = p.N;
  conv.height = p.P;
  conv.width = p.Q;
  conv.step_h = p.stride_h;
  conv.step_w = p.stride_w;
  conv.source_height = p.H;
  conv.source_width = p.W;
  conv.reduced = p.C / p.groups;
  conv.produced = p.K / p.groups;
  conv.groups = p.groups;
  conv.source = p.input;
  conv.dest = p.output;
  conv.weight_reduced = p.weight.c;
  conv.weight_produced = p.weight.n;
  conv.source_group = conv.reduced * p.input.c;
  conv.dest_group = conv.produced * p.output.c;
  conv.weight_group = conv.produced * p.weight.n;
  conv.taps = taps;
  conv.tap_count = p.R * p.S;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    run_tap_conv(conv, static_cast<const T*>(input), static_cast<const T*>(weight),
                 static_cast<const T*>(bias), static_cast<T*>(output), threads);
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
