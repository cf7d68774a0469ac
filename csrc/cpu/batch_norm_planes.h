// Batch normalisation of contiguous (NCHW) tensors: each channel is a plane in each image.
//
// A channel's planes usually fit a core's own cache, so that one task takes both passes over them
// and memory is read once.
#pragma once

#include "batch_norm.h"
#include "pack.h"

namespace gdfast::cpu {
namespace {

template <typename T>
class Planes {
  using A = typename Accumulator<T>::type;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  explicit Planes(const BatchNormProblem& p) : images_(p.N), channels_(p.C), pixels_(p.S) {}

  int64_t columns() const { return channels_; }
  // Index of some value of a channel.
  int64_t sample_of(int64_t channel) const { return channel * pixels_; }
  // How many elements lie side by side between two places where vectors begin anew.
  int64_t pitch() const { return pixels_; }
  int64_t scratch() const { return 0; }

  Cut cut(int64_t streams, int threads) const {
    const int64_t channel_bytes = images_ * pixels_ * static_cast<int64_t>(sizeof(T)) * streams;
    const int64_t most = max_of(1, channels_ * channel_bytes / kBytesPerRegion);
    if (channels_ >= 2 * threads || most == 1) {
      const int64_t regions = min_of(most, kRegionsPerThread * threads);
      const int64_t few = max_of(1, kCacheBytes / channel_bytes);
      const int64_t step = min_of(ceil_div(channels_, regions), few);
      return {true, ceil_div(channels_, step), step};
    }
    // Regions are whole numbers of images or, where these are few, parts of each image.
    const int64_t wanted = min_of(most, kRegionsPerThread * threads);
    const int64_t step = ceil_div(images_, wanted);
    const int64_t parts = parts_of_plane(wanted, step);
    return {false, ceil_div(images_, step) * parts, step};
  }

  Region region(const Cut& cut, int64_t index) const {
    if (cut.by_channel) {
      const int64_t begin = index * cut.step;
      return {begin, min_of(begin + cut.step, channels_), 0, images_, 0, pixels_};
    }
    const int64_t parts = cut.regions / ceil_div(images_, cut.step);
    const int64_t length = round_up(ceil_div(pixels_, parts), kWidth);
    const int64_t begin = index / parts * cut.step, part = index % parts;
    return {0,
            channels_,
            begin,
            min_of(begin + cut.step, images_),
            min_of(part * length, pixels_),
            min_of((part + 1) * length, pixels_)};
  }

  // Images are never normalised piece by piece.
  template <typename Visit>
  void for_pieces(const Region& g, bool, const Visit& visit) const {
    visit(g);
  }
  PixelRange pixels_of(const Region&) const { return {0, 0}; }

  // Adds to sums: the values less origin[channel], and their squares.
  void statistics(const Region& g, const T* input, const A* origin, A*, const Sums& sums) const {
    for (int64_t c = g.c; c < g.c_end; ++c) {
      const Vec<A> zero{};
      Vec<A> shift{}, first{}, second{};
      int64_t count = 0;
      const auto flush = [&] {
        // About another origin: sum of (v + d) and of (v + d)^2 over n values.
        const double n = static_cast<double>(count);
        const double d = static_cast<double>(shift[0]) - static_cast<double>(origin[c]);
        const double sum = total(first);
        sums.first[c] += sum + n * d;
        sums.second[c] += total(second) + d * (2.0 * sum + n * d);
        first = second = zero;
        count = 0;
      };
      for_chunks(g, c, [&](int64_t at, int64_t length) {
        if (count == 0) {
          // The mean of the chunk, which stays in the first-level cache for the sums about it.
          Vec<A> sum[4] = {};
          for_lanes<4>(at, at + length, [&](auto group, int64_t i) {
            using G = decltype(group);
#pragma GCC unroll 4
            for (int v = 0; v < G::kVectors; ++v) {
              sum[v] += valid(group, load_group(group, input + i + v * kWidth));
            }
          });
          const double all = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
          shift = finite<A>(broadcast(static_cast<A>(all / static_cast<double>(length))));
        }
        Vec<A> firsts[4] = {}, seconds[4] = {};
        for_lanes<4>(at, at + length, [&](auto group, int64_t i) {
          using G = decltype(group);
#pragma GCC unroll 4
          for (int v = 0; v < G::kVectors; ++v) {
            const Vec<A> d =
                valid(group, Vec<A>(load_group(group, input + i + v * kWidth) - shift));
            firsts[v] += d;
            seconds[v] += d * d;
          }
        });
        first += (firsts[0] + firsts[1]) + (firsts[2] + firsts[3]);
        second += (seconds[0] + seconds[1]) + (seconds[2] + seconds[3]);
        count += length;
        if (count >= kSumLength * kWidth) flush();
      });
      if (count > 0) flush();
    }
  }

