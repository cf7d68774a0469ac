// Convolution in groups of 32 channels on Hopper, by filters of 3 x 3 with stride 1, on images of
// 7 x 7 in bfloat16; and the gradient in the input.
//
// A block takes two groups of eight images. All that it needs comes to shared memory at once, rows
// of the images one after the other, and a warpgroup multiplies each for its group as soon as it is
// there: 8 columns of 8 images are the 64 rows of a product by warpgroups, whose right operand are
// a tap's filters as they lie in memory. A row of the input is loaded to registers once, for the
// three rows of the output that see it.
//
// An eighth column lies outside of each image: its zeros are the neighbours of the first column
// too, of the next image's.
#include "device.h"
#include "grouped_filters.h"
#include "grouped_hopper.h"
#include "grouped_octets.h"
#include "hopper_narrow.h"

namespace gdfast::cuda {
namespace {

constexpr int kGroup = 32, kRows = 7, kImages = 8, kTaps = 9, kSteps = kGroup / 16;
constexpr int kWarpgroups = kSlab / kGroup, kThreads = kWarpgroups * kWarpgroup;
constexpr int kRowBytes = kImages * kTileBytes;  // of all images
constexpr int kTapBytes = kGroup * 2;            // of a filter
constexpr int kTapsOfBox = kBoxRow / kTapBytes, kBoxes = (kTaps + kTapsOfBox - 1) / kTapsOfBox;
constexpr int kBoxBytes = kSlab * kBoxRow;  // of filters

// Shared memory: barriers, the pixel before the first row's first, rows, their results, filters.
constexpr int kRowsAt = 1024, kResultsAt = kRowsAt + kRows * kRowBytes;
constexpr int kFiltersAt = kResultsAt + kRows * kRowBytes, kBytes = kFiltersAt + kBoxes * kBoxBytes;
static_assert(kBytes <= kHopperMemory);

struct OctetArguments {
  TensorMap input, filters, output;
};

#if defined(GDFAST_HOPPER)

GDFAST_DEVICE uint64_t* row_barrier(int row) {
  return reinterpret_cast<uint64_t*>(shared_memory()) + row;
}
GDFAST_DEVICE uint64_t* filter_barrier() { return row_barrier(kRows); }

// By one thread.
GDFAST_DEVICE void load_all(const OctetArguments& a, int first_channel, int first_image) {
  for (int i = 0; i <= kRows; ++i) barrier_init(row_barrier(i), 1);
  barriers_ready();
  barrier_arrive_expecting(filter_barrier(), kBoxes * kBoxBytes);
  for (int box = 0; box < kBoxes; ++box) {
    load_box(shared_memory() + kFiltersAt + box * kBoxBytes, a.filters,
             {box * kBoxRow / 2, first_channel, 0, 0}, filter_barrier());
  }
  for (int row = 0; row < kRows; ++row) {
    barrier_arrive_expecting(row_barrier(row), kRowBytes);
    load_box(shared_memory() + kRowsAt + row * kRowBytes, a.input,
             {first_channel, 0, row, first_image}, row_barrier(row));
  }
}

using RowFragments = uint32_t[3][kSteps][4];  // by the column of the filter
using RowSums = float[kGroup / 2];

// What a tap multiplies 16 channels of the group by.
template <bool kGradient>
GDFAST_DEVICE uint64_t filters_of(int group, int tap, int step) {
  const int turned = kGradient ? kTaps - 1 - tap : tap;
  const int at = kFiltersAt + turned / kTapsOfBox * kBoxBytes + group * kGroup * kBoxRow +
                 turned % kTapsOfBox * kTapBytes;
  // Of the gradient the sum goes over filters.
  return kGradient ? columns_matrix(shared_memory(), at + step * 16 * kBoxRow, 0)
                   : rows_matrix(shared_memory(), at + step * 32);
}

// A row of the input by all taps, for the rows of the output that it touches.
template <bool kGradient>
GDFAST_DEVICE void multiply_row(RowSums (&sums)[kRows], const RowFragments& left, int group,
                                int row) {
#pragma unroll
  for (int s = 0; s < 3; ++s) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        const int p = row + 1 - r;
        if (p < 0 || p >= kRows) continue;
        // The first of all is with the row above, or the first row.
        const bool is_first = s == 0 && step == 0 && (r == 0 || row == 0);
        warpgroup_multiply_32<kGradient>(sums[p], left[s][step],
                                         filters_of<kGradient>(group, r * 3 + s, step), !is_first);
      }
    }
  }
}

