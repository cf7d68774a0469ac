// A depthwise convolution and the batch normalisation behind it, where channels lie side by side.
//
// Forward, lines are written as the statistics come to read them. Backward, a task walks down its
// share of the lines and keeps those of the normalisation's gradient that input lines still see:
// both gradients of the convolution read them there.
#pragma once

#include "depthwise_grad_weight.h"
#include "depthwise_phases.h"
#include "norm_pieces.h"

namespace gdfast::cpu {
namespace {

// Pixels of a depthwise convolution's output, one piece after the other.
class DepthwisePixels {
  using T = float;

 public:
  DepthwisePixels(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
                  int threads)
      : conv_(conv),
        source_(source),
        dest_(dest),
        lines_(conv, weight),
        memory_(
            threads, [&](Carver& carver) { lines_.carve_shared(carver); },
            [&](Carver& carver) { lines_.carve(carver); }) {
    lines_.prepare(weight, bias);
  }

  static void write(const void* self, int64_t first, int64_t end, int thread) {
    static_cast<const DepthwisePixels*>(self)->run(first, end, thread);
  }

 private:
  void run(int64_t first, int64_t end, int thread) const {
    Carver carver = memory_.of(thread);
    const auto own = lines_.carve(carver);
    while (first < end) {
      const GridPoint at = GridPoint::at(conv_, first);
      const int64_t j_end = min_of(conv_.width, at.j + end - first);
      const T* image = source_ + at.n * conv_.source.n;
      lines_.line(
          at.i, at.j, j_end, [&](int64_t h) { return image + h * conv_.source.h; },
          dest_ + at.n * conv_.dest.n + at.i * conv_.dest.h, own);
      first += j_end - at.j;
    }
  }

  const TapConv& conv_;
  const T* source_;
  T* dest_;
  DepthwiseLines<T> lines_;
  ThreadScratch memory_;
};

// Both gradients of a depthwise convolution, from the gradient of the normalisation behind it.
// Input lines from i * stride_h on, stride_h of them, go with output line i: conv2d_norm_fits()
// sees to it that these are all.
class DepthwiseNormGradients {
  using T = float;

 public:
  // Of both gradients.
  static int64_t tap_count(const Conv2dProblem& p) {
    return DepthwisePhases<T>::tap_count(p) + p.R * p.S;
  }

  // grad_input and grad_bias may be null; taps is room for tap_count(of_input) of them.
  DepthwiseNormGradients(const Conv2dProblem& of_input, const Conv2dProblem& of_weight,
                         const T* input, const T* weight, T* grad_input, T* grad_weight,
                         T* grad_bias, Tap* taps, int threads)
      : p_(of_input),
        weight_step_(of_weight.weight.n),
        conv_(forward_tap_conv(of_weight, taps + DepthwisePhases<T>::tap_count(of_input))),
        input_(input),
        weight_(weight),
        grad_input_(grad_input),
        grad_weight_(grad_weight),
        grad_bias_(grad_bias),
        threads_(threads),
        phases_(p_, weight, taps),
        kept_(phases_.before + phases_.after + 1) {
    phases_.read_from_cache();
  }

  static void run(const void* self, const PixelGradient& gradient) {
    const auto& all = *static_cast<const DepthwiseNormGradients*>(self);
    if (!all.run(gradient, all.grad_input_, false)) all.run(gradient, nullptr, true);
  }

 private:
  // False where the weight's gradient has to be taken carefully.
  bool run(const PixelGradient& gradient, T* grad_input, bool careful) const {
    DepthwiseGradWeightLines<T> sums(conv_, input_, grad_bias_ != nullptr, threads_, careful);
    const int64_t line_size = p_.Q * p_.K;
    const ThreadScratch memory(
        threads_,
        [&](Carver& carver) {
          sums.carve_shared(carver);
          phases_.carve_shared(carver);
        },
        [&](Carver& carver) {
          sums.carve(carver);
          phases_.carve(carver);
          carver.template take<T>(kept_ * line_size);
          carver.template take<T*>(kept_);
        });
    sums.prepare();
    phases_.prepare(weight_);

    parallel_for(sums.shares(), threads_, [&](int64_t share, int thread) {
      Carver carver = memory.of(thread);
      auto own = sums.carve(carver);
      const auto of_phases = phases_.carve(carver);
      T* const kept = carver.template take<T>(kept_ * line_size);
      T** const seen = carver.template take<T*>(kept_);  // from line i - phases_.before on
      sums.begin(own);
      const int64_t first = sums.first_line(share), end = sums.first_line(share + 1);
      int64_t next = 0;  // the first line of the image that is not there yet
      for (int64_t line = first; line < end; ++line) {
        const int64_t n = line / p_.P, i = line % p_.P;
        if (line == first || i == 0) next = max_of(0, i - phases_.before);
        for (int64_t x = 0; x < kept_; ++x) seen[x] = kept + (i + x) % kept_ * line_size;
        const auto line_at = [seen, top = i - phases_.before](int64_t h) { return seen[h - top]; };
        for (; next < min_of(p_.P, i + phases_.after + 1); ++next) {
          const int64_t pixel = (n * p_.P + next) * p_.Q;
          gradient.write(gradient.self, pixel, pixel + p_.Q, line_at(next));
        }
        sums.add(share, line, line_at(i), p_.K, own);
        if (grad_input != nullptr) phases_.write(n, i, line_at, grad_input, of_phases);
      }
    });
    if (!sums.finish()) return false;
    sums.write(weight_step_, grad_weight_, grad_bias_);
    return true;
  }

  const Conv2dProblem& p_;
  int64_t weight_step_;
  TapConv conv_;
  const T* input_;
  const T* weight_;
  T* grad_input_;
  T* grad_weight_;
  T* grad_bias_;
  int threads_;
  mutable DepthwisePhases<T> phases_;
  int64_t kept_;  // lines of grad_output that input lines see together
};

}  // namespace
}  // namespace gdfast::cpu
