// The largest of the four values in each 2x2 window of convolutions with a 3x3 kernel, and where it
// was: a window is a tile of F(2x2, 3x3), whose factors window_lanes.h makes of the pixels. Vectors
// run over windows, and a tile's values exist in registers alone.
#pragma once

#include "window_masks.h"

namespace gdfast::cpu {
namespace {

// Output channels at once, and vectors of windows one after another, whose places are stored
// together.
constexpr int kTileChannels = 2;
constexpr int kTileVectors = 2;

template <typename A>
class PoolTiles {
 public:
  // Where the values of output channels go, and where in their windows they were: what belongs to a
  // channel lies one step after what belongs to the channel before.
  struct Outputs {
    A* values;
    int64_t values_step;
    uint8_t* places;
    int64_t places_step;

    Outputs from_channel(int64_t k) const {
      return {values + k * values_step, values_step, places + k * places_step, places_step};
    }
  };

  // For so many channels of the input, whose factors lie `step` apart.
  PoolTiles(int64_t channels, int64_t step) : channels_(channels), step_(step) {}

  // Elements that transform_weights writes.
  int64_t weights_size(int64_t outputs) const { return round_up(outputs, kTileChannels) * size(); }

  // Writes [outputs][bias, channels * 16][kCopies], the outputs rounded up to whole pairs: of each
  // the bias, then G g G^T of the taps g of every input channel. weight_at(k, tap) is the bias for
  // tap -1, and 0 for k >= outputs.
  template <typename WeightAt>
  void transform_weights(int64_t outputs, const WeightAt& weight_at, A* to) const {
    const auto write = [&](A value) {
      for (int i = 0; i < kCopies; ++i) *to++ = value;
    };
    for (int64_t k = 0; k < round_up(outputs, kTileChannels); ++k) {
      write(weight_at(k, -1));
      for (int64_t c = 0; c < channels_; ++c) {
        A rows[4][3];
        for (int s = 0; s < 3; ++s) {
          const auto at = [&](int r) { return weight_at(k, (c * 3 + r) * 3 + s); };
          transform(at(0), at(1), at(2), [&](int y, A value) { rows[y][s] = value; });
        }
        for (const auto& row : rows) {
          transform(row[0], row[1], row[2], [&](int, A value) { write(value); });
        }
      }
    }
  }

  // The largest value of each of `count` windows in output channels [begin, end), at least 0; all
  // products and sums must be finite, and `begin` a multiple of kTileChannels. Channels are the
  // outer loop, so that their weights stay close.
  void find_largest(const A* factors, const A* weights, int64_t begin, int64_t end, int64_t count,
                    Outputs to) const {
    weights += begin * size();
    to = to.from_channel(begin);
    if constexpr (kHasMasks<A>) {
      if (channels_ == 1) {
        for (int64_t k = begin; k < end; ++k, weights += size(), to = to.from_channel(1)) {
          largest_of_tiles(factors, weights, count, to.values, to.places);
        }
        return;
      }
    }
    constexpr int64_t kStep = kTileVectors * kLanes<A>;
    for (int64_t k = begin; k < end; k += kTileChannels) {
      const int64_t channels = min_of(kTileChannels, end - k);
      const int64_t whole = channels == kTileChannels ? count / kStep * kStep : 0;
      find_best(factors, weights, whole, to);
      for (int64_t i = whole; i < count; i += kStep) {
        A few[kTileChannels][kStep];
        uint8_t few_places[kTileChannels][kStep];
        find_best(factors + i * 16, weights, kStep, {few[0], kStep, few_places[0], kStep});
        const int64_t rest = min_of(kStep, count - i);
        for (int64_t j = 0; j < channels; ++j) {
          std::memcpy(to.values + j * to.values_step + i, few[j], rest * sizeof(A));
          std::memcpy(to.places + j * to.places_step + i, few_places[j], rest);
        }
      }
      weights += kTileChannels * size();
      to = to.from_channel(kTileChannels);
    }
  }

 private:
  // Operations with masks take single weights; others take as many as a vector has lanes.
  static constexpr int kCopies = kHasMasks<A> ? 1 : kLanes<A>;

  int64_t size() const { return (1 + channels_ * 16) * kCopies; }

  template <typename Put>
  static void transform(A first, A second, A third, const Put& put) {
    const A ends = (first + third) * A(0.5), middle = second * A(0.5);
    put(0, first);
    put(1, ends + middle);
    put(2, ends - middle);
    put(3, third);
  }

  void find_best(const A* from, const A* weights, int64_t count, Outputs to) const {
    if (channels_ == 1) {
      find_best<1>(from, weights, count, to);
    } else {
      find_best<0>(from, weights, count, to);
    }
  }

