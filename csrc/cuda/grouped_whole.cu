// The forward pass in groups on Hopper of small images, and the gradient in the input: its kernels
// are in grouped_octets.h, grouped_quads.h and grouped_walks.h.
#include "conv2d_grouped_whole.h"
#include "device.h"
#include "grouped_octets.h"
#include "grouped_quads.h"
#include "grouped_walks.h"

namespace gdfast::cuda {
namespace {

template <typename Its>
TensorMap whole_images(const char* op, const Conv2dProblem& p, const void* input) {
  return channels_first<BFloat16>(op, input, {p.N, p.C, p.H, p.W, p.input},
                                  {Its::kImages, 1, Its::kColumns}, Its::kPixel);
}

template <typename Its>
TensorMap whole_filters(const char* op, const Conv2dProblem& p, const void* weight) {
  const Axis row{kTaps * Its::kGroup, 2}, filters = next_axis(row, p.K, p.weight.n * 2);
  const Axis one = next_axis(filters, 1, 0);
  return tensor_map<BFloat16>(op, weight, {row, filters, one, next_axis(one, 1, 0)},
                              {kBoxRow / 2, Its::kChannels, 1, 1});
}

template <typename Its, typename Kernel, typename Arguments>
void start(const char* op, const Conv2dProblem& p, Kernel kernel, const Arguments& arguments,
           const Where& where) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.N, Its::kImages)),
                  static_cast<unsigned>(ceil_div(p.C, Its::kChannels)));
  launch_early(op, kernel, grid, Its::kThreads, size_t{Its::kBytes}, where.stream, arguments);
}

template <bool kGradient>
void start_octets(const char* op, const Conv2dProblem& p, const void* input, const void* weight,
                  void* output, const Where& where) {
  const OctetArguments a{whole_images<Octets>(op, p, input),
                         whole_filters<Octets>(op, p, weight),
                         static_cast<unsigned char*>(output),
                         p.output.n * 2,
                         p.output.h * 2,
                         p.output.w * 2,
                         small(p.N)};
  start<Octets>(op, p, grouped_octets_kernel<kGradient>, a, where);
}

template <bool kGradient>
void start_quads(const char* op, const Conv2dProblem& p, const void* input, const void* weight,
                 void* output, const Where& where) {
  const QuadArguments a{
      whole_images<Quads>(op, p, input), whole_filters<Quads>(op, p, weight),
      channels_first<BFloat16>(op, output, {p.N, p.C, p.P, p.Q, p.output},
                               {kQuadBox.images, kQuadBox.rows, kQuadBox.columns})};
  start<Quads>(op, p, grouped_quads_kernel<kGradient>, a, where);
}

template <typename Its>
void start_walks(const char* op, const Conv2dProblem& p, bool gradient, const void* input,
                 const void* weight, void* output, const Where& where) {
  TensorMap images = channels_first<BFloat16>(op, input, {p.N, p.C, p.H, p.W, p.input},
                                              {Its::kImages, 2, Its::kColumns});
  // What the gradient in the input reads, the other gradient reads after it.
  if (!gradient) images = read_once(op, images, output_bytes(p));
  const WalkArguments a{
      images,
      channels_first<BFloat16>(op, output, {p.N, p.C, p.P, p.Q, p.output},
                               {kWalkBox.images, kWalkBox.rows, kWalkBox.columns}),
      grouped_filters(p, weight, gradient)};
  // Neighbours have slabs of the same images: pixels that lie side by side.
  const dim3 grid(static_cast<unsigned>(ceil_div(p.C, kSlab)),
                  static_cast<unsigned>(ceil_div(p.N, Its::kImages)));
  const int64_t bytes = Its::kFiltersAt + kSlab * filter_row_bytes(p);
  launch_early(op, grouped_walks_kernel<Its>, grid, kWalkThreads, static_cast<size_t>(bytes),
               where.stream, a);
}

template <bool kGradient>
void run(const char* op, const Conv2dProblem& p, const void* input, const void* weight,
         void* output, const Where& where) {
  const DeviceGuard guard(op, where.device);
  switch (p.C / p.groups) {
    case Octets::kGroup:
      return start_octets<kGradient>(op, p, input, weight, output, where);
    case Quads::kGroup:
      return start_quads<kGradient>(op, p, input, weight, output, where);
    case Walks28::kGroup:
      return start_walks<Walks28>(op, p, kGradient, input, weight, output, where);
    default:
      return start_walks<Walks56>(op, p, kGradient, input, weight, output, where);
  }
}

bool is_where_tma_reads(const void* weight) {
  return reinterpret_cast<uintptr_t>(weight) % 16 == 0;
}

}  // namespace

std::string grouped_whole_why_not(const Conv2dProblem& p, GroupedPass pass) {
  if (const std::string reason = grouped_hopper_why_not(p, pass); !reason.empty()) return reason;
  if (p.dtype != DType::kBFloat16) return "it takes bfloat16";
  const int64_t group = p.C / p.groups;
  const auto is = [&](int64_t channels, int64_t rows) {
    return group == channels && p.H == rows && p.W == rows;
  };
  const bool walks = is(Walks56::kGroup, Walks56::kRows) || is(Walks28::kGroup, Walks28::kRows);
  if (!walks && !is(Octets::kGroup, Octets::kRows) && !is(Quads::kGroup, Quads::kRows)) {
    return "it takes groups of 32 channels on images of 7 x 7, of 16 on 14 x 14, of 8 on 28 x 28, "
           "or of 4 on 56 x 56";
  }
  if (p.pad_h != 1 || p.pad_w != 1) return "it takes padding of 1";
  // Of blocks along a grid's second axis, which has channels or, of walks, images.
  constexpr int64_t kMost = 65535;
  const bool walks_many = walks && pass != GroupedPass::kGradWeight && p.N > kMost;
  if (walks_many || ceil_div(p.C, Octets::kChannels) > kMost) {
    return "it takes fewer images or channels at a time";
  }
  if (walks || pass == GroupedPass::kGradWeight) return "";
  const Strides4& at = p.weight;
  if (at.c != 1 || at.w != group || at.h != 3 * group || at.n % 8 != 0 || at.n < kTaps * group) {
    return "it takes weights in channels_last";
  }
  return "";
}

// What they are not made for, Hopper's other kernels do.
void conv2d_grouped_whole(const Conv2dProblem& p, const void* input, const void* weight,
                          const void* bias, void* output, const Where& where) {
  const bool ends = bias != nullptr || p.activation != Activation::kNone;
  if (ends || !is_where_tma_reads(weight)) {
    return conv2d_grouped_hopper(p, input, weight, bias, output, where);
  }
  run<false>("conv2d", p, input, weight, output, where);
}

void conv2d_grad_input_grouped_whole(const Conv2dProblem& p, const void* grad_output,
                                     const void* weight, void* grad_input, const Where& where) {
  if (!is_where_tma_reads(weight)) {
    return conv2d_grad_input_grouped_hopper(p, grad_output, weight, grad_input, where);
  }
  run<true>("conv2d_grad_input", turned(p), grad_output, weight, grad_input, where);
}

}  // namespace gdfast::cuda
