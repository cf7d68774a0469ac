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

// sums[t][c ...] += sum over count pixels of grad[x][c] * image[t][x][c], for kTaps taps that lie
// tap_step apart. Lanes below `skip` belong to the vector before and are left alone.
template <typename T, int kTaps>
GDFAST_INLINE void add_tap_sums(const T* grad, int64_t grad_step, const T* image,
                                int64_t image_step, int64_t tap_step, int64_t count, T* sums,
                                int64_t sums_step, int64_t skip) {
  // Two sums per tap, over even and odd pixels: one chain of FMAs would wait for itself.
  Vec<T> even[kTaps] = {}, odd[kTaps] = {};
  int64_t x = 0;
  for (; x + 2 <= count; x += 2) {
    const Vec<T> g0 = load(grad), g1 = load(grad + grad_step);
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) {
      even[t] += g0 * load(image + t * tap_step);
      odd[t] += g1 * load(image + t * tap_step + image_step);
    }
    grad += 2 * grad_step;
    image += 2 * image_step;
  }
  if (x < count) {
    const Vec<T> g0 = load(grad);
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) even[t] += g0 * load(image + t * tap_step);
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTaps; ++t) {
    T* to = sums + t * sums_step;
    if (skip == 0) {
      store<T>(to, load(to) + (even[t] + odd[t]));
    } else {
      T lanes[kLanes<T>];
      store<T>(lanes, even[t] + odd[t]);
      for (int64_t lane = skip; lane < kLanes<T>; ++lane) to[lane] += lanes[lane];
    }
  }
}

// Channels side by side: a task owns a share of the lines, with sums of its own for all channels.
template <typename T>
void depthwise_grad_weight_channel_lines(const Conv2dProblem& p, const T* grad_output,
                                         const T* input, T* grad_weight, T* grad_bias,
                                         int threads) {
  constexpr int kWidth = kLanes<T>;
  const int64_t lines = p.N * p.P, taps = p.R * p.S;
  const int64_t shares = max_of(1, min_of(threads, lines)), share_size = (taps + 1) * p.C;
  Workspace workspace(shares * share_size * sizeof(T));
  T* all_sums = reinterpret_cast<T*>(workspace.data());
  std::memset(all_sums, 0, shares * share_size * sizeof(T));

  // Output columns whose tap s sees the image.
  const auto begin_of = [&](int64_t s) {
    return min_of(p.Q, max_of(0, ceil_div(max_of(0, p.pad_w - s * p.dilation_w), p.stride_w)));
  };
  const auto end_of = [&](int64_t s) {
    const int64_t last = p.W - 1 + p.pad_w - s * p.dilation_w;
    return last < 0 ? 0 : min_of(p.Q, last / p.stride_w + 1);
  };

  parallel_for(shares, threads, [&](int64_t share, int) {
    T* sums = all_sums + share * share_size;
    for (int64_t line = lines * share / shares; line < lines * (share + 1) / shares; ++line) {
      const int64_t n = line / p.P, row = line % p.P;
      const T* grad = grad_output + n * p.output.n + row * p.output.h;
      for (int64_t c0 = 0; c0 < p.C; c0 += kWidth) {
        // The last vector ends at the last channel; its first lanes were summed before.
        const int64_t c = min_of(c0, p.C - kWidth), skip = c0 - c;
        for (int64_t r = 0; r < p.R; ++r) {
          const int64_t h = row * p.stride_h - p.pad_h + r * p.dilation_h;
          if (h < 0 || h >= p.H) continue;
          const T* image = input + n * p.input.n + h * p.input.h + c;
          const auto add = [&](auto count, int64_t s, int64_t begin, int64_t end) {
            if (end <= begin) return;
            add_tap_sums<T, decltype(count)::value>(
                grad + begin * p.output.w + c, p.output.w,
                image + (begin * p.stride_w - p.pad_w + s * p.dilation_w) * p.input.w,
                p.stride_w * p.input.w, p.dilation_w * p.input.w, end - begin,
                sums + (r * p.S + s) * p.C + c, p.C, skip);
          };
          using One = std::integral_constant<int, 1>;
          for (int64_t s = 0; s < p.S;) {
            const int64_t count = min_of(4, p.S - s);
            // Columns that all taps of the block see; what is left to each side tap by tap.
            const int64_t begin = begin_of(s);
            const int64_t end = max_of(begin, end_of(s + count - 1));
            for (int64_t t = s; t < s + count; ++t) {
              add(One(), t, begin_of(t), min_of(begin, end_of(t)));
              add(One(), t, max_of(end, begin_of(t)), end_of(t));
            }
            if (count == 4) add(std::integral_constant<int, 4>(), s, begin, end);
            if (count == 3) add(std::integral_constant<int, 3>(), s, begin, end);
            if (count == 2) add(std::integral_constant<int, 2>(), s, begin, end);
            if (count == 1) add(One(), s, begin, end);
            s += count;
          }
        }
        if (grad_bias != nullptr) {
          Vec<T> sum{};
          for (int64_t q = 0; q < p.Q; ++q) sum += load(grad + q * p.output.w + c);
          T lanes[kWidth];
          store<T>(lanes, sum);
          for (int64_t lane = skip; lane < kWidth; ++lane)
            sums[taps * p.C + c + lane] += lanes[lane];
        }
      }
    }
  });

  for (int64_t share = 1; share < shares; ++share) {
    for (int64_t x = 0; x < share_size; ++x) all_sums[x] += all_sums[share * share_size + x];
  }
  for (int64_t r = 0; r < p.R; ++r) {
    for (int64_t s = 0; s < p.S; ++s) {
      copy_narrowed(all_sums + (r * p.S + s) * p.C, p.C,
                    grad_weight + r * p.weight.h + s * p.weight.w, p.weight.n);
    }
  }
  if (grad_bias != nullptr) copy_narrowed(all_sums + taps * p.C, p.C, grad_bias, 1);
}

template <typename T>
void run_depthwise_grad_weight(const Conv2dProblem& p, const T* grad_output, const T* input,
                               T* grad_weight, T* grad_bias, int threads) {
  if constexpr (kSame<T, typename Accumulator<T>::type>) {
    if (p.input.c == 1 && p.output.c == 1 && p.C >= kLanes<T>) {
      depthwise_grad_weight_channel_lines(p, grad_output, input, grad_weight, grad_bias, threads);
      return;
    }
  }
  Workspace tap_memory(p.R * p.S * sizeof(Tap));
  const TapConv conv = forward_tap_conv(p, reinterpret_cast<Tap*>(tap_memory.data()));
  depthwise_grad_weight_planes(p, conv, grad_output, input, grad_weight, grad_bias, threads);
}

}  // namespace
}  // namespace gdfast::cpu
