// The gradient in the weight on Hopper's tensor cores, in half types: for each tap a product of
// filters by channels, summed over pixels.
//
// Pixels are cut into boxes, and boxes into splits. Blocks are persistent: one per multiprocessor,
// which takes every gridDim-th of all tiles of all splits. In a block one thread loads and two or
// three warpgroups multiply. The loader fills the stages of a ring with boxes of pixels: of
// grad_output, by 64 filters each, and of the input, shifted by a tap, by 64 channels each. What
// falls outside of the images arrives as zeros, so that neither padding nor the rest of a box needs
// code. Both operands of the products lie with what is summed down their columns.
//
// Of a 1x1 convolution in NCHW boxes are 64 pixels of planes, which is what a row sums over.
//
// Sums of a split are left in float32; the second pass of conv2d_grad_weight.cu adds them up.
#include "conv2d_hopper_grad_weight.h"
#include "conv2d_hopper_grad_weight_kernel.h"
#include "conv2d_hopper_images.h"
#include "conv2d_hopper_plane_maps.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";
constexpr int kMost = 2147483647;

// Calls run(tile) with the type of a block.
template <typename Run>
void with_tile(const HopperWeightBlock& block, Run&& run) {
  switch (block.columns) {
    case 576:
      return run(HopperWeightTile<64, 576>{});
    case 192:
      return run(HopperWeightTile<128, 192>{});
    case 256:
      return run(HopperWeightTile<128, 256>{});
    default:
      if (block.filters == 256) return run(HopperWeightTile<256, 128>{});
      return run(HopperWeightTile<128, 128>{});
  }
}

int64_t column_units(const Conv2dProblem& p) { return tiles_for(p.C, kBlock) * p.R * p.S; }

int64_t block_tiles(const Conv2dProblem& p, const HopperWeightBlock& block) {
  return tiles_for(p.K, block.filters) * tiles_for(column_units(p) * kBlock, block.columns);
}

bool are_planes(const Conv2dProblem& p) { return conv2d_grad_weight_planes_why_not(p).empty(); }

// The pixels that boxes divide, those of planes in one row each.
HopperImage divided_pixels(const Conv2dProblem& p) {
  if (are_planes(p)) return {p.N, p.K, 1, p.P * p.Q, p.output};
  return hopper_pass(p, false).out;
}

PixelBox box_of(const Conv2dProblem& p, int64_t pixels) {
  return are_planes(p) ? PixelBox{1, 1, pixels} : choose_pixel_box(divided_pixels(p), pixels);
}

template <typename T, int kFilters, int kColumns, bool kPlanes>
void run(const Conv2dProblem& p, const void* grad_output, const void* input, void* workspace,
         int64_t splits, const Where& where) {
  using Its = HopperWeightTile<kFilters, kColumns>;
  const HopperImage out = divided_pixels(p);
  const PixelBox box = box_of(p, Its::kPixels);
  HopperWeightArguments a = hopper_weight_arguments(p, out, box, kFilters, kColumns, splits);
  if constexpr (kPlanes) {
    a.grad = plane_boxes<T>(kOp, grad_output, out);
    a.images[0][0] = plane_boxes<T>(kOp, input, {p.N, p.C, p.H, p.W, p.input});
  } else {
    const HopperPass pass = hopper_pass(p, false);
    a.grad = channels_first<T>(kOp, grad_output, out, box);
    phase_maps<T>(kOp, input, pass.in, pass.in_phases(), box, a.images);
  }
  a.sums = static_cast<float*>(workspace);
  const int64_t blocks = multiprocessors(kOp);
  launch(kOp, conv2d_hopper_grad_weight_kernel<T, kFilters, kColumns, kPlanes>,
         static_cast<unsigned>(a.items < blocks ? a.items : blocks), Its::kThreads, Its::kSize,
         where.stream, a);
}

