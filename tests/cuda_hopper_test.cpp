// Kernels of Hopper's primitives alone, for tests/test_cuda_simulator.py.
#include <cstdio>
#include <exception>

#include "../csrc/cuda/hopper.h"

namespace gdfast::cuda {
namespace {

#if defined(GDFAST_HOPPER)

constexpr int kRows = 128;  // at most, of a box

// Copies a box and writes out shared memory as it lies there, after or before it has arrived.
GDFAST_KERNEL(32, 1)
box_kernel(GDFAST_GRID_CONSTANT const TensorMap map, int rows, int w, int channel, bool waits,
           uint16_t* out) {
  auto* const barrier = reinterpret_cast<uint64_t*>(shared_memory() + kRows * kBoxRow);
  if (warp_lane() == 0) {
    barrier_init(barrier, 1);
    barriers_ready();
    barrier_arrive_expecting(barrier, rows * kBoxRow);
    load_box(shared_memory(), map, {channel, w, -1, 0}, barrier);
  }
  sync_warp();
  if (waits) barrier_wait(barrier, 0);
  const auto* const arrived = reinterpret_cast<const uint16_t*>(shared_memory());
  for (int i = warp_lane(); i < rows * kBoxRow / 2; i += kWarp) out[i] = arrived[i];
}

// Writes [rows, 64] as they lie in shared memory to a box of a tensor; `changes` is too early then.
GDFAST_KERNEL(32, 1)
store_kernel(GDFAST_GRID_CONSTANT const TensorMap map, int rows, int w, int channel, bool waits,
             bool changes, const uint16_t* in) {
  auto* const there = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = warp_lane(); i < rows * kBoxRow / 2; i += kWarp) there[i] = in[i];
  stores_ready();
  sync_warp();
  if (warp_lane() != 0) return;
  store_box(map, {channel, w, 2, 0}, shared_memory());
  stores_commit();
  if (changes) there[1] = 0;
  if (waits) {
    stores_wait<0>();
  } else {
    stores_wait<1>();
  }
}

// d = a b of two boxes: a [64, 64] with rows of what is summed; b [64 or 128, 64] likewise, from
// row `first` of a box on, or with columns as boxes of [64, 64].
template <int kN, bool kColumnsB>
GDFAST_KERNEL(128, 1)
product_kernel(GDFAST_GRID_CONSTANT const TensorMap a, GDFAST_GRID_CONSTANT const TensorMap b,
               int first, int waits, float* out) {
  constexpr int kBox = 64 * kBoxRow;
  unsigned char* const of_b = shared_memory() + kBox;
  auto* const barrier = reinterpret_cast<uint64_t*>(of_b + 3 * kBox - kBoxRow);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barriers_ready();
    barrier_arrive_expecting(barrier, kBox + (kN + first) * kBoxRow);
    load_box(shared_memory(), a, {0, 0, 0, 0}, barrier);
    for (int part = 0; part < kN / 64; ++part) {
      if (kColumnsB) load_box(of_b + part * kBox, b, {64 * part, 0, 0, 0}, barrier);
    }
    if (!kColumnsB) load_box(of_b, b, {0, 0, 0, 0}, barrier);
  }
  sync_block();
  barrier_wait(barrier, 0);
  float d[kN / 2];
  for (float& value : d) value = -1;
  warpgroup_begin();
  for (int k = 0; k < 64; k += 16) {
    const uint64_t from_b = kColumnsB ? columns_matrix(of_b, k * kBoxRow, kBox)
                                      : rows_matrix(of_b + first * kBoxRow, 2 * k);
    warpgroup_multiply<BFloat16, kN, kColumnsB>(d, rows_matrix(shared_memory(), 2 * k), from_b,
                                                k > 0);
  }
  warpgroup_commit();
  if (waits) {
    warpgroup_wait<0>();
  } else {
    warpgroup_wait<1>();
  }
  warpgroup_take(d);
  for (int i = 0; i < kN / 2; ++i) {
    const int row = warp_index() * 16 + warp_lane() / 4 + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + warp_lane() % 4 * 2 + i % 2;
    out[row * kN + column] = d[i];
  }
}

