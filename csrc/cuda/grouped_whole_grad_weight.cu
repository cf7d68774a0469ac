// The gradients in the weight and the bias in groups on Hopper of small images and wide ones, in
// bfloat16, by filters of 3 x 3 with stride 1 and padding of 1.
//
// A block sums images one after the other, which come by the TMA unit to a ring in shared memory,
// all that fit there ahead of time. A warp loads each row of the input and of the gradient to
// registers once: there it meets the rows before it. So a slot is some rows of both and nothing
// around them.
#include "conv2d.h"
#include "conv2d_grouped_whole.h"
#include "device.h"
#include "early.h"
#include "grouped_octets_grad_weight.h"
#include "grouped_quads_grad_weight.h"
#include "grouped_strips_grad_weight.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";

template <typename Its>
constexpr int kThreadsOf = Its::kConsumers * kWarp;

// kShares: the blocks that registers are for. Where that is two, memory is for one, and the kernel
// that adds up splits begins beside it.
template <typename Its>
GDFAST_KERNEL(kThreadsOf<Its>, Its::kShares)
grouped_whole_grad_weight_kernel(GDFAST_GRID_CONSTANT const WholeWeightArguments a) {
#if defined(GDFAST_HOPPER)
  begin_block<Its>(a);
  sum_images(Its{}, a);
#else
  static_cast<void>(a);
#endif
}

template <typename With>
auto with_images(const Conv2dProblem& p, With&& with) {
  switch (p.H) {
    case OctetWeights::kRows:
      return with(OctetWeights{});
    case QuadWeights::kRows:
      return with(QuadWeights{});
    case Strip28Weights::kRows:
      return with(Strip28Weights{});
    default:
      return with(Strip56Weights{});
  }
}

// Of images that a block takes at a time.
template <typename Its>
int64_t rounds_of(const Conv2dProblem& p) {
  return ceil_div(p.N, Its::kStreams * Its::kImages);
}

template <typename Its>
void start(const Conv2dProblem& p, const void* grad_output, const void* input, void* workspace,
           bool with_bias, int64_t splits, const Where& where) {
  const auto map = [&](const void* images, const Strides4& strides) {
    return channels_first<BFloat16>(kOp, images, {p.N, p.C, p.H, p.W, strides},
                                    {Its::kImages, Its::kSlotRows, Its::kRowPixels}, Its::kPixel);
  };
  const int64_t rounds = rounds_of<Its>(p);
  const WholeWeightArguments a{read_once(kOp, map(input, p.input), output_bytes(p)),
                               map(grad_output, p.output), small(rounds),
                               small(ceil_div(rounds, splits)),
                               grouped_weight_split(p, workspace, splits, with_bias)};
  // Neighbours have slabs of the same images: pixels that lie side by side.
  const dim3 grid(static_cast<unsigned>(ceil_div(p.C, Its::kChannels)),
                  static_cast<unsigned>(splits));
  launch_early(kOp, grouped_whole_grad_weight_kernel<Its>, grid, kThreadsOf<Its>,
               size_t{bytes_of<Its>()}, where.stream, a);
}

}  // namespace

// As many as there are multiprocessors for, and no more than take as long.
int64_t grouped_whole_splits(const Conv2dProblem& p) {
  return with_images(p, [&](auto its) {
    using Its = decltype(its);
    const int64_t slabs = ceil_div(p.C, Its::kChannels), all = multiprocessors(kOp);
    const int64_t rounds = rounds_of<Its>(p), most = all < slabs ? 1 : all / slabs;
    return ceil_div(rounds, ceil_div(rounds, most));
  });
}

void conv2d_grad_weight_grouped_whole(const Conv2dProblem& p, const void* grad_output,
                                      const void* input, void* grad_weight, void* grad_bias,
                                      void* workspace, int64_t splits, const Where& where) {
  const DeviceGuard guard(kOp, where.device);
  with_images(p, [&](auto its) {
    start<decltype(its)>(p, grad_output, input, workspace, grad_bias != nullptr, splits, where);
  });
  if (grad_weight == nullptr && grad_bias == nullptr) return;
  const Conv2dWay way{Precision::kIeee, BlockTile::k64x64};
  conv2d_grad_weight(p, way, nullptr, nullptr, grad_weight, grad_bias, workspace, splits, where);
}

}  // namespace gdfast::cuda
