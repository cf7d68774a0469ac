// Depthwise convolution by a channel at a time on Hopper's tensor cores (depthwise_toeplitz.h),
// gradient in the weight: the first pass.
//
// A matrix instruction multiplies pixels of four rows, each four times and moved by 0 to 3, by
// gradients of four rows, each twice and moved by 0 and 4: its sums over 16 columns are 16 x 8
// pairs of rows and offsets, of a filter's row r, from one row to the other, and column s, the sum
// of both moves. Four rows of gradients meet those of as many groups of four rows of pixels as see
// them, the last ones of which stay in registers.
#include <type_traits>

#include "depthwise_diagonal_sums.h"
#include "depthwise_toeplitz_lines.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";

#if defined(GDFAST_HOPPER)

// What a warp adds up: of each group of rows of gradients, and of ones by gradients for the bias.
template <int kSize, int kChannels, bool kBias>
struct MoveSums {
  float pairs[kSeen<kSize>][kChannels][4];
  float bias[kBias ? kChannels : 1][4];

  static constexpr int kCount = kSeen<kSize> * kChannels * 128;  // of a warp, in shared memory
  static constexpr int kShared = kCount + kChannels * 8;

  // As [group][channel][row of the matrix][column], and behind these the bias's.
  GDFAST_DEVICE void share(const MoveSums& sums, float* to) {
    to += warp_lane() / 4 * 8 + warp_lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kSeen<kSize> * kChannels * 4; ++i) {
      const float (&of_group)[kChannels][4] = sums.pairs[i / (kChannels * 4)];
      to[i / 4 * 128 + i % 4 / 2 * 64 + i % 2] = of_group[i / 4 % kChannels][i % 4];
    }
    if constexpr (kBias) {
      if (warp_lane() >= 4) return;
#pragma unroll
      for (int i = 0; i < kChannels * 2; ++i) {
        to[kCount + i / 2 * 8 + i % 2] = sums.bias[i / 2][i % 2];
      }
    }
  }

  // Of a warp's channel and filter's row and column: each row of gradients has met one row of
  // pixels that is so far below it.
  GDFAST_DEVICE float tap(const float* from, int channel, int r, int s) {
    float sum = 0;
#pragma unroll
    for (int gradients = 0; gradients < kLines; ++gradients) {
      const int below = r + kAbove<kSize> + gradients;
      sum += from[(below / kLines * kChannels + channel) * 128 + (below % kLines * 4 + s % 4) * 8 +
                  gradients * 2 + s / 4];
    }
    return sum;
  }
  // Columns that are not moved count.
  GDFAST_DEVICE float of_bias(const float* from, int channel) {
    if (!kBias) return 0;
    from += kCount + channel * 8;
    return (from[0] + from[2]) + (from[4] + from[6]);
  }
};

// Of a window, what a lane has of a warp's channels: gradients of four slots, and pixels of as many
// in each of two lines.
template <typename Pack>
struct WindowPacks {
  Pack gradients[4], pixels[2][4];
};

// How lanes take gradients from packs that their twins, of the other move, have too: those that
// are moved have the window before's last pack first.
struct MovedGradients {
  bool moved;
  uint32_t low, high;  // for bytes_of: halves of both packs, which have changed places

  GDFAST_DEVICE MovedGradients of_lane() {
    const bool moved = warp_lane() / 4 % 2 == 1;
    return {moved, moved ? 0x1054u : 0x5410u, moved ? 0x3276u : 0x7632u};
  }
  template <typename Pack, int kChannels>
  GDFAST_DEVICE void take(const MovedGradients& by, const Pack (&packs)[4], const Pack& before,
                          uint32_t (&right)[kChannels][2]) {
#pragma unroll
    for (int word = 0; word < kChannels / 2; ++word) {
      const uint32_t first = by.moved ? before.words[word] : packs[1].words[word];
      const uint32_t second = by.moved ? packs[1].words[word] : packs[3].words[word];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t which = half == 0 ? by.low : by.high;
        right[word * 2 + half][0] = bytes_of(packs[0].words[word], first, which);
        right[word * 2 + half][1] = bytes_of(packs[2].words[word], second, which);
      }
    }
  }
};

#endif

