// A slab's filters in shared memory, and from there as operands of the matrix instruction: for
// convolution in groups of few channels (grouped.h).
#pragma once

#include "grouped.h"

namespace gdfast::cuda {
namespace {

struct GroupedFilters {
  const unsigned char* weight;
  int64_t filter_bytes;
  Steps weight_bytes;                          // of channel, row and column
  bool in_chunks;                              // in global memory
  bool gradient;                               // turned round, their channels exchanged
  int32_t count, group, taps;                  // filters in all; channels of a group
  Divisor filter_chunks, tap_chunks, columns;  // of a filter, of a tap; taps of a row
  int32_t row_bytes;                           // of a filter in shared memory
};

// Where a chunk of a filter lies, from the filter's beginning on.
GDFAST_DEVICE int64_t chunk_offset(const GroupedFilters& a, const Divided& tap) {
  const Divided row = divide(tap.quotient, a.columns);
  return row.quotient * a.weight_bytes.h + row.rest * a.weight_bytes.w;
}

// Begins to copy the slab's filters: rows of (tap, channel), where groups of less than 8 channels
// are made up to 8 by zeros in the place of their neighbours.
template <typename T>
GDFAST_DEVICE void stage_filters(const GroupedFilters& a, int32_t first_filter,
                                 unsigned char* filters, int threads) {
  const int chunks = static_cast<int>(a.filter_chunks.divisor);
  const unsigned char* const weight = a.weight + first_filter * a.filter_bytes;
  if (a.in_chunks) {
    // A lane has the same chunk of many filters: where it lies is found once.
    for (int chunk = warp_lane(); chunk < chunks; chunk += kWarp) {
      const Divided tap = divide(chunk, a.tap_chunks);
      const unsigned char* const from = weight + (chunk_offset(a, tap) + tap.rest * 16);
#pragma unroll 4
      for (int filter = warp_index(); filter < kSlab; filter += threads / kWarp) {
        cp_async_16(filters + filter * a.row_bytes + chunk * 16, from + filter * a.filter_bytes,
                    first_filter + filter < a.count);
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = this_thread(); i < kSlab * chunks; i += threads) {
    const Divided filter = divide(i, a.filter_chunks), tap = divide(filter.rest, a.tap_chunks);
    const unsigned char* const from =
        weight + (filter.quotient * a.filter_bytes + chunk_offset(a, tap));
    const int before = a.group < 8 ? filter.quotient % 8 / a.group * a.group : 0;
    union {
      uint16_t elements[8];
      Pack16 pack;
    } values;
#pragma unroll
    for (int lane = 0; lane < 8; ++lane) {
      const int channel = tap.rest * 8 + lane - before;
      const bool valid =
          first_filter + filter.quotient < a.count && channel >= 0 && channel < a.group;
      values.elements[lane] =
          valid ? *reinterpret_cast<const uint16_t*>(from + channel * a.weight_bytes.outer) : 0;
    }
    store_16(filters + filter.quotient * a.row_bytes + filter.rest * 16, values.pack);
  }
}

// Where a warp that makes 16 channels of the slab finds what it multiplies by, this lane's rows for
// ldmatrix.
struct FilterPlaces {
  int first, tap_bytes, step_bytes;  // a step is 16 channels that are summed over
};

// kWide: of groups of 16 channels and more, whose first channel of the slab this is.
template <bool kWide>
GDFAST_DEVICE FilterPlaces filter_places(const GroupedFilters& a, int channel, int first_of_group) {
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  const int high = matrix >> 1, low = matrix & 1;
  int row = channel + low * 8 + line, chunk = 0;
  FilterPlaces at;
  at.tap_bytes = static_cast<int>(a.tap_chunks.divisor) * 16;
  at.step_bytes = 32;
  if (kWide && a.gradient) {
    row = first_of_group + low * 8 + line;
    chunk = (channel - first_of_group) / 8 + high;
    at.step_bytes = 16 * a.row_bytes;
  } else if (kWide) {
    row = channel + high * 8 + line;
    chunk = low;
  }
  at.first = row * a.row_bytes + chunk * 16;
  if (a.gradient) {
    at.first += (a.taps - 1) * at.tap_bytes;
    at.tap_bytes = -at.tap_bytes;
  }
  return at;
}

// Sixteen channels by what each sums over in a step: 16 channels, in two halves, or of groups that
// have fewer the eight that each half has for itself.
GDFAST_DEVICE void load_filters(uint32_t (&right)[4], const unsigned char* from, bool gradient) {
  if (gradient) {
    ldmatrix_x4_transposed(right, from);
  } else {
    ldmatrix_x4(right, from);
  }
}

// What a channel's filter has for a channel of its group, where groups are no wider than 8.
template <typename T>
GDFAST_DEVICE float filter_element(const GroupedFilters& a, int channel, int other, int tap,
                                   const unsigned char* filters) {
  const int filter = a.gradient ? other : channel, within = a.gradient ? channel : other;
  const int number = (a.gradient ? a.taps - 1 - tap : tap) * 8 + within % 8;
  return to_float(reinterpret_cast<const T*>(filters + filter * a.row_bytes)[number]);
}

// --- From a problem ---------------------------------------------------------------------------

inline int64_t tap_chunks(const Conv2dProblem& p) { return ceil_div(p.C / p.groups, 8); }

// An odd number of chunks: eight filters that are read at a time lie in different banks.
inline int64_t filter_row_bytes(const Conv2dProblem& p) {
  return (p.R * p.S * tap_chunks(p) | 1) * 16;
}

inline GroupedFilters grouped_filters(const Conv2dProblem& p, const void* weight, bool gradient) {
  const int64_t group = p.C / p.groups, taps = p.R * p.S;
  return {static_cast<const unsigned char*>(weight),
          p.weight.n * 2,
          channel_steps(p.weight, 2),
          group % 8 == 0 && has_chunks(weight, p.weight, group, p.K, p.R, p.S, 2),
          gradient,
          small(p.C),
          small(group),
          small(taps),
          Divisor::of(taps * tap_chunks(p)),
          Divisor::of(tap_chunks(p)),
          Divisor::of(p.S),
          small(filter_row_bytes(p))};
}

// The gradient in the input of a convolution of stride 1, as a forward pass of other tensors.
inline Conv2dProblem turned(const Conv2dProblem& p) {
  Conv2dProblem t = p;
  t.H = p.P, t.W = p.Q, t.P = p.H, t.Q = p.W;
  t.pad_h = p.R - 1 - p.pad_h;
  t.pad_w = p.S - 1 - p.pad_w;
  t.input = p.output;
  t.output = p.input;
  t.activation = Activation::kNone;
  return t;
}

}  // namespace
}  // namespace gdfast::cuda
