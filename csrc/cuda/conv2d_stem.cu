// Convolution of images with few channels (conv2d_stem.h): a block keeps its filters in shared
// memory and walks over some tiles of positions.
#include "activation.h"
#include "conv2d_stem.h"
#include "device.h"

namespace gdfast::cuda {
namespace {

struct Arguments {
  StemPatch patch;
  StemTiles tiles;
  int32_t tiles_of_block;
  const unsigned char* weight;
  int64_t filter_bytes, weight_channel_bytes;
  Steps weight_bytes;                    // of row and column
  Divisor row_depth;                     // numbers of a filter's row, made up to 16 bytes
  int32_t filters, rows, row_values;     // and as they are
  int32_t chunks, row_chunks, steps;     // of 16 bytes; a step of the product takes two
  int32_t weight_row_bytes, weights_at;  // in shared memory
  Output output;
  Steps output_bytes;
  const void* bias;
  Activation activation;
  double negative_slope;
  void* moments;  // [tiles, threads of a column, 3, K], or null
};

// Filters in rows of their depth, zeros where there is no number; several of them at once, as
// stage_patch does it.
template <typename Math>
GDFAST_DEVICE void stage_weights(const Arguments& a, int32_t first_filter, unsigned char* weights) {
  using Raw = typename Bits<sizeof(typename Math::Element)>::Type;
  constexpr int kWarps = Math::kThreads / kWarp, kAtOnce = Math::kN / kWarps;
  const int depth = a.steps * 32 / static_cast<int>(sizeof(Raw));
  for (int index = warp_lane(); index < depth; index += kWarp) {
    const Divided row = divide(index, a.row_depth);
    const Divided column = divide(row.rest, a.patch.channels);
    const int64_t offset = row.quotient * a.weight_bytes.h + column.quotient * a.weight_bytes.w +
                           column.rest * a.weight_channel_bytes;
    const bool exists = row.quotient < a.rows && row.rest < a.row_values;
    Raw values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t filter = first_filter + warp_index() + i * kWarps;
      const unsigned char* const from = a.weight + (filter * a.filter_bytes + offset);
      const bool inside = exists && filter < a.filters;
      values[i] = inside ? *reinterpret_cast<const Raw*>(from) : Raw{0};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int line = warp_index() + i * kWarps;
      reinterpret_cast<Raw*>(weights + line * a.weight_row_bytes)[index] = values[i];
    }
  }
}

// The numbers of a word of a filter row's last 16 bytes that are the filter's. Others are those of
// pixels beside the window: zeros of the weight would not do, for these may be infinite.
template <int kBytes>
GDFAST_DEVICE uint32_t mask_of_last(const Arguments& a, int word) {
  const int first = (a.row_chunks - 1) * (16 / kBytes) + word * (4 / kBytes);
  if constexpr (kBytes == 4) return first < a.row_values ? ~0u : 0;
  return (first < a.row_values ? 0xffffu : 0) | (first + 1 < a.row_values ? 0xffff0000u : 0);
}

template <typename Operands, typename Math>
GDFAST_DEVICE void multiply_patch(typename Math::Sums& sums, const Arguments& a,
                                  const unsigned char* patch, const unsigned char* weights) {
  constexpr int kBytes = sizeof(typename Math::Element), kTerms = Operands::kTerms;
  constexpr int kRowTiles = Math::kRows / 16, kColumnTiles = Math::kColumns / 16;
  static_assert(kStemColumns == 16, "a row of a tile is what an instruction takes");
  const int lane = warp_lane(), word = lane % 4;
  // This thread's two positions of the first row, as words: those that begin within one are taken
  // from the copy that begins a number later.
  const unsigned char* from[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int at = (lane / 4 + half * 8) * a.patch.step_bytes;
    if (kBytes == 2 && at % 4 != 0) at += a.patch.copy_bytes + 2;
    from[half] = patch + at + word * 4 +
                 Math::first_row() / kStemColumns * a.patch.stride_h * a.patch.row_bytes;
  }
  const int row_step = a.patch.stride_h * a.patch.row_bytes;
  const uint32_t last = mask_of_last<kBytes>(a, word);
  const int matrix = lane / 8;
  const unsigned char* const filters =
      weights + (Math::first_column() + (matrix >> 1) * 8 + lane % 8) * a.weight_row_bytes +
      (matrix & 1) * 16;
  for (auto& sum : Math::flat(sums)) sum = 0;
  int chunk = 0, chunk_of_row = 0, next = 0;
  for (int step = 0; step < a.steps; ++step) {
    int at[2];
    uint32_t mask[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = chunk < a.chunks;
      at[half] = exists ? next : 0;
      mask[half] = !exists ? 0 : chunk_of_row == a.row_chunks - 1 ? last : ~0u;
      ++chunk;
      next += 16;
      if (++chunk_of_row == a.row_chunks) {
        chunk_of_row = 0;
        next += a.patch.row_bytes - a.row_chunks * 16;
      }
    }
    uint32_t left[kRowTiles][kTerms][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t raw[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const unsigned char* const address = from[j & 1] + (i * row_step + at[j >> 1]);
        raw[j] = *reinterpret_cast<const uint32_t*>(address) & mask[j >> 1];
      }
      Operands::convert(raw, left[i]);
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      uint32_t raw[4];
      ldmatrix_x4(raw, filters + (j * 16 * a.weight_row_bytes + step * 32));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair[2] = {raw[half * 2], raw[half * 2 + 1]};
        uint32_t right[kTerms][2];
        Operands::convert(pair, right);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          Operands::multiply_add(sums.values[i][j * 2 + half], left[i], right);
        }
      }
    }
  }
}

