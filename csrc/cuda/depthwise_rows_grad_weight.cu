// Depthwise convolution by whole rows (depthwise_rows.h), gradient in the weight: the first pass.
//
// A thread keeps the sums of all taps of its channels and, as floats, the gradients of its columns
// of all rows that see the row of the image which it reads.
#include "depthwise_rows.h"
#include "depthwise_weight_sums.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";
// What the plan is made for. Not what this GPU has, so that sums have the same bits on every one.
constexpr int kMultiprocessors = 132;

template <typename T>
struct Tensors {
  const T* grad_output;
  const T* input;
};

#if defined(GDFAST_HOPPER)

// Columns of a row, as floats.
template <typename T, int kCount>
GDFAST_DEVICE void read_columns(const unsigned char* from, int pitch, float (&values)[kCount][2]) {
  PackOf<T, 2> packs[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    packs[j] = *reinterpret_cast<const PackOf<T, 2>*>(from + j * pitch);
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) unpack<T, 2>(packs[j], values[j]);
}

// The sum of one tap over a block's outputs, from global memory.
template <typename T>
GDFAST_DEVICE float exact_sum_of_block(const DepthwiseArguments& a, const RowsWalk& walk,
                                       const Tensors<T>& tensors, int k, int r, int s) {
  float sum = 0;
  for_each_piece(a, walk, [&](const RowsPiece& piece) {
    sum += exact_sum(a, tensors.grad_output, tensors.input, piece.n, piece.p, piece.rows, 0, a.Q, k,
                     r, s);
  });
  return sum;
}

#endif

template <typename T, bool kBias>
GDFAST_KERNEL(kRowThreads, 1)
depthwise_rows_grad_weight_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                                  const GDFAST_GRID_CONSTANT RowsWalk walk,
                                  const GDFAST_GRID_CONSTANT Tensors<T> tensors, float* partial) {
#if defined(GDFAST_HOPPER)
  constexpr int kWide = kRowColumns + kRowSize - 1;
  let_next_begin();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) init_row_barriers(walk);
  sync_block();
  if (thread >= walk.workers) {
    if (warp_lane() == 0) load_rows(a, walk, tensors.input, tensors.grad_output);
    return;
  }
  clear_rows(walk, 0, a.pad_w * walk.pitch);
  clear_rows(walk, (a.pad_w + a.W) * walk.pitch, walk.row - (a.pad_w + a.W) * walk.pitch);
  clear_rows(walk, walk.row + a.Q * walk.pitch, walk.row - a.Q * walk.pitch);
  sync_workers(walk);

  const int strip = thread / walk.pairs, channel = thread % walk.pairs * 2;
  const bool exists = strip < walk.strips;
  const unsigned char* const pixels = shared_memory() + kRowBarriers +
                                      (exists ? strip * kRowColumns : 0) * walk.pitch + channel * 2;
  float sums[kRowTaps][2] = {}, bias[2] = {};
  RowStage stage;
  for_each_piece(a, walk, [&](const RowsPiece& piece) {
    float grads[kRowSize][kRowColumns][2] = {};
    const int steps = piece.rows + kRowSize - 1, h = piece.p - a.pad_h;
#pragma unroll 1
    for (int step = 0; step < steps; step += kRowSize) {
#pragma unroll
      for (int u = 0; u < kRowSize; ++u) {
        if (step + u >= steps) break;
        barrier_wait(row_full(stage), stage.parity);
        const unsigned char* const row = pixels + stage.index * walk.stage;
        if (step + u < piece.rows) {
          read_columns<T>(row + walk.row, walk.pitch, grads[u]);
          if constexpr (kBias) {
#pragma unroll
            for (int j = 0; j < kRowColumns; ++j) {
              bias[0] += grads[u][j][0];
              bias[1] += grads[u][j][1];
            }
          }
        } else {
#pragma unroll
          for (auto& grad : grads[u]) grad[0] = grad[1] = 0;
        }
        if (static_cast<unsigned>(h + step + u) < static_cast<unsigned>(a.H)) {
          float values[kWide][2];
          read_columns<T>(row, walk.pitch, values);
#pragma unroll
          for (int j = 0; j < kWide; ++j) {
#pragma unroll
            for (int s = 0; s < kRowSize; ++s) {
              const int column = j - s;
              if (column < 0 || column >= kRowColumns) continue;
#pragma unroll
              for (int r = 0; r < kRowSize; ++r) {
                const float (&grad)[2] = grads[(u - r + kRowSize) % kRowSize][column];
                sums[r * kRowSize + s][0] += grad[0] * values[j][0];
                sums[r * kRowSize + s][1] += grad[1] * values[j][1];
              }
            }
          }
        }
        leave_row(stage);
        RowStage::advance(stage, walk);
      }
    }
  });

  // All rows have come and been read: their place is free. It gets [strip][tap, or the bias][C].
  sync_workers(walk);
  constexpr int kSums = kRowTaps + (kBias ? 1 : 0);
  auto* const shared = reinterpret_cast<float*>(shared_memory() + kRowBarriers);
  if (exists) {
#pragma unroll
    for (int tap = 0; tap < kSums; ++tap) {
      float* const to = shared + (strip * kSums + tap) * a.C + channel;
#pragma unroll
      for (int i = 0; i < 2; ++i) to[i] = tap < kRowTaps ? sums[tap][i] : bias[i];
    }
  }
  sync_workers(walk);
  const int split = static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (int i = thread; i < kSums * a.C; i += walk.workers) {
    float sum = 0;
    for (int from = 0; from < walk.strips; ++from) sum += shared[from * kSums * a.C + i];
    const int tap = i / a.C, k = i % a.C;
    if (tap == kRowTaps) {
      *partial_bias(partial, a, static_cast<int>(gridDim.x), split, k) = sum;
      continue;
    }
    // Zeros around an image, or beyond a row, make NaN of infinities.
    if (sum != sum) sum = exact_sum_of_block(a, walk, tensors, k, tap / kRowSize, tap % kRowSize);
    partial_taps(partial, a, split, k)[tap] = sum;
  }
#endif
}

RowsWalk weight_walk(const DepthwiseArguments& a) { return rows_walk(a, 2, kMultiprocessors); }

template <typename T, bool kBias>
void launch_rows(const DepthwiseArguments& a, const Tensors<T>& tensors, float* partial,
                 uintptr_t stream) {
  const RowsWalk walk = weight_walk(a);
  launch(kOp, depthwise_rows_grad_weight_kernel<T, kBias>, static_cast<unsigned>(walk.blocks),
         static_cast<unsigned>(walk.workers + kWarp), static_cast<size_t>(walk.shared_bytes()),
         stream, a, walk, tensors, partial);
}

}  // namespace

int depthwise_rows_splits(const DepthwiseArguments& a) { return weight_walk(a).blocks; }

void depthwise_rows_grad_weight(DType dtype, const DepthwiseArguments& a, const void* grad_output,
                                const void* input, bool bias, void* partial, uintptr_t stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const Tensors<T> tensors{static_cast<const T*>(grad_output), static_cast<const T*>(input)};
      auto* const chosen = bias ? launch_rows<T, true> : launch_rows<T, false>;
      chosen(a, tensors, static_cast<float*>(partial), stream);
    }
  });
}

}  // namespace gdfast::cuda
