// Depthwise convolution in channels_last: threads that walk down columns.
//
// A thread has a vector of channels and kColumns neighbouring columns of outputs, and walks down
// the rows that these see. It reads and converts each row once; what the row gives to the outputs
// that see it is added up in registers, where so many rows of sums as a filter reaches over are
// alive at a time. The next rows are on their way meanwhile.
//
// Instructions bound it: of about 20 for an output of a 3 x 3 filter in half types 9 are its
// products, of 36 for 5 x 5 25, of 72 for 7 x 7 49.
#pragma once

#include "depthwise.h"

namespace gdfast::cuda {

constexpr int kColumnThreads = 128;
constexpr int kColumns = 4;  // of outputs

// Channels of a thread. Registers hold the weights and the sums of 7 x 7 for one.
template <int kSize>
constexpr int kColumnVector = kSize < 7 ? 2 : 1;

// Blocks of a multiprocessor, as many as registers allow.
template <int kSize>
constexpr int kColumnBlocks = kSize == 3   ? 5
                              : kSize == 5 ? 3
                                           : 4;

// After kPeriod rows everything is in the registers again where it was.
template <int kTapRows, int kSteps>
struct ColumnFilter {
  static constexpr int kSize = kTapRows, kStride = kSteps, kTaps = kSize * kSize;
  static constexpr int kVector = kColumnVector<kSize>, kBlocks = kColumnBlocks<kSize>;
  static constexpr int kWide = (kColumns - 1) * kStride + kSize;  // pixels of a row
  static constexpr int kAlive = (kSize + kStride - 1) / kStride;  // rows of outputs
  static constexpr int kPeriod = kAlive * kStride;

  // Which of the rows alive is the output that sees the u-th row of a period by row r of its
  // filter, or -1.
  GDFAST_HOST_DEVICE constexpr int alive(int u, int r) {
    const int first = u - r + kPeriod;
    return first % kStride == 0 ? first / kStride % kAlive : -1;
  }
};

// Rows on their way: in half types three are as much memory as one of float32.
template <typename T, typename Filter>
constexpr int kRowsAhead = sizeof(T) == 2 && Filter::kPeriod == 3 ? 3 : 1;

// A block has some vectors of channels side by side, for some items: kColumns columns of a part of
// an image's rows.
struct ColumnWalk {
  int groups, tile_groups;  // vectors of channels, and those of a block
  int items, tile_items;
  int rows;  // of outputs in a part
  Divisor lanes, strips, parts;

