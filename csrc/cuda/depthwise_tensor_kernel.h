// The kernel of depthwise_tensor.cu.
#pragma once

#include "depthwise_diagonals.h"
#include "depthwise_tensor.h"

namespace gdfast::cuda {
namespace {

// Blocks of a multiprocessor, as many as registers allow.
template <typename Tile, int kSize, bool kEnding>
constexpr int kBlocks = kSize == 7           ? 1
                        : Tile::kPlanes == 2 ? (kSize == 5 ? 2 : 4)
                                             : (kSize == 5 ? 2 : 4) / (kEnding ? 2 : 1);

// A block. In shared memory: the ring, batches of rows of the input; and twice the outputs that a
// batch completes, which are written to global memory while the next batch is multiplied. Filters
// lie there before.
template <typename Tile, int kSize>
struct Block {
  static constexpr int kPlanes = Tile::kPlanes;
  static constexpr int kGroups = kSize >= 5 ? 1 : 2;  // of 8 channels, which a warp multiplies
  static constexpr int kThreads = kPlanes / kGroups * Tile::kWarps * kWarp;
  static constexpr int kBatches = kSize == 7 ? 2 : 3;
  static constexpr int kSlots = Tile::slots(Tile::kPositions + kSize - 1);
  static constexpr int kPlane = kSlots * 16, kRow = kPlanes * kPlane;
  static constexpr int kBatch = kSize * kRow, kRing = kBatches * kBatch;

  // A position's channels; an odd number of chunks, so that words that are written at a time lie in
  // different banks, where there is room.
  static constexpr int kPosition = (kSize == 7 ? kPlanes : kPlanes | 1) * 16;
  static constexpr int kMadeRow = Tile::kPositions * kPosition, kMade = kSize * kMadeRow;
  static constexpr int kBytes = kRing + 2 * kMade;
  static_assert(kBytes <= 99 * 1024, "every GPU from compute capability 8.0 on has so much");
  static_assert(Tile::kSlab * kSize * kSize * 2 <= 2 * kMade, "filters fit");

