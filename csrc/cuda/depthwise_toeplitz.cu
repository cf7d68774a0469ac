// Depthwise convolution forward by bands (depthwise_toeplitz.h), and the gradient in the input,
// which is one too with the filters turned round.
#include "depthwise_toeplitz_kernel.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d";

template <typename T, int kSize, bool kEnding>
void launch_toeplitz(const DepthwiseArguments& a, const Tensors<T>& tensors, uintptr_t stream) {
  BoxesArguments boxes = toeplitz_arguments(a, multiprocessors(kOp));
  boxes.storer_fences = true;
  boxes.input =
      box_map(kOp, tensors.input, a, a.input, a.H, a.W, boxes.images, boxes.pitch, kHalfBoxRow);
  boxes.output = box_map<T>(kOp, tensors.output, a, a.output, a.P, a.Q, boxes.images, boxes.strip,
                            kHalfBoxRow);
  launch(kOp, depthwise_toeplitz_kernel<T, kSize, kEnding>, static_cast<unsigned>(boxes.blocks),
         kToeplitzThreads, static_cast<size_t>(ToeplitzRing<kSize>::bytes(boxes)), stream, a, boxes,
         tensors);
}

template <typename T, int kSize>
void launch_toeplitz(const DepthwiseArguments& a, const Tensors<T>& tensors, uintptr_t stream) {
  const bool ending = tensors.bias != nullptr || a.activation != Activation::kNone;
  ending ? launch_toeplitz<T, kSize, true>(a, tensors, stream)
         : launch_toeplitz<T, kSize, false>(a, tensors, stream);
}

}  // namespace

std::string depthwise_toeplitz_why_not(const Conv2dProblem& p) {
  if (std::string reason = depthwise_tensor_why_not(p); !reason.empty()) return reason;
  if (p.R == kBoxSize) return "it takes filters of 5x5 and 7x7";
  for (const HopperImage& image :
       {HopperImage{p.N, p.C, p.H, p.W, p.input}, HopperImage{p.N, p.K, p.P, p.Q, p.output}}) {
    if (std::string reason = image_why_not("images", image); !reason.empty()) return reason;
  }
  return "";
}

void depthwise_toeplitz(DType dtype, const DepthwiseArguments& a, const void* input,
                        const void* weight, const void* bias, void* output, uintptr_t stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const Tensors<T> tensors{static_cast<const T*>(input), static_cast<const T*>(weight),
                               static_cast<const T*>(bias), static_cast<T*>(output)};
      auto* const chosen = a.R == 5 ? launch_toeplitz<T, 5> : launch_toeplitz<T, 7>;
      chosen(a, tensors, stream);
    }
  });
}

}  // namespace gdfast::cuda
