// 1x1 convolution of images in NCHW, and its grad_input, on Hopper's tensor cores, in half types.
//
// Of each image it is a product of the weight by planes of pixels. Tensor cores take either order
// of an operand, so that pixels are read, and results written, as they lie: boxes of 64 pixels by
// 64 channels both ways. Channels are the rows of a product and pixels its columns.
//
// The rest is that of conv2d_hopper.cu: persistent blocks, a loader and two consumers that take
// tiles in turn, weights that stay where there is room, and zeros beyond the last
// pixel and channel.
#include "conv2d_hopper_images.h"
#include "conv2d_hopper_plane_maps.h"
#include "conv2d_hopper_planes.h"
#include "conv2d_hopper_planes_kernel.h"

namespace gdfast::cuda {
namespace {

constexpr int kMost = 2147483647;

int small(int64_t value) { return static_cast<int>(value); }

// Divides a block's memory, and says how many blocks there are, as for conv2d_hopper.cu.
int64_t divide_memory(PlanesArguments& a, int64_t multiprocessors) {
  using Memory = PlanesMemory;
  constexpr int64_t kEnoughStages = 4, kRest = kBlockMemory - Memory::kKept;
  const int64_t same_channels = multiprocessors - multiprocessors % a.tiles_channels.divisor;
  const bool keeps =
      same_channels > 0 && a.tiles > same_channels &&
      // Without the others it shall not take more than 5% longer.
      20 * tiles_for(a.tiles, same_channels) <= 21 * tiles_for(a.tiles, multiprocessors) &&
      int64_t{a.sums} * Memory::kWeights + kEnoughStages * Memory::kPixelBytes <= kRest;
  a.kept_steps = keeps ? a.sums : 0;
  a.stage_bytes = Memory::kPixelBytes + (keeps ? 0 : Memory::kWeights);
  const int64_t stages = (kRest - int64_t{a.kept_steps} * Memory::kWeights) / a.stage_bytes;
  a.stages = small(stages < kMostStages ? stages : kMostStages);
  const int64_t blocks = keeps ? same_channels : multiprocessors;
  return a.tiles < blocks ? a.tiles : blocks;
}

template <typename T, bool kGradient>
void run(const char* op, const Conv2dProblem& p, const void* image, const void* weight,
         const void* bias, void* output, const Where& where) {
  using Memory = PlanesMemory;
  HopperImage in{p.N, p.C, p.H, p.W, p.input}, out{p.N, p.K, p.P, p.Q, p.output};
  if (kGradient) std::swap(in, out);
  PlanesArguments a{};
  a.image = plane_boxes<T>(op, image, in);
  a.output = plane_boxes<T>(op, output, out);
  a.weight = channels_first<T>(op, weight, {p.K, p.C, 1, 1, p.weight},
                               {kGradient ? kChannels : kMade, 1, 1});
  a.bias = bias;
  a.channels = small(out.channels);
  a.sums = small(tiles_for(in.channels, kChannels));
  const int64_t tiles_pixels = tiles_for(out.H * out.W, kN);
  const int64_t tiles_channels = tiles_for(out.channels, kMade);
  a.tiles_pixels = Divisor::of(tiles_pixels), a.tiles_channels = Divisor::of(tiles_channels);
  a.tiles = small(out.N * tiles_pixels * tiles_channels);
  end_with(a, p.activation, p.negative_slope);
  const int64_t blocks = divide_memory(a, multiprocessors(op));
  const int64_t bytes =
      Memory::kKept + int64_t{a.kept_steps} * Memory::kWeights + a.stages * a.stage_bytes;
  launch(op, conv2d_planes_kernel<T, kGradient>, static_cast<unsigned>(blocks), kThreads,
         static_cast<size_t>(bytes), where.stream, a);
}

template <bool kGradient>
void run_by_dtype(const char* op, const Conv2dProblem& p, const void* image, const void* weight,
                  const void* bias, void* output, const Where& where) {
  const DeviceGuard guard(op, where.device);
  const auto chosen = p.dtype == DType::kFloat16 ? run<Half, kGradient> : run<BFloat16, kGradient>;
  chosen(op, p, image, weight, bias, output, where);
}

}  // namespace

std::string conv2d_planes_why_not(const Conv2dProblem& p, bool gradient) {
  const auto takes = [](const std::string& what) { return "it takes " + what; };
  if (const std::string reason = planes_why_not(p); !reason.empty()) return takes(reason);
  if (const std::string reason = image_why_not("weight", {p.K, p.C, 1, 1, p.weight});
      !reason.empty()) {
    return takes(reason);
  }
  const int64_t made = gradient ? p.C : p.K, summed = gradient ? p.K : p.C;
  const int64_t tiles = p.N * tiles_for(p.H * p.W, 128) * tiles_for(made, 64);
  return tiles > kMost / 8 || summed > kMost / 4 ? takes("fewer pixels and channels") : "";
}

void conv2d_planes(const Conv2dProblem& p, const void* input, const void* weight, const void* bias,
                   void* output, const Where& where) {
  run_by_dtype<false>("conv2d", p, input, weight, bias, output, where);
}

void conv2d_grad_input_planes(const Conv2dProblem& p, const void* grad_output, const void* weight,
                              void* grad_input, const Where& where) {
  run_by_dtype<true>("conv2d_grad_input", p, grad_output, weight, nullptr, grad_input, where);
}

}  // namespace gdfast::cuda