  // The largest value of each of `count` 2x2 windows in two channels, whole steps of them. The
  // input has kC channels, or as many as it has if 0.
  template <int kC>
  __attribute__((noinline)) void find_best(const A* from, const A* weights, int64_t count,
                                           Outputs to) const {
    for (int64_t i = 0; i < count; i += kTileVectors * kLanes<A>) {
      Places<A> places[kTileChannels][kTileVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v, from += 16 * kLanes<A>) {
        Vec<A> value[kTileChannels][2][2];
        multiply_tiles<kC>(from, weights, value);
#pragma GCC unroll 2
        for (int k = 0; k < kTileChannels; ++k) {
          const Best<A> best = best_of_four(value[k]);
          store<A>(to.values + k * to.values_step + i + v * kLanes<A>, best.value);
          places[k][v] = best.place;
        }
      }
      uint8_t* first = to.places + i;
      store_pairs_of_places<A>(first, first + to.places_step, places[0], places[1]);
    }
  }

  static GDFAST_INLINE Vec<A> copied(const A* weight) {
    return kCopies == 1 ? broadcast(*weight) : load(weight);
  }

  // A^T m A of the products m of each tile in two channels, all of them finite.
  template <int kC>
  GDFAST_INLINE void multiply_tiles(const A* from, const A* weights,
                                    Vec<A> (&value)[kTileChannels][2][2]) const {
    const int64_t channels = kC == 0 ? channels_ : kC, step = step_;
    const int64_t size = (1 + channels * 16) * kCopies;
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const auto factor = [&](int64_t c, int y) __attribute__((always_inline)) {
        Vec<A> read = load(from + c * step + (y * 4 + x) * kLanes<A>);
        keep_in_register<A>(read);  // it serves both channels
        return read;
      };
      const auto weight = [&](int k, int64_t c, int y) __attribute__((always_inline)) {
        return copied(weights + k * size + (1 + c * 16 + y * 4 + x) * kCopies);
      };
      // What the rows of the tile add to the upper and the lower values.
      Vec<A> sums[kTileChannels][2];
      Vec<A> read = factor(0, 1);
#pragma GCC unroll 2
      for (int k = 0; k < kTileChannels; ++k) {
        sums[k][0] = weight(k, 0, 1) * read;
        // One of the products counts in all four values: the bias goes with it.
        if (x == 1) sums[k][0] += copied(weights + k * size);
      }
      for (int64_t c = 1; c < channels; ++c) {
        read = factor(c, 1);
#pragma GCC unroll 2
        for (int k = 0; k < kTileChannels; ++k) sums[k][0] += weight(k, c, 1) * read;
      }
#pragma GCC unroll 2
      for (int k = 0; k < kTileChannels; ++k) {
        keep_in_register<A>(sums[k][0]);  // else it is multiplied twice
        sums[k][1] = sums[k][0];
      }
      for (int64_t c = 0; c < channels; ++c) {
        read = factor(c, 2);
#pragma GCC unroll 2
        for (int k = 0; k < kTileChannels; ++k) {
          Vec<A> both = weight(k, c, 2);
          keep_in_register<A>(both);
          sums[k][0] += both * read;
          sums[k][1] -= both * read;
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        const Vec<A> first = factor(c, 0);
#pragma GCC unroll 2
        for (int k = 0; k < kTileChannels; ++k) sums[k][0] += weight(k, c, 0) * first;
        const Vec<A> last = factor(c, 3);
#pragma GCC unroll 2
        for (int k = 0; k < kTileChannels; ++k) sums[k][1] -= weight(k, c, 3) * last;
      }
#pragma GCC unroll 2
      for (int k = 0; k < kTileChannels; ++k) {
#pragma GCC unroll 2
        for (int y = 0; y < 2; ++y) {
          Vec<A>&left = value[k][y][0], &right = value[k][y][1];
          left = x == 0 ? sums[k][y] : (x < 3 ? left + sums[k][y] : left);
          right = x == 1 ? sums[k][y] : (x > 1 ? right - sums[k][y] : right);
        }
      }
    }
  }

  // Of equal values the first.
  static GDFAST_INLINE Best<A> best_of_four(const Vec<A> (&sum)[2][2]) {
    const Places<A> right_above = sum[0][1] > sum[0][0], right_below = sum[1][1] > sum[1][0];
    const Vec<A> above = larger<A>(sum[0][1], sum[0][0]), below = larger<A>(sum[1][1], sum[1][0]);
    const Places<A> is_below = below > above, right = is_below ? right_below : right_above;
    const Vec<A> value = larger<A>(larger<A>(below, above), Vec<A>{});
    // A mask of all bits set is the number -1, and nowhere.
    const Places<A> clamped = value <= Vec<A>{};
    return {value, clamped | -(is_below + is_below + right)};
  }

  int64_t channels_, step_;
};

}  // namespace
}  // namespace gdfast::cpu
