// A convolution and the batch normalisation behind it as one kernel, forward and backward.
//
// 1x1 convolutions and depthwise ones do little with what they read: their time is that of memory.
// Forward, a piece's pixels are added up while a core's cache still has them. Backward, the
// gradient of the normalisation is computed a piece at a time, and both gradients of the
// convolution take it from there: as a tensor it is never stored. The 1x1 convolutions' products
// are those of Pointwise or of Strassen.
#include "grad_input_phases.h"
#include "kernels.h"
#include "norm_pieces.h"
#include "pointwise.h"
#include "pointwise_grad_weight.h"
#include "strassen.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

// Below so many bytes of output the caches hold it from one kernel to the next.
constexpr int64_t kLeastBytes = 512 * 1024;

bool pointwise_norm_fits(const Conv2dProblem& p, bool backward, int threads) {
  // A gradient narrower than the image is little beside that.
  if (backward && p.K < p.C) return false;
  // With few channels others run it: see run_tap_conv() and conv2d_grad_weight().
  return is_pointwise_grad_weight(p) && p.stride_h == 1 && p.stride_w == 1 && p.C > 8 && p.K > 8 &&
         PointwiseGradWeight(p, nullptr, nullptr, nullptr, nullptr, threads).takes_pixels_once();
}

bool depthwise_norm_fits(const Conv2dProblem& p) {
  return p.C >= kLanes<float> && p.stride_h <= 2 && p.stride_w <= 2 && p.H >= p.stride_h &&
         p.W >= p.stride_w && p.P == ceil_div(p.H, p.stride_h);
}

bool runs_strassen(const Conv2dProblem& p, const TapConv& conv) {
  return p.algorithm == Algorithm::kStrassen && strassen_fits(conv);
}

template <typename Product>
struct PointwisePixels {
  Product& conv;
  const ThreadScratch& scratch;

  static void write(const void* self, int64_t first, int64_t end, int thread) {
    const PointwisePixels& pixels = *static_cast<const PointwisePixels*>(self);
    pixels.conv.run_pixels(first, end, nullptr, pixels.scratch, thread);
  }
};

template <typename Product>
void pointwise_norm(const TapConv& conv, const BatchNormProblem& norm, const float* input,
                    const float* weight, const float* bias, const BatchNormForward& to,
                    float* between, double momentum, int threads) {
  using Pixels = PointwisePixels<Product>;
  Product product(conv, input, weight, bias, between, threads);
  const ThreadScratch scratch = product.make_scratch();
  product.pack_weights();
  const Pixels pixels{product, scratch};
  batch_norm_pieces(norm, to, momentum, {Pixels::write, &pixels}, threads);
}

// Both gradients of a 1x1 convolution, from the gradient of the normalisation behind it.
template <typename Product>
class PointwiseNormGradients {
 public:
  PointwiseNormGradients(const TapConv& of_input, const Conv2dProblem& of_weight,
                         const Conv2dGradients& to, int threads)
      : grad_input_(of_input, nullptr, static_cast<const float*>(to.weight), nullptr,
                    static_cast<float*>(to.grad_input), threads),
        grad_weight_(of_weight, nullptr, static_cast<const float*>(to.input),
                     static_cast<float*>(to.grad_weight), static_cast<float*>(to.grad_bias),
                     threads) {}

  static void run(const void* self, const PixelGradient& gradient) {
    auto& all = *static_cast<PointwiseNormGradients*>(const_cast<void*>(self));
    const ThreadScratch scratch = all.grad_input_.make_scratch();
    all.grad_input_.pack_weights();
    const Chunks chunks{all, gradient, scratch};
    const ChunkSource source{Chunks::write, &chunks, {gradient.reads[0], gradient.reads[1]}};
    all.grad_weight_.run(&source);
  }

 private:
  struct Chunks {
    const PointwiseNormGradients& all;
    const PixelGradient& gradient;
    const ThreadScratch& scratch;

    static void write(const void* self, int64_t first, int64_t end, float* to, int thread) {
      const Chunks& chunks = *static_cast<const Chunks*>(self);
      chunks.gradient.write(chunks.gradient.self, first, end, to);
      chunks.all.grad_input_.run_pixels(first, end, to, chunks.scratch, thread);
    }
  };

  Product grad_input_;
  PointwiseGradWeight grad_weight_;
};

}  // namespace

bool conv2d_norm_fits(const Conv2dProblem& p, bool backward, int threads) {
  const bool dense = p.input.c == 1 && p.output.c == 1 && p.output.w == p.K &&
                     p.output.h == p.Q * p.K && p.output.n == p.P * p.Q * p.K;
  if (p.dtype != DType::kFloat32 || p.algorithm == Algorithm::kWinograd || !dense) return false;
  if (p.activation != Activation::kNone) return false;
  if (p.N * p.P * p.Q * p.K * static_cast<int64_t>(sizeof(float)) < kLeastBytes) return false;
  return p.is_depthwise() ? depthwise_norm_fits(p) : pointwise_norm_fits(p, backward, threads);
}

bool conv2d_adds(const Conv2dProblem& p) {
  if (p.dtype != DType::kFloat32 || p.algorithm == Algorithm::kWinograd) return false;
  if (!is_pointwise_grad_weight(p) || p.stride_h != 1 || p.stride_w != 1) return false;
  if (p.C <= 8 || p.K <= 8) return false;  // see run_tap_conv()
  Tap tap;
  const TapConv conv = phase_tap_conv(p, 0, 0, &tap);
  if (!is_pointwise(conv)) return false;
  return runs_strassen(p, conv)
             ? Strassen(conv, nullptr, nullptr, nullptr, nullptr, 1).adds_at_once()
             : Pointwise(conv, nullptr, nullptr, nullptr, nullptr, 1).adds_at_once();
}

void conv2d_norm(const Conv2dProblem& p, const BatchNormProblem& norm, const void* input,
                 const void* weight, const void* bias, const BatchNormForward& to, void* between,
                 double momentum, int threads) {
  if (p.is_depthwise()) {
    return depthwise_norm(p, norm, input, weight, bias, to, between, momentum, threads);
  }
  Tap tap;
  const TapConv conv = forward_tap_conv(p, &tap);
  const auto run = runs_strassen(p, conv) ? pointwise_norm<Strassen> : pointwise_norm<Pointwise>;
  run(conv, norm, static_cast<const float*>(input), static_cast<const float*>(weight),
      static_cast<const float*>(bias), to, static_cast<float*>(between), momentum, threads);
}

void conv2d_norm_backward(const Conv2dProblem& of_input, const Conv2dProblem& of_weight,
                          const BatchNormProblem& norm, const BatchNormBackward& to,
                          PreActivation from, const Conv2dGradients& conv, int threads) {
  if (of_input.is_depthwise()) {
    return depthwise_norm_backward(of_input, of_weight, norm, to, from, conv, threads);
  }
  Tap tap;
  const TapConv product = phase_tap_conv(of_input, 0, 0, &tap);
  const auto run = [&](const auto& gradients) {
    using Gradients = std::decay_t<decltype(gradients)>;
    batch_norm_backward_pieces(norm, to, true, from, {Gradients::run, &gradients}, threads);
  };
  if (runs_strassen(of_input, product)) {
    run(PointwiseNormGradients<Strassen>(product, of_weight, conv, threads));
  } else {
    run(PointwiseNormGradients<Pointwise>(product, of_weight, conv, threads));
  }
}

}  // namespace gdfast::cpu::GDFAST_ISA
