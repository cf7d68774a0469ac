// The gradients in the weight and the bias where images have few channels (conv2d_stem.h): a block
// sums over the tiles of positions of one split, in registers, for 64 filters and up to 24 times
// eight numbers of their rows. What the splits have summed is added up in order by a second kernel.
#include "conv2d_stem.h"
#include "device.h"

namespace gdfast::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kFilterTiles = kStemFilters / 16;
constexpr int kColumnTiles = 6;  // of a warp, eight numbers each

struct Arguments {
  StemPatch patch;
  StemTiles tiles;
  int32_t tiles_of_split;
  const unsigned char* grad;
  Steps grad_bytes;
  int64_t filter_bytes;
  bool in_chunks;
  int32_t filters, rows, row_values;  // K, R, S C
  int32_t column_tiles;               // of all rows
  Divisor row_tiles;                  // column tiles of a row
  float* weight_sums;                 // [splits, K, R, S C]
  float* bias_sums;                   // [splits, K], or null
};

// A few positions of grad_output, which are summed over, by the block's filters.
template <typename Element>
using GradTile = SharedTile<sizeof(Element), kStemFilters, true>;

// Zeros for positions and filters that are not there.
template <typename Element>
GDFAST_DEVICE void stage_grad(const Arguments& a, const StemTile& tile, int32_t first_filter,
                              unsigned char* grad) {
  using Tile = GradTile<Element>;
  constexpr int kChunks = kStemFilters / Tile::kLanes;
  const StemPositions positions{tile, a.tiles.P, a.tiles.Q, a.grad_bytes};
#pragma unroll 4
  for (int i = this_thread(); i < kStemPositions * kChunks; i += kThreads) {
    const int position = i / kChunks, chunk = i % kChunks;
    const int32_t filter = first_filter + chunk * Tile::kLanes;
    const Place place = place_at(positions, position);
    const bool inside = place.h != kOutside;
    unsigned char* const to = grad + position / Tile::kRows * Tile::kSize +
                              chunk_offset<Tile>(position % Tile::kRows, chunk);
    const unsigned char* const from = a.grad + (place.offset + filter * a.filter_bytes);
    if (a.in_chunks) {
      cp_async_16(to, from, inside && filter < a.filters);
    } else {
      using Raw = typename Bits<sizeof(Element)>::Type;
      union {
        Raw elements[Tile::kLanes];
        Pack16 pack;
      } values;
#pragma unroll
      for (int lane = 0; lane < Tile::kLanes; ++lane) {
        const bool valid = inside && filter + lane < a.filters;
        values.elements[lane] =
            valid ? *reinterpret_cast<const Raw*>(from + lane * a.filter_bytes) : Raw{0};
      }
      store_16(to, values.pack);
    }
  }
}

// One word of a right operand: of the number of a filter's row that lies at `column` under the
// first position, what is there under those at q. Positions beyond the image read others' pixels,
// which may be infinite: times zero that is no zero.
template <typename Element>
GDFAST_DEVICE uint32_t word_at(const unsigned char* column, int q, int32_t columns,
                               int32_t step_bytes) {
  if constexpr (sizeof(Element) == 4) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(column + q * step_bytes);
    return q < columns ? word : 0;
  } else {
    const unsigned char* const from = column + q * step_bytes;
    const uint32_t low = *reinterpret_cast<const uint16_t*>(from);
    const uint32_t high = *reinterpret_cast<const uint16_t*>(from + step_bytes);
    return (q < columns ? low : 0) | (q + 1 < columns ? high << 16 : 0);
  }
}

template <typename Operands>
GDFAST_KERNEL(kThreads, 2)
conv2d_stem_grad_weight_kernel(GDFAST_GRID_CONSTANT const Arguments a) {
  using Element = typename Operands::Element;
  using Tile = GradTile<Element>;
  constexpr int kTerms = Operands::kTerms, kStep = 2 * Tile::kLanes;
  constexpr int kWord = 4 / static_cast<int>(sizeof(Element));  // numbers of a word
  constexpr int kGradBytes = kStemPositions * kStemFilters * static_cast<int>(sizeof(Element));
  unsigned char* const grad = shared_memory();
  unsigned char* const patch = shared_memory() + kGradBytes;
  const int lane = warp_lane();
  const auto first_filter = static_cast<int32_t>(blockIdx.z) * kStemFilters;
  const auto first_column = static_cast<int32_t>(blockIdx.y) * kWarps * kColumnTiles;
  const int64_t split = blockIdx.x;

  // Neighbouring column tiles go to different warps, so that all have about as many.
  int column_at[kColumnTiles];
  int columns = 0;
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const int32_t column_tile = first_column + j * kWarps + warp_index();
    const Divided row = divide(column_tile, a.row_tiles);
    column_at[j] = row.quotient * a.patch.row_bytes +
                   (row.rest * 8 + lane / 4) * static_cast<int>(sizeof(Element));
    if (column_tile < a.column_tiles) columns = j + 1;
  }
  float sums[kFilterTiles][kColumnTiles][4];
