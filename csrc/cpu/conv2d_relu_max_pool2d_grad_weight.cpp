// grad_weight and grad_bias of max_pool2d(relu(conv2d(input, weight) + bias)), from the gradient of
// the pooled output alone: that of the convolution's output, nearly all zeros, is never written.
//
// Vectors run over pooled outputs, as in the forward kernel. Every block of images has sums of its
// own, which are added up in order: which thread made them does not matter.
#include "kernels.h"
#include "window_lanes.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

// Enough blocks for any number of threads, few enough that adding them up costs nothing.
constexpr int64_t kBlocks = 16;
constexpr uint8_t kNowhereStored = static_cast<uint8_t>(kNowhere);

template <typename T>
class FusedGrad {
  using A = typename Accumulator<T>::type;

 public:
  FusedGrad(const Conv2dProblem& conv, const MaxPool2dProblem& pool, const T* grad_output,
            const uint8_t* argmax, const T* input, T* grad_weight, T* grad_bias, int threads)
      : conv_(conv),
        pool_(pool),
        grad_output_(grad_output),
        argmax_(argmax),
        input_(input),
        grad_weight_(grad_weight),
        grad_bias_(grad_bias),
        threads_(threads),
        lanes_(conv, pool),
        taps_(conv.C * conv.R * conv.S),
        places_(pool.R * pool.S) {}

  void run() {
    const int64_t bands = conv_.N * lanes_.bands(), blocks = min_of(bands, kBlocks);
    const ThreadScratch memory(
        threads_, [&](Carver& carver) { carve_shared(carver, blocks); },
        [&](Carver& carver) { carve(carver); });
    find_offsets(lanes_, conv_, pool_, tap_offsets_, place_offsets_);
    parallel_for(blocks, threads_, [&](int64_t block, int thread) {
      Carver own = memory.of(thread);
      const Scratch scratch = carve(own);
      A* sums = sums_ + block * sums_size();
      std::memset(sums, 0, sums_size() * sizeof(A));
      for (int64_t band = block * bands / blocks; band < (block + 1) * bands / blocks; ++band) {
        const int64_t n = band / lanes_.bands(), begin = band % lanes_.bands() * lanes_.band();
        const int64_t end = min_of(pool_.P, begin + lanes_.band());
        lanes_.fill(input_ + n * conv_.input.n, begin, end, scratch.lanes);
        for (int64_t k = 0; k < conv_.K; ++k) {
          const Gradients grads = gradients(n, k, begin, end, scratch.line);
          add_products(grads, scratch, sums + k * (taps_ + 1) * kLanes<A>);
        }
      }
    });
    for (int64_t k = 0; k < conv_.K; ++k) write_out(k, blocks);
  }

 private:
  struct Scratch {
    typename WindowLanes<T>::Scratch lanes;
    A* line;  // one band of grad_output, where its own memory is not in that order and type
  };

  // One channel's band of grad_output, and the place in its window that each value goes to.
  struct Gradients {
    const A* values;
    const uint8_t* places;
    int64_t count;
  };

  int64_t sums_size() const { return conv_.K * (taps_ + 1) * kLanes<A>; }

  void carve_shared(Carver& carver, int64_t blocks) {
    tap_offsets_ = carver.template take<int64_t>(taps_);
    place_offsets_ = carver.template take<int64_t>(places_);
    sums_ = carver.template take<A>(blocks * sums_size());
  }

  Scratch carve(Carver& carver) const {
    Scratch scratch;
    scratch.lanes = lanes_.carve(carver);
    scratch.line = carver.template take<A>(lanes_.length());
    return scratch;
  }

  Gradients gradients(int64_t n, int64_t k, int64_t begin, int64_t end, A* line) const {
    const T* plane =
        grad_output_ + n * pool_.output.n + k * pool_.output.c + begin * pool_.output.h;
    const A* values = line;
    if constexpr (kSame<T, A>) {
      if (pool_.output.w == 1 && pool_.output.h == pool_.Q) values = plane;
    }
    if (values == line) {
      for (int64_t p = 0; p < end - begin; ++p) {
        copy_widened(plane + p * pool_.output.h, pool_.output.w, pool_.Q, line + p * pool_.Q);
      }
    }
    const uint8_t* places = argmax_ + (n * conv_.K + k) * pool_.P * pool_.Q + begin * pool_.Q;
    return {values, places, (end - begin) * pool_.Q};
  }

  // Adds the products of one channel's gradients with what each tap saw: [bias, taps][kLanes].
  void add_products(const Gradients& grads, const Scratch& scratch, A* sums) const {
    int64_t t = 0;
    if (conv_.R == 3 && conv_.S == 3) {
      add_taps<9, true>(grads, scratch, t, sums);
      for (t = 9; t < taps_; t += 9) add_taps<9, false>(grads, scratch, t, sums);
      return;
    }
    add_taps<0, true>(grads, scratch, t, sums);
    for (; t + 8 <= taps_; t += 8) add_taps<8, false>(grads, scratch, t, sums);
    for (; t < taps_; ++t) add_taps<1, false>(grads, scratch, t, sums);
  }

