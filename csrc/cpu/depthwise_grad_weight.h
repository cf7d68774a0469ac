// grad_weight and grad_bias of a depthwise convolution: for every channel and tap, the sum over
// all pixels of grad_output times the image value that the tap sees. The layouts are treated as in
// depthwise.h.
#pragma once

#include "depthwise.h"

namespace gdfast::cpu {
namespace {

// Planes: a task owns a channel. The sums of each tap are a vector until the end, which adds up its
// lanes in order.
template <typename T>
void depthwise_grad_weight_planes(const Conv2dProblem& p, const TapConv& conv, const T* grad_output,
                                  const T* input, T* grad_weight, T* grad_bias, int threads) {
  using A = typename Accumulator<T>::type;
  constexpr int kWidth = kLanes<A>;
  const Band<T> band(conv);
  const int64_t lines = band_lines<T>(conv), padded = round_up(conv.width, kWidth);
  struct Scratch {
    A *band, *line, *sums;
  };
  const auto carve = [&](Carver& carver) {
    return Scratch{carver.template take<A>(band_size<T>(conv)), carver.template take<A>(padded),
                   carver.template take<A>((conv.tap_count + 1) * kWidth)};
  };
  Carver counter;
  carve(counter);
  Workspace workspace(counter.used() * threads);

  parallel_for(conv.groups, threads, [&](int64_t channel, int thread) {
    Carver carver(workspace.data() + counter.used() * thread);
    const Scratch scratch = carve(carver);
    std::memset(scratch.sums, 0, (conv.tap_count + 1) * kWidth * sizeof(A));
    A* bias_sums = scratch.sums + conv.tap_count * kWidth;
    for (int64_t n = 0; n < conv.batch; ++n) {
      for (int64_t i = 0; i < conv.height; ++i) {
        if (i % lines == 0) {
          const LineRange seen = lines_seen(conv, i, min_of(lines, conv.height - i));
          band.copy(input + n * conv.source.n + channel * conv.source_group, seen.first, seen.end,
                    scratch.band);
        }
        const int64_t i0 = i / lines * lines;
        const int64_t first = lines_seen(conv, i0, min_of(lines, conv.height - i0)).first;
        copy_widened(grad_output + n * conv.dest.n + channel * conv.dest_group + i * conv.dest.h,
                     conv.dest.w, conv.width, scratch.line);
        for (int64_t j = conv.width; j < padded; ++j) scratch.line[j] = A(0);
        for (int64_t t = 0; t < conv.tap_count; ++t) {
          const int64_t h = i * conv.step_h + conv.taps[t].dh;
          if (h < 0 || h >= conv.source_height) continue;
          const A* from =
              scratch.band + (h - first) * band.line_size() + band.offset_of(conv.taps[t]);
          Vec<A> sum{};
          for (int64_t j = 0; j < padded; j += kWidth) {
            sum += load(scratch.line + j) * load(from + j);
          }
          A* sums = scratch.sums + t * kWidth;
          store<A>(sums, load(sums) + sum);
        }
        Vec<A> sum{};
        for (int64_t j = 0; j < padded; j += kWidth) sum += load(scratch.line + j);
        store<A>(bias_sums, load(bias_sums) + sum);
      }
    }
    const auto total = [&](const A* sums) {
      A sum = 0;
      for (int lane = 0; lane < kWidth; ++lane) sum += sums[lane];
      return narrow<T>(sum);
    };
    for (int64_t t = 0; t < conv.tap_count; ++t) {
      grad_weight[channel * p.weight.n + conv.taps[t].weight] = total(scratch.sums + t * kWidth);
    }
    if (grad_bias != nullptr) grad_bias[channel] = total(bias_sums);
  });
}

// Channels side by side: a task owns a share of the lines, with sums of its own for all channels:
// [vector][tap][lane], and behind them those of the bias.
template <typename T>
void depthwise_grad_weight_channel_lines(const Conv2dProblem& p, const TapConv& conv,
                                         const T* grad_output, const T* input, T* grad_weight,
                                         T* grad_bias, int threads, bool careful = false) {
  // So many pixels are added up before they go to the totals, lest the error grow with each.
  constexpr int64_t kSumLength = 128;
  constexpr int kWidth = kLanes<T>;
  const TapRows taps(conv, careful);
  const int64_t channels = conv.groups, padded = round_up(channels, kWidth);
  const int64_t all_taps = conv.tap_count * padded, size = all_taps + padded;
  const int64_t lines = conv.batch * conv.height;
  const int64_t shares = max_of(1, min_of(2 * threads, lines));
  int most_seen = 0;
  void (*run)(const T* const*, const T* const*, int64_t, int64_t, int64_t, T*) = nullptr;
  taps.with_shape([&](auto shape) {
    most_seen = decltype(shape)::kSeen;
    run = block_tap_sums<T, decltype(shape)>;
  });
  T *totals, *zeros;
  struct Scratch {
    const T** seen;
    T* sums;
  };
  const auto carve = [&](Carver& carver) {
    return Scratch{carver.template take<const T*>(taps.rows * most_seen),
                   carver.template take<T>(size)};
  };
  const ThreadScratch memory(
      threads,
      [&](Carver& carver) {
        totals = carver.template take<T>(shares * size);
        zeros = carver.template take<T>(channels);
      },
      carve);
  std::memset(totals, 0, shares * size * sizeof(T));
  std::memset(zeros, 0, channels * sizeof(T));

  parallel_for(shares, threads, [&](int64_t share, int thread) {
    Carver own = memory.of(thread);
    const Scratch scratch = carve(own);
    T* const total = totals + share * size;
    const int64_t end = lines * (share + 1) / shares;
    std::memset(scratch.sums, 0, size * sizeof(T));
    int64_t pixels = 0;
    for (int64_t line = lines * share / shares; line < end; ++line) {
      const int64_t n = line / conv.height, i = line % conv.height;
      const T* grad_line = grad_output + n * conv.dest.n + i * conv.dest.h;
      for (int64_t j = 0; j < conv.width; j += kBlockPixels) {
        const T* grads[kBlockPixels];
        for (int x = 0; x < kBlockPixels; ++x) {
          grads[x] = j + x < conv.width ? grad_line + (j + x) * conv.dest.w : zeros;
        }
        taps.find(input + n * conv.source.n, i, j, most_seen, careful ? nullptr : zeros,
                  scratch.seen);
        run(scratch.seen, grads, taps.rows, channels, taps.ahead, scratch.sums);
        if (grad_bias == nullptr) continue;
        for_channel_vectors<T>(channels, [&](int64_t c, int64_t v) {
          T* to = scratch.sums + all_taps + v * kWidth;
          Vec<T> sum = load(to);
          for (const T* grad : grads) sum += load(grad + c);
          store<T>(to, sum);
        });
      }
      pixels += conv.width;
      if (pixels < kSumLength && line + 1 < end) continue;
      pixels = 0;
      for (int64_t x = 0; x < size; ++x) total[x] += scratch.sums[x];
      std::memset(scratch.sums, 0, size * sizeof(T));
    }
  });

  for (int64_t share = 1; share < shares; ++share) {
    for (int64_t x = 0; x < size; ++x) totals[x] += totals[share * size + x];
  }
  if (!careful && !all_finite(totals, all_taps, 1)) {
    return depthwise_grad_weight_channel_lines(p, conv, grad_output, input, grad_weight, grad_bias,
                                               threads, true);
  }
  for (int64_t row = 0; row < taps.rows; ++row) {
    for (int64_t s = 0; s < taps.columns; ++s) {
      gather_channels(totals + (row * taps.columns + s) * kWidth, conv.tap_count * kWidth, channels,
                      grad_weight + taps.tap(row, s).weight, p.weight.n);
    }
  }
  if (grad_bias != nullptr) gather_channels(totals + all_taps, kWidth, channels, grad_bias, 1);
}

template <typename T>
void run_depthwise_grad_weight(const Conv2dProblem& p, const T* grad_output, const T* input,
                               T* grad_weight, T* grad_bias, int threads) {
  Workspace tap_memory(p.R * p.S * sizeof(Tap));
  const TapConv conv = forward_tap_conv(p, reinterpret_cast<Tap*>(tap_memory.data()));
  if constexpr (kSame<T, typename Accumulator<T>::type>) {
    if (p.input.c == 1 && p.output.c == 1 && p.C >= kLanes<T>) {
      depthwise_grad_weight_channel_lines(p, conv, grad_output, input, grad_weight, grad_bias,
                                          threads);
      return;
    }
  }
  depthwise_grad_weight_planes(p, conv, grad_output, input, grad_weight, grad_bias, threads);
}

}  // namespace
}  // namespace gdfast::cpu
