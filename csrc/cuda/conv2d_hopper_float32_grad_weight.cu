// The gradient in the weight in float32 on Hopper's tensor cores: for each tap a product of
// channels by filters, summed over pixels.
//
// A number is the sum of three bfloat16 parts, and a product six products of parts. What
// conv2d_hopper_grad_weight.cu says of boxes, splits and blocks holds here too. grad_output, which
// all taps read, is brought into its parts first, by a kernel of its own; consumers bring the input
// from shared memory to registers and make its parts there.
#include "conv2d_hopper_float32_grad_weight.h"
#include "conv2d_hopper_float32_grad_weight_kernel.h"
#include "conv2d_hopper_images.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";

// Calls run(tile) with the type of a block.
template <typename Run>
void with_tile(const HopperWeightBlock& block, Run&& run) {
  switch (block.columns) {
    case 192:
      return run(HopperFloat32WeightTile<64, 192>{});
    case 256:
      return run(HopperFloat32WeightTile<64, 256>{});
    default:
      return run(HopperFloat32WeightTile<128, 128>{});
  }
}

// The box that divides the output's rows and columns and has the most pixels; among such, the one
// with the most neighbours. A rest would be zeros of grad_output, which make NaN of an infinity
// that no window meets.
PixelBox whole_pixel_box(const HopperImage& out) {
  constexpr int64_t kMost = kStagePixels;
  PixelBox best{1, 1, 1};
  for (int64_t w = 1; w <= kMost && w <= out.W; ++w) {
    if (out.W % w != 0) continue;
    for (int64_t h = 1; w * h <= kMost && h <= out.H; ++h) {
      if (out.H % h != 0) continue;
      const int64_t room = kMost / (w * h);
      // Pixels beyond the last image are zeros in both.
      const PixelBox box{out.N < room ? out.N : room, h, w};
      if (box.rows() >= best.rows()) best = box;
    }
  }
  return best;
}

PixelBox weight_pixel_box(const HopperPass& pass) {
  const HopperImage& out = pass.out;
  // So are those behind the only row of a layer that changes no size.
  const bool is_flat =
      out.N == 1 && out.H == 1 && pass.in.W == out.W && pass.columns.taps[0].at == 0;
  return is_flat ? choose_pixel_box(out, kStagePixels) : whole_pixel_box(out);
}

constexpr int kSplitThreads = 256;
constexpr int kEight = 8;  // numbers of a thread

// Numbers side by side to their parts, each as far from the next as there are numbers.
GDFAST_KERNEL(kSplitThreads, 1)
split_image_kernel(const float* image, unsigned char* parts, int64_t count) {
  const int64_t first = (int64_t{blockIdx.x} * kSplitThreads + threadIdx.x) * kEight;
  if (first >= count) return;
  Pack16 split[kFloatParts];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Pack16 four = load_16_streaming(image + first + 4 * half);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      uint32_t pair[kFloatParts];
      split_two(four.words[i], four.words[i + 1], pair);
#pragma unroll
      for (int part = 0; part < kFloatParts; ++part) {
        split[part].words[2 * half + i / 2] = pair[part];
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kFloatParts; ++part) {
    store_16(parts + 2 * (part * count + first), split[part]);
  }
}

template <int kFilters, int kColumns>
void run(const Conv2dProblem& p, HopperFloat32WeightTile<kFilters, kColumns>, const void* input,
         const void* parts, void* workspace, int64_t splits, const Where& where) {
  using Its = HopperFloat32WeightTile<kFilters, kColumns>;
  const HopperPass pass = hopper_pass(p, false);
  const PixelBox box = weight_pixel_box(pass);
  HopperFloat32WeightArguments a{
      hopper_weight_arguments(p, pass.out, box, kFilters, kColumns, splits), {}};
  for (int part = 0; part < kFloatParts; ++part) {
    const auto* const from = static_cast<const unsigned char*>(parts) +
                             part * conv2d_grad_weight_hopper_float32_parts(p) / kFloatParts;
    a.grads[part] = channels_first<BFloat16>(kOp, from, pass.out, box);
  }
  phase_maps<float>(kOp, input, pass.in, pass.in_phases(), box, a.images);
  a.sums = static_cast<float*>(workspace);
  const int blocks = multiprocessors(kOp);
  launch(kOp, conv2d_hopper_float32_grad_weight_kernel<kFilters, kColumns>,
         static_cast<unsigned>(a.items < blocks ? a.items : blocks), Its::kThreads, Its::kSize,
         where.stream, a);
}

