// A depthwise convolution and the batch normalisation behind it, where channels lie side by side.
//
// Forward, lines are written as the statistics come to read them. Backward, a task walks down its
// share of the lines and keeps those of the normalisation's gradient that input lines still see:
// both gradients of the convolution read them there.
#pragma once

#include "depthwise_grad_weight.h"
#include "grad_input_phases.h"
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
  static constexpr int kMostPhases = 4;

  // Of grad_input.
  struct Phase {
    TapConv conv;
    int64_t offset;
    DepthwiseLines<T> lines;

    Phase(const Conv2dProblem& p, const T* weight, int64_t index, Tap* taps)
        : conv(phase_tap_conv(p, index / p.stride_w % p.stride_h, index % p.stride_w,
                              taps + index * p.R * p.S)),
          offset(phase_offset(p, index / p.stride_w % p.stride_h, index % p.stride_w)),
          lines(conv, weight) {}
  };

 public:
  static constexpr int64_t kTapSets = kMostPhases + 1;

  // grad_input and grad_bias may be null; taps is room for kTapSets * R * S of them.
  DepthwiseNormGradients(const Conv2dProblem& of_input, const Conv2dProblem& of_weight,
                         const T* input, const T* weight, T* grad_input, T* grad_weight,
                         T* grad_bias, Tap* taps, int threads)
      : p_(of_input),
        weight_step_(of_weight.weight.n),
        conv_(forward_tap_conv(of_weight, taps + kMostPhases * p_.R * p_.S)),
        input_(input),
        weight_(weight),
        grad_input_(grad_input),
        grad_weight_(grad_weight),
        grad_bias_(grad_bias),
        threads_(threads),
        phase_count_(p_.stride_h * p_.stride_w),
        phases_{{p_, weight, 0, taps},
                {p_, weight, 1, taps},
                {p_, weight, 2, taps},
                {p_, weight, 3, taps}} {
    for (int64_t index = 0; index < phase_count_; ++index) {
      const TapConv& conv = phases_[index].conv;
      for (int64_t t = 0; t < conv.tap_count; ++t) {
        before_ = max_of(before_, -conv.taps[t].dh);
        after_ = max_of(after_, conv.taps[t].dh);
      }
    }
    kept_ = before_ + after_ + 1;
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
          for (int64_t x = 0; x < phase_count_; ++x) phases_[x].lines.carve_shared(carver);
        },
        [&](Carver& carver) {
          sums.carve(carver);
          for (int64_t x = 0; x < phase_count_; ++x) phases_[x].lines.carve(carver);
          carver.template take<T>(kept_ * line_size);
          carver.template take<T*>(kept_);
        });
    sums.prepare();
    for (int64_t x = 0; x < phase_count_; ++x) phases_[x].lines.prepare(weight_, nullptr);

    parallel_for(sums.shares(), threads_, [&](int64_t share, int thread) {
      Carver carver = memory.of(thread);
      auto own = sums.carve(carver);
      DepthwiseLines<T>::Own of_phase[kMostPhases];
      for (int64_t x = 0; x < phase_count_; ++x) of_phase[x] = phases_[x].lines.carve(carver);
      T* const kept = carver.template take<T>(kept_ * line_size);
      T** const seen = carver.template take<T*>(kept_);  // from line i - before_ on
      sums.begin(own);
      const int64_t first = sums.first_line(share), end = sums.first_line(share + 1);
      int64_t next = 0;  // the first line of the image that is not there yet
      for (int64_t line = first; line < end; ++line) {
        const int64_t n = line / p_.P, i = line % p_.P;
        if (line == first || i == 0) next = max_of(0, i - before_);
        for (int64_t x = 0; x < kept_; ++x) seen[x] = kept + (i + x) % kept_ * line_size;
        const auto line_at = [seen, top = i - before_](int64_t h) { return seen[h - top]; };
        for (; next < min_of(p_.P, i + after_ + 1); ++next) {
          const int64_t pixel = (n * p_.P + next) * p_.Q;
          gradient.write(gradient.self, pixel, pixel + p_.Q, line_at(next));
        }
        sums.add(share, line, line_at(i), p_.K, own);
        if (grad_input == nullptr) continue;
        for (int64_t x = 0; x < phase_count_; ++x) {
          const TapConv& conv = phases_[x].conv;
          if (i >= conv.height) continue;
          phases_[x].lines.line(i, 0, conv.width, line_at,
                                grad_input + phases_[x].offset + n * conv.dest.n + i * conv.dest.h,
                                of_phase[x]);
        }
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
  int64_t phase_count_;
  mutable Phase phases_[kMostPhases];
  int64_t before_ = 0, after_ = 0;  // lines of grad_output around the one that an input line sees
  int64_t kept_;                    // of those, in all
};

}  // namespace
}  // namespace gdfast::cpu
