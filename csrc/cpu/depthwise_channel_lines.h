// Depthwise convolution where channels lie side by side: vectors run over them, and images are read
// in place.
//
// A block of neighbouring pixels goes along the channels, so that memory is read in order. For each
// row of taps there is a list of the pixels of the image that the block sees through it: each is
// loaded once for all pixels of the block, and beyond the border there are zeros. 3x3 taps side by
// side are walked instead, with padding of at most 2, or 1 with steps of 2 (depthwise_walk.h).
#pragma once

#include "band.h"
#include "depthwise_taps.h"

namespace gdfast::cpu {
namespace {

// What a block writes is fetched while blocks before it are computed: whole blocks ahead, at least
// so many bytes, that it is there in time.
constexpr int64_t kFetchBytes = 2048;

// That distance in elements, where neighbouring blocks lie `block` of them apart.
template <typename T>
int64_t fetch_distance(int64_t block) {
  const int64_t least = kFetchBytes / static_cast<int64_t>(sizeof(T));
  return block <= 0 ? block : round_up(least, block);
}

// Calls each(c, v) for the vectors of channels, of which c is the first one. The last vector ends
// at the last channel: some of its lanes may be those of the vector before.
template <typename T, typename Each>
GDFAST_INLINE void for_channel_vectors(int64_t channels, const Each& each) {
  constexpr int64_t kWidth = kLanes<T>;
  int64_t v = 0;
  for (; (v + 1) * kWidth <= channels; ++v) each(v * kWidth, v);
  if (v * kWidth < channels) each(channels - kWidth, v);
}

// Calls visit(row) for the rows of taps.
template <int kRows, typename Visit>
GDFAST_INLINE void for_tap_rows(int64_t rows, const Visit& visit) {
  if constexpr (kRows == 0) {
    for (int64_t row = 0; row < rows; ++row) visit(row);
  } else {
#pragma GCC unroll 3
    for (int64_t row = 0; row < kRows; ++row) visit(row);
  }
}

// Calls each(c, v, count) for vectors of channels that are walked together: count of them, an
// integral constant.
template <typename T, typename Each>
GDFAST_INLINE void for_walked_vectors(int64_t channels, const Each& each) {
  constexpr int64_t kWidth = kLanes<T>;
  int64_t v = 0;
  for (; (v + kWalkVectors) * kWidth <= channels; v += kWalkVectors) {
    each(v * kWidth, v, std::integral_constant<int, kWalkVectors>());
  }
  for (; v * kWidth < channels; ++v) {
    each(min_of(v * kWidth, channels - kWidth), v, std::integral_constant<int, 1>());
  }
}

// The sums of a block: to[x] = starts + weights * seen. Weights lie [vector][tap][lane].
template <typename T, typename Shape>
void block_sums(const T* const* seen, const T* weights, int64_t rows, const T* starts,
                int64_t channels, int64_t to_ahead, Ending<T> ending, T* const* to) {
  constexpr int kPixels = Shape::kPixels, kColumns = Shape::kColumns, kSeen = Shape::kSeen;
  constexpr int kWidth = kLanes<T>;
  const int64_t taps = (Shape::kRows == 0 ? rows : Shape::kRows) * kColumns;
  T *const to0 = to[0], *const to1 = to[1], *const to2 = to[2], *const to3 = to[3];
  for_channel_vectors<T>(channels, [=](int64_t c, int64_t v) {
    __builtin_prefetch(to0 + c + to_ahead, 1);
    __builtin_prefetch(to1 + c + to_ahead, 1);
    __builtin_prefetch(to2 + c + to_ahead, 1);
    __builtin_prefetch(to3 + c + to_ahead, 1);
    Vec<T> sums[kPixels];
#pragma GCC unroll 4
    for (int x = 0; x < kPixels; ++x) sums[x] = load(starts + v * kWidth);
    for_tap_rows<Shape::kRows>(rows, [&](int64_t row) {
      if constexpr (Shape::kCareful) {
        const Vec<T> weight = load(weights + (v * taps + row) * kWidth);
        for (int x = 0; x < kPixels; ++x) {
          const T* const from = seen[row * kSeen + x];
          if (from != nullptr) sums[x] += weight * load(from + c);
        }
        return;
      }
      Vec<T> pixels[kSeen];
#pragma GCC unroll 16
      for (int x = 0; x < kSeen; ++x) pixels[x] = load(seen[row * kSeen + x] + c);
#pragma GCC unroll 8
      for (int s = 0; s < kColumns; ++s) {
        const Vec<T> weight = load(weights + (v * taps + row * kColumns + s) * kWidth);
#pragma GCC unroll 4
        for (int x = 0; x < kPixels; ++x) sums[x] += weight * pixels[x * Shape::kStep + s];
      }
    });
    finish_sums<1, kPixels>(ending, &sums);
    store<T>(to0 + c, sums[0]);
    store<T>(to1 + c, sums[1]);
    store<T>(to2 + c, sums[2]);
    store<T>(to3 + c, sums[3]);
  });
}

// sums += grads * seen, for each tap; sums lie as weights do.
template <typename T, typename Shape>
void block_tap_sums(const T* const* seen, const T* const* grads, int64_t rows, int64_t channels,
                    T* sums) {
  constexpr int kPixels = Shape::kPixels, kColumns = Shape::kColumns, kSeen = Shape::kSeen;
  constexpr int kWidth = kLanes<T>;
  const int64_t taps = (Shape::kRows == 0 ? rows : Shape::kRows) * kColumns;
  const T *const grad0 = grads[0], *const grad1 = grads[1];
  const T *const grad2 = grads[2], *const grad3 = grads[3];
  for_channel_vectors<T>(channels, [=](int64_t c, int64_t v) {
    const Vec<T> grad[kPixels] = {load(grad0 + c), load(grad1 + c), load(grad2 + c),
                                  load(grad3 + c)};
    for_tap_rows<Shape::kRows>(rows, [&](int64_t row) {
      T* const to = sums + (v * taps + row * kColumns) * kWidth;
      if constexpr (Shape::kCareful) {
        Vec<T> sum = load(to);
        for (int x = 0; x < kPixels; ++x) {
          const T* const from = seen[row * kSeen + x];
          if (from != nullptr) sum += grad[x] * load(from + c);
        }
        store<T>(to, sum);
        return;
      }
      Vec<T> sum[kColumns];
#pragma GCC unroll 8
      for (int s = 0; s < kColumns; ++s) sum[s] = load(to + s * kWidth);
#pragma GCC unroll 16
      for (int x = 0; x < kSeen; ++x) {
        const Vec<T> pixel = load(seen[row * kSeen + x] + c);
#pragma GCC unroll 4
        for (int p = 0; p < kPixels; ++p) {
          const int s = x - p * Shape::kStep;
          if (s >= 0 && s < kColumns) sum[s] += grad[p] * pixel;
        }
      }
#pragma GCC unroll 8
      for (int s = 0; s < kColumns; ++s) store<T>(to + s * kWidth, sum[s]);
    });
  });
}

// Pixels of one line of dest, and sums for each tap over a line of gradients, by walks.
template <typename T, int kStep>
void walk_line(const SeenLines<T>& seen, const T* weights, const T* starts, int64_t channels,
               const WalkedPixels<T>& pixels, const Ending<T>& ending) {
  for_walked_vectors<T>(channels, [&](int64_t c, int64_t v, auto count) {
    walk_sums<T, kStep, count.value>(seen, c, weights + v * 9 * kLanes<T>, starts + v * kLanes<T>,
                                     pixels, ending);
  });
}
template <typename T, int kStep>
void walk_tap_line(const SeenLines<T>& seen, int64_t channels, const WalkedPixels<const T>& grads,
                   T* sums) {
  for_walked_vectors<T>(channels, [&](int64_t c, int64_t v, auto count) {
    walk_tap_sums<T, kStep, count.value>(seen, c, grads, sums + v * 9 * kLanes<T>);
  });
}

// Between one value for each channel, `step` apart, and vectors, `pitch` apart.
template <typename T>
void spread_channels(const T* from, int64_t step, int64_t channels, T* to, int64_t pitch) {
  for_channel_vectors<T>(channels, [&](int64_t c, int64_t v) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) to[v * pitch + lane] = from[(c + lane) * step];
  });
}
template <typename T>
void gather_channels(const T* from, int64_t pitch, int64_t channels, T* to, int64_t step) {
  for_channel_vectors<T>(channels, [&](int64_t c, int64_t v) {
    for (int64_t lane = v * kLanes<T> - c; lane < kLanes<T>; ++lane) {
      to[(c + lane) * step] = from[v * pitch + lane];
    }
  });
}

