// The forward kernel of common filters in NCHW: a thread makes a strip of kRows x kColumns outputs.
#pragma once

#include "activation.h"
#include "depthwise.h"

namespace gdfast::cuda {

constexpr int kStripThreads = 256;
// Side by side in channels_last: 64 channels, which are 128 bytes in half types. The fewer, the
// more of the image a block has, and the less of it two blocks read.
constexpr int kStripChannels = 16;
constexpr int kStripColumns = 4;  // strips of a row in a block, in channels_last
constexpr int kStripWaves = 8;    // blocks for each multiprocessor, before they take more tiles

// How a block's threads lie over an image, and blocks over all of them. Axes are numbered by how
// fast they change from thread to thread: channels first in channels_last, else columns.
struct StripWalk {
  int groups;                          // vectors of channels
  int tile_c, tile_q, tile_p, tile_n;  // of vectors, strips and images in a block
  int tiles_p, tiles_at_once;          // of a column, and those that a block takes one by one
  bool channels_inside;
  Divisor first, second, third;  // the tile's axes
  Divisor tiles_c, tiles_q;

  static StripWalk of(const DepthwiseArguments& a, int vector, int rows, int columns,
                      bool channels_inside, int64_t blocks) {
    const int64_t groups = a.C / vector;
    const int64_t wide = ceil_div(a.Q, columns), high = ceil_div(a.P, rows);
    const auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
    // Equal tiles rather than a small last one.
    const auto even = [](int64_t size, int64_t most) {
      return ceil_div(size, ceil_div(size, most));
    };
    const int64_t c = channels_inside ? even(groups, kStripChannels) : 1;
    const int64_t q = even(wide, channels_inside ? kStripColumns : 64);
    int64_t left = kStripThreads / (c * q);
    const int64_t p = even(high, left);
    left /= p;
    // What small images leave over goes to more of them, or to more channels.
    const int64_t more_c = channels_inside ? c : least(left, groups);
    const int64_t n = channels_inside ? least(left, a.N) : 1;
    const auto divisor = [](int64_t by) { return Divisor::of(by); };
    StripWalk walk{};
    walk.groups = static_cast<int>(groups);
    walk.tile_c = static_cast<int>(more_c);
    walk.tile_q = static_cast<int>(q);
    walk.tile_p = static_cast<int>(p);
    walk.tile_n = static_cast<int>(n);
    walk.tiles_p = static_cast<int>(ceil_div(high, p));
    // What a block prepares serves several tiles, as long as there are blocks for all of a GPU.
    const int64_t others = ceil_div(a.N, n) * ceil_div(groups, more_c) * ceil_div(wide, q);
    walk.tiles_at_once =
        static_cast<int>(even(walk.tiles_p, least(4, others * walk.tiles_p / blocks + 1)));
    walk.channels_inside = channels_inside;
    walk.first = divisor(channels_inside ? more_c : q);
    walk.second = divisor(channels_inside ? q : p);
    walk.third = divisor(channels_inside ? p : more_c);
    walk.tiles_c = divisor(ceil_div(groups, more_c));
    walk.tiles_q = divisor(ceil_div(wide, q));
    return walk;
  }

