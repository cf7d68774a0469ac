// Depthwise convolution: every channel sees only itself, so there is no product of matrices.
//
// Memory is the limit, not arithmetic, and the two layouts want different loops:
//   ChannelLines  channels side by side: vectors run over channels, images are read in place.
//   Planes        anything else: a band of one plane is copied once, widened, with a border of
//                 zeros and its columns sorted by w % step; vectors then run along the line.
#pragma once

#include "band.h"
#include "ending.h"

namespace gdfast::cpu {
namespace {

// Source lines that dest lines [i, i + lines) see through any tap, within the image.
struct LineRange {
  int64_t first, end;
};

inline LineRange lines_seen(const TapConv& conv, int64_t i, int64_t lines) {
  if (conv.tap_count == 0) return {0, 0};
  int64_t low = conv.taps[0].dh, high = low;
  for (int64_t t = 1; t < conv.tap_count; ++t) {
    low = min_of(low, conv.taps[t].dh);
    high = max_of(high, conv.taps[t].dh);
  }
  const int64_t first = max_of(0, min_of(i * conv.step_h + low, conv.source_height));
  const int64_t end = min_of(conv.source_height, (i + lines - 1) * conv.step_h + high + 1);
  return {first, max_of(first, end)};
}

// Dest lines of a band: about 64 KB of source, to stay in L2 beside the rest.
template <typename T>
int64_t band_lines(const TapConv& conv) {
  using A = typename Accumulator<T>::type;
  const int64_t line = conv.step_h * Band<T>(conv).line_size() * static_cast<int64_t>(sizeof(A));
  return min_of(conv.height, max_of(4, 65536 / line));
}

template <typename T>
int64_t band_size(const TapConv& conv) {
  int64_t most = 0;
  const int64_t lines = band_lines<T>(conv);
  for (int64_t i = 0; i < conv.height; i += lines) {
    const LineRange seen = lines_seen(conv, i, min_of(lines, conv.height - i));
    most = max_of(most, seen.end - seen.first);
  }
  return most * Band<T>(conv).line_size();
}

// One line of dest: sums of kVectors vectors from column j on. Without an end of any kind (kEnds
// false) not even the choice of one is made.
template <typename A, int kVectors, bool kEnds>
GDFAST_INLINE void plane_sums(const A* const* lines, const A* weights, int64_t taps, int64_t j,
                              A start, const Ending<A>& ending, A* to) {
  Vec<A> sum[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sum[v] = broadcast(start);
  for (int64_t t = 0; t < taps; ++t) {
    const Vec<A> weight = broadcast(weights[t]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] += weight * load(lines[t] + j + v * kLanes<A>);
  }
  if constexpr (kEnds) finish_sums<1, kVectors>(ending, &sum);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store<A>(to + v * kLanes<A>, sum[v]);
}

template <typename T, bool kEnds>
void depthwise_planes(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
                      int threads) {
  using A = typename Accumulator<T>::type;
  constexpr int64_t kStep = 4 * kLanes<A>;
  const Band<T> band(conv);
  const int64_t lines = band_lines<T>(conv), padded = round_up(conv.width, kStep);
  struct Scratch {
    A *band, *line, *weights;
    const A** at;
  };
  const auto carve = [&](Carver& carver) {
    return Scratch{carver.template take<A>(band_size<T>(conv)), carver.template take<A>(padded),
                   carver.template take<A>(conv.tap_count),
                   carver.template take<const A*>(conv.tap_count)};
  };
  Carver counter;
  carve(counter);
  Workspace workspace(counter.used() * threads);
  const int64_t bands = ceil_div(conv.height, lines);
  const Ending<A> ending = Ending<A>::of(conv);

  parallel_for(conv.batch * conv.groups * bands, threads, [&](int64_t index, int thread) {
    Carver carver(workspace.data() + counter.used() * thread);
    const Scratch scratch = carve(carver);
    const int64_t i0 = index % bands * lines, i_end = min_of(i0 + lines, conv.height);
    const int64_t group = index / bands % conv.groups, n = index / bands / conv.groups;
    const LineRange seen = lines_seen(conv, i0, i_end - i0);
    band.copy(source + n * conv.source.n + group * conv.source_group, seen.first, seen.end,
              scratch.band);
    const A start = bias == nullptr ? A(0) : widen(bias[group]);
    T* plane = dest + n * conv.dest.n + group * conv.dest_group;
    for (int64_t i = i0; i < i_end; ++i) {
      int64_t taps = 0;
      for (int64_t t = 0; t < conv.tap_count; ++t) {
        const Tap& tap = conv.taps[t];
        const int64_t h = i * conv.step_h + tap.dh;
        if (h < 0 || h >= conv.source_height) continue;
        scratch.weights[taps] = widen(weight[group * conv.weight_group + tap.weight]);
        scratch.at[taps++] =
            scratch.band + (h - seen.first) * band.line_size() + band.offset_of(tap);
      }
      T* to = plane + i * conv.dest.h;
      int64_t j = 0;
      if constexpr (kSame<T, A>) {
        if (conv.dest.w == 1) {
          for (; j + kStep <= conv.width; j += kStep) {
            plane_sums<A, 4, kEnds>(scratch.at, scratch.weights, taps, j, start, ending, to + j);
          }
          for (; j + kLanes<A> <= conv.width; j += kLanes<A>) {
            plane_sums<A, 1, kEnds>(scratch.at, scratch.weights, taps, j, start, ending, to + j);
          }
          finish_rows(ending, &to, 1, j);
        }
      }
      const int64_t rest = j;
      for (; j < conv.width; j += kLanes<A>) {
        plane_sums<A, 1, kEnds>(scratch.at, scratch.weights, taps, j, start, ending,
                                scratch.line + j);
      }
      if (rest < conv.width) {
        A* line = scratch.line + rest;
        finish_rows(ending, &line, 1, conv.width - rest);
        copy_narrowed(line, conv.width - rest, to + rest * conv.dest.w, conv.dest.w);
      }
    }
  });
}

// Channels [c, c + lanes) of kPixels neighbouring dest pixels.
template <typename T, int kPixels>
GDFAST_INLINE void channel_sums(const T* const* at, const T* weights, int64_t weight_step,
                                const int64_t* order, int64_t taps, int64_t pixel_step, int64_t c,
                                Vec<T> start, const Ending<T>& ending, T* to, int64_t to_step) {
  Vec<T> sum[kPixels];
#pragma GCC unroll 8
  for (int x = 0; x < kPixels; ++x) sum[x] = start;
  for (int64_t t = 0; t < taps; ++t) {
    const Vec<T> weight = load(weights + order[t] * weight_step + c);
    const T* from = at[t] + c;
#pragma GCC unroll 8
    for (int x = 0; x < kPixels; ++x) sum[x] += weight * load(from + x * pixel_step);
  }
  finish_sums<1, kPixels>(ending, &sum);
#pragma GCC unroll 8
  for (int x = 0; x < kPixels; ++x) store<T>(to + x * to_step + c, sum[x]);
}

// float and double with channels side by side in source and dest, at least one vector of them.
template <typename T>
void depthwise_channel_lines(const TapConv& conv, const T* source, const T* weight, const T* bias,
                             T* dest, int threads) {
  constexpr int kPixels = 4;
  const int64_t channels = conv.groups;
  const Ending<T> ending = Ending<T>::of(conv);
  struct Scratch {
    const T** at;
    int64_t* order;
  };
  Carver carver;
  const auto carve_shared = [&](Carver& c) {
    return c.template take<T>((conv.tap_count + 1) * channels);
  };
  const auto carve_scratch = [&](Carver& c) {
    return Scratch{c.template take<const T*>(conv.tap_count),
                   c.template take<int64_t>(conv.tap_count)};
  };
  carve_shared(carver);
  const int64_t shared = carver.used();
  carve_scratch(carver);
  const int64_t each = carver.used() - shared;
  Workspace workspace(shared + each * threads);
  Carver shared_carver(workspace.data());
  // [tap][channel], then the bias.
  T* weights = carve_shared(shared_carver);
  T* starts = weights + conv.tap_count * channels;
  for (int64_t t = 0; t < conv.tap_count; ++t) {
    copy_widened(weight + conv.taps[t].weight, conv.weight_group, channels, weights + t * channels);
  }
  for (int64_t c = 0; c < channels; ++c) starts[c] = bias == nullptr ? T(0) : bias[c];

  int64_t low = 0, high = 0;
  for (int64_t t = 0; t < conv.tap_count; ++t) {
    low = min_of(low, conv.taps[t].dw);
    high = max_of(high, conv.taps[t].dw);
  }
  // Grid points [inner, inner_end) see the image through every tap.
  const int64_t inner = min_of(conv.width, ceil_div(-low, conv.step_w));
  const int64_t inner_end =
      max_of(inner, min_of(conv.width, floor_div(conv.source_width - 1 - high, conv.step_w) + 1));

  parallel_for(conv.batch * conv.height, threads, [&](int64_t line, int thread) {
    Carver own(workspace.data() + shared + each * thread);
    const Scratch scratch = carve_scratch(own);
    const int64_t n = line / conv.height, i = line % conv.height;
    const T* image = source + n * conv.source.n;
    T* to = dest + n * conv.dest.n + i * conv.dest.h;
    const int64_t step = conv.step_w * conv.source.w;

    // Taps that see the image from grid point j.
    const auto find_taps = [&](int64_t j) {
      int64_t taps = 0;
      for (int64_t t = 0; t < conv.tap_count; ++t) {
        const int64_t h = i * conv.step_h + conv.taps[t].dh;
        const int64_t w = j * conv.step_w + conv.taps[t].dw;
        if (h < 0 || h >= conv.source_height || w < 0 || w >= conv.source_width) continue;
        scratch.at[taps] = image + h * conv.source.h + w * conv.source.w;
        scratch.order[taps++] = t;
      }
      return taps;
    };
    for (int64_t j = 0; j < conv.width;) {
      const int64_t taps = find_taps(j);
      const int64_t count = j >= inner && j + kPixels <= inner_end ? kPixels : 1;
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        // The last vector ends at the last channel, and computes some channels again.
        const int64_t first = min_of(c, channels - kLanes<T>);
        const Vec<T> start = load(starts + first);
        T* out = to + j * conv.dest.w;
        if (count == kPixels) {
          channel_sums<T, kPixels>(scratch.at, weights, channels, scratch.order, taps, step, first,
                                   start, ending, out, conv.dest.w);
        } else {
          channel_sums<T, 1>(scratch.at, weights, channels, scratch.order, taps, step, first, start,
                             ending, out, conv.dest.w);
        }
      }
      finish_rows<kPixels>(ending, to + j * conv.dest.w, conv.dest.w, count, channels);
      j += count;
    }
  });
}

template <typename T>
void run_depthwise(const TapConv& conv, const T* source, const T* weight, const T* bias, T* dest,
                   int threads) {
  if (conv.pixels() == 0) return;
  if constexpr (kSame<T, typename Accumulator<T>::type>) {
    if (conv.source_group == 1 && conv.dest_group == 1 && conv.groups >= kLanes<T>) {
      depthwise_channel_lines(conv, source, weight, bias, dest, threads);
      return;
    }
  }
  if (conv.activation == Activation::kNone) {
    depthwise_planes<T, false>(conv, source, weight, bias, dest, threads);
  } else {
    depthwise_planes<T, true>(conv, source, weight, bias, dest, threads);
  }
}

}  // namespace
}  // namespace gdfast::cpu
