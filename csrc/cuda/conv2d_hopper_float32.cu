// Convolution of strides 1 and 2, and its grad_input, in float32 on Hopper's tensor cores.
//
// A number is the sum of three bfloat16 parts, and a product six products of parts. What
// conv2d_hopper.cu says of blocks, boxes and strides holds here too. But a consumer brings pixels
// from shared memory to registers, and makes their parts there: what is copied and read is four
// bytes a number, once. The weight's parts are made before, by a kernel of its own, for each
// channel that is made with those that are summed side by side: so grad_input is the same product.
#include "conv2d_hopper_float32.h"
#include "conv2d_hopper_float32_kernel.h"
#include "conv2d_hopper_images.h"

namespace gdfast::cuda {
namespace {

int small(int64_t value) { return static_cast<int>(value); }

// The weight's parts: [kFloatParts, made, taps, summed], with zeros beyond the last that is summed.
struct WeightParts {
  int64_t made, taps, summed, count;  // count: of one part
  int64_t made_step, summed_step;     // of the weight, in elements

  static WeightParts of(const Conv2dProblem& p, bool gradient) {
    const int64_t made = gradient ? p.C : p.K, summed = gradient ? p.K : p.C;
    const int64_t taps = p.R * p.S, padded = tiles_for(summed, kChannels) * kChannels;
    return {made,
            taps,
            padded,
            made * taps * padded,
            gradient ? p.weight.c : p.weight.n,
            gradient ? p.weight.n : p.weight.c};
  }
};

constexpr int kSplitThreads = 128;
constexpr int kEight = 8;  // numbers of a thread, and of a warp that are made

struct SplitArguments {
  const float* weight;
  unsigned char* parts;
  WeightParts sizes;
  int64_t row_step, column_step;
  int64_t summed;  // that there are
  int columns;
  Divisor blocks, taps;  // of 32 that are summed
};

// A warp has eight channels that are made by 32 that are summed, of one tap: whole sectors of
// memory whichever of the two lie side by side.
GDFAST_KERNEL(kSplitThreads, 1)
split_weight_kernel(GDFAST_GRID_CONSTANT const SplitArguments a) {
  const int warp = static_cast<int>(blockIdx.x) * (kSplitThreads / kWarp) + warp_index();
  const Divided block = divide(warp, a.blocks), tap = divide(block.quotient, a.taps);
  const int64_t made = int64_t{tap.quotient} * kEight + warp_lane() % kEight;
  if (made >= a.sizes.made) return;
  const int first = block.rest * 32 + warp_lane() / kEight * kEight;
  const float* const from =
      a.weight + (made * a.sizes.made_step + tap.rest / a.columns * a.row_step +
                  tap.rest % a.columns * a.column_step);
  Pack16 parts[kFloatParts];
#pragma unroll
  for (int i = 0; i < kEight; i += 2) {
    // Places 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of each 16 are of four numbers side by side.
    const int summed = first / 16 * 16 + 2 * i + first % 16 / 4;
    uint32_t pair[2], split[kFloatParts];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      pair[j] = summed + j < a.summed ? bits_of(from[(summed + j) * a.sizes.summed_step]) : 0;
    }
    split_two(pair[0], pair[1], split);
#pragma unroll
    for (int part = 0; part < kFloatParts; ++part) parts[part].words[i / 2] = split[part];
  }
  const int64_t to = (made * a.sizes.taps + tap.rest) * a.sizes.summed + first;
#pragma unroll
  for (int part = 0; part < kFloatParts; ++part) {
    store_16(a.parts + 2 * (part * a.sizes.count + to), parts[part]);
  }
}

void split_weight(const char* op, const Conv2dProblem& p, const WeightParts& sizes, bool gradient,
                  const void* weight, void* parts, uintptr_t stream) {
  const int64_t blocks = sizes.summed / 32;
  const SplitArguments a{static_cast<const float*>(weight),
                         static_cast<unsigned char*>(parts),
                         sizes,
                         p.weight.h,
                         p.weight.w,
                         gradient ? p.K : p.C,
                         small(p.S),
                         Divisor::of(blocks),
                         Divisor::of(sizes.taps)};
  const int64_t warps = tiles_for(sizes.made, kEight) * sizes.taps * blocks;
  launch(op, split_weight_kernel, static_cast<unsigned>(tiles_for(warps, kSplitThreads / kWarp)),
         kSplitThreads, 0, stream, a);
}

// A pass, and what its kernels are told.
struct Launch {
  const char* op;
  HopperPass pass;
  WeightParts sizes;
  const void *image, *parts;
  HopperFloat32Arguments arguments;
  int multiprocessors;
  uintptr_t stream;
};

// Tiles of pixels: all of them, or a part.
struct PixelTiles {
  int64_t first, count;
};

template <int kPixels>
int64_t all_pixel_tiles(const Launch& of) {
  const HopperImage out = first_phase(of.pass);
  return pixel_tiles(out, choose_pixel_box(out, kPixels));
}

template <int kPixels, int kN>
void run(const Launch& of, const PixelTiles& tiles) {
  const HopperImage out = first_phase(of.pass);
  const PixelBox box = choose_pixel_box(out, kPixels);
  const int64_t tiles_channels = tiles_for(out.channels, kN);
  HopperFloat32Arguments a = of.arguments;
  a.box_n = small(box.n), a.box_h = small(box.h), a.box_w = small(box.w);
  a.tiles_h = Divisor::of(tiles_for(out.H, box.h));
  a.tiles_w = Divisor::of(tiles_for(out.W, box.w));
  a.tiles_channels = Divisor::of(tiles_channels);
  a.first_tile = small(tiles.first * tiles_channels);
  a.tiles = small(tiles.count * tiles_channels);
  phase_maps<float>(of.op, of.image, of.pass.in, of.pass.in_phases(), box, a.images);
  const WeightParts& sizes = of.sizes;
  const Strides4 dense{sizes.count, 1, sizes.taps * sizes.summed, sizes.summed};
  a.weight = channels_first<BFloat16>(
      of.op, of.parts, {kFloatParts, sizes.summed, sizes.made, sizes.taps, dense}, {1, kN, 1});
  const int blocks = a.tiles < of.multiprocessors ? a.tiles : of.multiprocessors;
  launch(of.op, conv2d_hopper_float32_kernel<kPixels, kN>, static_cast<unsigned>(blocks), kThreads,
         HopperFloat32Tile<kPixels, kN>::kSize, of.stream, a);
}

// Tiles of 128 channels. What is left when all multiprocessors have had as many of them goes in
// tiles of 64, where one for each multiprocessor is enough of these: that is half as long.
void run_wide(const Launch& of) {
  const int64_t tiles = all_pixel_tiles<128>(of), blocks = of.multiprocessors;
  const int64_t channels = first_phase(of.pass).channels;
  const int64_t wide = tiles_for(channels, 128);
  const int64_t whole = tiles * wide / blocks * blocks / wide, rest = tiles - whole;
  if (whole == 0 || rest == 0 || rest * tiles_for(channels, 64) > blocks) {
    return run<128, 128>(of, {0, tiles});
  }
  run<128, 128>(of, {0, whole});
  run<128, 64>(of, {whole, rest});
}

void run(const char* op, const Conv2dProblem& p, const HopperTileSize& tile, bool gradient,
         const void* image, const void* weight, const void* bias, void* output, void* parts,
         const Where& where) {
  const WeightParts sizes = WeightParts::of(p, gradient);
  split_weight(op, p, sizes, gradient, weight, parts, where.stream);
  const HopperPass pass = hopper_pass(p, gradient);
  HopperFloat32Arguments a{};
  a.rows = pass.rows, a.columns = pass.columns;
  a.bias = bias;
  a.channels = small(pass.out.channels);
  a.sums = small(sizes.summed / kChannels);
  end_with(a, gradient ? Activation::kNone : p.activation, p.negative_slope);
  a.output = static_cast<float*>(output);
  a.strides = pass.out.strides;
  a.N = small(pass.out.N), a.H = small(pass.out.H), a.W = small(pass.out.W);
  a.taps_across = small(p.S);
  const Launch of{op, pass, sizes, image, parts, a, multiprocessors(op), where.stream};
  if (tile.pixels == 256) return run<256, 64>(of, {0, all_pixel_tiles<256>(of)});
  if (tile.channels == 64) return run<128, 64>(of, {0, all_pixel_tiles<128>(of)});
  run_wide(of);
}

}  // namespace

