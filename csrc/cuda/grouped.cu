// The forward pass in groups of few channels (grouped.h), and the gradient in the input where the
// stride is 1: that is one too, with the filters turned round and their two axes of channels
// exchanged, which the way they are loaded from shared memory does.
#include "device.h"
#include "grouped_kernel.h"

namespace gdfast::cuda {
namespace {

struct Plan {
  int64_t parts, buffers, bytes;
};

// Two parts and two buffers where they fit.
Plan plan_of(const Conv2dProblem& p) {
  for (int64_t parts = most_parts(p);; --parts) {
    for (int64_t buffers = 2; buffers >= 1; --buffers) {
      const int64_t bytes = kSlab * filter_row_bytes(p) + buffers * window_bytes(p, parts);
      if (bytes <= kGroupedMemory || (parts == 1 && buffers == 1)) return {parts, buffers, bytes};
    }
  }
}

void run(const char* op, const Conv2dProblem& p, bool gradient, const void* input,
         const void* weight, const void* bias, void* output, const Where& where) {
  const Plan plan = plan_of(p);
  const GroupedTiles tiles = grouped_tiles(p, plan.parts);
  if (tiles.total == 0) return;
  const Arguments a{window_patch(p, input, plan.parts),
                    tiles,
                    plan.buffers == 2,
                    small(kSlab * filter_row_bytes(p)),
                    small(window_bytes(p, plan.parts)),
                    small(p.R),
                    small(p.S),
                    grouped_filters(p, weight, gradient),
                    grouped_output(p, bias, output)};
  const DeviceGuard guard(op, where.device);
  const auto threads = static_cast<unsigned>(plan.parts * kGroupedThreads / 2);
  const int64_t slabs = ceil_div(p.C, kSlab);
  // As many blocks as run at once: each keeps its filters for all of its tiles.
  const int64_t at_once = grouped_blocks_of_multiprocessor(plan.bytes, threads);
  const int64_t wanted = at_once * multiprocessors(op) / slabs;
  const int64_t blocks = wanted < 1 ? 1 : wanted < tiles.total ? wanted : tiles.total;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(slabs));
  const auto start = [&](auto kernel) {
    launch(op, kernel, grid, threads, static_cast<size_t>(plan.bytes), where.stream, a);
  };
  const bool three = p.R == 3 && p.stride_h == 1;
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    if (p.C / p.groups >= 16) {
      three ? start(grouped_kernel<T, true, true>) : start(grouped_kernel<T, true, false>);
    } else {
      three ? start(grouped_kernel<T, false, true>) : start(grouped_kernel<T, false, false>);
    }
  };
  p.dtype == DType::kBFloat16 ? with_type(BFloat16{}) : with_type(Half{});
}

}  // namespace

std::string grouped_why_not(const Conv2dProblem& p, GroupedPass pass) {
  const int64_t group = p.C / p.groups;
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) {
    return "it takes float16 and bfloat16";
  }
  if (p.groups < 2 || p.K != p.C) return "it takes groups of as many filters as channels";
  if (group < 2 || group > kSlab / 2 || kSlab % group != 0 || p.C % 8 != 0) {
    return "it takes groups of 2, 4, 8, 16 or 32 channels, in all a multiple of 8";
  }
  if (p.R > 7 || p.S > 7) return "it takes filters of up to 7 x 7";
  if ((p.R > 1 && p.dilation_h != 1) || (p.S > 1 && p.dilation_w != 1)) {
    return "it takes no dilation";
  }
  const bool gradient = pass == GroupedPass::kGradInput;
  if (gradient && (p.stride_h != 1 || p.stride_w != 1)) return "it takes stride 1";
  if (!has_chunks(nullptr, p.input, p.C, p.N, p.H, p.W, 2) ||
      !has_chunks(nullptr, p.output, p.K, p.N, p.P, p.Q, 2)) {
    return "it takes channels_last";
  }
  // Rows and columns of a tile reach beyond the image.
  constexpr int64_t kMost = int64_t{1} << 31, kBeyond = 256;
  const auto fits = [&](const Strides4& strides, int64_t rows, int64_t columns) {
    return strides.h >= 0 && strides.w >= 0 && strides.h < kMost / 2 && strides.w < kMost / 2 &&
           rows < kMost / 4 && columns < kMost / 4 &&
           2 * ((rows + kBeyond) * strides.h + (columns + kBeyond) * strides.w) < kMost;
  };
  const int64_t rows = p.H + p.pad_h + p.P * p.stride_h - p.P;
  const int64_t columns = p.W + p.pad_w + p.Q * p.stride_w - p.Q;
  if (!fits(p.input, rows, columns) || !fits(p.output, p.P + p.pad_h, p.Q + p.pad_w)) {
    return "it takes images of less than 2^31 bytes";
  }
  if (p.N * ceil_div(p.H, kSide) * ceil_div(p.W, kSide) >= kMost ||
      p.N * ceil_div(p.P, kSide) * ceil_div(p.Q, kSide) >= kMost || ceil_div(p.C, kSlab) > 65535) {
    return "it takes fewer images or channels at a time";
  }
  const int64_t bytes = pass == GroupedPass::kGradWeight ? grouped_grad_weight_memory(p)
                                                         : plan_of(gradient ? turned(p) : p).bytes;
  if (bytes > kGroupedMemory) return "it takes less than 99 KiB of shared memory";
  return "";
}

void conv2d_grouped(const Conv2dProblem& p, const void* input, const void* weight, const void* bias,
                    void* output, const Where& where) {
  run("conv2d", p, false, input, weight, bias, output, where);
}

void conv2d_grad_input_grouped(const Conv2dProblem& p, const void* grad_output, const void* weight,
                               void* grad_input, const Where& where) {
  run("conv2d_grad_input", turned(p), true, grad_output, weight, nullptr, grad_input, where);
}

}  // namespace gdfast::cuda