// Whether the pixels of an image lie one after the other, each with its channels side by side.
bool is_dense(int64_t N, int64_t C, int64_t H, int64_t W, const Strides4& at) {
  return (C == 1 || at.c == 1) && (W == 1 || at.w == C) && (H == 1 || at.h == W * C) &&
         (N == 1 || at.n == H * W * C);
}

}  // namespace

bool is_hopper_float32_weight_block(const HopperWeightBlock& block) {
  bool is = false;
  with_tile(block, [&](auto tile) {
    using Its = decltype(tile);
    is = block.filters == Its::kN && block.columns == Its::kUnits * kBlock;
  });
  return is;
}

std::string conv2d_grad_weight_hopper_float32_why_not(const Conv2dProblem& p) {
  if (p.dtype != DType::kFloat32) return "it takes float32";
  if (!is_dense(p.N, p.K, p.P, p.Q, p.output)) return "it takes output: dense in channels_last";
  Conv2dProblem other = p;
  other.dtype = DType::kBFloat16;
  const std::string reason = conv2d_grad_weight_hopper_why_not(other);
  if (!reason.empty()) return reason;
  const HopperPass pass = hopper_pass(p, false);
  const int64_t fewest = pixel_tiles(pass.out, choose_pixel_box(pass.out, kStagePixels));
  if (pixel_tiles(pass.out, weight_pixel_box(pass)) > 2 * fewest) {
    return "it takes outputs that boxes of about 64 pixels divide";
  }
  return "";
}

int64_t conv2d_grad_weight_hopper_float32_splits(const Conv2dProblem& p,
                                                 const HopperWeightBlock& block,
                                                 int64_t multiprocessors) {
  const HopperPass pass = hopper_pass(p, false);
  const int64_t boxes = pixel_tiles(pass.out, weight_pixel_box(pass));
  const int64_t columns = tiles_for(p.C, kBlock) * kBlock * p.R * p.S;
  const int64_t tiles = tiles_for(p.K, block.filters) * tiles_for(columns, block.columns);
  const int64_t area = int64_t{block.filters} * block.columns;
  // In cycles: six products for each, at two thirds of their peak of 2048; then 24 bytes are
  // written, and read by the second pass, by each multiprocessor.
  const int64_t step = 6 * area * kStagePixels * 3 / 2 / 2048, writing = area * 4 / 24;
  const int64_t reading = p.K * p.C * p.R * p.S * 4 / (24 * multiprocessors);
  return fastest_splits(boxes, tiles, step, writing, reading, multiprocessors);
}

int64_t conv2d_grad_weight_hopper_float32_parts(const Conv2dProblem& p) {
  return kFloatParts * p.N * p.K * p.P * p.Q * 2;
}

void conv2d_grad_weight_hopper_float32(const Conv2dProblem& p, const HopperWeightBlock& block,
                                       const void* grad_output, const void* input, void* parts,
                                       void* workspace, int64_t splits, const Where& where) {
  const DeviceGuard guard(kOp, where.device);
  const int64_t count = p.N * p.K * p.P * p.Q;
  launch(kOp, split_image_kernel,
         static_cast<unsigned>(tiles_for(count, int64_t{kSplitThreads} * kEight)), kSplitThreads, 0,
         where.stream, static_cast<const float*>(grad_output), static_cast<unsigned char*>(parts),
         count);
  with_tile(block, [&](auto tile) { run(p, tile, input, parts, workspace, splits, where); });
}

}  // namespace gdfast::cuda