#pragma unroll
  for (int i = 0; i < kFilterTiles * kColumnTiles * 4; ++i) {
    reinterpret_cast<float (&)[kFilterTiles * kColumnTiles * 4]>(sums)[i] = 0;
  }
  // Two threads for each filter add up the gradients.
  constexpr int kParts = kThreads / kStemFilters;
  const int filter = this_thread() % kStemFilters, part = this_thread() / kStemFilters;
  const bool sums_bias = a.bias_sums != nullptr && first_column == 0;
  float bias_sum = 0;

  const int64_t first_tile = split * a.tiles_of_split;
  for (int64_t index = first_tile; index < first_tile + a.tiles_of_split && index < a.tiles.total;
       ++index) {
    const StemTile tile = tile_at(a.tiles, static_cast<int32_t>(index));
    stage_grad<Element>(a, tile, first_filter, grad);
    cp_async_commit();
    stage_patch<Element, kThreads, 1>(a.patch, tile, patch);
    cp_async_wait<0>();
    sync_block();
    if (sums_bias) {
#pragma unroll 8
      for (int position = part; position < kStemPositions; position += kParts) {
        const unsigned char* const from = grad + position / Tile::kRows * Tile::kSize;
        bias_sum += to_float(*reinterpret_cast<const Element*>(
            from + element_offset<Tile>(filter, position % Tile::kRows)));
      }
    }
    const int32_t rows_left = a.tiles.P - tile.p, columns_left = a.tiles.Q - tile.q;
    const int positions = (rows_left < kStemRows ? rows_left : kStemRows) * kStemColumns;
    for (int first = 0; first < positions; first += kStep) {
      uint32_t left[kFilterTiles][kTerms][4];
#pragma unroll
      for (int i = 0; i < kFilterTiles; ++i) {
        uint32_t raw[4];
        load_operands<Tile, true>(raw, grad + first / Tile::kRows * Tile::kSize, 0, i,
                                  first % Tile::kRows / Tile::kLanes);
        Operands::convert(raw, left[i]);
      }
      const unsigned char* const window =
          patch + first / kStemColumns * a.patch.stride_h * a.patch.row_bytes;
      const int q = first % kStemColumns + lane % 4 * kWord;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        if (j >= columns) break;
        uint32_t pair[2], right[kTerms][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          pair[half] = word_at<Element>(window + column_at[j], q + half * Tile::kLanes,
                                        columns_left, a.patch.step_bytes);
        }
        Operands::convert(pair, right);
#pragma unroll
        for (int i = 0; i < kFilterTiles; ++i) {
          Operands::multiply_add(sums[i][j], left[i], right);
        }
      }
    }
    sync_block();
  }

  const int64_t filter_sums = int64_t{a.rows} * a.row_values;
  float* const to = a.weight_sums + split * a.filters * filter_sums;
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const int32_t column_tile = first_column + j * kWarps + warp_index();
    const Divided row = divide(column_tile, a.row_tiles);
    const int column = row.rest * 8 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kFilterTiles * 4; ++i) {
      const int32_t k = first_filter + i / 4 * 16 + i % 4 / 2 * 8 + lane / 4;
      const int32_t value = column + i % 2;
      if (j < columns && k < a.filters && value < a.row_values) {
        to[k * filter_sums + row.quotient * a.row_values + value] = sums[i / 4][j][i % 4];
      }
    }
  }
  if (sums_bias) {
    float* const parts = reinterpret_cast<float*>(shared_memory());
    parts[this_thread()] = bias_sum;
    sync_block();
    if (part == 0 && first_filter + filter < a.filters) {
      for (int other = 1; other < kParts; ++other) bias_sum += parts[other * kStemFilters + filter];
      a.bias_sums[split * a.filters + first_filter + filter] = bias_sum;
    }
  }
}

