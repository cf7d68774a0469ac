// The three passes of conv2d for bfloat16 with AVX512_BF16. What they do not take is left to the
// kernels of another instruction set, GDFAST_BESIDE, as all other operations are.
#include "grad_input_phases.h"
#include "grad_weight_pairs.h"
#include "kernels.h"
#include "tap_conv_pairs.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

const BFloat16* numbers(const void* address) { return static_cast<const BFloat16*>(address); }

// The side of a convolution that is read pixel by pixel: its input, or its output in grad_input.
struct Source {
  const PixelMajor& pixels;

  void run(TapConv conv, const void* weight, const void* bias, BFloat16* dest, int threads) const {
    conv.source = pixels.strides();
    conv.source_group = pixels.group_step();
    PairTiles(conv, pixels.data(), numbers(weight), numbers(bias), dest, threads).run();
  }
};

}  // namespace

void conv2d(const Conv2dProblem& p, const void* input, const void* weight, const void* bias,
            void* output, int threads) {
  if (!pairs_fit(p)) return GDFAST_BESIDE::conv2d(p, input, weight, bias, output, threads);
  const int64_t channels = p.C / p.groups;
  const PixelMajor pixels(numbers(input), p.input, p.N, p.H, p.W, p.groups, channels,
                          PairTiles::tap_channels(channels), threads);
  Workspace tap_memory(p.R * p.S * sizeof(Tap));
  const TapConv conv = forward_tap_conv(p, reinterpret_cast<Tap*>(tap_memory.data()));
  Source{pixels}.run(conv, weight, bias, static_cast<BFloat16*>(output), threads);
}

void conv2d_grad_input(const Conv2dProblem& p, const void* grad_output, const void* weight,
                       void* grad_input, int threads) {
  if (!pairs_fit(p)) {
    return GDFAST_BESIDE::conv2d_grad_input(p, grad_output, weight, grad_input, threads);
  }
  const int64_t channels = p.K / p.groups;
  const PixelMajor pixels(numbers(grad_output), p.output, p.N, p.P, p.Q, p.groups, channels,
                          PairTiles::tap_channels(channels), threads);
  Workspace tap_memory(p.R * p.S * sizeof(Tap));
  for_each_phase(p, reinterpret_cast<Tap*>(tap_memory.data()),
                 [&](const TapConv& conv, int64_t offset) {
                   BFloat16* dest = static_cast<BFloat16*>(grad_input) + offset;
                   Source{pixels}.run(conv, weight, nullptr, dest, threads);
                 });
}

void conv2d_grad_weight(const Conv2dProblem& p, const void* grad_output, const void* input,
                        void* grad_weight, void* grad_bias, int threads) {
  if (!pairs_fit(p)) {
    return GDFAST_BESIDE::conv2d_grad_weight(p, grad_output, input, grad_weight, grad_bias,
                                             threads);
  }
  const int64_t produced = p.K / p.groups, channels = p.C / p.groups;
  const PixelMajor grads(numbers(grad_output), p.output, p.N, p.P, p.Q, p.groups, produced,
                         produced, threads);
  const PixelMajor pixels(numbers(input), p.input, p.N, p.H, p.W, p.groups, channels, channels,
                          threads);
  PairGradWeight(p, grads, pixels, static_cast<BFloat16*>(grad_weight),
                 static_cast<BFloat16*>(grad_bias), threads)
      .run();
}

}  // namespace gdfast::cpu::GDFAST_ISA
