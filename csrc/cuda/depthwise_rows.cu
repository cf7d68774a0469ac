// Depthwise convolution forward by whole rows (depthwise_rows.h), and the gradient in the input,
// which is one too with the filters turned round.
#include "depthwise_rows_kernel.h"
#include "depthwise_tensor.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d";

template <typename T>
void launch_rows(const DepthwiseArguments& a, const Tensors<T>& tensors, uintptr_t stream) {
  const RowsWalk walk = rows_walk(a, 1, multiprocessors(kOp));
  launch(kOp, depthwise_rows_kernel<T>, static_cast<unsigned>(walk.blocks),
         static_cast<unsigned>(walk.workers + kWarp), static_cast<size_t>(walk.shared_bytes()),
         stream, a, walk, tensors);
}

}  // namespace

std::string depthwise_rows_why_not(const Conv2dProblem& p) {
  if (std::string reason = depthwise_tensor_why_not(p); !reason.empty()) return reason;
  if (p.R != kRowSize) return "it takes filters of 3x3";
  if (p.pad_h >= p.R || p.pad_w >= p.S) return "it takes less padding than the filter is large";
  const auto whole = [&](const Strides4& strides, int64_t columns) {
    return strides.w == p.C && strides.h == columns * p.C;
  };
  if (!whole(p.input, p.W) || !whole(p.output, p.Q)) return "it takes whole rows of pixels";
  constexpr const char* kTooLong = "it takes rows of fewer pixels and channels";
  if (p.C * (p.W > p.Q ? p.W : p.Q) > kMostRow) return kTooLong;
  const DepthwiseArguments a = depthwise_arguments(p);
  DepthwiseArguments turned = a;
  std::swap(turned.W, turned.Q);
  turned.pad_w = a.S - 1 - a.pad_w;
  const bool fits = has_rows(a) && has_rows(turned);
  return fits ? "" : kTooLong;
}

void depthwise_rows(DType dtype, const DepthwiseArguments& a, const void* input, const void* weight,
                    const void* bias, void* output, uintptr_t stream) {
  if (bias != nullptr || a.activation != Activation::kNone) {
    // With these the registers of rows do not suffice.
    return depthwise_tensor(dtype, a, true, input, weight, bias, output, stream);
  }
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      launch_rows<T>(
          a, {static_cast<const T*>(input), static_cast<const T*>(weight), static_cast<T*>(output)},
          stream);
    }
  });
}

}  // namespace gdfast::cuda