// Lines of dest for float and double, with channels side by side in source and dest, at least one
// vector of them.
template <typename T>
class DepthwiseLines {
 public:
  struct Own {
    const T** seen;
    T* unused;
  };

  DepthwiseLines(const TapConv& conv, const T* weight)
      : conv_(conv),
        finite_(weights_are_finite(conv, weight)),
        taps_(conv, !finite_),
        channels_(conv.groups),
        size_(round_up(channels_, kLanes<T>)),
        to_ahead_(fetches_dest(conv) ? fetch_distance<T>(kBlockPixels * conv.dest.w) : 0),
        ending_(Ending<T>::of(conv)) {
    taps_.with_shape([&](auto shape) {
      most_seen_ = decltype(shape)::kSeen;
      run_ = block_sums<T, decltype(shape)>;
    });
    if (taps_.walks()) walk_ = conv.step_w == 1 ? walk_line<T, 1> : walk_line<T, 2>;
  }

  void carve_shared(Carver& carver) {
    weights_ = carver.template take<T>(conv_.tap_count * size_);
    starts_ = carver.template take<T>(size_);
    zeros_ = carver.template take<T>(channels_);
  }
  Own carve(Carver& carver) const {
    return {carver.template take<const T*>(taps_.rows * most_seen_),
            carver.template take<T>(channels_)};
  }

