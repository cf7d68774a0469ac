// Depthwise convolution on the tensor cores (depthwise_tensor.h), gradient in the weight: the first
// pass.
#include "depthwise_diagonal_sums.h"
#include "depthwise_tensor.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";
// What the plan is made for. Not what this GPU has, so that sums have the same bits on every one.
constexpr int kMultiprocessors = 132;

// Blocks of a multiprocessor, as many as registers allow.
template <typename Tile, int kSize>
constexpr int kBlocks = Tile::kPlanes > 2 ? (kSize == 3 ? 2 : 1)
                        : kSize == 3      ? 3
                        : kSize == 5      ? 2
                                          : 1;

// Shared memory: batches of rows of the input, each with a row of the gradient behind it. At last
// the sums of all warps.
template <typename Tile, int kSize>
struct Block {
  static constexpr int kPlanes = Tile::kPlanes, kWarps = Tile::kWarps;
  static constexpr int kThreads = kPlanes * kWarps * kWarp;
  static constexpr int kBatches = kSize == 7 && kPlanes > 2 ? 2 : 3;
  static constexpr int kSlots = Tile::slots(Tile::kPositions + kSize - 1);
  static constexpr int kGradSlots = Tile::slots(Tile::kPositions);
  static constexpr int kPlane = kSlots * 16, kGradPlane = kGradSlots * 16;
  static constexpr int kGrad = kPlanes * kPlane;
  static constexpr int kRow = kGrad + kPlanes * kGradPlane;
  static constexpr int kBatch = kSize * kRow;
  static constexpr int kTaps = kSize * kSize;
  static constexpr int kSums = Tile::kSlab * (kTaps + 1);  // of a warp of each group
  static constexpr int kBytes = kBatches * kBatch;
  static_assert(kWarps * kSums * 4 <= kBytes, "sums fit");
};

// The sum of one tap over a block's rows of outputs, from global memory.
template <typename T>
GDFAST_DEVICE float exact_sum_of_block(const DepthwiseArguments& a, const TensorWalk& walk,
                                       const Tensors<T>& tensors, int first, int end, int k, int r,
                                       int s) {
  float sum = 0;
#pragma unroll 1
  for (int row = first; row < end;) {
    const TensorPiece piece = piece_at(a, walk, row, end);
    row += piece.rows;
    const int images = a.N - piece.n < walk.images ? a.N - piece.n : walk.images;
    const int columns = a.Q - piece.q < walk.strip ? a.Q - piece.q : walk.strip;
#pragma unroll 1
    for (int i = 0; i < images; ++i) {
      sum += exact_sum(a, tensors.grad_output, tensors.input, piece.n + i, piece.p, piece.rows,
                       piece.q, columns, k, r, s);
    }
  }
  return sum;
}

