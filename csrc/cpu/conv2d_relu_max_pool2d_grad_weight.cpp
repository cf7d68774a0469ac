// grad_weight and grad_bias of max_pool2d(relu(conv2d(input, weight) + bias)), from the gradient of
// the pooled output alone: that of the convolution's output, nearly all zeros, is never written.
//
// Vectors run over pooled outputs, as in the forward kernel. Every block of images has sums of its
// own, which are added up in order: which thread made them does not matter.
//
// A 2x2 window and the 4x4 pixels that a 3x3 kernel sees from it are a tile of F(2x2, 3x3) (Lavin
// and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016): 16 products instead of
// 36, whose factors are differences and sums of two pixels in either direction. Of the window's
// four gradients one is not zero, so that those of the tile are that one or its negative.
#include "kernels.h"
#include "shares.h"
#include "window_lanes.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

// Enough blocks for any number of threads, few enough that adding them up costs nothing.
constexpr int64_t kBlocks = 8;
// Rows of a tile whose 4 sums each stay in registers, beside what makes up their factors.
constexpr int kTileRows = kVectorRegisters == 32 ? 4 : 2;
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
        places_(pool.R * pool.S),
        tile_(lanes_.is_square() ? 16 * conv.C : 0) {}

  void run() {
    const int64_t bands = conv_.N * lanes_.bands(), blocks = min_of(bands, kBlocks);
    const ThreadScratch memory(
        threads_, [&](Carver& carver) { carve_shared(carver, blocks); },
        [&](Carver& carver) { carve(carver); });
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
        const A largest = lanes_.fill(input_ + n * conv_.input.n, begin, end, scratch.lanes);
        // Differences of pixels must not overflow, nor spread what is not finite.
        const bool tiles = tile_ > 0 && largest < std::numeric_limits<A>::max() / (1LL << 32);
        if (tiles) transform_pixels((end - begin) * pool_.Q, scratch);
        for (int64_t k = begin_k; k < end_k; ++k) {
          const Gradients grads = gradients(n, k, begin, end, scratch.line);
          A* sums = scratch.sums + k * sums_size();
          if (tiles) {
            add_tiles(grads, scratch.tiles, sums + (taps_ + 1) * kLanes<A>, sums);
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
    A* tiles;  // [C][vectors of a band][4][4][kLanes]
    A* line;   // one band of grad_output, where its own memory is not in that order and type
    A* sums;   // [K][bias, taps, tiles][kLanes]
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
    scratch.tiles = carver.template take<A>(tile_ * lanes_.length());
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

  // What the gradients of tiles are multiplied by: B^T d B of the pixels d, for `count` outputs.
  void transform_pixels(int64_t count, const Scratch& scratch) const {
    const int64_t step = lanes_.length();
    A* to = scratch.tiles;
    for (int64_t c = 0; c < conv_.C; ++c) {
      for (int64_t i = 0; i < count; i += kLanes<A>, to += 16 * kLanes<A>) {
        const A* from = scratch.lanes.stretches + c * 16 * step + i;
        Vec<A> rows[4][4];
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x) {
          const Vec<A> d0 = load(from + x * step), d1 = load(from + (4 + x) * step);
          const Vec<A> d2 = load(from + (8 + x) * step), d3 = load(from + (12 + x) * step);
          rows[0][x] = d0 - d2;
          rows[1][x] = d1 + d2;
          rows[2][x] = d2 - d1;
          rows[3][x] = d1 - d3;
        }
#pragma GCC unroll 4
        for (int y = 0; y < 4; ++y) {
          A* row = to + y * 4 * kLanes<A>;
          store<A>(row, rows[y][0] - rows[y][2]);
          store<A>(row + kLanes<A>, rows[y][1] + rows[y][2]);
          store<A>(row + 2 * kLanes<A>, rows[y][2] - rows[y][1]);
          store<A>(row + 3 * kLanes<A>, rows[y][1] - rows[y][3]);
        }
      }
    }
  }

  // Adds the products of one channel's gradients with transformed pixels: [C][4][4][kLanes].
  void add_tiles(const Gradients& grads, const A* tiles, A* sums, A* bias) const {
    for (int64_t c = 0; c < conv_.C; ++c, sums += 16 * kLanes<A>) {
      add_tile_rows<0>(grads, tiles, sums, c == 0 ? bias : nullptr);
      if constexpr (kTileRows == 2) add_tile_rows<2>(grads, tiles, sums, nullptr);
      tiles += ceil_div(grads.count, kLanes<A>) * 16 * kLanes<A>;
    }
  }

  // Rows [kFirst, kFirst + kTileRows).
  template <int kFirst>
  void add_tile_rows(const Gradients& grads, const A* tiles, A* sums, A* bias) const {
    Vec<A> sum[kTileRows][4], bias_sum{};
#pragma GCC unroll 16
    for (int i = 0; i < 4 * kTileRows; ++i) {
      sum[i / 4][i % 4] = load(sums + (kFirst * 4 + i) * kLanes<A>);
    }
    const auto add = [&](Vec<A> grad, Places<A> place) __attribute__((always_inline)) {
      constexpr int kSign = 8 * sizeof(A) - 1;
      const Places<A> g = place == same_places<A>(kNowhereStored) ? Places<A>{} : (Places<A>)grad;
      // Place 2 * a + b has row a and column b of the window: as signs, and as masks.
      const Places<A> sign_a = place >> 1 << kSign, sign_b = place << kSign;
      const Places<A> a = sign_a < Places<A>{}, b = sign_b < Places<A>{};
      // A y of the two gradients y of a column or row, but the last with the other sign.
      const Places<A> rows[4] = {g & ~a, g, g ^ sign_a, g & a};
      if constexpr (kFirst == 0) bias_sum += (Vec<A>)g;
#pragma GCC unroll 4
      for (int y = 0; y < kTileRows; ++y) {
        const Places<A> row = rows[kFirst + y];
        const Places<A> factors[4] = {row & ~b, row, row ^ sign_b, row & b};
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x) {
          sum[y][x] += (Vec<A>)factors[x] * load(tiles + ((kFirst + y) * 4 + x) * kLanes<A>);
        }
      }
      tiles += 16 * kLanes<A>;
    };
    for_vectors(grads, [&](Vec<A> grad, Places<A> place, int64_t)
                           __attribute__((always_inline)) { add(grad, place); });
#pragma GCC unroll 16
    for (int i = 0; i < 4 * kTileRows; ++i) {
      store<A>(sums + (kFirst * 4 + i) * kLanes<A>, sum[i / 4][i % 4]);
    }
    if (bias != nullptr) store<A>(bias, load(bias) + bias_sum);
  }

  // Calls add with gradients, their places and the index of the first of them.
  template <typename Add>
  GDFAST_INLINE void for_vectors(const Gradients& grads, const Add& add) const {
    int64_t i = 0;
    for (; i + kLanes<A> <= grads.count; i += kLanes<A>) {
      add(load(grads.values + i), load_places<A>(grads.places + i), i);
    }
    if (i < grads.count) {
      A values[kLanes<A>] = {};
      uint8_t places[kLanes<A>] = {};
      Places<A> lane;
      for (int x = 0; x < kLanes<A>; ++x) lane[x] = x;
      const int64_t rest = grads.count - i;
      if (!grads.whole) {
        std::memcpy(values, grads.values + i, rest * sizeof(A));
        std::memcpy(places, grads.places + i, rest);
      }
      const Vec<A> grad = load(grads.whole ? grads.values + i : values);
      const Places<A> place = load_places<A>(grads.whole ? grads.places + i : places);
      add(grad, lane < same_places<A>(rest) ? place : same_places<A>(kNowhereStored), i);
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
    for_vectors(grads, add);
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
      A total = 0;
      for (int lane = 0; lane < kLanes<A>; ++lane) total += sums[t * kLanes<A> + lane];
      totals[t] = total;
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