  // Once there is memory for it. bias may be null.
  void prepare(const T* weight, const T* bias) {
    const int64_t pitch = conv_.tap_count * kLanes<T>;
    for (int64_t row = 0; row < taps_.rows; ++row) {
      for (int64_t s = 0; s < taps_.columns; ++s) {
        spread_channels(weight + taps_.tap(row, s).weight, conv_.weight_group, channels_,
                        weights_ + (row * taps_.columns + s) * kLanes<T>, pitch);
      }
    }
    std::memset(zeros_, 0, channels_ * sizeof(T));
    std::memset(starts_, 0, size_ * sizeof(T));
    if (bias != nullptr) spread_channels(bias, 1, channels_, starts_, kLanes<T>);
  }

  void write_past_caches(const T* dest) {
    stream_ = walk_ != nullptr && writes_past_caches(conv_, dest, channels_);
  }

  // Has no lines of the source be fetched ahead: those that line_at gives are in a cache.
  void read_from_cache() { taps_.is_cached = true; }

  // Pixels [j, end) of line i, which is written to `dest`; line_at(h) is where a line of its source
  // lies.
  template <typename LineAt>
  void line(int64_t i, int64_t j, int64_t end, const LineAt& line_at, T* dest,
            const Own& own) const {
    if (walk_ != nullptr) {
      walk_(taps_.seen_lines(line_at, i, zeros_), weights_, starts_, channels_,
            {j, end, dest, conv_.dest.w, stream_}, ending_);
      if (stream_) stream_fence();
      for (; j < end; j += kBlockPixels) {
        finish_rows<kBlockPixels>(ending_, dest + j * conv_.dest.w, conv_.dest.w,
                                  min_of(kBlockPixels, end - j), channels_);
      }
      return;
    }
    for (const int64_t begin = j; j < end; j += kBlockPixels) {
      const int64_t count = min_of(kBlockPixels, end - j);
      T* to[kBlockPixels];
      for (int x = 0; x < kBlockPixels; ++x) {
        to[x] = x < count ? dest + (j + x) * conv_.dest.w : own.unused;
      }
      taps_.find(line_at, i, j, j > begin, most_seen_, finite_ ? zeros_ : nullptr, own.seen);
      run_(own.seen, weights_, taps_.rows, starts_, channels_, to_ahead_, ending_, to);
      finish_rows(ending_, to, count, channels_);
    }
  }

 private:
  static bool weights_are_finite(const TapConv& conv, const T* weight) {
    bool finite = true;
    for (int64_t t = 0; t < conv.tap_count && finite; ++t) {
      finite = all_finite(weight + conv.taps[t].weight, conv.groups, conv.weight_group);
    }
    return finite;
  }

  // Where dest's pixels do not lie side by side, few taps are seen from each: then fetching costs
  // more than it gives, unless dest is more than caches hold.
  static bool fetches_dest(const TapConv& conv) {
    constexpr int64_t kBytes = 2 << 20;
    const int64_t values = conv.pixels() * conv.groups;
    return conv.dest.w == conv.groups || values * static_cast<int64_t>(sizeof(T)) > kBytes;
  }

  const TapConv& conv_;
  bool finite_;
  TapRows taps_;
  int64_t channels_, size_;
  int64_t to_ahead_;  // of dest
  Ending<T> ending_;
  int most_seen_ = 0;
  bool stream_ = false;
  void (*run_)(const T* const*, const T*, int64_t, const T*, int64_t, int64_t, Ending<T>,
               T* const*) = nullptr;
  void (*walk_)(const SeenLines<T>&, const T*, const T*, int64_t, const WalkedPixels<T>&,
                const Ending<T>&) = nullptr;
  T *weights_ = nullptr, *starts_ = nullptr, *zeros_ = nullptr;
};

// Neighbouring lines see the same lines of the image: one thread takes a few of them.
inline int64_t lines_together(int64_t lines, int threads) {
  return max_of(1, min_of(8, lines / (8 * threads)));
}

template <typename T>
void depthwise_channel_lines(const TapConv& conv, const T* source, const T* weight, const T* bias,
                             T* dest, int threads) {
  DepthwiseLines<T> lines(conv, weight);
  const ThreadScratch memory(
      threads, [&](Carver& carver) { lines.carve_shared(carver); },
      [&](Carver& carver) { lines.carve(carver); });
  lines.prepare(weight, bias);
  lines.write_past_caches(dest);
  const int64_t together = lines_together(conv.batch * conv.height, threads);
  const int64_t runs = ceil_div(conv.height, together);
  parallel_for(conv.batch * runs, threads, [&](int64_t index, int thread) {
    Carver carver = memory.of(thread);
    const auto own = lines.carve(carver);
    const int64_t n = index / runs, i0 = index % runs * together;
    const T* image = source + n * conv.source.n;
    for (int64_t i = i0; i < min_of(i0 + together, conv.height); ++i) {
      lines.line(
          i, 0, conv.width, [&](int64_t h) { return image + h * conv.source.h; },
          dest + n * conv.dest.n + i * conv.dest.h, own);
    }
  });
}

}  // namespace
}  // namespace gdfast::cpu