std::string conv2d_hopper_float32_why_not(const Conv2dProblem& p, bool gradient) {
  if (p.dtype != DType::kFloat32) return "it takes float32";
  // The weight's parts are made where the kernel wants them.
  Conv2dProblem other = p;
  other.dtype = DType::kBFloat16;
  other.weight = {p.C * p.R * p.S, 1, p.C * p.S, p.C};
  return conv2d_hopper_why_not(other, gradient);
}

bool is_hopper_float32_tile(const HopperTileSize& tile) {
  const int pixels = tile.pixels, channels = tile.channels;
  return (pixels == 128 && (channels == 64 || channels == 128)) ||
         (pixels == 256 && channels == 64);
}

int64_t conv2d_hopper_float32_workspace(const Conv2dProblem& p, bool gradient) {
  return kFloatParts * WeightParts::of(p, gradient).count * 2;
}

void conv2d_hopper_float32(const Conv2dProblem& p, const HopperTileSize& tile, const void* input,
                           const void* weight, const void* bias, void* output, void* workspace,
                           const Where& where) {
  constexpr char kOp[] = "conv2d";
  const DeviceGuard guard(kOp, where.device);
  run(kOp, p, tile, false, input, weight, bias, output, workspace, where);
}

void conv2d_grad_input_hopper_float32(const Conv2dProblem& p, const HopperTileSize& tile,
                                      const void* grad_output, const void* weight, void* grad_input,
                                      void* workspace, const Where& where) {
  constexpr char kOp[] = "conv2d_grad_input";
  const DeviceGuard guard(kOp, where.device);
  run(kOp, p, tile, true, grad_output, weight, nullptr, grad_input, workspace, where);
}

}  // namespace gdfast::cuda
