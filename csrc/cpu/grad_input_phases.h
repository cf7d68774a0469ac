// grad_input as convolutions of grad_output, one for each phase of the stride.
//
// The gradient of input pixel (h, w) takes from output pixel (p, q) through tap (r, s) where
//   p * stride_h = h + pad_h - r * dilation_h,   q * stride_w = w + pad_w - s * dilation_w.
// Pixels with the same h % stride_h divide evenly by the same taps r, so each phase is a
// convolution of grad_output with step 1.
#pragma once

#include <cstring>

#include "shares.h"
#include "tap_conv.h"

namespace gdfast::cpu {
namespace {

// The convolution that gives one phase of grad_input, whose pixels begin at phase_offset(); taps is
// room for R * S of them.
inline TapConv phase_tap_conv(const Conv2dProblem& p, int64_t phase_h, int64_t phase_w, Tap* taps) {
  TapConv conv;
  conv.batch = p.N;
  conv.height = ceil_div(p.H - phase_h, p.stride_h);
  conv.width = ceil_div(p.W - phase_w, p.stride_w);
  conv.step_h = conv.step_w = 1;
  conv.source_height = p.P;
  conv.source_width = p.Q;
  conv.reduced = p.K / p.groups;
  conv.produced = p.C / p.groups;
  conv.groups = p.groups;
  conv.source = p.output;
  conv.dest = {p.input.n, p.input.c, p.input.h * p.stride_h, p.input.w * p.stride_w};
  conv.weight_reduced = p.weight.n;
  conv.weight_produced = p.weight.c;
  conv.source_group = conv.reduced * p.output.c;
  conv.dest_group = conv.produced * p.input.c;
  conv.weight_group = conv.reduced * p.weight.n;
  conv.taps = taps;
  conv.tap_count = 0;
  conv.adds = p.adds;
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t h = phase_h + p.pad_h - r * p.dilation_h;
    if (h % p.stride_h != 0) continue;
    for (int64_t s = 0; s < p.S; ++s) {
      const int64_t w = phase_w + p.pad_w - s * p.dilation_w;
      if (w % p.stride_w != 0) continue;
      taps[conv.tap_count++] = {h / p.stride_h, w / p.stride_w, r * p.weight.h + s * p.weight.w};
    }
  }
  return conv;
}

inline int64_t phase_offset(const Conv2dProblem& p, int64_t phase_h, int64_t phase_w) {
  return phase_h * p.input.h + phase_w * p.input.w;
}

// Calls run(conv, offset) for each phase, whose pixels begin at that offset of grad_input; taps is
// room for R * S of them.
template <typename Run>
void for_each_phase(const Conv2dProblem& p, Tap* taps, const Run& run) {
  for (int64_t phase_h = 0; phase_h < min_of(p.stride_h, p.H); ++phase_h) {
    for (int64_t phase_w = 0; phase_w < min_of(p.stride_w, p.W); ++phase_w) {
      run(phase_tap_conv(p, phase_h, phase_w, taps), phase_offset(p, phase_h, phase_w));
    }
  }
}

// Whether pixels of a phase take from any output, along one axis.
inline bool phase_has_taps(int64_t phase, int64_t stride, int64_t pad, int64_t taps,
                           int64_t dilation) {
  for (int64_t tap = 0; tap < taps; ++tap) {
    if ((phase + pad - tap * dilation) % stride == 0) return true;
  }
  return false;
}

// Writes the pixels of all phases without taps, which are zero: those between the pixels of a 1x1
// kernel with stride 2. The channels of a pixel lie side by side.
template <typename T>
void write_phases_without_taps(const Conv2dProblem& p, T* grad_input, int threads) {
  const auto write = [&](T* to, int64_t values) { std::memset(to, 0, values * sizeof(T)); };
  const int64_t rows = p.N * p.H, tasks = min_of(rows, 16 * threads);
  parallel_shares(tasks, threads, [&](int64_t task, int) {
    for (int64_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) {
      const int64_t n = row / p.H, h = row % p.H;
      T* line = grad_input + n * p.input.n + h * p.input.h;
      const bool has = phase_has_taps(h % p.stride_h, p.stride_h, p.pad_h, p.R, p.dilation_h);
      if (!has && p.input.w == p.C) {
        write(line, p.W * p.C);
        continue;
      }
      for (int64_t phase = 0; phase < min_of(p.stride_w, p.W); ++phase) {
        if (has && phase_has_taps(phase, p.stride_w, p.pad_w, p.S, p.dilation_w)) continue;
        for (int64_t w = phase; w < p.W; w += p.stride_w) write(line + w * p.input.w, p.C);
      }
    }
  });
}

}  // namespace
}  // namespace gdfast::cpu