  template <Activation kActivation, bool kResidual>
  void apply(const Region& g, const T* input, const T* residual, const Factors<A>& factors,
             A negative_slope, T* output, bool stream) const {
    const Vec<A> leak = broadcast(negative_slope);
    for (int64_t c = g.c; c < g.c_end; ++c) {
      const Vec<A> mean = broadcast(factors.mean[c]), scale = broadcast(factors.scale[c]);
      const Vec<A> bias = broadcast(factors.bias[c]);
      for_chunks(g, c, [&](int64_t at, int64_t length) {
        for_lanes<1>(at, at + length, [&](auto group, int64_t i) {
          Vec<A> z = (load_group(group, input + i) - mean) * scale + bias;
          if constexpr (kResidual) z += load_group(group, residual + i);
          store_result(group, output + i, activate<kActivation, A>(z, leak), stream);
        });
      });
    }
  }

  // Adds to sums: the gradient before the activation, and its products with input - mean.
  template <Activation kActivation, PreActivation kFrom>
  void reduce(const Region& g, const Gradients<T>& to, const Factors<A>& factors, A negative_slope,
              bool stream, A*, const Sums& sums) const {
    const Vec<A> leak = broadcast(negative_slope);
    for (int64_t c = g.c; c < g.c_end; ++c) {
      const Vec<A> mean = broadcast(factors.mean[c]), scale = broadcast(factors.scale[c]);
      const Vec<A> bias = broadcast(factors.bias[c]);
      Vec<A> first{}, second{};
      int64_t count = 0;
      const auto flush = [&] {
        sums.first[c] += total(first);
        sums.second[c] += total(second);
        first = second = Vec<A>{};
        count = 0;
      };
      for_chunks(g, c, [&](int64_t at, int64_t length) {
        Vec<A> firsts[4] = {}, seconds[4] = {};
        for_lanes<4>(at, at + length, [&](auto group, int64_t i) {
          using G = decltype(group);
#pragma GCC unroll 4
          for (int v = 0; v < G::kVectors; ++v) {
            const int64_t here = i + v * kWidth;
            const Vec<A> centred = load_group(group, to.input + here) - mean;
            Vec<A> other{};
            if constexpr (kFrom != PreActivation::kInput) {
              other = load_group(group, to.other + here);
            }
            const Vec<A> grad = grad_before<kActivation, kFrom, A>(
                load_group(group, to.grad_output + here), centred, other, scale, bias, leak);
            if constexpr (kFrom != PreActivation::kInput) {
              if (to.grad_residual != nullptr) {
                store_result(group, to.grad_residual + here, grad, stream);
              }
            }
            firsts[v] += valid(group, grad);
            seconds[v] += valid(group, Vec<A>(grad * centred));
          }
        });
        first += (firsts[0] + firsts[1]) + (firsts[2] + firsts[3]);
        second += (seconds[0] + seconds[1]) + (seconds[2] + seconds[3]);
        count += length;
        if (count >= kSumLength * kWidth) flush();
      });
      if (count > 0) flush();
    }
  }