  unsigned threads() const {
    return static_cast<unsigned>(ceil_div(tile_groups * tile_items, kWarp) * kWarp);
  }
  int64_t channel_tiles() const { return (groups - 1) / tile_groups + 1; }
  int64_t item_tiles() const { return (items - 1) / tile_items + 1; }
};

// Whether offsets within a row fit 32 bits.
inline bool has_column_offsets(const DepthwiseArguments& a) {
  constexpr int kMost = 1 << 24;
  return a.input.w < kMost && a.output.w < kMost;
}

// Vectors of a block side by side: if not all, whole sectors of 32 bytes.
inline int column_tile_groups(int64_t groups, int64_t vector_bytes) {
  constexpr int64_t kMost = kWarp;
  if (groups <= kMost) return static_cast<int>(groups);
  int64_t best = kMost;
  for (int64_t tile = kMost; tile >= kMost / 2; tile -= 32 / vector_bytes) {
    if (ceil_div(groups, tile) * tile < ceil_div(groups, best) * best) best = tile;
  }
  return static_cast<int>(best);
}

// `cost` tells what a walk takes; the best number of rows is chosen by it.
template <typename Filter, typename Cost>
ColumnWalk column_walk(const DepthwiseArguments& a, int64_t element_bytes, Cost&& cost) {
  ColumnWalk walk{};
  walk.groups = a.K / Filter::kVector;
  walk.tile_groups = column_tile_groups(walk.groups, Filter::kVector * element_bytes);
  // Whole warps, if a block can have them.
  int whole = 1;
  while (whole < kWarp && walk.tile_groups * whole % kWarp != 0) whole *= 2;
  const int most = kColumnThreads / walk.tile_groups;
  walk.tile_items = whole <= most ? most / whole * whole : most;
  const int64_t strips = ceil_div(a.Q, kColumns);
  double least = 0;
  ColumnWalk best{};
  for (int64_t parts = 1; parts <= a.P; parts += parts < 8 ? 1 : parts / 4) {
    walk.rows = static_cast<int>(ceil_div(a.P, parts));
    walk.items = static_cast<int>(a.N * strips * ceil_div(a.P, walk.rows));
    const double takes = cost(walk);
    if (best.rows != 0 && takes >= least) continue;
    least = takes;
    best = walk;
  }
  best.lanes = Divisor::of(best.tile_groups);
  best.strips = Divisor::of(strips);
  best.parts = Divisor::of(ceil_div(a.P, best.rows));
  return best;
}

// What a thread walks over: outputs from (p, q) of image n on, `rows` of them down, which see the
// rows of the image from h on. The `within` of these from the first one on are inside of it.
struct ColumnPlace {
  int n, p, q, h, w;
  uint32_t rows, first, within;
  uint32_t seen, made;  // columns of the image and of the outputs, as flags: none without an item
};

template <typename Filter>
GDFAST_DEVICE ColumnPlace place_of_column(const DepthwiseArguments& a, const ColumnWalk& walk,
                                          int item, bool exists) {
  static_assert(Filter::kWide <= 32, "columns are flags of one register");
  const Divided strip = divide(item, walk.strips), part = divide(strip.quotient, walk.parts);
  ColumnPlace at;
  at.n = part.quotient;
  at.p = part.rest * walk.rows;
  at.q = strip.rest * kColumns;
  const int rows = a.P - at.p < walk.rows ? a.P - at.p : walk.rows;
  at.h = at.p * Filter::kStride - a.pad_h;
  at.w = at.q * Filter::kStride - a.pad_w;
  const int first = at.h < 0 ? -at.h : 0;
  const int seen_rows = (rows - 1) * Filter::kStride + Filter::kSize;
  const int end = seen_rows < a.H - at.h ? seen_rows : a.H - at.h;
  at.rows = static_cast<uint32_t>(rows);
  at.first = static_cast<uint32_t>(first);
  at.within = static_cast<uint32_t>(end > first ? end - first : 0);
  // Every step asks for these.
  opaque(at.rows);
  opaque(at.first);
  opaque(at.within);
  at.seen = at.made = 0;
#pragma unroll
  for (int j = 0; j < Filter::kWide; ++j) {
    const bool inside = static_cast<unsigned>(at.w + j) < static_cast<unsigned>(a.W);
    if (exists && inside) at.seen |= 1u << j;
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    if (exists && at.q + j < a.Q) at.made |= 1u << j;
  }
  opaque(at.seen);
  opaque(at.made);
  return at;
}

// Vectors of a row from an address on, which begin `step` bytes apart. Those without a flag are not
// read: what they were they stay.
template <typename T, int kVector, int kCount>
struct ColumnRow {
  const unsigned char* address;
  uint32_t offsets[kCount];

  GDFAST_DEVICE void begin(ColumnRow& row, const T* from, int step) {
    row.address = reinterpret_cast<const unsigned char*>(from);
    opaque_global(row.address);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      row.offsets[j] = static_cast<uint32_t>(j * step) * static_cast<uint32_t>(sizeof(T));
      opaque(row.offsets[j]);
    }
  }
  GDFAST_DEVICE void load(const ColumnRow& row, uint32_t flags, PackOf<T, kVector> (&to)[kCount]) {
    opaque(flags);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const auto* const from = reinterpret_cast<const T*>(row.address + row.offsets[j]);
      if (flags >> j & 1u) to[j] = load_pack<kVector>(from);
    }
  }
  GDFAST_DEVICE void next(ColumnRow& row, int step) {
    row.address += int64_t{step} * static_cast<int64_t>(sizeof(T));
    opaque_global(row.address);
  }
};

// The values of a row, whose packs are free for the next one from here on.
template <typename T, int kVector, int kCount>
GDFAST_DEVICE void take_row(const PackOf<T, kVector> (&packs)[kCount],
                            SumOf<T> (&values)[kCount][kVector]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    unpack<T, kVector>(packs[j], values[j]);
#pragma unroll
    for (int v = 0; v < kVector; ++v) opaque(values[j][v]);
  }
}

// The kernels' launchers; they do nothing, and return false or 0, where a filter has none.
bool depthwise_columns(DType dtype, const DepthwiseArguments& arguments, const void* input,
                       const void* weight, const void* bias, void* output, uintptr_t stream);

// In how many splits `partial` gets the sums (depthwise_weight_sums.h), those of the bias if asked.
int depthwise_columns_splits(const DepthwiseArguments& arguments, DType dtype);
int depthwise_columns_grad_weight(DType dtype, const DepthwiseArguments& arguments,
                                  const void* grad_output, const void* input, bool bias,
                                  void* partial, uintptr_t stream);

}  // namespace gdfast::cuda