template <typename T, typename Tile, int kSize>
GDFAST_KERNEL((Block<Tile, kSize>::kThreads), (kBlocks<Tile, kSize>))
depthwise_tensor_grad_weight_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                                    const GDFAST_GRID_CONSTANT TensorWalk walk,
                                    const GDFAST_GRID_CONSTANT Tensors<T> tensors, float* partial) {
  using Its = Block<Tile, kSize>;
  constexpr int kSlab = Tile::kSlab, kThreads = Its::kThreads;
  using Pixels = TensorRows<Tile::kPlanes, Its::kSlots, kThreads>;
  using Gradients = TensorRows<Tile::kPlanes, Its::kGradSlots, kThreads>;
  let_next_begin();
  unsigned char* const ring = shared_memory();
  const int first_channel = static_cast<int>(blockIdx.x) * kSlab;
  const int split = static_cast<int>(blockIdx.y), first = split * walk.rows_of_block;
  const int last = first + walk.rows_of_block, end = last < walk.rows ? last : walk.rows;

  // What is copied next: a batch of a piece, which may be one after that which is multiplied.
  int ahead = first, ahead_h = 0, ahead_rows = 0, ahead_steps = 0;
  const T *pixels_from = tensors.input, *grads_from = tensors.grad_output;
  Pixels pixels = Pixels::of(a.input, walk);
  Gradients grads = Gradients::of(a.output, walk);
  const auto copy_batch = [&](int to_batch) {
    if (ahead_steps <= 0 && ahead < end) {
      const TensorPiece piece = piece_at(a, walk, ahead, end);
      ahead += piece.rows;
      ahead_h = piece.p - a.pad_h;
      ahead_rows = piece.rows;
      ahead_steps = piece.rows + kSize - 1;
      const int w = piece.q - a.pad_w, images = a.N - piece.n, channels = a.C - first_channel;
      const int columns = a.Q - piece.q < walk.strip ? a.Q - piece.q : walk.strip;
      Pixels::begin(pixels, walk, images, -w, a.W - 1 - w, channels);
      Gradients::begin(grads, walk, images, 0, columns - 1, channels);
      pixels_from = tensors.input + piece.n * a.input.n + int64_t{ahead_h} * a.input.h +
                    int64_t{w} * a.input.w + first_channel;
      grads_from = tensors.grad_output + piece.n * a.output.n + int64_t{piece.p} * a.output.h +
                   int64_t{piece.q} * a.output.w + first_channel;
    }
    Pixels::template copy<kSize, Its::kRow>(pixels, pixels_from, a.input.h,
                                            rows_within<kSize>(ahead_h, ahead_steps, a.H),
                                            ring + to_batch);
    Gradients::template copy<kSize, Its::kRow>(grads, grads_from, a.output.h,
                                               rows_within<kSize>(0, ahead_rows, kSize),
                                               ring + to_batch + Its::kGrad);
    pixels_from += int64_t{kSize} * a.input.h;
    grads_from += int64_t{kSize} * a.output.h;
    cp_async_commit();
    ahead_h += kSize;
    ahead_rows -= kSize;
    ahead_steps -= kSize;
  };
#pragma unroll 1
  for (int i = 0; i < Its::kBatches - 1; ++i) copy_batch(i * Its::kBatch);
#pragma unroll 1
  for (int i = 0; i < Its::kBatches * kSize; ++i) {
    Pixels::clear(walk, ring + i * Its::kRow);
    Gradients::clear(walk, ring + i * Its::kRow + Its::kGrad);
  }

  // Where this lane loads matrices: columns of two taps, or the last tap's and the gradients'.
  const int group = warp_index() / Tile::kWarps, matrix = warp_lane() / 8;
  const int position = warp_index() % Tile::kWarps * 16 + warp_lane() % 8;
  const int pairs_at = group * Its::kPlane + (position + matrix / 2 * 8 + matrix % 2) * 16;
  const int last_at = matrix < 2
                          ? group * Its::kPlane + (position + matrix * 8 + kSize - 1) * 16
                          : Its::kGrad + group * Its::kGradPlane + (position + matrix % 2 * 8) * 16;
  TapSums<kSize> sums{};
  int at = 0;
#pragma unroll 1
  for (int row = first; row < end;) {
    const TensorPiece piece = piece_at(a, walk, row, end);
    row += piece.rows;
    const int steps = piece.rows + kSize - 1, h = piece.p - a.pad_h;
    TapRows<kSize> taps{};
#pragma unroll 1
    for (int step = 0; step < steps; step += kSize) {
      cp_async_wait<Its::kBatches - 2>();
      sync_block();  // and nobody reads the batch before any more
      copy_batch((at == 0 ? Its::kBytes : at) - Its::kBatch);
      const unsigned char* const batch = ring + at;
      at = at + Its::kBatch < Its::kBytes ? at + Its::kBatch : 0;
#pragma unroll
      for (int u = 0; u < kSize; ++u) {
        if (step + u >= steps) break;
        const unsigned char* const from = batch + u * Its::kRow;
        const bool inside = static_cast<unsigned>(h + step + u) < static_cast<unsigned>(a.H);
        multiply_taps<T>(
            sums, taps, u, inside, step + u < piece.rows,
            [&](int column) { return from + pairs_at + column * 16; }, from + last_at);
      }
    }
  }

  cp_async_wait<0>();
  sync_block();
  auto* const shared = reinterpret_cast<float*>(ring);
  share_sums<kSlab, kSize>(sums, shared + warp_index() % Tile::kWarps * Its::kSums, group);
  sync_block();
  write_sums<kSlab, kSize, kThreads>(
      a, first_channel, partial, static_cast<int>(gridDim.y), split, static_cast<int>(threadIdx.x),
      [&](int channel, int tap) {
        return shared_sum<kSlab, kSize>(shared, Tile::kWarps, channel, tap);
      },
      [&](int k, int r, int s) {
        return exact_sum_of_block(a, walk, tensors, first, end, k, r, s);
      });
}

template <typename Tile, int kSize>
TensorWalk weight_walk(const DepthwiseArguments& a) {
  return tensor_walk<Tile, kSize>(a, int64_t{kBlocks<Tile, kSize>} * kMultiprocessors);
}

// Calls f with the kind of tile, and the size of a filter as a constant.
template <typename F>
void with_tile(const DepthwiseArguments& a, bool wide, F&& f) {
  with_common_filter(a, [&](auto filter) {
    using Filter = decltype(filter);
    if constexpr (Filter::kStride == 1) {
      wide ? f(WideTile{}, Constant<Filter::kSize>{}) : f(NarrowTile{}, Constant<Filter::kSize>{});
    }
  });
}

}  // namespace

int depthwise_tensor_splits(const DepthwiseArguments& a, bool wide) {
  int splits = 0;
  with_tile(a, wide, [&](auto tile, auto size) {
    using Tile = decltype(tile);
    const TensorWalk walk = weight_walk<Tile, decltype(size)::value>(a);
    splits = static_cast<int>(tensor_grid<Tile>(a, walk).y);
  });
  return splits;
}

void depthwise_tensor_grad_weight(DType dtype, const DepthwiseArguments& a, bool wide,
                                  const void* grad_output, const void* input, void* partial,
                                  uintptr_t stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      with_tile(a, wide, [&](auto tile, auto size) {
        using Tile = decltype(tile);
        constexpr int kSize = decltype(size)::value;
        using Its = Block<Tile, kSize>;
        const TensorWalk walk = weight_walk<Tile, kSize>(a);
        const Tensors<T> tensors{static_cast<const T*>(grad_output), static_cast<const T*>(input)};
        launch(kOp, depthwise_tensor_grad_weight_kernel<T, Tile, kSize>, tensor_grid<Tile>(a, walk),
               Its::kThreads, Its::kBytes, stream, a, walk, tensors, static_cast<float*>(partial));
      });
    }
  });
}

}  // namespace gdfast::cuda
