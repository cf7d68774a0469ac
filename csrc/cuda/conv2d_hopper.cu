// Convolution of stride 1, and its grad_input, on Hopper's tensor cores, in half types.
//
// Blocks are persistent: one per multiprocessor, which takes every gridDim-th tile of 128 pixels by
// kN channels. In a block one thread loads and two warpgroups multiply; these take tiles in turn,
// so that one multiplies while the other writes its results. The loader fills the stages of a ring:
// for each tap and each 64 channels that are summed, a box of pixels, shifted by the tap, and the
// weights. What falls outside of the images arrives as zeros, so that padding needs no code, and
// channels beyond the last as well.
//
// In grad_input the weights are read down their columns: its sum goes over filters. That is a bit
// in the instruction; they lie in memory as they do for conv2d.
//
// It compiles for sm_90a and its results are right in the simulator (hopper_simulator.h says what
// that does not cover). The tuner may choose it with GDFAST_HOPPER=1 alone, and then where its
// results on the GPU at hand are native's.
#include "conv2d_hopper.h"
#include "conv2d_hopper_kernel.h"
#include "conv2d_hopper_tiles.h"

namespace gdfast::cuda {
namespace {

constexpr int kMost = 2147483647;

int small(int64_t value) { return static_cast<int>(value); }

// The axis after another. One of length 1 is never stepped along, but has to have a legal step.
Axis next_axis(const Axis& before, int64_t size, int64_t stride) {
  return {size, size == 1 ? before.size * before.bytes : 2 * stride};
}

// A tensor with its channels first, as boxes of 64 of them.
template <typename T>
TensorMap channels_first(const char* op, const void* address, const HopperImage& image, int box_w,
                         int box_h, int box_n) {
  const Axis channels{image.channels, 2};
  const Axis w = next_axis(channels, image.W, image.strides.w);
  const Axis h = next_axis(w, image.H, image.strides.h);
  const Axis n = next_axis(h, image.N, image.strides.n);
  return tensor_map<T>(op, address, {channels, w, h, n}, {kChannels, box_w, box_h, box_n});
}

template <typename T, int kN, bool kGradient>
void run(const char* op, const Conv2dProblem& p, const HopperPass& pass, const void* image,
         const void* weight, HopperArguments a, const Where& where) {
  const HopperImage& out = pass.out;
  a.image = channels_first<T>(op, image, pass.in, a.box_w, a.box_h, a.box_n);
  a.weight = channels_first<T>(op, weight, {p.K, p.C, p.R, p.S, p.weight}, 1, 1,
                               kGradient ? kChannels : kN);
  a.tiles_channels = small(tiles_for(out.channels, kN));
  const int64_t tiles = pixel_tiles(out, {a.box_n, a.box_h, a.box_w}) * a.tiles_channels;
  a.tiles = small(tiles);
  const int64_t blocks = multiprocessors(op);
  launch(op, conv2d_hopper_kernel<T, kN, kGradient>,
         static_cast<unsigned>(tiles < blocks ? tiles : blocks), kThreads, HopperTile<kN>::kSize,
         where.stream, a);
}

template <typename T, bool kGradient>
void run(const char* op, const Conv2dProblem& p, int channels, const void* image,
         const void* weight, const void* bias, void* output, const Where& where) {
  const HopperPass pass = hopper_pass(p, kGradient);
  const HopperImage& out = pass.out;
  const PixelBox box = choose_pixel_box(out, kPixels);
  HopperArguments a{};
  a.output = static_cast<unsigned char*>(output);
  a.bias = bias;
  a.stride_n = out.strides.n, a.stride_h = out.strides.h, a.stride_w = out.strides.w;
  a.N = small(out.N), a.H = small(out.H), a.W = small(out.W), a.channels = small(out.channels);
  a.box_n = small(box.n), a.box_h = small(box.h), a.box_w = small(box.w);
  a.by_box_w = (65536 + a.box_w - 1) / a.box_w, a.by_box_h = (65536 + a.box_h - 1) / a.box_h;
  a.tiles_h = small(tiles_for(out.H, box.h)), a.tiles_w = small(tiles_for(out.W, box.w));
  a.R = small(pass.R), a.S = small(pass.S);
  a.sums = small(tiles_for(pass.in.channels, kChannels));
  a.first_h = small(pass.first_h), a.first_w = small(pass.first_w);
  a.step_h = small(pass.step_h), a.step_w = small(pass.step_w);
  a.activation = p.activation, a.negative_slope = static_cast<float>(p.negative_slope);
  const HopperTileTime time{pixel_tiles(out, box), out.channels, pass.R * pass.S * a.sums,
                            multiprocessors(op)};
  switch (channels != 0 ? channels : time.fastest()) {
    case 64:
      return run<T, 64, kGradient>(op, p, pass, image, weight, a, where);
    case 128:
      return run<T, 128, kGradient>(op, p, pass, image, weight, a, where);
    default:
      return run<T, 256, kGradient>(op, p, pass, image, weight, a, where);
  }
}

std::string image_why_not(const char* name, const HopperImage& image) {
  const Strides4& s = image.strides;
  const auto fits = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 38);
  };
  if (image.channels % 8 != 0) return std::string(name) + ": channels in eights";
  if (s.c != 1 || !fits(image.N, s.n) || !fits(image.H, s.h) || !fits(image.W, s.w)) {
    return std::string(name) + ": channels_last, with pixels a multiple of 16 bytes apart";
  }
  return "";
}

}  // namespace

