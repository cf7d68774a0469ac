// output = max_pool2d(relu(conv2d(input, weight) + bias)), and where in its window each value was,
// for few input channels and windows that do not overlap.
//
// The convolution's values exist in registers alone: vectors run over pooled outputs, and the
// values of a window's places follow each other, compared as they come. The commonest case, 2x2
// windows over a 3x3 kernel, has all four at once.
#include <cmath>
#include <limits>

#include "kernels.h"
#include "shares.h"
#include "window_lanes.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

// Output channels at once: each vector of pixels that is read serves as many. With the 4 places of
// a 2x2 window that takes 16 accumulators of 32 registers, or 8 of 16.
constexpr int kChannels = kVectorRegisters == 32 ? 4 : 2;

template <typename T>
class FusedPool {
  using A = typename Accumulator<T>::type;

 public:
  FusedPool(const Conv2dProblem& conv, const MaxPool2dProblem& pool, const T* input,
            const T* weight, const T* bias, T* output, uint8_t* argmax, int threads)
      : conv_(conv),
        pool_(pool),
        input_(input),
        weight_(weight),
        bias_(bias),
        output_(output),
        argmax_(argmax),
        threads_(threads),
        lanes_(conv, pool),
        taps_(conv.C * conv.R * conv.S),
        places_(pool.R * pool.S),
        blocks_(ceil_div(conv.K, kChannels)),
        flat_(kSame<T, A> && pool.output.w == 1 && pool.output.h == pool.Q) {}

  void run() {
    const ThreadScratch memory(
        threads_, [&](Carver& carver) { carve_shared(carver); },
        [&](Carver& carver) { carve(carver); });
    find_offsets(lanes_, conv_, pool_, tap_offsets_, place_offsets_);
    pack_weights();
    const bool square = flat_ && lanes_.is_square();
    // Where channels lie side by side, two threads would write to the same lines.
    const int64_t groups = flat_ ? channel_groups(conv_.K, threads_) : 1;
    const int64_t bands = conv_.N * lanes_.bands();
    parallel_shares(groups * bands, threads_, [&](int64_t task, int thread) {
      Carver own = memory.of(thread);
      const Scratch scratch = carve(own);
      const int64_t group = task / bands, band = task % bands;
      Part part;
      part.n = band / lanes_.bands();
      part.begin = band % lanes_.bands() * lanes_.band();
      part.end = min_of(pool_.P, part.begin + lanes_.band());
      part.begin_k = group * blocks_ / groups * kChannels;
      part.end_k = min_of(conv_.K, (group + 1) * blocks_ / groups * kChannels);
      const T* image = input_ + part.n * conv_.input.n;
      const A largest = lanes_.fill(image, part.begin, part.end, scratch.lanes);
      // No NaN comes of sums that cannot reach infinity; comparing them takes half as long.
      if (!(largest * all_weights_ + all_biases_ < std::numeric_limits<A>::max() / 2)) {
        run_part<false>(part, scratch);
      } else if (square) {
        run_square(part, scratch);
      } else {
        run_part<true>(part, scratch);
      }
    });
  }

 private:
  struct Scratch {
    typename WindowLanes<T>::Scratch lanes;
    A* values;  // [blocks * kChannels][kLanes]
  };

  // Lines [begin, end) of the outputs of one image, in some of its channels.
  struct Part {
    int64_t n, begin, end, begin_k, end_k;
  };

  void carve_shared(Carver& carver) {
    tap_offsets_ = carver.template take<int64_t>(taps_);
    place_offsets_ = carver.template take<int64_t>(places_);
    weights_ = carver.template take<A>(blocks_ * (taps_ + 1) * kChannels);
  }

  Scratch carve(Carver& carver) const {
    Scratch scratch;
    scratch.lanes = lanes_.carve(carver);
    scratch.values = carver.template take<A>(blocks_ * kChannels * kLanes<A>);
    return scratch;
  }

  // [block][bias, taps][kChannels]
  void pack_weights() {
    A* to = weights_;
    all_weights_ = all_biases_ = 0;
    for (int64_t k0 = 0; k0 < blocks_ * kChannels; k0 += kChannels) {
      for (int64_t t = -1; t < taps_; ++t) {
        for (int64_t k = k0; k < k0 + kChannels; ++k, ++to) {
          *to = k < conv_.K ? weight_at(k, t) : A(0);
          (t < 0 ? all_biases_ : all_weights_) += std::abs(*to);
        }
      }
    }
  }