template <bool kGradient>
GDFAST_DEVICE void multiply_all(const OctetArguments& a, int first_channel, int first_image) {
  const int group = warp_index() / 4, lane = warp_lane();
  // Of this lane, for ldmatrix: its pixel, of one of the warp's two images, by the column of the
  // filter; and where it writes results, of the first image.
  const int image = warp_index() % 4 * 2, matrix = lane / 8, first_chunk = group * kGroup / 8;
  int pixels[3];
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    pixels[s] = kRowsAt + swizzled((image + (matrix & 1)) * kSide + lane % 8 + s - 1,
                                   first_chunk + (matrix >> 1));
  }
  const int written = kResultsAt + swizzled(image * kSide + lane / 4, first_chunk) + lane % 4 * 4;
  RowSums sums[kRows];
  RowFragments left[2];
  const auto load = [&](int row) {
    barrier_wait(row_barrier(row), 0);
#pragma unroll
    for (int s = 0; s < 3; ++s) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        ldmatrix_x4(left[row % 2][s][step],
                    shared_memory() + row * kRowBytes + (pixels[s] ^ step * 32));
      }
    }
  };
  const auto take = [&](int row) {
#pragma unroll
    for (auto& column : left[row % 2]) {
#pragma unroll
      for (auto& fragment : column) warpgroup_take(fragment);
    }
  };
  const auto finish = [&](int p) {
    warpgroup_take(sums[p]);
    unsigned char* const to = shared_memory() + p * kRowBytes;
#pragma unroll
    for (int i = 0; i < kGroup / 4; ++i) {
      const uint32_t word = pack_two<BFloat16>(sums[p][i * 2], sums[p][i * 2 + 1]);
      // Pairs of sums go by image, then by eight channels.
      const int at = (written ^ (i >> 1) * 16) + (i & 1) * kTileBytes;
      *reinterpret_cast<uint32_t*>(to + at) = word;
    }
    stores_ready();
    sync_block();
    if (this_thread() != 0) return;
    store_box(a.output, {first_channel, 0, p, first_image}, to + kResultsAt);
    stores_commit();
  };
  load(0);
  barrier_wait(filter_barrier(), 0);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    warpgroup_begin();
    multiply_row<kGradient>(sums, left[row % 2], group, row);
    warpgroup_commit();
    if (row > 0) {
      warpgroup_wait<1>();
      take(row - 1);
    }
    if (row > 1) finish(row - 2);
    if (row + 1 < kRows) load(row + 1);
  }
  warpgroup_wait<0>();
  take(kRows - 1);
  finish(kRows - 2);
  finish(kRows - 1);
  if (this_thread() == 0) stores_wait<0>();
}

#endif

template <bool kGradient>
GDFAST_KERNEL(kThreads, 1)
grouped_octets_kernel(GDFAST_GRID_CONSTANT const OctetArguments a) {
#if defined(GDFAST_HOPPER)
  const int first_channel = static_cast<int>(blockIdx.y) * kSlab;
  const int first_image = static_cast<int>(blockIdx.x) * kImages;
  if (this_thread() == 0) load_all(a, first_channel, first_image);
  if (this_thread() >= kThreads - kBoxRow / 4) {
    reinterpret_cast<uint32_t*>(shared_memory() + kRowsAt)[this_thread() - kThreads] = 0;
  }
  sync_block();
  multiply_all<kGradient>(a, first_channel, first_image);
#else
  static_cast<void>(a);
#endif
}

TensorMap filter_map(const char* op, const Conv2dProblem& p, const void* weight) {
  const Axis row{kTaps * kGroup, 2}, filters = next_axis(row, p.K, p.weight.n * 2);
  const Axis one = next_axis(filters, 1, 0);
  return tensor_map<BFloat16>(op, weight, {row, filters, one, next_axis(one, 1, 0)},
                              {kBoxRow / 2, kSlab, 1, 1});
}

void run(const char* op, const Conv2dProblem& p, bool gradient, const void* input,
         const void* weight, void* output, const Where& where) {
  const DeviceGuard guard(op, where.device);
  const OctetArguments a{
      channels_first<BFloat16>(op, input, {p.N, p.C, p.H, p.W, p.input}, {kImages, 1, kSide}),
      filter_map(op, p, weight),
      channels_first<BFloat16>(op, output, {p.N, p.C, p.P, p.Q, p.output}, {kImages, 1, kSide})};
  launch(op, gradient ? grouped_octets_kernel<true> : grouped_octets_kernel<false>,
         dim3(static_cast<unsigned>(ceil_div(p.N, kImages)),
              static_cast<unsigned>(ceil_div(p.C, kSlab))),
         kThreads, kBytes, where.stream, a);
}

bool is_where_tma_reads(const void* weight) {
  return reinterpret_cast<uintptr_t>(weight) % 16 == 0;
}

}  // namespace

std::string grouped_octets_why_not(const Conv2dProblem& p, GroupedPass pass) {
  if (pass == GroupedPass::kGradWeight) return "it makes no gradient of the weight";
  if (const std::string reason = grouped_hopper_why_not(p, pass); !reason.empty()) return reason;
  if (p.dtype != DType::kBFloat16) return "it takes bfloat16";
  if (p.C / p.groups != kGroup) return "it takes groups of 32 channels";
  if (p.H != kRows || p.W != kRows || p.pad_h != 1 || p.pad_w != 1) {
    return "it takes images of 7 x 7, with padding of 1";
  }
  const Strides4& at = p.weight;
  if (at.c != 1 || at.w != kGroup || at.h != 3 * kGroup || at.n % 8 != 0 || at.n < 9 * kGroup) {
    return "it takes weights in channels_last";
  }
  return "";
}

// What it is not made for, Hopper's other kernel does.
void conv2d_grouped_octets(const Conv2dProblem& p, const void* input, const void* weight,
                           const void* bias, void* output, const Where& where) {
  const bool ends = bias != nullptr || p.activation != Activation::kNone;
  if (ends || !is_where_tma_reads(weight)) {
    return conv2d_grouped_hopper(p, input, weight, bias, output, where);
  }
  run("conv2d", p, false, input, weight, output, where);
}

void conv2d_grad_input_grouped_octets(const Conv2dProblem& p, const void* grad_output,
                                      const void* weight, void* grad_input, const Where& where) {
  if (!is_where_tma_reads(weight)) {
    return conv2d_grad_input_grouped_hopper(p, grad_output, weight, grad_input, where);
  }
  run("conv2d_grad_input", turned(p), true, grad_output, weight, grad_input, where);
}

}  // namespace gdfast::cuda
