// Depthwise convolution forward in boxes (depthwise_boxes.h), and the gradient in the input, which
// is one too with the filters turned round.
#include "depthwise_boxes_kernel.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d";

template <typename T, bool kEnding>
void launch_boxes(const DepthwiseArguments& a, const Tensors<T>& tensors, uintptr_t stream) {
  BoxesArguments boxes = boxes_arguments(a, int64_t{kBoxBlocks} * multiprocessors(kOp), true, true);
  boxes.storer_fences = boxes.images > 1;  // where rows are few
  boxes.input = box_map(kOp, tensors.input, a, a.input, a.H, a.W, boxes.images, boxes.pitch);
  // What the gradient in the input reads, by filters turned round, the other gradient reads after
  // it.
  if (a.weight_r > 0) boxes.input = read_once(kOp, boxes.input, output_bytes(a));
  boxes.output = box_map<T>(kOp, tensors.output, a, a.output, a.P, a.Q, boxes.images, boxes.strip);
  launch(kOp, depthwise_boxes_kernel<T, kEnding>, static_cast<unsigned>(boxes.blocks), kBoxThreads,
         static_cast<size_t>(BoxesRing::bytes(boxes)), stream, a, boxes, tensors);
}

}  // namespace

std::string depthwise_boxes_why_not(const Conv2dProblem& p) {
  if (std::string reason = depthwise_tensor_why_not(p); !reason.empty()) return reason;
  if (p.R != kBoxSize) return "it takes filters of 3x3";
  for (const HopperImage& image :
       {HopperImage{p.N, p.C, p.H, p.W, p.input}, HopperImage{p.N, p.K, p.P, p.Q, p.output}}) {
    if (std::string reason = image_why_not("images", image); !reason.empty()) return reason;
  }
  return "";
}

void depthwise_boxes(DType dtype, const DepthwiseArguments& a, const void* input,
                     const void* weight, const void* bias, void* output, uintptr_t stream) {
  const bool ending = bias != nullptr || a.activation != Activation::kNone;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const Tensors<T> tensors{static_cast<const T*>(input), static_cast<const T*>(weight),
                               static_cast<const T*>(bias), static_cast<T*>(output)};
      auto* const chosen = ending ? launch_boxes<T, true> : launch_boxes<T, false>;
      chosen(a, tensors, stream);
    }
  });
}

}  // namespace gdfast::cuda
