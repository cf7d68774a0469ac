// output = max_pool2d(relu(conv2d(input, weight) + bias)), and where in its window each value was,
// for few input channels and windows that do not overlap.
//
// The convolution's values exist in registers alone: vectors run over pooled outputs, and the
// values of a window's places follow each other, compared as they come.
#include <cmath>
#include <limits>

#include "kernels.h"
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
        blocks_(ceil_div(conv.K, kChannels)) {}

  void run() {
    const ThreadScratch memory(
        threads_, [&](Carver& carver) { carve_shared(carver); },
        [&](Carver& carver) { carve(carver); });
    find_offsets(lanes_, conv_, pool_, tap_offsets_, place_offsets_);
    pack_weights();
    parallel_for(conv_.N * lanes_.bands(), threads_, [&](int64_t task, int thread) {
      Carver own = memory.of(thread);
      const Scratch scratch = carve(own);
      const int64_t n = task / lanes_.bands(), begin = task % lanes_.bands() * lanes_.band();
      const int64_t end = min_of(pool_.P, begin + lanes_.band());
      const A largest = lanes_.fill(input_ + n * conv_.input.n, begin, end, scratch.lanes);
      // No NaN comes of sums that cannot reach infinity; comparing them takes half as long.
      if (largest * all_weights_ + all_biases_ < std::numeric_limits<A>::max() / 2) {
        run_band<true>(n, begin, end, scratch);
      } else {
        run_band<false>(n, begin, end, scratch);
      }
    });
  }

 private:
  struct Scratch {
    typename WindowLanes<T>::Scratch lanes;
    A* values;  // [blocks * kChannels][kLanes]
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
  void run_band(int64_t n, int64_t begin, int64_t end, const Scratch& scratch) const {
    const int64_t first = begin * pool_.Q, count = (end - begin) * pool_.Q;
    const bool flat = kSame<T, A> && pool_.output.w == 1 && pool_.output.h == pool_.Q;
    T* image = output_ + n * pool_.output.n;
    uint8_t* places = argmax_ + n * conv_.K * pool_.P * pool_.Q + first;
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      const int64_t rest = min_of(kLanes<A>, count - i);
      const A* from = scratch.lanes.stretches + i;
      for (int64_t k0 = 0; k0 < conv_.K; k0 += kChannels) {
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
          uint8_t* to = places + (k0 + k) * pool_.P * pool_.Q + i;
          if (rest == kLanes<A>) {
            if (flat) values = reinterpret_cast<A*>(image + (k0 + k) * pool_.output.c + first + i);
            store_places<A>(to, best[k].place);
          } else {
            uint8_t few[kLanes<A>];
            store_places<A>(few, best[k].place);
            for (int64_t x = 0; x < rest; ++x) to[x] = few[x];
          }
          store<A>(values, best[k].value);
        }
      }
      if (!flat || rest < kLanes<A>) write_out(image, first + i, rest, scratch.values);
    }
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

  // Values of all channels of outputs [first, first + count) of an image.
  void write_out(T* image, int64_t first, int64_t count, const A* values) const {
    for (int64_t x = 0; x < count; ++x) {
      T* to =
          image + (first + x) / pool_.Q * pool_.output.h + (first + x) % pool_.Q * pool_.output.w;
      for (int64_t k = 0; k < conv_.K; ++k) {
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
