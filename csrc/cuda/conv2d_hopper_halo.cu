// Convolution of stride 1, and its grad_input, on Hopper's tensor cores, for windows of several
// taps and images of few columns.
//
// conv2d_hopper.cu loads a tile's pixels afresh for every tap. Here the taps of 64 channels share
// one box, with the pixels around the tile: each tap multiplies the same box from another row on,
// which reads and fills shared memory less and loads several times fewer pixels. Pixels are the
// columns of a product, up to 248 of them, and 64 channels its rows: shared memory is read less for
// that than for products of 64 pixels, and results come out as columns of the boxes that are
// written.
//
// A descriptor's first row may be any: the unit finds a chunk's place by its address, as it lay it
// down, where the pattern of eight rows begins at multiples of 1024 bytes. Source: PTX ISA,
// "Matrix Descriptor Format", the base offset.
//
// The rest is that of conv2d_hopper.cu: persistent blocks, loaders and two consumers that take
// tiles in turn or share them, and zeros from outside of the images.
#include "conv2d_hopper_halo.h"
#include "conv2d_hopper_halo_kernel.h"
#include "conv2d_hopper_halo_tiles.h"
#include "conv2d_hopper_images.h"

namespace gdfast::cuda {
namespace {

constexpr int kMost = 2147483647;
constexpr HaloLimits kLimits{kBoxRow, kBlockMemory - kBarrierBytes, kMostBoxes, kMostWeights};

int small(int64_t value) { return static_cast<int>(value); }

HopperPass halo_pass(const Conv2dProblem& p, bool gradient) {
  HopperPass pass{{p.N, p.C, p.H, p.W, p.input},
                  {p.N, p.K, p.P, p.Q, p.output},
                  hopper_axis(1, p.dilation_h, p.pad_h, p.R, gradient),
                  hopper_axis(1, p.dilation_w, p.pad_w, p.S, gradient)};
  if (gradient) std::swap(pass.in, pass.out);
  return pass;
}

HaloTaps taps_of(const HaloAxis& axis) {
  return {small(axis.taps), small(axis.shift), small(axis.step)};
}

template <typename T, int kN, int kSharers, bool kGradient>
void run(const char* op, const HaloPlan& plan, HaloArguments a, const Where& where) {
  const int64_t bytes = a.barriers_at + kBarrierBytes;
  launch(op, conv2d_halo_kernel<T, kN, kSharers, kGradient>, static_cast<unsigned>(plan.blocks),
         kThreads, static_cast<size_t>(bytes), where.stream, a);
}

template <typename T, int kSharers, bool kGradient>
void run(const char* op, const HaloPlan& plan, const HaloArguments& a, const Where& where) {
  auto* chosen = run<T, 248, kSharers, kGradient>;
  if (plan.width == 232) chosen = run<T, 232, kSharers, kGradient>;
  if constexpr (is_halo_width(64 * kSharers, 208)) {
    if (plan.width == 208) chosen = run<T, 208, kSharers, kGradient>;
  }
  chosen(op, plan, a, where);
}

template <typename T, bool kGradient>
void run(const char* op, const Conv2dProblem& p, int channels, const void* image,
         const void* weight, const void* bias, void* output, void* moments, const Where& where) {
  const HopperPass pass = halo_pass(p, kGradient);
  const HaloPlanner planner(pass, channels, multiprocessors(op), kLimits);
  const HaloPlan plan = planner.best();
  HaloArguments a{};
  a.image = channels_first<T>(op, image, pass.in, {plan.n, plan.box_h, plan.pitch});
  a.output = channels_first<T>(op, output, pass.out, {plan.n, plan.out_h, plan.pitch});
  a.weight = channels_first<T>(op, weight, {p.K, p.C, p.R, p.S, p.weight},
                               {kGradient ? kChannels : channels, 1, 1});
  const HaloAxis &rows = planner.rows(), &columns = planner.columns();
  a.rows = taps_of(rows);
  a.columns = taps_of(columns);
  a.box_h = small(-rows.before);
  a.box_w = small(-columns.before);
  a.bias = bias;
  a.channels = small(pass.out.channels);
  const int64_t channel_tiles = tiles_for(pass.out.channels, channels);
  a.tiles_channels = Divisor::of(channel_tiles);
  a.tiles_h = Divisor::of(tiles_for(pass.out.H, plan.h));
  a.tiles = small(plan.tiles * channel_tiles);
  a.tile_n = small(plan.n), a.tile_h = small(plan.h);
  a.sums = small(tiles_for(pass.in.channels, kChannels));
  a.pitch = small(plan.pitch);
  a.box_bytes = small(plan.box_rows() * kBoxRow);
  a.stage_bytes = small(plan.stage_rows * kBoxRow);
  a.result_bytes = small(plan.result_rows * kBoxRow);
  a.box_stages = small(plan.box_stages), a.weight_stages = small(plan.weight_stages);
  a.kept_steps = plan.weight_stages > 0 ? 0 : small(plan.steps);
  a.weights_at = kConsumers * a.result_bytes;
  a.boxes_at = a.weights_at + (a.kept_steps + a.weight_stages) * channels * kBoxRow;
  a.barriers_at = a.boxes_at + a.box_stages * a.stage_bytes;
  a.moments = {static_cast<float*>(moments),
               plan.blocks % channel_tiles == 0,
               small(pass.out.N),
               small(pass.out.H),
               small(pass.out.W),
               Divisor::of(plan.pitch),
               Divisor::of(plan.out_h)};
  end_with(a, p.activation, p.negative_slope);
  const auto chosen = channels == 64 ? run<T, 1, kGradient> : run<T, 2, kGradient>;
  chosen(op, plan, a, where);
}

}  // namespace

std::string conv2d_halo_why_not(const Conv2dProblem& p, int channels, bool gradient) {
  const auto takes = [](const std::string& what) { return "it takes " + what; };
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return takes("half types");
  if (p.groups != 1) return takes("one group");
  if (p.stride_h != 1 || p.stride_w != 1) return takes("strides of 1");
  if (p.R * p.S == 1) return takes("windows of several taps");
  if (p.N == 0) return takes("at least one image");
  for (const auto& [name, image] :
       {std::pair{"input", HopperImage{p.N, p.C, p.H, p.W, p.input}},
        std::pair{"output", HopperImage{p.N, p.K, p.P, p.Q, p.output}},
        std::pair{"weight", HopperImage{p.K, p.C, p.R, p.S, p.weight}}}) {
    if (const std::string reason = image_why_not(name, image); !reason.empty()) {
      return takes(reason);
    }
  }
  const int64_t span_h = p.R * p.dilation_h + p.pad_h, span_w = p.S * p.dilation_w + p.pad_w;
  const int64_t summed = gradient ? p.K : p.C;
  if ((span_h | span_w | p.H | p.W | p.P | p.Q) > kMost / 4 ||
      p.R * p.S * tiles_for(summed, kChannels) > kMost / 64) {
    return takes("fewer pixels and taps");
  }
  const HaloPlanner planner(halo_pass(p, gradient), channels, 1, kLimits);
  if (!planner.shares_padding()) return takes("padding narrower than the window");
  const HaloPlan plan = planner.best();
  if (plan.width == 0) return takes("images of fewer columns");
  const int64_t most_tiles =
      p.N * (gradient ? p.H : p.P) * tiles_for(gradient ? p.C : p.K, kChannels);
  return most_tiles > kMost / 8 ? takes("fewer pixels") : "";
}

int64_t conv2d_halo_moment_splits(const Conv2dProblem& p, int channels, int device) {
  constexpr int64_t kMostParts = 2048;  // one kernel joins them
  if (p.activation != Activation::kNone) return 0;
  const DeviceGuard guard("conv2d", device);
  const HopperPass pass = halo_pass(p, false);
  const HaloPlanner planner(pass, channels, multiprocessors("conv2d"), kLimits);
  const HaloPlan plan = planner.best();
  const int64_t channel_tiles = tiles_for(pass.out.channels, channels);
  const int64_t turns = channels == 64 ? 2 : 1;
  const int64_t parts =
      plan.blocks % channel_tiles == 0 ? plan.blocks / channel_tiles * turns : plan.tiles;
  return parts > kMostParts ? 0 : parts;
}

void conv2d_halo(const Conv2dProblem& p, int channels, const void* input, const void* weight,
                 const void* bias, void* output, void* moments, const Where& where) {
  constexpr char kOp[] = "conv2d";
  const DeviceGuard guard(kOp, where.device);
  const auto chosen = p.dtype == DType::kFloat16 ? run<Half, false> : run<BFloat16, false>;
  chosen(kOp, p, channels, input, weight, bias, output, moments, where);
}

void conv2d_grad_input_halo(const Conv2dProblem& p, int channels, const void* grad_output,
                            const void* weight, void* grad_input, const Where& where) {
  constexpr char kOp[] = "conv2d_grad_input";
  const DeviceGuard guard(kOp, where.device);
  const auto chosen = p.dtype == DType::kFloat16 ? run<Half, true> : run<BFloat16, true>;
  chosen(kOp, p, channels, grad_output, weight, nullptr, grad_input, nullptr, where);
}

}  // namespace gdfast::cuda
