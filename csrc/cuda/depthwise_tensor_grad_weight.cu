// Depthwise convolution on the tensor cores (depthwise_tensor.h), gradient in the weight: the first
// pass.
//
// A matrix instruction multiplies the pixels of two taps and 8 channels by the gradients of these
// channels, over 16 positions. Of each tap's 8 x 8 sums the diagonal is the filters'. A warp keeps
// the sums of all taps, and the gradients of all rows that see the row of the image which it loads.
#include "depthwise_exact.h"
#include "depthwise_tensor.h"
#include "depthwise_weight_sums.h"

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

template <typename T>
struct Tensors {
  const T* grad_output;
  const T* input;
};

// Sums of a warp. Pairs of taps are two of a row; those of the last column are two of neighbouring
// rows, which the same gradients are multiplied by where the upper one's pixel is a row higher:
// pair i is of the rows 2 i + 1 and 2 i, and the last one of the filter's last row and of ones, for
// the bias.
template <int kSize>
struct Sums {
  static constexpr int kPairs = kSize / 2;
  float pairs[kSize][kPairs][4];
  float last[kPairs + 1][4];
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

// What this lane has of the diagonals of two taps.
struct Diagonal {
  int channel;  // of the group, or -1 for none
  int at;       // in the first of them; the second one is two further on

  GDFAST_DEVICE Diagonal of_lane() {
    const int row = warp_lane() / 4;
    return {row / 2 == warp_lane() % 4 ? row : -1, row % 2};
  }
};

// Writes a warp's sums to its part of shared memory, [channel][tap] and behind these [channel].
template <int kSlab, int kSize>
GDFAST_DEVICE void share_sums(const Sums<kSize>& sums, float* to, int group) {
  constexpr int kTaps = kSize * kSize;
  const Diagonal diagonal = Diagonal::of_lane();
  if (warp_lane() < 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[kSlab * kTaps + group * 8 + warp_lane() * 2 + i] = sums.last[kSize / 2][2 + i];
    }
  }
  if (diagonal.channel < 0) return;
  float* const taps = to + (group * 8 + diagonal.channel) * kTaps;
  const auto first = [&](const float (&pair)[4]) { return diagonal.at == 0 ? pair[0] : pair[1]; };
  const auto second = [&](const float (&pair)[4]) { return diagonal.at == 0 ? pair[2] : pair[3]; };
#pragma unroll
  for (int r = 0; r < kSize; ++r) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      taps[r * kSize + 2 * i] = first(sums.pairs[r][i]);
      taps[r * kSize + 2 * i + 1] = second(sums.pairs[r][i]);
    }
    const auto& last = sums.last[r / 2];
    taps[r * kSize + kSize - 1] = r % 2 == 1 || r + 1 == kSize ? first(last) : second(last);
  }
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
  const uint32_t ones = pack_two<T>(1.f, 1.f);
  Sums<kSize> sums{};
  int at = 0;
#pragma unroll 1
  for (int row = first; row < end;) {
    const TensorPiece piece = piece_at(a, walk, row, end);
    row += piece.rows;
    const int steps = piece.rows + kSize - 1, h = piece.p - a.pad_h;
    uint32_t alive[kSize][2] = {}, before[2] = {0, 0};
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
        uint32_t loaded[4];
        ldmatrix_x4_transposed(loaded, from + last_at);
        alive[u][0] = step + u < piece.rows ? loaded[2] : 0;
        alive[u][1] = step + u < piece.rows ? loaded[3] : 0;
        if (inside) {
#pragma unroll
          for (int i = 0; i < kSize / 2; ++i) {
            uint32_t pair[4];
            ldmatrix_x4_transposed(pair, from + pairs_at + 2 * i * 16);
#pragma unroll
            for (int r = 0; r < kSize; ++r) {
              mma_m16n8k16<T>(sums.pairs[r][i], pair, alive[(u - r + kSize) % kSize]);
            }
          }
        }
        const uint32_t now[2] = {inside ? loaded[0] : 0, inside ? loaded[1] : 0};
#pragma unroll
        for (int i = 0; i < kSize / 2; ++i) {
          mma_m16n8k16<T>(sums.last[i], {now[0], before[0], now[1], before[1]},
                          alive[(u - 2 * i - 1 + kSize) % kSize]);
        }
        // The first gradients that have been multiplied by all rows.
        mma_m16n8k16<T>(sums.last[kSize / 2], {now[0], ones, now[1], ones}, alive[(u + 1) % kSize]);
        before[0] = now[0];
        before[1] = now[1];
      }
    }
  }

  cp_async_wait<0>();
  sync_block();
  auto* const shared = reinterpret_cast<float*>(ring);
  share_sums<kSlab, kSize>(sums, shared + warp_index() % Tile::kWarps * Its::kSums, group);
  sync_block();
  for (int i = static_cast<int>(threadIdx.x); i < Its::kSums; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; ++warp) sum += shared[warp * Its::kSums + i];
    const bool is_bias = i >= kSlab * Its::kTaps;
    const int tap = i % Its::kTaps, channel = is_bias ? i - kSlab * Its::kTaps : i / Its::kTaps;
    const int k = first_channel + channel;
    if (k >= a.K) continue;
    if (is_bias) {
      *partial_bias(partial, a, static_cast<int>(gridDim.y), split, k) = sum;
      continue;
    }
    // Zeros around an image, or beyond a row, make NaN of infinities.
    if (sum != sum) {
      sum = exact_sum_of_block(a, walk, tensors, first, end, k, tap / kSize, tap % kSize);
    }
    partial_taps(partial, a, split, k)[tap] = sum;
  }
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