  // kTaps taps from the first on, and the bias. The 9 are those of a 3x3 kernel, whose rows have
  // one distance between their taps: three addresses and a distance fit the registers, nine do not.
  template <int kTaps, bool kBias>
  void add_taps(const Gradients& grads, const Scratch& scratch, int64_t first, A* sums) const {
    constexpr bool kRows = kTaps == 9;
    constexpr int kAddresses = kRows ? 3 : (kTaps > 1 ? kTaps : 1), kSums = kTaps > 1 ? kTaps : 1;
    A* to = sums + (first + 1) * kLanes<A>;
    const A* at[kAddresses];
    Vec<A> sum[kSums], bias_sum{};
    const int64_t step = kRows ? tap_offsets_[first + 1] - tap_offsets_[first] : 0;
#pragma GCC unroll 8
    for (int i = 0; i < kAddresses && kTaps > 0; ++i) {
      at[i] = scratch.lanes.stretches + tap_offsets_[first + i * (kRows ? 3 : 1)];
    }
#pragma GCC unroll 9
    for (int t = 0; t < kTaps; ++t) sum[t] = load(to + t * kLanes<A>);
    if constexpr (kBias) bias_sum = load(sums);
    const auto add = [&](Vec<A> grad, Places<A> place, int64_t i) __attribute__((always_inline)) {
      if constexpr (kBias) {
        bias_sum += place == same_places<A>(kNowhereStored) ? Vec<A>{} : grad;
      }
      // Each gradient belongs to one place; at the others it counts as zero.
      for (int64_t j = 0; j < places_ && kTaps > 0; ++j) {
        const Vec<A> taken = place == same_places<A>(j) ? grad : Vec<A>{};
        const int64_t offset = place_offsets_[j] + i;
#pragma GCC unroll 9
        for (int t = 0; t < kTaps; ++t) {
          sum[t] += taken * load(kRows ? at[t / 3] + offset + t % 3 * step : at[t] + offset);
        }
      }
    };
    int64_t i = 0;
    for (; i + kLanes<A> <= grads.count; i += kLanes<A>) {
      add(load(grads.values + i), load_places<A>(grads.places + i), i);
    }
    if (i < grads.count) {
      A values[kLanes<A>] = {};
      uint8_t places[kLanes<A>];
      for (int64_t x = 0; x < kLanes<A>; ++x) {
        const bool is_one = i + x < grads.count;
        if (is_one) values[x] = grads.values[i + x];
        places[x] = is_one ? grads.places[i + x] : kNowhereStored;
      }
      add(load(values), load_places<A>(places), i);
    }
#pragma GCC unroll 9
    for (int t = 0; t < kTaps; ++t) store<A>(to + t * kLanes<A>, sum[t]);
    if constexpr (kBias) store<A>(sums, bias_sum);
  }

  void write_out(int64_t k, int64_t blocks) const {
    for (int64_t t = 0; t <= taps_; ++t) {
      Vec<A> sum{};
      for (int64_t block = 0; block < blocks; ++block) {
        sum += load(sums_ + block * sums_size() + (k * (taps_ + 1) + t) * kLanes<A>);
      }
      A total = 0;
      for (int lane = 0; lane < kLanes<A>; ++lane) total += sum[lane];
      if (t == 0) {
        if (grad_bias_ != nullptr) grad_bias_[k] = narrow<T>(total);
        continue;
      }
      const int64_t s = (t - 1) % conv_.S, r = (t - 1) / conv_.S % conv_.R;
      const int64_t c = (t - 1) / conv_.S / conv_.R;
      grad_weight_[k * conv_.weight.n + c * conv_.weight.c + r * conv_.weight.h +
                   s * conv_.weight.w] = narrow<T>(total);
    }
  }

  const Conv2dProblem& conv_;
  const MaxPool2dProblem& pool_;
  const T* grad_output_;
  const uint8_t* argmax_;
  const T* input_;
  T* grad_weight_;
  T* grad_bias_;
  int threads_;
  WindowLanes<T> lanes_;
  int64_t taps_, places_;
  int64_t* tap_offsets_;
  int64_t* place_offsets_;
  A* sums_;  // [blocks][K][bias, taps][kLanes]
};

}  // namespace

void conv2d_relu_max_pool2d_grad_weight(const Conv2dProblem& conv, const MaxPool2dProblem& pool,
                                        const void* grad_output, const uint8_t* argmax,
                                        const void* input, void* grad_weight, void* grad_bias,
                                        int threads) {
  with_dtype(conv.dtype, [&](auto element) {
    using T = decltype(element);
    FusedGrad<T>(conv, pool, static_cast<const T*>(grad_output), argmax,
                 static_cast<const T*>(input), static_cast<T*>(grad_weight),
                 static_cast<T*>(grad_bias), threads)
        .run();
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
