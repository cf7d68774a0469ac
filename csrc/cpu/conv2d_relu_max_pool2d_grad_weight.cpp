// grad_weight and grad_bias of max_pool2d(relu(conv2d(input, weight) + bias)), from the gradient of
// the pooled output alone: that of the convolution's output, nearly all zeros, is never written.
//
// Vectors run over pooled outputs, as in the forward kernel. Every block of images has sums of its
// own, which are added up in order: which thread made them does not matter.
//
// Of the four gradients of a tile of F(2x2, 3x3) one is not zero, so that those that its factors
// are multiplied by are that one or its negative.
#include "kernels.h"
#include "lane_sums.h"
#include "scratch_places.h"
#include "shares.h"
#include "window_lanes.h"
#include "window_masks.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

// Enough blocks for any number of threads, few enough that adding them up costs nothing.
constexpr int64_t kBlocks = 8;
// Rows of a tile whose 4 sums each stay in registers, beside what makes up their factors.
constexpr int kTileRows = kVectorRegisters == 32 ? 4 : 2;

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
        places_(pool.R * pool.S),
        tile_(lanes_.is_square() ? 16 * conv.C : 0) {}

  void run() {
    const int64_t bands = conv_.N * lanes_.bands(), blocks = min_of(bands, kBlocks);
    const ThreadScratch memory(
        threads_,
        [&](Carver& carver) {
          carve_shared(carver, blocks);
          end_shared(carver);
        },
        [&](Carver& carver) {
          carve(carver);
          end_own(carver);
        });
    find_offsets(lanes_, conv_, pool_, tap_offsets_, place_offsets_);
    const int64_t groups = channel_groups(conv_.K, threads_);
    parallel_shares(groups * blocks, threads_, [&](int64_t task, int thread) {
      Carver own = memory.of(thread);
      const Scratch scratch = carve(own);
      const int64_t group = task / blocks, block = task % blocks;
      const int64_t begin_k = group * conv_.K / groups, end_k = (group + 1) * conv_.K / groups;
      std::memset(scratch.sums, 0, conv_.K * sums_size() * sizeof(A));
      for (int64_t band = block * bands / blocks; band < (block + 1) * bands / blocks; ++band) {
        const int64_t n = band / lanes_.bands(), begin = band % lanes_.bands() * lanes_.band();
        const int64_t end = min_of(pool_.P, begin + lanes_.band());
        const T* image = input_ + n * conv_.input.n;
        // Differences of pixels must not overflow, nor spread what is not finite.
        const bool tiles =
            tile_ > 0 && lanes_.template fill<true>(image, begin, end, scratch.lanes) <
                             std::numeric_limits<A>::max() / (1LL << 32);
        if (!tiles) lanes_.template fill<false>(image, begin, end, scratch.lanes);
        for (int64_t k = begin_k; k < end_k; ++k) {
          const Gradients grads = gradients(n, k, begin, end, scratch.line);
          A* sums = scratch.sums + k * sums_size();
          if (tiles) {
            add_tiles(grads, scratch.lanes.tiles, sums + (taps_ + 1) * kLanes<A>, sums);
          } else {
            add_products(grads, scratch, sums);
          }
        }
      }
      for (int64_t k = begin_k; k < end_k; ++k) {
        add_up(scratch.sums + k * sums_size(), totals_ + (block * conv_.K + k) * (taps_ + 1));
      }
    });
    for (int64_t k = 0; k < conv_.K; ++k) write_out(k, blocks);
  }

 private:
  struct Scratch {
    typename WindowLanes<T>::Scratch lanes;
    A* line;  // one band of grad_output, where its own memory is not in that order and type
    A* sums;  // [K][bias, taps, tiles][kLanes]
  };

  // One channel's band of grad_output, and the place in its window that each value goes to.
  struct Gradients {
    const A* values;
    const uint8_t* places;
    int64_t count;
    bool whole;  // whether there is memory behind them for a whole vector
  };

  int64_t sums_size() const { return (1 + taps_ + tile_) * kLanes<A>; }

  void carve_shared(Carver& carver, int64_t blocks) {
    tap_offsets_ = carver.template take<int64_t>(taps_);
    place_offsets_ = carver.template take<int64_t>(places_);
    totals_ = carver.template take<A>(blocks * conv_.K * (taps_ + 1));
  }

  Scratch carve(Carver& carver) const {
    Scratch scratch;
    scratch.lanes = lanes_.carve(carver);
    scratch.line = carver.template take<A>(lanes_.length());
    scratch.sums = carver.template take<A>(conv_.K * sums_size());
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
    const int64_t size = pool_.P * pool_.Q;
    // In the planes after this one and the lines after this band.
    const int64_t planes = (conv_.N - 1 - n) * conv_.K + conv_.K - 1 - k;
    const int64_t behind = planes * size + (pool_.P - end) * pool_.Q;
    const bool dense = pool_.output.c == size && pool_.output.n == conv_.K * size;
    const bool whole = behind >= kLanes<A> - 1 && (values == line || dense);
    return {values, places, (end - begin) * pool_.Q, whole};
  }

  // Adds the products of one channel's gradients with the factors of tiles: [C][4][4][kLanes].
  void add_tiles(const Gradients& grads, const A* factors, A* sums, A* bias) const {
    if constexpr (kHasMasks<T>) {
      if (conv_.C == 1) {
        return add_gradients_of_tiles(grads.values, grads.places, grads.count, factors, sums, bias);
      }
    }
    for (int64_t c = 0; c < conv_.C; ++c, sums += 16 * kLanes<A>) {
      add_tile_rows<0>(grads, factors, sums, c == 0 ? bias : nullptr);
      if constexpr (kTileRows == 2) add_tile_rows<2>(grads, factors, sums, nullptr);
      factors += lanes_.tiles_size();
    }
  }

  // Rows [kFirst, kFirst + kTileRows).
  template <int kFirst>
  void add_tile_rows(const Gradients& grads, const A* factors, A* sums, A* bias) const {
    Vec<A> sum[kTileRows][4], bias_sum{};
#pragma GCC unroll 16
    for (int i = 0; i < 4 * kTileRows; ++i) {
      sum[i / 4][i % 4] = load(sums + (kFirst * 4 + i) * kLanes<A>);
    }
    const auto add = [&](Vec<A> grad, Places<A> place, int64_t at) __attribute__((always_inline)) {
      // Place 2 * a + b has row a and column b of the window.
      const Places<A> one = same_places<A>(1), a = place > one, b = (place & one) == one;
      const auto only = [](Vec<A> value, Places<A> mask) __attribute__((always_inline)) {
        return (Vec<A>)((Places<A>)value & mask);
      };
      const Vec<A> g = only(grad, place >= Places<A>{});
      // A y of the two gradients y of a column or row, but the last with the other sign.
      // Differences are exact, of a number and itself or 0, and need neither more masks nor their
      // units.
      const Vec<A> last_row = only(g, a), first_row = g - last_row;
      const Vec<A> rows[4] = {first_row, g, first_row - last_row, last_row};
      if constexpr (kFirst == 0) bias_sum += g;
      const A* factor = factors + at * 16 + kFirst * 4 * kLanes<A>;
#pragma GCC unroll 4
      for (int y = 0; y < kTileRows; ++y, factor += 4 * kLanes<A>) {
        const Vec<A> row = rows[kFirst + y], last = only(row, b), first = row - last;
        sum[y][0] += first * load(factor);
        sum[y][1] += row * load(factor + kLanes<A>);
        sum[y][2] += (first - last) * load(factor + 2 * kLanes<A>);
        sum[y][3] += last * load(factor + 3 * kLanes<A>);
      }
    };
    for_vectors<int8_t>(grads, add);
#pragma GCC unroll 16
    for (int i = 0; i < 4 * kTileRows; ++i) {
      store<A>(sums + (kFirst * 4 + i) * kLanes<A>, sum[i / 4][i % 4]);
    }
    if (bias != nullptr) store<A>(bias, load(bias) + bias_sum);
  }

  // Calls add with gradients, their places read as type I, and the index of the first of them.
  template <typename I, typename Add>
  GDFAST_INLINE void for_vectors(const Gradients& grads, const Add& add) const {
    const I* places = reinterpret_cast<const I*>(grads.places);
    int64_t i = 0;
    for (; i + kLanes<A> <= grads.count; i += kLanes<A>) {
      add(load(grads.values + i), load_places<A>(places + i), i);
    }
    if (i < grads.count) {
      A values[kLanes<A>] = {};
      I few[kLanes<A>] = {};
      Places<A> lane;
      for (int x = 0; x < kLanes<A>; ++x) lane[x] = x;
      const int64_t rest = grads.count - i;
      if (!grads.whole) {
        std::memcpy(values, grads.values + i, rest * sizeof(A));
        std::memcpy(few, places + i, rest);
      }
      const Vec<A> grad = load(grads.whole ? grads.values + i : values);
      const Places<A> place = load_places<A>(grads.whole ? places + i : few);
      add(grad, lane < same_places<A>(rest) ? place : same_places<A>(I(kNowhere)), i);
    }
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
        bias_sum += place == same_places<A>(uint8_t(kNowhere)) ? Vec<A>{} : grad;
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
    for_vectors<uint8_t>(grads, add);
#pragma GCC unroll 9
    for (int t = 0; t < kTaps; ++t) store<A>(to + t * kLanes<A>, sum[t]);
    if constexpr (kBias) store<A>(sums, bias_sum);
  }

  // Adds up the lanes of one channel's sums: bias, taps. Those of a tile m are G^T m G of the taps.
  void add_up(A* sums, A* totals) const {
    for (int64_t c = 0; c < tile_ / 16; ++c) {
      const A* tile = sums + (1 + taps_ + c * 16) * kLanes<A>;
      Vec<A> rows[3][4];
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        const auto at = [&](int y) { return load(tile + (y * 4 + x) * kLanes<A>); };
        combine(at(0), at(1), at(2), at(3), rows[0][x], rows[1][x], rows[2][x]);
      }
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        Vec<A> taps[3];
        combine(rows[r][0], rows[r][1], rows[r][2], rows[r][3], taps[0], taps[1], taps[2]);
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          A* to = sums + (1 + c * 9 + r * 3 + s) * kLanes<A>;
          store<A>(to, load(to) + taps[s]);
        }
      }
    }
    for (int64_t t = 0; t <= taps_; ++t) {
      totals[t] = sum_lanes<A>(load(sums + t * kLanes<A>));
    }
  }

  static GDFAST_INLINE void combine(Vec<A> m0, Vec<A> m1, Vec<A> m2, Vec<A> m3, Vec<A>& first,
                                    Vec<A>& second, Vec<A>& third) {
    const Vec<A> half = (m1 + m2) * A(0.5);
    first = m0 + half;
    second = (m1 - m2) * A(0.5);
    third = half - m3;
  }

  void write_out(int64_t k, int64_t blocks) const {
    for (int64_t t = 0; t <= taps_; ++t) {
      A total = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        total += totals_[(block * conv_.K + k) * (taps_ + 1) + t];
      }
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
  int64_t tile_;  // sums of all channels' tiles, 0 where there are none
  int64_t* tap_offsets_;
  int64_t* place_offsets_;
  A* totals_;  // [blocks][K][bias, taps]
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
