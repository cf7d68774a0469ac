// Convolution of strides 1 and 2, and its grad_input, on Hopper's tensor cores, in half types.
//
// Blocks are persistent: one per multiprocessor, which takes every gridDim-th tile of pixels by
// channels. In a block one thread loads and two warpgroups multiply; these take tiles in turn, so
// that one multiplies while the other writes its results, or share large ones. The loader fills the
// stages of a ring: for each tap and each 64 channels that are summed, a box of pixels, shifted by
// the tap, and the weights, unless those of the block's last tile serve again. What falls outside
// of the images arrives as zeros, so that padding needs no code, and channels beyond the last as
// well. Results go the same way back, as boxes that are cut off at the image's edge.
//
// A stride is a matter of addresses: the rows and columns that it meets are phases of an image,
// each of which is a tensor of its own. Forward, every tap reads one phase of the input; of a
// gradient each phase is made by the taps that reach it, of the same outputs.
//
// In grad_input the weights are read down their columns: its sum goes over filters. That is a bit
// in the instruction; they lie in memory as they do for conv2d.
#include "conv2d_hopper.h"
#include "conv2d_hopper_images.h"
#include "conv2d_hopper_kernel.h"

namespace gdfast::cuda {
namespace {

constexpr int kMost = 2147483647;

int small(int64_t value) { return static_cast<int>(value); }

// Divides a block's memory, and says how many blocks there are. Weights that all tiles of a block
// need stay there, where enough stages fit beside them to have loads under way all the time.
template <typename Its>
int64_t divide_memory(HopperArguments& a, int64_t steps, bool one_phase, int64_t multiprocessors) {
  constexpr int64_t kEnoughStages = 4, kRest = kBlockMemory - Its::kKept;
  // A block's tiles have the same channels where blocks are a multiple of the channels' tiles.
  const int64_t same_channels = multiprocessors - multiprocessors % a.tiles_channels.divisor;
  const bool keeps =
      one_phase && same_channels > 0 && a.tiles > same_channels &&
      // Without the others it shall not take more than 5% longer.
      20 * tiles_for(a.tiles, same_channels) <= 21 * tiles_for(a.tiles, multiprocessors) &&
      steps * Its::kWeights + kEnoughStages * Its::kPixelBytes <= kRest;
  a.kept_steps = keeps ? small(steps) : 0;
  a.stage_bytes = Its::kPixelBytes + (keeps ? 0 : Its::kWeights);
  const int64_t stages = (kRest - a.kept_steps * Its::kWeights) / a.stage_bytes;
  a.stages = small(stages < kMostStages ? stages : kMostStages);
  const int64_t blocks = keeps ? same_channels : multiprocessors;
  return a.tiles < blocks ? a.tiles : blocks;
}

template <typename T, int kPixels, int kN, bool kGradient>
void run(const char* op, const Conv2dProblem& p, const HopperPass& pass, const void* image,
         const void* weight, void* output, HopperArguments a, const Where& where) {
  using Its = HopperTile<kPixels, kN>;
  const HopperImage out = first_phase(pass);
  const PixelBox box = choose_pixel_box(out, kPixels);
  a.box_n = small(box.n), a.box_h = small(box.h), a.box_w = small(box.w);
  a.tiles_h = Divisor::of(tiles_for(out.H, box.h));
  a.tiles_w = Divisor::of(tiles_for(out.W, box.w));
  const int64_t tiles_channels = tiles_for(out.channels, kN);
  a.tiles_channels = Divisor::of(tiles_channels);
  a.tiles = small(pixel_tiles(out, box) * tiles_channels);
  phase_maps<T>(op, image, pass.in, pass.in_phases(), box, a.images);
  phase_maps<T>(op, output, pass.out, pass.out_phases(), box, a.outputs);
  a.weight = channels_first<T>(op, weight, {p.K, p.C, p.R, p.S, p.weight},
                               {kGradient ? kChannels : kN, 1, 1});
  const HopperPhases phases = pass.out_phases();
  const int64_t blocks =
      divide_memory<Its>(a, p.R * p.S * a.sums, phases.h * phases.w == 1, multiprocessors(op));
  const int64_t bytes = Its::kKept + a.kept_steps * Its::kWeights + a.stages * a.stage_bytes;
  launch(op, conv2d_hopper_kernel<T, kPixels, kN, kGradient>, static_cast<unsigned>(blocks),
         kThreads, static_cast<size_t>(bytes), where.stream, a);
}

HopperTileSize guess(const Conv2dProblem& p, const HopperPass& pass, int64_t multiprocessors) {
  const HopperImage out = first_phase(pass);
  const HopperPhases phases = pass.out_phases();
  const HopperTileTime time{pixel_tiles(out, choose_pixel_box(out, 128)), out.channels,
                            p.R * p.S * tiles_for(pass.in.channels, kChannels), phases.h * phases.w,
                            multiprocessors};
  return {128, time.fastest()};
}

template <typename T, bool kGradient>
void run(const char* op, const Conv2dProblem& p, HopperTileSize tile, const void* image,
         const void* weight, const void* bias, void* output, const Where& where) {
  const HopperPass pass = hopper_pass(p, kGradient);
  HopperArguments a{};
  a.rows = pass.rows, a.columns = pass.columns;
  a.bias = bias;
  a.channels = small(pass.out.channels);
  a.sums = small(tiles_for(pass.in.channels, kChannels));
  end_with(a, p.activation, p.negative_slope);
  if (tile.channels == 0) tile = guess(p, pass, multiprocessors(op));
  const auto chosen = tile.channels == 64    ? run<T, 128, 64, kGradient>
                      : tile.channels == 256 ? run<T, 128, 256, kGradient>
                      : tile.pixels == 256   ? run<T, 256, 128, kGradient>
                                             : run<T, 128, 128, kGradient>;
  chosen(op, p, pass, image, weight, output, a, where);
}

}  // namespace

std::string conv2d_hopper_why_not(const Conv2dProblem& p, bool gradient) {
  const auto takes = [](const std::string& what) { return "it takes " + what; };
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return takes("half types");
  if (p.groups != 1) return takes("one group");
  if (p.stride_h > kMostPhases || p.stride_w > kMostPhases) return takes("strides of 1 and 2");
  if (p.stride_h > p.H || p.stride_w > p.W) return takes("images of at least the stride");
  if (p.N == 0) return takes("at least one image");
  for (const auto& [name, image] :
       {std::pair{"input", HopperImage{p.N, p.C, p.H, p.W, p.input}},
        std::pair{"output", HopperImage{p.N, p.K, p.P, p.Q, p.output}},
        std::pair{"weight", HopperImage{p.K, p.C, p.R, p.S, p.weight}}}) {
    if (const std::string reason = image_why_not(name, image); !reason.empty()) {
      return takes(reason);
    }
  }
  const int64_t spans = (p.R * p.dilation_h + p.pad_h) | (p.S * p.dilation_w + p.pad_w);
  const int64_t steps = p.R * p.S * tiles_for(gradient ? p.K : p.C, kChannels);
  const HopperPass pass = hopper_pass(p, gradient);
  const HopperImage out = first_phase(pass);
  const int64_t tiles = pixel_tiles(out, choose_pixel_box(out, 128)) * tiles_for(out.channels, 64);
  if (tiles > kMost / 8 || steps > kMost / 64 || (spans | pass.in.W | pass.out.W) > kMost / 4) {
    return takes("fewer pixels and taps");
  }
  return "";
}

bool is_hopper_tile(const HopperTileSize& tile) {
  const int pixels = tile.pixels, channels = tile.channels;
  if (pixels == 0 || pixels == 256) return channels == pixels / 2;
  return pixels == 128 && (channels == 64 || channels == 128 || channels == 256);
}

void conv2d_hopper(const Conv2dProblem& p, const HopperTileSize& tile, const void* input,
                   const void* weight, const void* bias, void* output, const Where& where) {
  constexpr char kOp[] = "conv2d";
  const DeviceGuard guard(kOp, where.device);
  const auto chosen = p.dtype == DType::kFloat16 ? run<Half, false> : run<BFloat16, false>;
  chosen(kOp, p, tile, input, weight, bias, output, where);
}

void conv2d_grad_input_hopper(const Conv2dProblem& p, const HopperTileSize& tile,
                              const void* grad_output, const void* weight, void* grad_input,
                              const Where& where) {
  constexpr char kOp[] = "conv2d_grad_input";
  const DeviceGuard guard(kOp, where.device);
  const auto chosen = p.dtype == DType::kFloat16 ? run<Half, true> : run<BFloat16, true>;
  chosen(kOp, p, tile, grad_output, weight, nullptr, grad_input, where);
}

std::string hopper_missing(int device) {
#if defined(__CUDACC__)
  try {
    const DeviceGuard guard("conv2d", device);
    int major = 0, minor = 0;
    check("conv2d", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check("conv2d", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    if (major != 9 || minor != 0) return "it needs a GPU of compute capability 9.0";
    // On such a GPU the body is empty in code made from another architecture's.
    cudaFuncAttributes attributes;
    check("conv2d",
          cudaFuncGetAttributes(&attributes, conv2d_hopper_kernel<Half, 128, 128, false>));
    constexpr int kRegistersOfAnEmptyBody = 32;  // and somewhat more
    if (attributes.numRegs < kRegistersOfAnEmptyBody) {
      return "it was built without TORCH_CUDA_ARCH_LIST 9.0a";
    }
  } catch (const std::runtime_error& error) {
    return error.what();
  }
#else
  static_cast<void>(device);
#endif
  return "";
}

}  // namespace gdfast::cuda
