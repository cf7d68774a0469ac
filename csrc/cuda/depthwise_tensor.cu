// Depthwise convolution forward on the tensor cores (depthwise_tensor.h), and the gradient in the
// input, which is one too with the filters turned round.
#include "depthwise_tensor_kernel.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d";

template <typename T, typename Tile, int kSize, bool kEnding>
void launch_tensor(const DepthwiseArguments& a, const Tensors<T>& tensors, uintptr_t stream) {
  using Its = Block<Tile, kSize>;
  const int64_t blocks = int64_t{kBlocks<Tile, kSize, kEnding>} * multiprocessors(kOp);
  const auto walk = tensor_walk<Tile, kSize>(a, blocks);
  launch(kOp, depthwise_tensor_kernel<T, Tile, kSize, kEnding>, tensor_grid<Tile>(a, walk),
         Its::kThreads, Its::kBytes, stream, a, walk, tensors);
}

template <typename T, typename Tile, int kSize>
void launch_tensor(const DepthwiseArguments& a, const Tensors<T>& tensors, uintptr_t stream) {
  const bool ending = tensors.bias != nullptr || a.activation != Activation::kNone;
  ending ? launch_tensor<T, Tile, kSize, true>(a, tensors, stream)
         : launch_tensor<T, Tile, kSize, false>(a, tensors, stream);
}

}  // namespace

std::string depthwise_tensor_why_not(const Conv2dProblem& p) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) {
    return "it takes float16 and bfloat16";
  }
  if (p.K != p.C || p.C % 8 != 0)
    return "it takes a filter for each channel, in all eights of them";
  if (p.R != p.S || (p.R != 3 && p.R != 5 && p.R != 7)) return "it takes filters of 3x3, 5x5, 7x7";
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) {
    return "it takes no stride or dilation";
  }
  if (p.N == 0) return "it takes images";
  if (!has_channel_vectors(p.input, 8) || !has_channel_vectors(p.output, 8)) {
    return "it takes channels_last, with pixels a multiple of 16 bytes apart";
  }
  constexpr int64_t kMost = 1 << 24;
  if (p.input.w >= kMost || p.output.w >= kMost) return "it takes pixels less than 2^24 apart";
  return "";
}

void depthwise_tensor(DType dtype, const DepthwiseArguments& a, bool wide, const void* input,
                      const void* weight, const void* bias, void* output, uintptr_t stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const Tensors<T> tensors{static_cast<const T*>(input), static_cast<const T*>(weight),
                               static_cast<const T*>(bias), static_cast<T*>(output)};
      with_common_filter(a, [&](auto filter) {
        using Filter = decltype(filter);
        if constexpr (Filter::kStride == 1) {
          constexpr int kSize = Filter::kSize;
          wide ? launch_tensor<T, WideTile, kSize>(a, tensors, stream)
               : launch_tensor<T, NarrowTile, kSize>(a, tensors, stream);
        }
      });
    }
  });
}

}  // namespace gdfast::cuda