  // Chunks of a row of outputs; threads write one of each row, or of every other one.
  static constexpr int kChunks = Tile::kPositions * kPlanes;
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0, "each thread writes the same place of a row");
};

// kEnding: with a bias or an activation.
template <typename T, typename Tile, int kSize, bool kEnding>
GDFAST_POINTERS_MAY_LEAVE GDFAST_KERNEL((Block<Tile, kSize>::kThreads),
                                        (kBlocks<Tile, kSize, kEnding>))
    depthwise_tensor_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                            const GDFAST_GRID_CONSTANT TensorWalk walk,
                            const GDFAST_GRID_CONSTANT Tensors<T> tensors) {
  using Its = Block<Tile, kSize>;
  constexpr int kGroups = Its::kGroups, kPlanes = Its::kPlanes;
  using Rows = TensorRows<kPlanes, Its::kSlots, Its::kThreads>;
  using Filters = Diagonals<T, kSize, kGroups>;
  unsigned char* const ring = shared_memory();
  const int first_channel = static_cast<int>(blockIdx.x) * Tile::kSlab;
  const int first = static_cast<int>(blockIdx.y) * walk.rows_of_block;
  const int last = first + walk.rows_of_block, end = last < walk.rows ? last : walk.rows;

  // What is copied next: a batch of a piece, which may be one after that which is multiplied.
  int ahead = first, ahead_h = 0, ahead_steps = 0;
  const T* from = tensors.input;
  Rows rows = Rows::of(a.input, walk);
  const auto copy_batch = [&](int to_batch) {
    if (ahead_steps <= 0 && ahead < end) {
      const TensorPiece piece = piece_at(a, walk, ahead, end);
      ahead += piece.rows;
      ahead_h = piece.p - a.pad_h;
      ahead_steps = piece.rows + kSize - 1;
      const int w = piece.q - a.pad_w;
      Rows::begin(rows, walk, a.N - piece.n, -w, a.W - 1 - w, a.C - first_channel);
      from = tensors.input + piece.n * a.input.n + int64_t{ahead_h} * a.input.h +
             int64_t{w} * a.input.w + first_channel;
    }
    Rows::template copy<kSize, Its::kRow>(
        rows, from, a.input.h, rows_within<kSize>(ahead_h, ahead_steps, a.H), ring + to_batch);
    from += int64_t{kSize} * a.input.h;
    cp_async_commit();
    ahead_h += kSize;
    ahead_steps -= kSize;
  };
#pragma unroll 1
  for (int i = 0; i < Its::kBatches - 1; ++i) copy_batch(i * Its::kBatch);
#pragma unroll 1
  for (int i = 0; i < Its::kBatches * kSize; ++i) Rows::clear(walk, ring + i * Its::kRow);
  auto* const filters = reinterpret_cast<T*>(ring + Its::kRing);
  Filters::template share<Tile::kSlab, Its::kThreads>(a, tensors.weight, first_channel, filters,
                                                      static_cast<int>(threadIdx.x));
  sync_block();
  // The channels and positions of this warp, from the block's first ones on.
  const int group = warp_index() / Tile::kWarps * kGroups;
  const int position = warp_index() % Tile::kWarps * 16, quarter = warp_lane() % 4;
  Filters diagonals;
  Filters::take(diagonals, filters + group * 8 * kSize * kSize);
  float bias[kGroups * 2] = {};  // of the channels that this lane has of a matrix's columns
  if (kEnding && tensors.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kGroups * 2; ++i) {
      const int k = first_channel + (group + i / 2) * 8 + quarter * 2 + i % 2;
      if (k < a.K) bias[i] = to_float(tensors.bias[k]);
    }
  }

  // Where this lane loads matrices: two columns of one plane, or the last column of two.
  const int matrix = warp_lane() / 8, line = warp_lane() % 8;
  const int slot = group * Its::kPlane + (position + matrix % 2 * 8 + line) * 16;
  const int pairs_at = slot + matrix / 2 * 16;
  const int last_at = kGroups == 1 ? pairs_at + (kSize - 1) * 16
                                   : slot + (kSize - 1) * 16 + matrix / 2 * Its::kPlane;
  // Where it puts sums; and of which position and channels this thread writes outputs.
  const int sums_at =
      Its::kRing + (position + warp_lane() / 4) * Its::kPosition + group * 16 + quarter * 4;
  const int thread = static_cast<int>(threadIdx.x);
  const int place = thread % Its::kChunks / kPlanes, plane = thread % Its::kChunks % kPlanes;
  const int made_at = Its::kRing + place * Its::kPosition + plane * 16;
  const TensorColumn column = column_at(walk, place);
  const auto outputs = [&](const TensorPiece& piece) -> T* {
    const int n = piece.n + column.image, q = piece.q + column.column;
    const int k = first_channel + plane * 8;
    if (column.image >= walk.images || n >= a.N || column.column >= walk.strip || q >= a.Q ||
        k >= a.K) {
      return nullptr;
    }
    return tensors.output + n * a.output.n + int64_t{piece.p} * a.output.h +
           int64_t{q} * a.output.w + k;
  };

  // Rows of outputs that the batch before has completed: a flag for each that this thread writes.
  uint32_t made = 0;
  T* to = nullptr;  // the first of the batch
  int made_in = 0;  // which half of the memory for them
  const auto write_outputs = [&] {
#pragma unroll
    for (int u = 0; u < kSize; ++u) {
      if (made >> u & 1u) {
        store_16(to + int64_t{u} * a.output.h,
                 load_16(ring + made_at + made_in + u * Its::kMadeRow));
      }
    }
    made_in = Its::kMade - made_in;
  };

  float zero = 0;  // unless a sum was not finite
  int at = 0;
