// What both layouts and both directions of batch normalisation share.
//
// A layout offers four passes over a Region of the tensors: `statistics` and `apply` forward,
// `reduce` and `grad_input` backward. run_passes() calls two of them after each other, with the
// sums of the first turned into factors for the second in between.
#pragma once

#include <cmath>

#include "activation.h"
#include "convert.h"
#include "parallel.h"

namespace gdfast::cpu {
namespace {

// Part of the tensors: some columns of some rows for Rows; for Planes some channels of some images,
// and of each plane the pixels [s, s_end).
struct Region {
  int64_t c, c_end;
  int64_t i, i_end;
  int64_t s, s_end;
};

struct PixelRange {
  int64_t first, end;
};

// How a layout cuts the work. Where `by_channel`, no two regions have a channel in common: one
// task takes both passes over a region, the second one from the cache. Else regions divide the
// images, each has sums of its own, and all of them are added in the order of the regions.
struct Cut {
  bool by_channel;
  int64_t regions;
  int64_t step;  // of channels, rows or images from one region to the next
};

// Bytes of one region that the second pass should find in a core's own cache, of 1 MB or more.
constexpr int64_t kCacheBytes = 640 * 1024;

// Below so many bytes a second thread costs more than it saves.
constexpr int64_t kBytesPerRegion = 64 * 1024;

// Each lane of a vector adds up so many values at most before they go into double totals: the
// error of a sum is the same for narrow vectors and wide ones.
constexpr int64_t kSumLength = 64;

// The two sums of each column that a pass takes; see statistics() and reduce() of the layouts.
struct Sums {
  double* first;
  double* second;
};

// Per-channel factors, repeated for as many columns as the layout's table has:
//   z = (input - mean) * scale + bias
//   grad_input = (input - mean) * slope + grad * scale + offset
template <typename A>
struct Factors {
  const A* mean;
  const A* scale;
  const A* bias;
  const A* slope;
  const A* offset;
};

// A group of vectors side by side. Not whole, it is one vector that has its first lanes only.
template <int kCount, bool kIsWhole>
struct Group {
  static constexpr int kVectors = kCount;
  static constexpr bool kWhole = kIsWhole;
  int64_t lanes;
};

// Splits [begin, end) into groups of kMost vectors and of one: visit(group, at).
template <typename A, int kMost, typename Visit>
GDFAST_INLINE void for_groups(int64_t begin, int64_t end, const Visit& visit) {
  constexpr int64_t kWidth = kLanes<A>;
  int64_t at = begin;
  if constexpr (kMost > 1) {
    for (; at + kMost * kWidth <= end; at += kMost * kWidth) {
      visit(Group<kMost, true>{kWidth}, at);
    }
  }
  for (; at + kWidth <= end; at += kWidth) visit(Group<1, true>{kWidth}, at);
  if (at < end) visit(Group<1, false>{end - at}, at);
}

template <typename G, typename T>
GDFAST_INLINE auto load_group(const G& group, const T* from) {
  if constexpr (G::kWhole) {
    return load_widened(from);
  } else {
    return load_some(from, group.lanes);
  }
}

template <typename G, typename T, typename V>
GDFAST_INLINE void store_group(const G& group, T* to, const V& value) {
  if constexpr (G::kWhole) {
    store_narrowed(to, value);
  } else {
    store_some(to, value, group.lanes);
  }
}

// Results of at least so many bytes are written past the caches: lines that are to be overwritten
// need not be read first, and what the second pass and its neighbours read stays where it is.
constexpr int64_t kStreamBytes = 1024 * 1024;

// Whether to do so, which takes `pitch` elements at a time that begin at whole cache lines.
template <typename T>
inline bool streams(const BatchNormProblem& p, const void* to, int64_t pitch) {
  constexpr int64_t kSize = sizeof(T);
  return kSize >= 4 && p.N * p.C * p.S * kSize >= kStreamBytes && pitch * kSize % 64 == 0 &&
         reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

template <typename G, typename T, typename V>
GDFAST_INLINE void store_result(const G& group, T* to, const V& value, bool stream) {
  if constexpr (G::kWhole && sizeof(T) >= 4) {
    if (stream) return store_streaming<T>(to, value);
  }
  store_group(group, to, value);
}

// Pointers of the backward passes. grad_residual may be null.
template <typename T>
struct Gradients {
  const T* grad_output;
  const T* input;
  const T* other;  // the residual or the output
  T* grad_residual;
  T* grad_input;
};

// The gradient in front of the activation.
template <Activation kActivation, PreActivation kFrom, typename A>
GDFAST_INLINE Vec<A> grad_before(Vec<A> grad, Vec<A> centred, Vec<A> other, Vec<A> scale,
                                 Vec<A> bias, Vec<A> negative_slope) {
  if constexpr (kActivation == Activation::kNone) return grad;
  if constexpr (kFrom == PreActivation::kOutput) {
    return activation_gradient<kActivation, A>(grad, other, negative_slope);
  }
  Vec<A> z = centred * scale + bias;
  if constexpr (kFrom == PreActivation::kResidual) z += other;
  return activation_gradient<kActivation, A>(grad, z, negative_slope);
}

// A mean to take sums about: any finite value will do, so that an infinity stays one in the sums.
template <typename A>
GDFAST_INLINE Vec<A> finite(Vec<A> value) {
  return value - value == Vec<A>{} ? value : Vec<A>{};
}

// param[c], or `otherwise` where there are none.
template <typename A>
inline A param_at(const void* param, DType dtype, int64_t c, A otherwise) {
  A value = otherwise;
  if (param == nullptr) return value;
  with_dtype(dtype, [&](auto zero) {
    using P = decltype(zero);
    value = static_cast<A>(widen(static_cast<const P*>(param)[c]));
  });
  return value;
}

template <typename A>
inline void set_param(void* param, DType dtype, int64_t c, A value) {
  if (param == nullptr) return;
  with_dtype(dtype, [&](auto zero) {
    using P = decltype(zero);
    using B = typename Accumulator<P>::type;
    static_cast<P*>(param)[c] = narrow<P>(static_cast<B>(value));
  });
}

// Where layouts do not cut by channel: first(region, sums) over all regions, then finish(c, c_end,
// sums). `totals` has room for 2 * columns of each region.
template <typename Layout, typename First, typename Finish>
void run_sums(const Layout& layout, const Cut& cut, double* totals, int threads, const First& first,
              const Finish& finish) {
  const int64_t columns = layout.columns();
  const auto sums_of = [&](int64_t index) {
    return Sums{totals + 2 * index * columns, totals + (2 * index + 1) * columns};
  };
  parallel_for(cut.regions, threads, [&](int64_t index, int thread) {
    first(layout.region(cut, index), sums_of(index), thread);
  });
  const Sums all = sums_of(0);
  for (int64_t index = 1; index < cut.regions; ++index) {
    const Sums part = sums_of(index);
    for (int64_t c = 0; c < columns; ++c) {
      all.first[c] += part.first[c];
      all.second[c] += part.second[c];
    }
  }
  finish(0, columns, all);
}

// Runs first(region, sums), finish(c, c_end, sums) and second(region, index) over all regions.
// The second pass goes backwards through them: what the first one read last is still in a cache.
template <typename Layout, typename First, typename Finish, typename Second>
void run_passes(const Layout& layout, const Cut& cut, double* totals, int threads,
                const First& first, const Finish& finish, const Second& second) {
  if (cut.by_channel) {
    const Sums sums{totals, totals + layout.columns()};
    parallel_for(cut.regions, threads, [&](int64_t index, int thread) {
      const Region region = layout.region(cut, index);
      first(region, sums, thread);
      finish(region.c, region.c_end, sums);
      second(region);
    });
    return;
  }
  run_sums(layout, cut, totals, threads, first, finish);
  parallel_for(cut.regions, threads,
               [&](int64_t index, int) { second(layout.region(cut, cut.regions - 1 - index)); });
}

}  // namespace
}  // namespace gdfast::cpu
