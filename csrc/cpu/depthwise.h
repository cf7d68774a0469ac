// Depthwise convolution: every channel sees only itself, so there is no product of matrices.
//
// Memory is the limit, not arithmetic, and the two layouts want different loops:
//   ChannelLines  channels side by side: vectors run over channels, images are read in place
//                 (depthwise_channel_lines.h).
//   Planes        anything else: a band of one plane is copied once, widened, with a border of
//                 zeros and its columns sorted by w % step; vectors then run along the line.
#pragma once

#include "depthwise_channel_lines.h"

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

// The same for a line i of dest in a plane with weights that are not finite, times which the zeros
// of a border would be NaN: taps add nothing where they see no pixel. `line` has room for whole
// vectors.
template <typename T, bool kEnds, typename A>
__attribute__((noinline)) void careful_plane_sums(const TapConv& conv, const T* plane,
                                                  const T* weight, int64_t i, A start,
                                                  const Ending<A>& ending, A* line) {
  const int64_t padded = round_up(conv.width, kLanes<A>);
  for (int64_t j = 0; j < padded; ++j) line[j] = start;
  for (int64_t t = 0; t < conv.tap_count; ++t) {
    const Tap& tap = conv.taps[t];
    const int64_t h = i * conv.step_h + tap.dh;
    if (h < 0 || h >= conv.source_height) continue;
    const A factor = widen(weight[tap.weight]);
    for (int64_t j = 0; j < conv.width; ++j) {
      const int64_t w = j * conv.step_w + tap.dw;
      if (w < 0 || w >= conv.source_width) continue;
      line[j] += factor * widen(plane[h * conv.source.h + w * conv.source.w]);
    }
  }
  if constexpr (kEnds) {
    for (int64_t j = 0; j < padded; j += kLanes<A>) {
      Vec<A> sum[1] = {load(line + j)};
      finish_sums<1, 1>(ending, &sum);
      store<A>(line + j, sum[0]);
    }
  }
}

template <typename T>
bool taps_are_finite(const TapConv& conv, const T* weight) {
  bool finite = true;
  for (int64_t t = 0; t < conv.tap_count; ++t) {
    const auto value = widen(weight[conv.taps[t].weight]);
    finite &= value - value == 0;
  }
  return finite;
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
    const T* image = source + n * conv.source.n + group * conv.source_group;
    const T* own_weight = weight + group * conv.weight_group;
    const bool finite = taps_are_finite(conv, own_weight);
    band.copy(image, seen.first, seen.end, scratch.band);
    const A start = bias == nullptr ? A(0) : widen(bias[group]);
    T* plane = dest + n * conv.dest.n + group * conv.dest_group;
    // Sums in scratch.line from column j on.
    const auto write_line = [&](int64_t j, T* to) {
      A* line = scratch.line + j;
      finish_rows(ending, &line, 1, conv.width - j);
      copy_narrowed(line, conv.width - j, to + j * conv.dest.w, conv.dest.w);
    };
    for (int64_t i = i0; i < i_end; ++i) {
      T* to = plane + i * conv.dest.h;
      if (!finite) {
        careful_plane_sums<T, kEnds>(conv, image, own_weight, i, start, ending, scratch.line);
        write_line(0, to);
        continue;
      }
      int64_t taps = 0;
      for (int64_t t = 0; t < conv.tap_count; ++t) {
        const Tap& tap = conv.taps[t];
        const int64_t h = i * conv.step_h + tap.dh;
        if (h < 0 || h >= conv.source_height) continue;
        scratch.weights[taps] = widen(own_weight[tap.weight]);
        scratch.at[taps++] =
            scratch.band + (h - seen.first) * band.line_size() + band.offset_of(tap);
      }
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
      if (rest < conv.width) write_line(rest, to);
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