// Leaves pairs of two 8x8 matrices, as lanes hold them, as 16 rows of 16 bytes.
GDFAST_KERNEL(32, 1)
stmatrix_kernel(const uint32_t* in, uint32_t* out) {
  const int lane = warp_lane();
  stmatrix_x2_transposed(shared_memory() + lane % 16 * 16, in[2 * lane], in[2 * lane + 1]);
  sync_warp();
  const auto* const stored = reinterpret_cast<const uint32_t*>(shared_memory());
  for (int i = lane; i < 64; i += kWarp) out[i] = stored[i];
}

// Leaves four of them as 32 rows, which lie in the opposite order.
GDFAST_KERNEL(32, 1)
stmatrix_rows_kernel(const uint32_t* in, uint32_t* out) {
  const int lane = warp_lane();
  const uint32_t* const words = in + 4 * lane;
  stmatrix_x4(shared_memory() + (31 - lane) * 16, {words[0], words[1], words[2], words[3]});
  sync_warp();
  const auto* const stored = reinterpret_cast<const uint32_t*>(shared_memory());
  for (int i = lane; i < 128; i += kWarp) out[i] = stored[i];
}

char error[4096];

template <typename... Parameters, typename... Arguments>
const char* run(void (*kernel)(Parameters...), unsigned threads, Arguments... arguments) {
  try {
    launch("test", kernel, 1, threads, 4 * 64 * kBoxRow, 0, arguments...);
  } catch (const std::exception& thrown) {
    std::snprintf(error, sizeof error, "%s", thrown.what());
    return error;
  }
  return "";
}

// [rows, channels], as one line of pixels.
TensorMap matrix(const uint16_t* address, int rows, int channels, int box_rows) {
  const int64_t bytes = 2 * channels;
  return tensor_map<BFloat16>("test", address,
                              {{channels, 2}, {rows, bytes}, {1, rows * bytes}, {1, rows * bytes}},
                              {64, box_rows, 1, 1});
}

#endif

}  // namespace
}  // namespace gdfast::cuda

#if defined(GDFAST_HOPPER)
using namespace gdfast::cuda;

namespace {
// Boxes of [n, h, w, 64] of an image [N, H, W, channels].
TensorMap boxes(const uint16_t* image, const int* size, const int* of_box) {
  const int64_t C = size[3], W = size[2], H = size[1];
  return tensor_map<BFloat16>("test", image,
                              {{C, 2}, {W, 2 * C}, {H, 2 * C * W}, {size[0], 2 * C * W * H}},
                              {64, of_box[2], of_box[1], of_box[0]});
}
}  // namespace

extern "C" {
// A box from row -1, a column and a channel on.
const char* box(const uint16_t* image, const int* size, const int* of_box, int w, int channel,
                int waits, uint16_t* out) {
  return run(box_kernel, 32, boxes(image, size, of_box), of_box[0] * of_box[1] * of_box[2], w,
             channel, waits != 0, out);
}

// Likewise written.
const char* store(uint16_t* image, const int* size, const int* of_box, int w, int channel,
                  int waits, int changes, const uint16_t* in) {
  return run(store_kernel, 32, boxes(image, size, of_box), of_box[0] * of_box[1] * of_box[2], w,
             channel, waits != 0, changes != 0, in);
}

const char* stmatrix(const uint32_t* in, uint32_t* out) {
  return run(stmatrix_kernel, 32, in, out);
}

const char* stmatrix_rows(const uint32_t* in, uint32_t* out) {
  return run(stmatrix_rows_kernel, 32, in, out);
}

// b is [first + n, 64], or where `columns` [64, n].
const char* product(const uint16_t* a, const uint16_t* b, int n, int columns, int first, int waits,
                    float* out) {
  const TensorMap of_a = matrix(a, 64, 64, 64);
  const TensorMap of_b = columns ? matrix(b, 64, n, 64) : matrix(b, first + n, 64, first + n);
  const auto kernel = n == 64 ? (columns ? product_kernel<64, true> : product_kernel<64, false>)
                              : (columns ? product_kernel<128, true> : product_kernel<128, false>);
  return run(kernel, 128, of_a, of_b, first, waits, out);
}
}
#endif