std::string conv2d_hopper_why_not(const Conv2dProblem& p, bool gradient) {
  const auto takes = [](const std::string& what) { return "it takes " + what; };
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return takes("half types");
  if (p.groups != 1) return takes("one group");
  if (p.stride_h != 1 || p.stride_w != 1) return takes("a stride of 1");
  if (p.N == 0) return takes("at least one image");
  for (const auto& [name, image] :
       {std::pair{"input", HopperImage{p.N, p.C, p.H, p.W, p.input}},
        std::pair{"output", HopperImage{p.N, p.K, p.P, p.Q, p.output}},
        std::pair{"weight", HopperImage{p.K, p.C, p.R, p.S, p.weight}}}) {
    if (const std::string reason = image_why_not(name, image); !reason.empty()) {
      return takes(reason);
    }
  }
  const HopperPass pass = hopper_pass(p, gradient);
  const int64_t steps = p.R * p.S * tiles_for(pass.in.channels, kChannels);
  const int64_t tiles =
      pixel_tiles(pass.out, choose_pixel_box(pass.out, kPixels)) * tiles_for(pass.out.channels, 64);
  const int64_t spans = (p.R * p.dilation_h + p.pad_h) | (p.S * p.dilation_w + p.pad_w);
  if (tiles > kMost / 2 || steps > kMost / 64 || (spans | pass.in.W | pass.out.W) > kMost / 4) {
    return takes("fewer pixels and taps");
  }
  return "";
}

void conv2d_hopper(const Conv2dProblem& p, int channels, const void* input, const void* weight,
                   const void* bias, void* output, const Where& where) {
  constexpr char kOp[] = "conv2d";
  const DeviceGuard guard(kOp, where.device);
  const auto chosen = p.dtype == DType::kFloat16 ? run<Half, false> : run<BFloat16, false>;
  chosen(kOp, p, channels, input, weight, bias, output, where);
}

void conv2d_grad_input_hopper(const Conv2dProblem& p, int channels, const void* grad_output,
                              const void* weight, void* grad_input, const Where& where) {
  constexpr char kOp[] = "conv2d_grad_input";
  const DeviceGuard guard(kOp, where.device);
  const auto chosen = p.dtype == DType::kFloat16 ? run<Half, true> : run<BFloat16, true>;
  chosen(kOp, p, channels, grad_output, weight, nullptr, grad_input, where);
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
    check("conv2d", cudaFuncGetAttributes(&attributes, conv2d_hopper_kernel<Half, 128, false>));
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
