// output = max_pool2d(relu(conv2d(input, weight) + bias)), and where in its window each value was,
// for few input channels and windows that do not overlap.
//
// The convolution's values exist in registers alone: vectors run over pooled outputs, and the
// values of a window's places follow each other, compared as they come. The commonest case, 2x2
// windows over a 3x3 kernel, has all four at once (pool_tiles.h).
#include <cmath>
#include <limits>

#include "kernels.h"
#include "pool_tiles.h"
#include "scratch_places.h"
#include "shares.h"
#include "window_lanes.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

// Output channels at once: each vector of pixels that is read serves as many. With the 4 places of
// a 2x2 window that takes 16 accumulators of 32 registers, or 8 of 16.
constexpr int kChannels = kVectorRegisters == 32 ? 4 : 2;
static_assert(kChannels % kTileChannels == 0, "a thread's channels begin with whole tiles");
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
        flat_(kSame<T, A> && pool.output.w == 1 && pool.output.h == pool.Q),
        has_tiles_(flat_ && lanes_.is_square()),
        tiles_(conv.C, lanes_.tiles_size()) {}

  void run() {
    const ThreadScratch memory(
        threads_,
        [&](Carver& carver) {
          carve_shared(carver);
          end_shared(carver);
        },
        [&](Carver& carver) {
          carve(carver);
          end_own(carver);
        });
    find_offsets(lanes_, conv_, pool_, tap_offsets_, place_offsets_);
    pack_weights();
    for (int thread = 0; thread < threads_; ++thread) {
      Carver own = memory.of(thread);
      *carve(own).has_weights = false;
    }
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
      if constexpr (kSame<T, A>) {
        if (has_tiles_ && run_tiles(part, scratch)) return;
      }
      // No NaN comes of sums that cannot reach infinity; comparing them takes half as long.
      if (is_finite(fill<false>(part, scratch))) {
        run_part<true>(part, scratch);
      } else {
        run_part<false>(part, scratch);
      }
    });
  }

 private:
  struct Scratch {
    typename WindowLanes<T>::Scratch lanes;
    A* values;  // [blocks * kChannels][kLanes]
    bool* has_weights;
    A* weights;  // of tiles, made by the thread that reads them
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
    scratch.has_weights = carver.template take<bool>(1);
    scratch.weights = carver.template take<A>(has_tiles_ ? tiles_.weights_size(conv_.K) : 0);
    return scratch;
  }

  // [block][bias, taps][kChannels]
  void pack_weights() {
    A* to = weights_;
    all_weights_ = all_biases_ = 0;
    for (int64_t k0 = 0; k0 < blocks_ * kChannels; k0 += kChannels) {
      for (int64_t t = -1; t < taps_; ++t) {
        for (int64_t k = k0; k < k0 + kChannels; ++k, ++to) {
          *to = weight_at(k, t);
          (t < 0 ? all_biases_ : all_weights_) += std::abs(*to);
        }
      }
    }
  }

  A weight_at(int64_t k, int64_t tap) const {
    if (k >= conv_.K) return A(0);
    if (tap < 0) return bias_ == nullptr ? A(0) : widen(bias_[k]);
    const int64_t s = tap % conv_.S, r = tap / conv_.S % conv_.R, c = tap / conv_.S / conv_.R;
    return widen(
        weight_[k * conv_.weight.n + c * conv_.weight.c + r * conv_.weight.h + s * conv_.weight.w]);
  }

  template <bool kTiles>
  A fill(const Part& part, const Scratch& scratch) const {
    const T* image = input_ + part.n * conv_.input.n;
    return lanes_.template fill<kTiles>(image, part.begin, part.end, scratch.lanes);
  }

  // Whether no sum of products with pixels up to a magnitude overflows.
  bool is_finite(A magnitude) const {
    return magnitude * all_weights_ + all_biases_ < std::numeric_limits<A>::max() / 64;
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

  // False, with nothing written, where values are so large that differences of pixels might
  // overflow or are not numbers.
  bool run_tiles(const Part& part, const Scratch& scratch) const {
    if (!is_finite(fill<true>(part, scratch))) return false;
    if (!*scratch.has_weights) {
      const auto weight = [&](int64_t k, int64_t tap) { return weight_at(k, tap); };
      tiles_.transform_weights(conv_.K, weight, scratch.weights);
      *scratch.has_weights = true;
    }
    const int64_t first = part.begin * pool_.Q, count = (part.end - part.begin) * pool_.Q;
    const int64_t plane = pool_.P * pool_.Q;
    tiles_.find_largest(scratch.lanes.tiles, scratch.weights, part.begin_k, part.end_k, count,
                        {output_ + part.n * pool_.output.n + first, pool_.output.c,
                         argmax_ + part.n * conv_.K * plane + first, plane});
    return true;
  }

  void store_few_places(uint8_t* to, Places<A> places, int64_t count) const {
    if (count == kLanes<A>) return store_places<A>(to, places);
    uint8_t few[kLanes<A>];
    store_places<A>(few, places);
    std::memcpy(to, few, count);
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
  bool flat_;       // whether an image's outputs of one channel lie side by side
  bool has_tiles_;  // whether there are tiles, and their values are of type T
  PoolTiles<A> tiles_;
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