struct SplitSums {
  const float* sums;  // [splits, K, R, S, C]
  int64_t count, splits;
  unsigned char* to;
  Divisor of_filter, of_row, channels;
  int64_t filter_bytes;
  Steps bytes;  // of channel, row and column
};

template <typename Element>
GDFAST_KERNEL(kThreads, 1)
sum_stem_splits_kernel(GDFAST_GRID_CONSTANT const SplitSums a) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + this_thread();
  if (index >= a.count) return;
  float sum = 0;
#pragma unroll 8
  for (int64_t split = 0; split < a.splits; ++split) sum += a.sums[split * a.count + index];
  const Divided filter = divide(static_cast<int32_t>(index), a.of_filter);
  const Divided row = divide(filter.rest, a.of_row), column = divide(row.rest, a.channels);
  *reinterpret_cast<Element*>(a.to + filter.quotient * a.filter_bytes + row.quotient * a.bytes.h +
                              column.quotient * a.bytes.w + column.rest * a.bytes.outer) =
      from_float<Element>(sum);
}

int64_t grad_shared_bytes(const Conv2dProblem& p) {
  const StemPatch patch = stem_patch(p, nullptr);
  return kStemPositions * kStemFilters * bytes_of(p.dtype) + int64_t{patch.rows} * patch.row_bytes;
}

int64_t weight_elements(const Conv2dProblem& p) { return p.K * p.R * p.S * p.C; }

}  // namespace

int64_t conv2d_stem_grad_weight_workspace(const Conv2dProblem& p, int64_t splits, bool bias) {
  return splits * (weight_elements(p) + (bias ? p.K : 0)) * 4;
}

void conv2d_stem_grad_weight(const Conv2dProblem& p, Precision precision, const void* grad_output,
                             const void* input, void* grad_weight, void* grad_bias, void* workspace,
                             int64_t splits, const Where& where) {
  const int64_t bytes = bytes_of(p.dtype), weights = weight_elements(p);
  const StemTiles tiles = stem_tiles(p);
  const int64_t row_tiles = blocks_for(p.S * p.C, 8), column_tiles = p.R * row_tiles;
  auto* const weight_sums = static_cast<float*>(workspace);
  float* const bias_sums = grad_bias == nullptr ? nullptr : weight_sums + splits * weights;
  // The sums of no positions are zeros.
  const int64_t used = tiles.total == 0 ? 0 : splits;
  const Arguments a{stem_patch(p, input),
                    tiles,
                    small(blocks_for(tiles.total, splits)),
                    static_cast<const unsigned char*>(grad_output),
                    image_steps(p.output, bytes),
                    p.output.c * bytes,
                    has_chunks(grad_output, p.output, p.K, p.N, p.P, p.Q, bytes),
                    small(p.K),
                    small(p.R),
                    small(p.S * p.C),
                    small(column_tiles),
                    Divisor::of(row_tiles),
                    weight_sums,
                    bias_sums};
  const SplitSums of_weight{weight_sums,
                            weights,
                            used,
                            static_cast<unsigned char*>(grad_weight),
                            Divisor::of(p.R * p.S * p.C),
                            Divisor::of(p.S * p.C),
                            Divisor::of(p.C),
                            p.weight.n * bytes,
                            channel_steps(p.weight, bytes)};
  const SplitSums of_bias{bias_sums,      p.K,
                          used,           static_cast<unsigned char*>(grad_bias),
                          Divisor::of(1), Divisor::of(1),
                          Divisor::of(1), bytes,
                          {0, 0, 0}};
  const DeviceGuard guard("conv2d_grad_weight", where.device);
  with_operands(p.dtype, precision, [&](auto operands) {
    using Operands = decltype(operands);
    const char* const op = "conv2d_grad_weight";
    if (used > 0) {
      const dim3 grid(static_cast<unsigned>(splits),
                      static_cast<unsigned>(blocks_for(column_tiles, kWarps * kColumnTiles)),
                      static_cast<unsigned>(blocks_for(p.K, kStemFilters)));
      launch(op, conv2d_stem_grad_weight_kernel<Operands>, grid, kThreads,
             static_cast<size_t>(grad_shared_bytes(p)), where.stream, a);
    }
    const auto sum = [&](const SplitSums& sums) {
      launch(op, sum_stem_splits_kernel<typename Operands::Element>,
             dim3(static_cast<unsigned>(blocks_for(sums.count, kThreads))), kThreads, 0,
             where.stream, sums);
    };
    sum(of_weight);
    if (grad_bias != nullptr) sum(of_bias);
  });
}

}  // namespace gdfast::cuda