#pragma unroll 1
  for (int row = first; row < end;) {
    const TensorPiece piece = piece_at(a, walk, row, end);
    row += piece.rows;
    T* const first_output = outputs(piece);
    const int steps = piece.rows + kSize - 1, h = piece.p - a.pad_h;
    Sums<kGroups> alive[kSize] = {};
    LastColumn<kGroups> before = {};
#pragma unroll 1
    for (int step = 0; step < steps; step += kSize) {
      cp_async_wait<Its::kBatches - 2>();
      sync_block();  // and nobody reads the batch before any more
      copy_batch((at == 0 ? Its::kRing : at) - Its::kBatch);
      write_outputs();
      // Those of this batch.
      to = first_output + int64_t{step - (kSize - 1)} * a.output.h;
      made = 0;
#pragma unroll
      for (int u = 0; u < kSize; ++u) {
        const bool completed = step + u >= kSize - 1 && step + u < steps;
        const bool mine = u % Its::kRowsAtOnce == thread / Its::kChunks;
        if (completed && mine && first_output != nullptr) made |= 1u << u;
      }
      const unsigned char* const batch = ring + at;
      at = at + Its::kBatch < Its::kRing ? at + Its::kBatch : 0;
      // Row u of the batch, for the output that sees it first and those that have begun.
      const auto multiply = [&](int u) {
#pragma unroll
        for (float& sum : alive[u]) sum = 0;
        const bool inside = static_cast<unsigned>(h + step + u) < static_cast<unsigned>(a.H);
        const unsigned char* const pixels = batch + u * Its::kRow;
        multiply_row<T, kSize>(alive, u, before, diagonals, inside, [&](int g, int s) {
          return pixels + (s + 1 < kSize ? pairs_at + g * Its::kPlane + s * 16 : last_at);
        });
      };
      // The output that sees row u last.
      const auto finish = [&](int u, Sums<kGroups>& sums) {
        if (step + u < kSize - 1) return;
#pragma unroll
        for (float sum : sums) zero += sum * 0;
        if constexpr (kEnding) {
#pragma unroll
          for (int i = 0; i < kGroups * 4; ++i) sums[i] += bias[i / 4 * 2 + i % 2];
          activate(sums, a.activation, static_cast<float>(a.negative_slope));
        }
        unsigned char* const words = ring + sums_at + made_in + u * Its::kMadeRow;
#pragma unroll
        for (int i = 0; i < kGroups * 4; i += 2) {
          auto* const word =
              reinterpret_cast<PackOf<T, 2>*>(words + i / 4 * 16 + i / 2 % 2 * 8 * Its::kPosition);
          *word = {{pack_two<T>(sums[i], sums[i + 1])}};
        }
      };
      if constexpr (kEnding) {
        // Activations are long: they are there once.
#pragma unroll 1
        for (int u = 0; u < kSize && step + u < steps; ++u) {
          Sums<kGroups> sums;
#pragma unroll
          for (int v = 0; v < kSize; ++v) {
            if (u != v) continue;
            multiply(v);
#pragma unroll
            for (int i = 0; i < kGroups * 4; ++i) sums[i] = alive[(v + 1) % kSize][i];
          }
          finish(u, sums);
        }
      } else {
#pragma unroll
        for (int u = 0; u < kSize; ++u) {
          if (step + u >= steps) break;
          multiply(u);
          finish(u, alive[(u + 1) % kSize]);
        }
      }
    }
  }
  cp_async_wait<0>();
  sync_block();
  write_outputs();
  if (sum_of_warps(zero, reinterpret_cast<float*>(ring), warp_index(), Its::kThreads / kWarp,
                   sync_block) == 0) {
    return;
  }
#pragma unroll 1
  for (int row = first; row < end;) {
    const TensorPiece piece = piece_at(a, walk, row, end);
    row += piece.rows;
    T* const chunks = outputs(piece);
    if (chunks == nullptr) continue;
    // Made by whom it was written.
#pragma unroll 1
    for (int p = 0; p < piece.rows; ++p) {
      if ((p + kSize - 1) % kSize % Its::kRowsAtOnce != thread / Its::kChunks) continue;
      mend<T, kSize>(a, tensors, chunks + int64_t{p} * a.output.h, piece.n + column.image,
                     first_channel + plane * 8, piece.p + p, piece.q + column.column);
    }
  }
}

}  // namespace
}  // namespace gdfast::cuda
