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
class DepthwiseGradWeightLines {
  // So many pixels are added up before they go to the totals, lest the error grow with each.
  static constexpr int64_t kSumLength = 128;
  static constexpr int kWidth = kLanes<T>;

 public:
  struct Own {
    const T** seen;
    T* sums;
    int64_t pixels = 0;  // that are in the sums
  };

  // A careful one multiplies nothing by the zeros beyond the border.
  DepthwiseGradWeightLines(const TapConv& conv, const T* input, bool has_bias, int threads,
                           bool careful)
      : conv_(conv),
        input_(input),
        has_bias_(has_bias),
        careful_(careful),
        taps_(conv, careful),
        channels_(conv.groups),
        all_taps_(conv.tap_count * round_up(channels_, kWidth)),
        size_(all_taps_ + round_up(channels_, kWidth)),
        lines_(conv.batch * conv.height),
        shares_(max_of(1, min_of(2 * threads, lines_))) {
    taps_.with_shape([&](auto shape) {
      most_seen_ = decltype(shape)::kSeen;
      run_ = block_tap_sums<T, decltype(shape)>;
    });
    if (taps_.walks()) walk_ = conv.step_w == 1 ? walk_tap_line<T, 1> : walk_tap_line<T, 2>;
  }

  int64_t shares() const { return shares_; }
  // The lines of a share, counted through the batch, begin and end with its neighbours'.
  int64_t first_line(int64_t share) const { return lines_ * share / shares_; }

  void carve_shared(Carver& carver) {
    totals_ = carver.template take<T>(shares_ * size_);
    zeros_ = carver.template take<T>(channels_);
  }
  Own carve(Carver& carver) const {
    return {carver.template take<const T*>(taps_.rows * most_seen_),
            carver.template take<T>(size_)};
  }

  // Once there is memory for it.
  void prepare() {
    std::memset(totals_, 0, shares_ * size_ * sizeof(T));
    std::memset(zeros_, 0, channels_ * sizeof(T));
  }

  void begin(Own& own) const {
    std::memset(own.sums, 0, size_ * sizeof(T));
    own.pixels = 0;
  }

  // Adds a line of a share: `grad_line` is that of grad_output, whose pixels lie `step` apart.
  void add(int64_t share, int64_t line, const T* grad_line, int64_t step, Own& own) const {
    const int64_t i = line % conv_.height, width = conv_.width;
    const T* image = input_ + line / conv_.height * conv_.source.n;
    const auto line_at = [&](int64_t h) { return image + h * conv_.source.h; };
    if (walk_ != nullptr) {
      walk_(taps_.seen_lines(line_at, i, zeros_), channels_, {0, width, grad_line, step}, own.sums);
    }
    for (int64_t j = 0; j < width && (walk_ == nullptr || has_bias_); j += kBlockPixels) {
      const T* grads[kBlockPixels];
      for (int x = 0; x < kBlockPixels; ++x) {
        grads[x] = j + x < width ? grad_line + (j + x) * step : zeros_;
      }
      if (walk_ == nullptr) {
        taps_.find(line_at, i, j, j > 0, most_seen_, careful_ ? nullptr : zeros_, own.seen);
        run_(own.seen, grads, taps_.rows, channels_, own.sums);
      }
      if (!has_bias_) continue;
      for_channel_vectors<T>(channels_, [&](int64_t c, int64_t v) {
        T* to = own.sums + all_taps_ + v * kWidth;
        Vec<T> sum = load(to);
        for (const T* grad : grads) sum += load(grad + c);
        store<T>(to, sum);
      });
    }
    own.pixels += width;
    if (own.pixels < kSumLength && line + 1 < first_line(share + 1)) return;
    T* const total = totals_ + share * size_;
    for (int64_t x = 0; x < size_; ++x) total[x] += own.sums[x];
    begin(own);
  }

  // Adds up the shares. False where a sum is not finite: zeros beyond the border may have done it.
  bool finish() {
    for (int64_t share = 1; share < shares_; ++share) {
      for (int64_t x = 0; x < size_; ++x) totals_[x] += totals_[share * size_ + x];
    }
    return careful_ || all_finite(totals_, all_taps_, 1);
  }

  // grad_bias may be null.
  void write(int64_t weight_step, T* grad_weight, T* grad_bias) const {
    for (int64_t row = 0; row < taps_.rows; ++row) {
      for (int64_t s = 0; s < taps_.columns; ++s) {
        gather_channels(totals_ + (row * taps_.columns + s) * kWidth, conv_.tap_count * kWidth,
                        channels_, grad_weight + taps_.tap(row, s).weight, weight_step);
      }
    }
    if (grad_bias != nullptr) gather_channels(totals_ + all_taps_, kWidth, channels_, grad_bias, 1);
  }

 private:
  const TapConv& conv_;
  const T* input_;
  bool has_bias_, careful_;
  TapRows taps_;
  int64_t channels_, all_taps_, size_, lines_, shares_;
  int most_seen_ = 0;
  void (*run_)(const T* const*, const T* const*, int64_t, int64_t, T*) = nullptr;
  void (*walk_)(const SeenLines<T>&, int64_t, const WalkedPixels<const T>&, T*) = nullptr;
  T *totals_ = nullptr, *zeros_ = nullptr;
};

template <typename T>
void depthwise_grad_weight_channel_lines(const Conv2dProblem& p, const TapConv& conv,
                                         const T* grad_output, const T* input, T* grad_weight,
                                         T* grad_bias, int threads, bool careful = false) {
  DepthwiseGradWeightLines<T> lines(conv, input, grad_bias != nullptr, threads, careful);
  const ThreadScratch memory(
      threads, [&](Carver& carver) { lines.carve_shared(carver); },
      [&](Carver& carver) { lines.carve(carver); });
  lines.prepare();
  parallel_for(lines.shares(), threads, [&](int64_t share, int thread) {
    Carver carver = memory.of(thread);
    auto own = lines.carve(carver);
    lines.begin(own);
    for (int64_t line = lines.first_line(share); line < lines.first_line(share + 1); ++line) {
      const int64_t n = line / conv.height, i = line % conv.height;
      lines.add(share, line, grad_output + n * conv.dest.n + i * conv.dest.h, conv.dest.w, own);
    }
  });
  if (lines.finish()) return lines.write(p.weight.n, grad_weight, grad_bias);
  depthwise_grad_weight_channel_lines(p, conv, grad_output, input, grad_weight, grad_bias, threads,
                                      true);
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