  dim3 grid(int64_t N) const {
    const int64_t others = ceil_div(N, tile_n) * tiles_c.divisor * tiles_q.divisor;
    return dim3(static_cast<unsigned>(others),
                static_cast<unsigned>(ceil_div(tiles_p, tiles_at_once)));
  }
};

struct StripPlace {
  int lane;                  // of the tile's channels
  int first_group, n, p, q;  // p and q in strips, of the first tile
  bool exists;
};

GDFAST_DEVICE StripPlace place_of_strip(const StripWalk& walk, int N) {
  const Divided block = divide(static_cast<int>(blockIdx.x), walk.tiles_c);
  const Divided rest = divide(block.quotient, walk.tiles_q);
  const Divided first = divide(static_cast<int>(threadIdx.x), walk.first);
  const Divided second = divide(first.quotient, walk.second);
  const Divided third = divide(second.quotient, walk.third);
  const int q = walk.channels_inside ? second.rest : first.rest;
  const int p = walk.channels_inside ? third.rest : second.rest;
  const int n = third.quotient;
  StripPlace at;
  at.lane = walk.channels_inside ? first.rest : third.rest;
  at.first_group = block.rest * walk.tile_c;
  at.q = rest.rest * walk.tile_q + q;
  at.p = static_cast<int>(blockIdx.y) * walk.tiles_at_once * walk.tile_p + p;
  at.n = rest.quotient * walk.tile_n + n;
  at.exists = n < walk.tile_n && at.n < N && at.first_group + at.lane < walk.groups;
  return at;
}

// The tile's weights as [tap][channel] in shared memory, in the type of sums.
template <int kSize, typename T>
GDFAST_DEVICE void load_filters(const DepthwiseArguments& a, const T* weight, int first_channel,
                                int channels, SumOf<T>* filters) {
  const int thread = static_cast<int>(threadIdx.x), k = first_channel + thread;
  if (thread >= channels || k >= a.K) return;
#pragma unroll
  for (int tap = 0; tap < kSize * kSize; ++tap) {
    const int at = tap / kSize * a.weight_r + tap % kSize * a.weight_s;
    filters[tap * channels + thread] = to_float(weight[k * a.weight_k + at]);
  }
}

template <typename T, int kVector, int kSize, int kStride, int kRows, int kColumns>
GDFAST_KERNEL(kStripThreads, 2)
depthwise_strip_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                       const GDFAST_GRID_CONSTANT StripWalk walk, const T* input, const T* weight,
                       const T* bias, T* output) {
  using A = SumOf<T>;
  // The pixels that a strip sees.
  constexpr int kHigh = (kRows - 1) * kStride + kSize, kWide = (kColumns - 1) * kStride + kSize;
  static_assert(kWide <= 32, "columns are flags of one register");
  // All rows at once where registers hold what they load ahead.
  constexpr int kAtOnce = kSize == 3 ? kHigh : 1;
  static_assert(kAtOnce == kHigh || kRows == 1, "sums need indices that are constants");
  const StripPlace at = place_of_strip(walk, a.N);
  auto* const filters = reinterpret_cast<A*>(shared_memory());
  const int channels = walk.tile_c * kVector;
  load_filters<kSize>(a, weight, at.first_group * kVector, channels, filters);
  sync_block();
  const int q0 = at.q * kColumns;
  if (!at.exists || q0 >= a.Q) return;

  const int channel = (at.first_group + at.lane) * kVector;
  const A* const own = filters + at.lane * kVector;
  const int w0 = q0 * kStride - a.pad_w;
  unsigned seen = 0;  // columns within the image
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    if (static_cast<unsigned>(w0 + j) < static_cast<unsigned>(a.W)) seen |= 1u << j;
  }
  const T* const image = input + at.n * a.input.n + channel * a.input.c;
  T* const to = output + at.n * a.output.n + channel * a.output.c;
  for (int tile = 0; tile < walk.tiles_at_once; ++tile) {
    const int p0 = (at.p + tile * walk.tile_p) * kRows, h0 = p0 * kStride - a.pad_h;
    if (p0 >= a.P) return;
    A sums[kRows * kColumns * kVector] = {};
#pragma unroll kAtOnce
    for (int i = 0; i < kHigh; ++i) {
      const bool inside = static_cast<unsigned>(h0 + i) < static_cast<unsigned>(a.H);
      const T* const line = image + (h0 + i) * a.input.h + w0 * a.input.w;
      PackOf<T, kVector> packs[kWide];
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        packs[j] = {};
        if (inside && (seen >> j & 1u)) packs[j] = load_pack<kVector>(line + j * a.input.w);
      }
      A pixels[kWide][kVector];
#pragma unroll
      for (int j = 0; j < kWide; ++j) unpack<T, kVector>(packs[j], pixels[j]);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int r = i - row * kStride;
        if (r < 0 || r >= kSize) continue;
#pragma unroll
        for (int s = 0; s < kSize; ++s) {
          A factors[kVector];
          load_values<kVector>(own + (r * kSize + s) * channels, factors);
#pragma unroll
          for (int column = 0; column < kColumns; ++column) {
#pragma unroll
            for (int lane = 0; lane < kVector; ++lane) {
              sums[(row * kColumns + column) * kVector + lane] +=
                  pixels[column * kStride + s][lane] * factors[lane];
            }
          }
        }
      }
    }

    if (bias != nullptr) {
#pragma unroll
      for (int lane = 0; lane < kVector; ++lane) {
        const A more = to_float(bias[channel + lane]);
#pragma unroll
        for (int i = 0; i < kRows * kColumns; ++i) sums[i * kVector + lane] += more;
      }
    }
    activate(sums, a.activation, static_cast<A>(a.negative_slope));
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        if (p0 + row >= a.P || q0 + column >= a.Q) continue;
        A values[kVector];
#pragma unroll
        for (int lane = 0; lane < kVector; ++lane) {
          values[lane] = sums[(row * kColumns + column) * kVector + lane];
        }
        store_values<kVector>(to + (p0 + row) * a.output.h + (q0 + column) * a.output.w, values);
      }
    }
  }
}

}  // namespace gdfast::cuda