template <typename Operands>
GDFAST_KERNEL(StemBlock::kThreads, 2)
conv2d_stem_kernel(GDFAST_GRID_CONSTANT const Arguments a) {
  using Math = TensorCores<Operands, StemBlock>;
  using Its = BlockMemory<Math, false, false>;
  using Element = typename Math::Element;
  constexpr int kCopies = sizeof(Element) == 2 ? 2 : 1;
  // Patch and results take turns.
  unsigned char* const patch = shared_memory();
  unsigned char* const weights = shared_memory() + a.weights_at;
  const auto first_filter = static_cast<int32_t>(blockIdx.y) * Math::kN;
  stage_weights<Math>(a, first_filter, weights);
  const auto finish = [&](auto& values, int filter) {
    if (a.bias != nullptr) {
      const Element* bias = static_cast<const Element*>(a.bias) + filter;
      for (float& value : values) value += to_float(*bias++);
    }
    activate(values, a.activation, static_cast<float>(a.negative_slope));
  };
  for (int32_t i = 0; i < a.tiles_of_block; ++i) {
    const int64_t index = int64_t{blockIdx.x} * a.tiles_of_block + i;
    if (index >= a.tiles.total) return;
    const StemTile tile = tile_at(a.tiles, static_cast<int32_t>(index));
    stage_patch<Element, Math::kThreads, kCopies>(a.patch, tile, patch);
    sync_block();
    typename Math::Sums sums;
    multiply_patch<Operands, Math>(sums, a, patch, weights);
    sync_block();
    keep_results<Math, Its>(sums);
    const StemPositions rows{tile, a.tiles.P, a.tiles.Q, a.output_bytes};
    if (a.moments != nullptr) {
      write_moments<Math, Its>(
          static_cast<float*>(a.moments) + 3 * index * kThreadsOfColumn<Math> * a.filters,
          a.filters, first_filter, a.filters, [&](int row) { return exists(rows, row); }, finish);
    }
    write_results<Math, Its>(a.output, rows, 0, first_filter, finish);
    sync_block();
  }
}

// An odd multiple of 16 bytes: eight rows that are read at a time lie in different banks.
int64_t weight_row_bytes(int64_t steps) { return (steps * 2 + 1) * 16; }

// Rounds up to what ldmatrix reads at.
int64_t aligned(int64_t bytes) { return blocks_for(bytes, 16) * 16; }

// Bytes of shared memory before the filters.
int64_t weights_at(const Conv2dProblem& p) {
  using Its = BlockMemory<TensorCores<Tf32Operands, StemBlock>, false, false>;
  const StemPatch patch = stem_patch(p, nullptr);
  const int64_t copies = bytes_of(p.dtype) == 2 ? 2 : 1, bytes = copies * patch.copy_bytes;
  return aligned(bytes > Its::kResults ? bytes : Its::kResults);
}

int64_t steps_of(const Conv2dProblem& p) {
  const int64_t lanes = 16 / bytes_of(p.dtype);
  return blocks_for(p.R * stem_row(p, lanes) / lanes, 2);
}

}  // namespace

int64_t conv2d_stem_shared_bytes(const Conv2dProblem& p) {
  return weights_at(p) + kStemFilters * weight_row_bytes(steps_of(p));
}

int64_t conv2d_stem_moments_workspace(const Conv2dProblem& p) {
  return int64_t{stem_tiles(p).total} * kThreadsOfColumn<TensorCores<Tf32Operands, StemBlock>> * 3 *
         p.K * 4;
}

void conv2d_stem(const Conv2dProblem& p, Precision precision, int64_t tiles_of_block,
                 const void* input, const void* weight, const void* bias, void* output,
                 void* moments, void* workspace, const Where& where) {
  const StemTiles tiles = stem_tiles(p);
  if (tiles.total == 0) return;
  const int64_t bytes = bytes_of(p.dtype), lanes = 16 / bytes;
  const int64_t row_depth = stem_row(p, lanes), steps = steps_of(p);
  const Arguments a{
      stem_patch(p, input),
      tiles,
      small(tiles_of_block),
      static_cast<const unsigned char*>(weight),
      p.weight.n * bytes,
      p.weight.c * bytes,
      {0, p.weight.h * bytes, p.weight.w * bytes},
      Divisor::of(row_depth),
      small(p.K),
      small(p.R),
      small(p.S * p.C),
      small(p.R * row_depth / lanes),
      small(row_depth / lanes),
      small(steps),
      small(weight_row_bytes(steps)),
      small(weights_at(p)),
      {static_cast<unsigned char*>(output), 0, small(p.P), small(p.Q), output_positions(p),
       filters(p, p.output.c), has_chunks(output, p.output, p.K, p.N, p.P, p.Q, bytes),
       p.output.c <= p.output.w},
      image_steps(p.output, bytes),
      bias,
      p.activation,
      p.negative_slope,
      moments == nullptr ? nullptr : workspace};
  const DeviceGuard guard("conv2d", where.device);
  const dim3 grid(static_cast<unsigned>(blocks_for(tiles.total, tiles_of_block)),
                  static_cast<unsigned>(blocks_for(p.K, kStemFilters)));
  with_operands(p.dtype, precision, [&](auto operands) {
    launch("conv2d", conv2d_stem_kernel<decltype(operands)>, grid, StemBlock::kThreads,
           static_cast<size_t>(conv2d_stem_shared_bytes(p)), where.stream, a);
  });
  if (moments == nullptr) return;
  join_moments(p, workspace,
               int64_t{tiles.total} * kThreadsOfColumn<TensorCores<Tf32Operands, StemBlock>>,
               moments, where);
}

}  // namespace gdfast::cuda
