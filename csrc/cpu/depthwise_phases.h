// The gradient of a depthwise convolution in its input, where channels lie side by side: all phases
// of the stride go down the image together, so that the lines of grad_output that they see are read
// from memory once.
#pragma once

#include "depthwise_channel_lines.h"
#include "grad_input_phases.h"

namespace gdfast::cpu {
namespace {

template <typename T>
class DepthwisePhases {
  static constexpr int kMost = 4;

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
  struct Own {
    typename DepthwiseLines<T>::Own of_phase[kMost];
  };

  static bool takes(const Conv2dProblem& p) { return p.stride_h * p.stride_w <= kMost; }
  static int64_t tap_count(const Conv2dProblem& p) { return kMost * p.R * p.S; }

  // taps is room for tap_count(p) of them.
  DepthwisePhases(const Conv2dProblem& p, const T* weight, Tap* taps)
      : count_(p.stride_h * p.stride_w),
        phases_{{p, weight, 0, taps},
                {p, weight, 1, taps},
                {p, weight, 2, taps},
                {p, weight, 3, taps}} {
    for (int64_t index = 0; index < count_; ++index) {
      const TapConv& conv = phases_[index].conv;
      for (int64_t t = 0; t < conv.tap_count; ++t) {
        before = max_of(before, -conv.taps[t].dh);
        after = max_of(after, conv.taps[t].dh);
      }
    }
  }

  void carve_shared(Carver& carver) {
    for (int64_t x = 0; x < count_; ++x) phases_[x].lines.carve_shared(carver);
  }
  Own carve(Carver& carver) const {
    Own own;
    for (int64_t x = 0; x < count_; ++x) own.of_phase[x] = phases_[x].lines.carve(carver);
    return own;
  }
  void write_past_caches(const T* grad_input) {
    for (int64_t x = 0; x < count_; ++x) {
      phases_[x].lines.write_past_caches(grad_input + phases_[x].offset);
    }
  }
  void read_from_cache() {
    for (int64_t x = 0; x < count_; ++x) phases_[x].lines.read_from_cache();
  }
  void prepare(const T* weight) {
    for (int64_t x = 0; x < count_; ++x) phases_[x].lines.prepare(weight, nullptr);
  }

  // The lines of image n that begin at i times the stride; line_at(h) is where a line of
  // grad_output lies.
  template <typename LineAt>
  void write(int64_t n, int64_t i, const LineAt& line_at, T* grad_input, const Own& own) const {
    for (int64_t x = 0; x < count_; ++x) {
      const TapConv& conv = phases_[x].conv;
      if (i >= conv.height) continue;
      phases_[x].lines.line(i, 0, conv.width, line_at,
                            grad_input + phases_[x].offset + n * conv.dest.n + i * conv.dest.h,
                            own.of_phase[x]);
    }
  }

  // Lines of grad_output around line i that are seen there.
  int64_t before = 0, after = 0;

 private:
  int64_t count_;
  Phase phases_[kMost];
};

template <typename T>
void depthwise_grad_input_channel_lines(const Conv2dProblem& p, const T* grad_output,
                                        const T* weight, T* grad_input, int threads) {
  Workspace tap_memory(DepthwisePhases<T>::tap_count(p) * sizeof(Tap));
  DepthwisePhases<T> phases(p, weight, reinterpret_cast<Tap*>(tap_memory.data()));
  const ThreadScratch memory(
      threads, [&](Carver& carver) { phases.carve_shared(carver); },
      [&](Carver& carver) { phases.carve(carver); });
  phases.prepare(weight);
  phases.write_past_caches(grad_input);
  const int64_t height = ceil_div(p.H, p.stride_h);
  const int64_t together = lines_together(p.N * height, threads);
  const int64_t runs = ceil_div(height, together);
  parallel_for(p.N * runs, threads, [&](int64_t index, int thread) {
    Carver carver = memory.of(thread);
    const auto own = phases.carve(carver);
    const int64_t n = index / runs, i0 = index % runs * together;
    const auto line_at = [image = grad_output + n * p.output.n, step = p.output.h](int64_t h) {
      return image + h * step;
    };
    for (int64_t i = i0; i < min_of(i0 + together, height); ++i) {
      phases.write(n, i, line_at, grad_input, own);
    }
  });
}

}  // namespace
}  // namespace gdfast::cpu