  A weight_at(int64_t k, int64_t tap) const {
    if (tap < 0) return bias_ == nullptr ? A(0) : widen(bias_[k]);
    const int64_t s = tap % conv_.S, r = tap / conv_.S % conv_.R, c = tap / conv_.S / conv_.R;
    return widen(
        weight_[k * conv_.weight.n + c * conv_.weight.c + r * conv_.weight.h + s * conv_.weight.w]);
  }

  template <bool kNumbers>
  void run_part(const Part& part, const Scratch& scratch) const {
    const int64_t first = part.begin * pool_.Q, count = (part.end - part.begin) * pool_.Q;
    T* image = output_ + part.n * pool_.output.n;
    uint8_t* places = argmax_ + part.n * conv_.K * pool_.P * pool_.Q + first;
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const int64_t rest = min_of(kLanes<A>, count - i);
      const A* from = scratch.lanes.stretches + i;
      for (int64_t k0 = part.begin_k; k0 < part.end_k; k0 += kChannels) {
        Best<A> best[kChannels];
        if (places_ % 4 == 0) {
          find_best<4, kNumbers>(from, k0, best);
        } else if (places_ % 3 == 0) {
          find_best<3, kNumbers>(from, k0, best);
        } else {
          find_best<1, kNumbers>(from, k0, best);
        }
#pragma GCC unroll 4
        for (int k = 0; k < kChannels; ++k) {
          if (k0 + k >= conv_.K) break;
          A* values = scratch.values + (k0 + k) * kLanes<A>;
          if (flat_ && rest == kLanes<A>) {
            values = reinterpret_cast<A*>(image + (k0 + k) * pool_.output.c + first + i);
          }
          store<A>(values, best[k].value);
          store_few_places(places + (k0 + k) * pool_.P * pool_.Q + i, best[k].place, rest);
        }
      }
      if (!flat_ || rest < kLanes<A>) write_out(image, first + i, rest, part, scratch.values);
    }
  }

  // Some channels after another, whose weights stay close. Only for flat_ outputs.
  void run_square(const Part& part, const Scratch& scratch) const {
    const int64_t first = part.begin * pool_.Q, count = (part.end - part.begin) * pool_.Q;
    const int64_t plane = pool_.P * pool_.Q;
    for (int64_t k0 = part.begin_k; k0 < part.end_k; k0 += kChannels) {
      T* values = output_ + part.n * pool_.output.n + k0 * pool_.output.c + first;
      uint8_t* places = argmax_ + (part.n * conv_.K + k0) * plane + first;
      Best<A> best[kChannels];
      int64_t i = 0;
      if (k0 + kChannels <= part.end_k) {
        for (; i + kLanes<A> <= count; i += kLanes<A>) {
          find_best_of_square(scratch.lanes.stretches + i, k0, best);
#pragma GCC unroll 4
          for (int k = 0; k < kChannels; ++k) {
            store<A>(reinterpret_cast<A*>(values + k * pool_.output.c + i), best[k].value);
          }
#pragma GCC unroll 2
          for (int k = 0; k < kChannels; k += 2) {
            uint8_t* to = places + k * plane + i;
            store_two_places<A>(to, to + plane, best[k].place, best[k + 1].place);
          }
        }
      }
      for (; i < count; i += kLanes<A>) {
        find_best_of_square(scratch.lanes.stretches + i, k0, best);
        const int64_t rest = min_of(kLanes<A>, count - i);
        for (int64_t k = 0; k < min_of(kChannels, part.end_k - k0); ++k) {
          for (int64_t x = 0; x < rest; ++x) {
            values[k * pool_.output.c + i + x] = narrow<T>(best[k].value[x]);
          }
          store_few_places(places + k * plane + i, best[k].place, rest);
        }
      }
    }
  }

  void store_few_places(uint8_t* to, Places<A> places, int64_t count) const {
    if (count == kLanes<A>) return store_places<A>(to, places);
    uint8_t few[kLanes<A>];
    store_places<A>(few, places);
    std::memcpy(to, few, count);
  }

  // The largest of 2x2 values that a 3x3 kernel makes of 4x4 pixels in each channel, all finite.
  GDFAST_INLINE void find_best_of_square(const A* from, int64_t k0,
                                         Best<A> (&best)[kChannels]) const {
    const A* weights = weights_ + k0 * (taps_ + 1);
    const int64_t step = lanes_.length();
    Vec<A> sum[kChannels][2][2];
#pragma GCC unroll 4
    for (int k = 0; k < kChannels; ++k) {
      sum[k][0][0] = sum[k][0][1] = sum[k][1][0] = sum[k][1][1] = broadcast(weights[k]);
    }
    for (int64_t c = 0; c < conv_.C; ++c, from += 16 * step) {
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        const A *above = from + r * 4 * step, *below = above + 4 * step;
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          weights += kChannels;
          const Vec<A> pixel[2][2] = {{load(above + s * step), load(above + (s + 1) * step)},
                                      {load(below + s * step), load(below + (s + 1) * step)}};
#pragma GCC unroll 4
          for (int k = 0; k < kChannels; ++k) {
            Vec<A> weight = broadcast(weights[k]);
            keep_in_register<A>(weight);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) sum[k][j / 2][j % 2] += weight * pixel[j / 2][j % 2];
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kChannels; ++k) best[k] = best_of_four(sum[k]);
  }

  // Of equal values the first.
  static GDFAST_INLINE Best<A> best_of_four(const Vec<A> (&sum)[2][2]) {
    const Places<A> right_above = sum[0][1] > sum[0][0], right_below = sum[1][1] > sum[1][0];
    const Vec<A> above = right_above ? sum[0][1] : sum[0][0];
    const Vec<A> below = right_below ? sum[1][1] : sum[1][0];
    const Places<A> is_below = below > above;
    const Places<A> right = is_below ? right_below : right_above;
    // A mask of all bits set is the number -1.
    Best<A> best = {is_below ? below : above, -(is_below + is_below + right)};
    best.clamp();
    return best;
  }

  // Values of kPlaces places of each window at a time, a divisor of their number.
  template <int kPlaces, bool kNumbers>
  GDFAST_INLINE void find_best(const A* from, int64_t k0, Best<A> (&best)[kChannels]) const {
    const A* weights = weights_ + k0 * (taps_ + 1);
#pragma GCC unroll 4
    for (int k = 0; k < kChannels; ++k) best[k] = {Vec<A>{}, same_places<A>(kNowhere)};
    for (int64_t place = 0; place < places_; place += kPlaces) {
      const A* at[kPlaces];
      Vec<A> sum[kChannels][kPlaces];
#pragma GCC unroll 4
      for (int j = 0; j < kPlaces; ++j) {
        at[j] = from + place_offsets_[place + j];
#pragma GCC unroll 4
        for (int k = 0; k < kChannels; ++k) sum[k][j] = broadcast(weights[k]);
      }
      for (int64_t t = 0; t < taps_; ++t) {
        const A* tap = weights + (t + 1) * kChannels;
        Vec<A> pixel[kPlaces];
#pragma GCC unroll 4
        for (int j = 0; j < kPlaces; ++j) pixel[j] = load(at[j] + tap_offsets_[t]);
#pragma GCC unroll 4
        for (int k = 0; k < kChannels; ++k) {
          Vec<A> weight = broadcast(tap[k]);
          keep_in_register<A>(weight);  // it serves kPlaces products
#pragma GCC unroll 4
          for (int j = 0; j < kPlaces; ++j) sum[k][j] += weight * pixel[j];
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kPlaces; ++j) {
#pragma GCC unroll 4
        for (int k = 0; k < kChannels; ++k) {
          best[k].template offer<kNumbers>(rounded<T, A>(sum[k][j]), same_places<A>(place + j));
        }
      }
    }
  }

  // Values of a part's channels of outputs [first, first + count) of an image.
  void write_out(T* image, int64_t first, int64_t count, const Part& part, const A* values) const {
    for (int64_t x = 0; x < count; ++x) {
      T* to =
          image + (first + x) / pool_.Q * pool_.output.h + (first + x) % pool_.Q * pool_.output.w;
      for (int64_t k = part.begin_k; k < part.end_k; ++k) {
        to[k * pool_.output.c] = narrow<T>(values[k * kLanes<A> + x]);
      }
    }
  }

  const Conv2dProblem& conv_;
  const MaxPool2dProblem& pool_;
  const T* input_;
  const T* weight_;
  const T* bias_;
  T* output_;
  uint8_t* argmax_;
  int threads_;
  WindowLanes<T> lanes_;
  int64_t taps_, places_, blocks_;
  bool flat_;  // whether an image's outputs of one channel lie side by side
  int64_t* tap_offsets_;
  int64_t* place_offsets_;
  A* weights_;
  A all_weights_, all_biases_;  // sums of their magnitudes
};

}  // namespace

void conv2d_relu_max_pool2d(const Conv2dProblem& conv, const MaxPool2dProblem& pool,
                            const void* input, const void* weight, const void* bias, void* output,
                            uint8_t* argmax, int threads) {
  with_dtype(conv.dtype, [&](auto element) {
    using T = decltype(element);
    FusedPool<T>(conv, pool, static_cast<const T*>(input), static_cast<const T*>(weight),
                 static_cast<const T*>(bias), static_cast<T*>(output), argmax, threads)
        .run();
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