template <typename T, int kSize, bool kWide, bool kBias>
GDFAST_KERNEL(kToeplitzThreads, 1)
depthwise_toeplitz_grad_weight_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                                      const GDFAST_GRID_CONSTANT WeightLines lines,
                                      const GDFAST_GRID_CONSTANT Tensors<T> tensors,
                                      float* partial) {
#if defined(GDFAST_HOPPER)
  const BoxesArguments& boxes = lines.boxes;
  using Shape = WeightShape<kWide>;
  constexpr int kChannels = Shape::kChannels, kGroups = kSeen<kSize>, kWindows = Shape::kWindows;
  constexpr int kSteps = Shape::kSteps, kLine = Shape::kLine;
  using Rows = Stages<kSteps>;
  using Pack = PackOf<T, kChannels>;
  using Fragments = uint32_t[kChannels][2];
  using Sums = MoveSums<kSize, kChannels, kBias>;
  let_next_begin();
  const int first_channel = first_channel_of<Shape>(boxes);
  if (threadIdx.x == 0) {
    const int warps = (a.C - first_channel + kChannels - 1) / kChannels;
    for (int i = 0; i < kSteps; ++i) {
      barrier_init(Rows::full(boxes, i), 1);
      barrier_init(Rows::empty(boxes, i), warps < kToeplitzWarps ? warps : kToeplitzWarps);
    }
    barriers_ready();
  }
  // Zeros around what boxes fill of lines are never written to again.
  for (int i = warp_index(); i < kSteps * 2 * kLines; i += kToeplitzThreads / kWarp) {
    const bool pixels = i / kLines % 2 == 0;
    const int first = pixels ? lines.inset * Shape::kRow : 0;
    const int filled = pixels ? boxes.pixels : lines.graded;
    for (int at = warp_lane() * 16; at < kLine - filled; at += kWarp * 16) {
      store_16(shared_memory() + i * kLine + (at < first ? at : at + filled), {{0, 0, 0, 0}});
    }
  }
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warp = shuffle(warp_index(), 0) - kBoxLoaders / kWarp;
  if (warp < 0) {
    give_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) load_lines<Shape, kSize>(a, lines);
    return;
  }
  take_registers<kToeplitzWorkerRegisters>();
  const int channel = warp * kChannels;
  const bool exists = first_channel + channel < a.C;

  // Where this lane loads a window's pixels, of two lines that are two apart, and gradients; each
  // time also what is 4 columns further on. Eight slots on, chunks have changed places alike.
  const int line = warp_lane() / 4, quarter = warp_lane() % 4;
  int pixels_at[2], gradients_at[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pixels_at[i] = Shape::place(line / 4 * Shape::kLineSlots + quarter + line % 4 + i * 4, channel);
    gradients_at[i] =
        Shape::place((kLines + line / 2) * Shape::kLineSlots + quarter + i * 4, channel);
  }
  const MovedGradients by_move = MovedGradients::of_lane();
  WindowPacks<Pack> packs;
  RingPlace<kSteps> stage;
  const auto load = [&](int window) {
    const unsigned char* const from = Rows::at(boxes, stage.index);
    const auto load_one = [&](int at, int bytes) {
      return load_pack<kChannels>(
          reinterpret_cast<const T*>(from + at + window * kWindow * Shape::kRow + bytes));
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int on = i / 2 * 8 * Shape::kRow;
      packs.gradients[i] = load_one(gradients_at[i % 2], on);
      packs.pixels[0][i] = load_one(pixels_at[i % 2], on);
      packs.pixels[1][i] = load_one(pixels_at[i % 2], on + 2 * kLine);
    }
  };

  Sums sums{};
  if (exists) {
    int pieces = pieces_of_block(boxes);
    barrier_wait(Rows::full(boxes, stage.index), stage.parity);
    load(0);
    for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
      const WeightSteps steps = WeightSteps::of<kSize>(a, piece);
      const bool last = --pieces == 0;
      Fragments alive[kGroups][kWindows] = {};
      // What the next products need is loaded before those of a window are begun.
      const auto multiply = [&](int step, int u, auto is_graded, auto has_pixels) {
        constexpr bool kGraded = decltype(is_graded)::value, kPixels = decltype(has_pixels)::value;
        Pack before{};
#pragma unroll
        for (int window = 0; window < kWindows; ++window) {
          Fragments& right = alive[u][window];
          uint32_t left[kChannels][4];
          if constexpr (kGraded) {
            MovedGradients::take(by_move, packs.gradients, before, right);
            before = packs.gradients[3];
          } else {
#pragma unroll
            for (auto& of_channel : right) of_channel[0] = of_channel[1] = 0;
          }
          if constexpr (kPixels) {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) left_operand(left[c], packs.pixels, c);
          }
          if (window + 1 < kWindows) {
            load(window + 1);
          } else {
            sync_warp();
            if (warp_lane() == 0) barrier_arrive(Rows::empty(boxes, stage.index));
            RingPlace<kSteps>::advance(stage);
            if (!last || step + 1 < steps.count) {
              barrier_wait(Rows::full(boxes, stage.index), stage.parity);
            }
            load(0);
          }
          if constexpr (kBias && kGraded) {
            const uint32_t ones = pack_two<T>(1.f, 1.f);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
              mma_m16n8k16<T>(sums.bias[c], {ones, ones, ones, ones}, right[c]);
            }
          }
          if constexpr (kPixels) {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
#pragma unroll
              for (int group = kGraded ? 0 : 1; group < kGroups; ++group) {
                mma_m16n8k16<T>(sums.pairs[group][c], left[c],
                                alive[(u - group + kGroups) % kGroups][window][c]);
              }
            }
          }
        }
      };