template <typename T, int kFilters, int kColumns>
void run(const Conv2dProblem& p, HopperWeightTile<kFilters, kColumns>, const void* grad_output,
         const void* input, void* workspace, int64_t splits, const Where& where) {
  auto* chosen = run<T, kFilters, kColumns, false>;
  if (are_planes(p)) {
    if constexpr (HopperWeightTile<kFilters, kColumns>::kPixels == kPlanePixels) {
      chosen = run<T, kFilters, kColumns, true>;
    } else {
      throw std::runtime_error(std::string(kOp) +
                               ": block: expected another than 64 x 576 for images in NCHW");
    }
  }
  chosen(p, grad_output, input, workspace, splits, where);
}

}  // namespace

bool is_hopper_weight_block(const HopperWeightBlock& block) {
  bool is = false;
  with_tile(block, [&](auto tile) {
    using Its = decltype(tile);
    is = block.filters == Its::kFilterBlocks * kBlock && block.columns == Its::kUnits * kBlock;
  });
  return is;
}

std::string conv2d_grad_weight_hopper_why_not(const Conv2dProblem& p) {
  const auto takes = [](const std::string& what) { return "it takes " + what; };
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return takes("half types");
  if (p.groups != 1) return takes("one group");
  if (p.stride_h > kMostPhases || p.stride_w > kMostPhases) return takes("strides of 1 and 2");
  if (p.stride_h > p.H || p.stride_w > p.W) return takes("images of at least the stride");
  if (p.N == 0) return takes("at least one image");
  for (const auto& [name, image] :
       {std::pair{"input", HopperImage{p.N, p.C, p.H, p.W, p.input}},
        std::pair{"output", HopperImage{p.N, p.K, p.P, p.Q, p.output}}}) {
    if (const std::string reason = image_why_not(name, image); !reason.empty()) {
      return takes(reason);
    }
  }
  const HopperPass pass = hopper_pass(p, false);
  const int64_t spans = (p.H + 2 * p.pad_h) | (p.W + 2 * p.pad_w) | p.R * p.dilation_h |
                        p.S * p.dilation_w | pass.in.W | pass.out.W;
  const int64_t boxes = pixel_tiles(pass.out, choose_pixel_box(pass.out, 32));
  if (spans > kMost / 8 || boxes > kMost / 4 || p.K * column_units(p) * kBlock > kMost / 2) {
    return takes("fewer pixels and taps");
  }
  return "";
}

std::string conv2d_grad_weight_planes_why_not(const Conv2dProblem& p) {
  const auto takes = [](const std::string& what) { return "it takes " + what; };
  if (const std::string reason = planes_why_not(p); !reason.empty()) return takes(reason);
  if (p.C % 8 != 0) return takes("input: channels in eights");
  const int64_t boxes = p.N * tiles_for(p.P * p.Q, kPlanePixels);
  const bool fits = boxes <= kMost / 4 && p.K * column_units(p) * kBlock <= kMost / 2;
  return fits ? "" : takes("fewer pixels");
}

int64_t conv2d_grad_weight_hopper_splits(const Conv2dProblem& p, const HopperWeightBlock& block,
                                         int64_t multiprocessors) {
  int64_t pixels = 0;
  with_tile(block, [&](auto tile) { pixels = decltype(tile)::kPixels; });
  const int64_t boxes = pixel_tiles(divided_pixels(p), box_of(p, pixels));
  const int64_t tiles = block_tiles(p, block), area = int64_t{block.filters} * block.columns;
  // In cycles: products at two thirds of their peak of 2048 multiplications; then 24 bytes are
  // written, and read by the second pass, by each multiprocessor.
  const int64_t step = area * pixels * 3 / 2 / 2048, writing = area * 4 / 24;
  const int64_t reading = p.K * p.C * p.R * p.S * 4 / (24 * multiprocessors);
  return fastest_splits(boxes, tiles, step, writing, reading, multiprocessors);
}

void conv2d_grad_weight_hopper(const Conv2dProblem& p, const HopperWeightBlock& block,
                               const void* grad_output, const void* input, void* workspace,
                               int64_t splits, const Where& where) {
  const DeviceGuard guard(kOp, where.device);
  with_tile(block, [&](auto tile) {
    if (p.dtype == DType::kFloat16) {
      run<Half>(p, tile, grad_output, input, workspace, splits, where);
    } else {
      run<BFloat16>(p, tile, grad_output, input, workspace, splits, where);
    }
  });
}

}  // namespace gdfast::cuda