  // Writes grad_input, in evaluation without the share of the statistics.
  template <Activation kActivation, PreActivation kFrom>
  void grad_input(const Region& g, const Gradients<T>& to, const Factors<A>& factors,
                  A negative_slope, bool training, bool stream) const {
    const Vec<A> leak = broadcast(negative_slope);
    for (int64_t c = g.c; c < g.c_end; ++c) {
      const Vec<A> mean = broadcast(factors.mean[c]), scale = broadcast(factors.scale[c]);
      const Vec<A> bias = broadcast(factors.bias[c]), slope = broadcast(factors.slope[c]);
      const Vec<A> offset = broadcast(factors.offset[c]);
      for_chunks(g, c, [&](int64_t at, int64_t length) {
        for_lanes<1>(at, at + length, [&](auto group, int64_t i) {
          const Vec<A> centred = load_group(group, to.input + i) - mean;
          Vec<A> other{};
          if constexpr (kFrom != PreActivation::kInput) other = load_group(group, to.other + i);
          const Vec<A> grad = grad_before<kActivation, kFrom, A>(
              load_group(group, to.grad_output + i), centred, other, scale, bias, leak);
          if constexpr (kFrom != PreActivation::kInput) {
            if (to.grad_residual != nullptr) {
              store_result(group, to.grad_residual + i, grad, stream);
            }
          }
          Vec<A> result = grad * scale;
          if (training) result += centred * slope + offset;
          store_result(group, to.grad_input + i, result, stream);
        });
      });
    }
  }

 private:
  static constexpr int64_t kRegionsPerThread = 8;
  static constexpr int64_t kLeastPixels = 4096;

  // Into how many parts each plane is divided where regions of `step` images are too few.
  int64_t parts_of_plane(int64_t wanted, int64_t step) const {
    const int64_t by_image = ceil_div(images_, step);
    return max_of(1, min_of(ceil_div(wanted, by_image), pixels_ / kLeastPixels));
  }

  // Calls chunk(at, length) for stretches of memory that hold channel c.
  template <typename Chunk>
  GDFAST_INLINE void for_chunks(const Region& g, int64_t c, const Chunk& chunk) const {
    for (int64_t n = g.i; n < g.i_end; ++n) {
      const int64_t plane = (n * channels_ + c) * pixels_;
      for (int64_t s = g.s; s < g.s_end; s += kChunk) {
        chunk(plane + s, min_of(kChunk, g.s_end - s));
      }
    }
  }

  // Of two sums' length, since four vectors side by side add it up.
  static constexpr int64_t kChunk = 2 * kSumLength * kWidth;

  // A vector that overlaps the one before: only its last `lanes` lanes are new.
  struct Overlap {
    static constexpr int kVectors = 1;
    static constexpr bool kWhole = true;
    int64_t lanes;
  };

  // for_groups, but that what is left over ends in an overlapping vector where there was one.
  template <int kMost, typename Visit>
  GDFAST_INLINE static void for_lanes(int64_t begin, int64_t end, const Visit& visit) {
    const int64_t rest = end - begin < kWidth ? 0 : (end - begin) % kWidth;
    for_groups<A, kMost>(begin, end - rest, visit);  // once, since all of it is inlined
    if (rest != 0) visit(Overlap{rest}, end - kWidth);
  }

  // Zeros for the lanes that do not count.
  template <typename G>
  GDFAST_INLINE static Vec<A> valid(const G& group, Vec<A> value) {
    if constexpr (kSame<G, Overlap>) {
      return lane_numbers() < static_cast<A>(kWidth - group.lanes) ? Vec<A>{} : value;
    } else if constexpr (!G::kWhole) {
      return lane_numbers() < static_cast<A>(group.lanes) ? value : Vec<A>{};
    } else {
      return value;
    }
  }

  GDFAST_INLINE static Vec<A> lane_numbers() {
    Vec<A> numbers{};
    for (int64_t lane = 0; lane < kWidth; ++lane) numbers[lane] = static_cast<A>(lane);
    return numbers;
  }

  // The sum of all lanes, in pairs.
  GDFAST_INLINE static double total(Vec<A> value) {
    A lanes[kWidth];
    store<A>(lanes, value);
#pragma GCC unroll 4
    for (int64_t half = kWidth / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return static_cast<double>(lanes[0]);
  }

  int64_t images_, channels_, pixels_;
};

}  // namespace
}  // namespace gdfast::cpu