#pragma unroll 1
      for (int step = 0; step < steps.count; step += kGroups) {
#pragma unroll
        for (int u = 0; u < kGroups; ++u) {
          if (step + u >= steps.count) break;
          const bool graded = WeightSteps::is_graded(steps, step + u);
          if (!WeightSteps::has_pixels(steps, step + u)) {
            graded ? multiply(step + u, u, std::true_type{}, std::false_type{})
                   : multiply(step + u, u, std::false_type{}, std::false_type{});
          } else {
            graded ? multiply(step + u, u, std::true_type{}, std::true_type{})
                   : multiply(step + u, u, std::false_type{}, std::true_type{});
          }
        }
      }
    });
  }

  // All rows have come and been read: their place is free.
  const auto sync = [] { sync_threads_of(1, kToeplitzWorkers); };
  sync();
  static_assert(kToeplitzWarps * Sums::kShared * 4 <= kSteps * Shape::kStage, "sums fit");
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  Sums::share(sums, shared + warp * Sums::kShared);
  sync();
  write_sums<Shape::kBlockChannels, kSize, kToeplitzWorkers>(
      a, first_channel, partial, static_cast<int>(gridDim.x) / boxes.chunks, first_piece(boxes),
      static_cast<int>(threadIdx.x) - kBoxLoaders,
      [&](int k, int tap) {
        const float* const of_warp = shared + k / kChannels * Sums::kShared;
        return tap == kSize * kSize ? Sums::of_bias(of_warp, k % kChannels)
                                    : Sums::tap(of_warp, k % kChannels, tap / kSize, tap % kSize);
      },
      [&](int k, int r, int s) {
        return exact_sum_of_pieces(a, boxes, tensors.grad_output, tensors.input, k, r, s);
      });
#endif
}

template <typename T, int kSize, bool kWide, bool kBias>
void launch_toeplitz(const DepthwiseArguments& a, const Tensors<T>& tensors, float* partial,
                     uintptr_t stream) {
  constexpr int kRow = WeightShape<kWide>::kRow;
  WeightLines lines = weight_lines<kWide>(a);
  BoxesArguments& boxes = lines.boxes;
  boxes.input = box_map(kOp, tensors.input, a, a.input, a.H, a.W, boxes.images, boxes.pitch, kRow);
  boxes.output = box_map(kOp, tensors.grad_output, a, a.output, a.P, a.Q, boxes.images,
                         lines.graded / boxes.images / kRow, kRow);
  launch(kOp, depthwise_toeplitz_grad_weight_kernel<T, kSize, kWide, kBias>,
         static_cast<unsigned>(boxes.blocks), kToeplitzThreads,
         static_cast<size_t>(WeightShape<kWide>::kBytes), stream, a, lines, tensors, partial);
}

template <typename T>
void launch_toeplitz(const DepthwiseArguments& a, const Tensors<T>& tensors, bool with_bias,
                     float* partial, uintptr_t stream) {
  const auto launch_size = [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    auto* chosen = with_bias ? launch_toeplitz<T, kSize, false, true>
                             : launch_toeplitz<T, kSize, false, false>;
    if constexpr (kSize == 5) {
      if (is_wide(a, with_bias)) chosen = launch_toeplitz<T, kSize, true, false>;
    }
    chosen(a, tensors, partial, stream);
  };
  a.R == 5 ? launch_size(Constant<5>{}) : launch_size(Constant<7>{});
}

}  // namespace

int depthwise_toeplitz_splits(const DepthwiseArguments& a, bool with_bias) {
  const BoxesArguments boxes =
      (is_wide(a, with_bias) ? weight_lines<true>(a) : weight_lines<false>(a)).boxes;
  return boxes.blocks / boxes.chunks;
}

void depthwise_toeplitz_grad_weight(DType dtype, const DepthwiseArguments& a,
                                    const void* grad_output, const void* input, bool with_bias,
                                    void* partial, uintptr_t stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const Tensors<T> tensors{static_cast<const T*>(grad_output), static_cast<const T*>(input)};
      launch_toeplitz(a, tensors, with_bias, static_cast<float*>(partial), stream);
    }
  });
}

}  // namespace gdfast::cuda
