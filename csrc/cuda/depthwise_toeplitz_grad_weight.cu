// Depthwise convolution by a channel at a time on Hopper's tensor cores (depthwise_toeplitz.h),
// gradient in the weight: the first pass.
//
// A matrix instruction multiplies pixels of four rows, each four times and moved by 0 to 3, by
// gradients of four rows, each twice and moved by 0 and 4: its sums over 16 columns are 16 x 8
// pairs of rows and offsets, of a filter's row r, from one row to the other, and column s, the sum
// of both moves. Four rows of gradients meet those of as many groups of four rows of pixels as see
// them, the last ones of which stay in registers.
//
//   step     four rows of the image, and the gradient's that begin there
//   line     a row of some images side by side in shared memory, between zeros
//   window   16 columns of a line; moved gradients go four columns beyond an image's last ones
#include "depthwise_diagonal_sums.h"
#include "depthwise_toeplitz.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "conv2d_grad_weight";
// What the plan is made for. Not what this GPU has, so that sums have the same bits on every one.
constexpr int kMultiprocessors = 132;

constexpr int kWindows = 4, kWindow = 16, kMove = 4;
constexpr int kLines = 4;  // of a step, of pixels and of gradients
constexpr int kSteps = 4;  // on their way
constexpr int kBarrierBytes = 2 * kSteps * 8;
constexpr int kMostLine = (96 + kMove) * kHalfBoxRow;  // four images of 12 columns

struct WeightLines {
  BoxesArguments boxes;
  int line;              // bytes
  int graded;            // bytes that a row of gradients fills
  int windows;           // of a line
  int windows_of_image;  // where images have windows of their own, or 0

  // Where a window begins.
  GDFAST_HOST_DEVICE int first_slot(const WeightLines& lines, int window) {
    if (lines.windows_of_image == 0) return window * kWindow;
    return window / lines.windows_of_image * lines.boxes.pitch +
           window % lines.windows_of_image * kWindow;
  }
};

// Of the images that a line has, in windows of their own or in one row of windows.
WeightLines weight_lines(const DepthwiseArguments& a) {
  constexpr int64_t kMost = kWindows * kWindow - kMove;  // columns of gradients
  WeightLines lines{};
  BoxesArguments& boxes = lines.boxes;
  const int64_t strips = ceil_div(a.Q, kMost), strip = ceil_div(a.Q, strips);
  const int64_t seen = strip + a.S - 1;
  const int64_t alone = ceil_div(strip + kMove, kWindow), together = kWindows * kWindow / seen;
  const bool own = together < kWindows / alone;  // then they are longer than their windows
  const int64_t fit = own ? kWindows / alone : together;
  // Gradients end with the image, so that there are zeros behind, or are those of one image alone.
  boxes.images = static_cast<int>(strips > 1 ? 1 : fit < a.N ? fit : a.N);
  boxes.strip = static_cast<int>(strip);
  boxes.pitch = static_cast<int>(own ? ceil_div(seen, 8) * 8 : seen);
  lines.windows_of_image = own ? static_cast<int>(alone) : 0;
  const int columns = boxes.images * boxes.pitch;
  lines.windows =
      own ? boxes.images * lines.windows_of_image : static_cast<int>(ceil_div(columns, kWindow));
  const int end = WeightLines::first_slot(lines, lines.windows - 1) + kWindow;
  const int slots = end > columns ? end : columns;
  lines.line = static_cast<int>(ceil_div((slots + kMove) * kHalfBoxRow, 1024) * 1024);
  boxes.pixels = columns * kHalfBoxRow;
  lines.graded = (strips > 1 ? boxes.strip : columns) * kHalfBoxRow;
  boxes.stage = 2 * kLines * lines.line;
  boxes.chunks = static_cast<int>(ceil_div(a.C, kToeplitzChannels));
  share_rows(boxes, a, strips, kMultiprocessors, kLines);
  return lines;
}
constexpr int kMostStage = 2 * kLines * ((kMostLine + 1023) / 1024 * 1024);
static_assert(kSteps * kMostStage + kBarrierBytes <= 227 * 1024, "the longest lines fit");

// Groups of four rows of gradients that four rows of the image see.
template <int kSize>
constexpr int kSeen = (kSize + 2) / 4 + 1;

#if defined(GDFAST_HOPPER)

using Rows = Stages<kSteps>;

GDFAST_DEVICE int first_channel_of(const BoxesArguments& boxes) {
  return static_cast<int>(blockIdx.x) % boxes.chunks * kToeplitzChannels;
}

// Rows that there are not are zeros.
GDFAST_DEVICE int steps_of(const BoxesPiece& piece, int size) {
  return (piece.rows + size - 1 + kLines - 1) / kLines;
}
GDFAST_DEVICE bool is_graded(const BoxesPiece& piece, int step) {
  return step * kLines < piece.rows;
}

// One thread starts to load all rows, each step as soon as its stage is nobody's any more.
template <int kSize>
GDFAST_DEVICE void load_lines(const DepthwiseArguments& a, const WeightLines& lines) {
  const BoxesArguments& boxes = lines.boxes;
  RingPlace<kSteps> stage;
  for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
    const int channel = first_channel_of(boxes);
#pragma unroll 1
    for (int step = 0; step < steps_of(piece, kSize); ++step) {
      const bool graded = is_graded(piece, step);
      uint64_t* const full = Rows::full(boxes, stage.index);
      // In the first turn nobody has to leave a stage: the phase before the first is over.
      barrier_wait(Rows::empty(boxes, stage.index), stage.parity ^ 1);
      barrier_arrive_expecting(full, kLines * (boxes.pixels + (graded ? lines.graded : 0)));
      unsigned char* to = Rows::at(boxes, stage.index);
#pragma unroll 1
      for (int i = 0; i < kLines; ++i, to += lines.line) {
        const int p = piece.p + step * kLines + i;
        load_box(to, boxes.input, {channel, piece.q - a.pad_w, p - a.pad_h, piece.n}, full);
        if (graded) {
          load_box(to + kLines * lines.line, boxes.output, {channel, piece.q, p, piece.n}, full);
        }
      }
      RingPlace<kSteps>::advance(stage);
    }
  });
}

// What a warp adds up: of each group of rows of gradients, and of ones by gradients for the bias.
template <int kSize>
struct MoveSums {
  float pairs[kSeen<kSize>][kWarpChannels][4];
  float bias[kWarpChannels][4];

  static constexpr int kCount = kSeen<kSize> * kWarpChannels * 128;  // of a warp, in shared memory

  // As [group][channel][row of the matrix][column], and behind these the bias's.
  GDFAST_DEVICE void share(const MoveSums& sums, float* to) {
    to += warp_lane() / 4 * 8 + warp_lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kSeen<kSize> * kWarpChannels * 4; ++i) {
      to[i / 4 * 128 + i % 4 / 2 * 64 + i % 2] = sums.pairs[i / 16][i / 4 % 4][i % 4];
    }
    if (warp_lane() >= 4) return;
#pragma unroll
    for (int i = 0; i < kWarpChannels * 2; ++i) {
      to[kCount + i / 2 * 8 + i % 2] = sums.bias[i / 2][i % 2];
    }
  }
  static constexpr int kShared = kCount + kWarpChannels * 8;

  // Of a warp's channel and filter's row and column, always in one order.
  GDFAST_DEVICE float tap(const float* from, int channel, int r, int s) {
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < kLines * kLines; ++i) {
      const int pixels = i / kLines, gradients = i % kLines, apart = r + gradients - pixels;
      if (apart < 0 || apart % kLines != 0) continue;
      sum += from[(apart / kLines * kWarpChannels + channel) * 128 + (pixels * 4 + s % 4) * 8 +
                  gradients * 2 + s / 4];
    }
    return sum;
  }
  // Columns that are not moved count.
  GDFAST_DEVICE float of_bias(const float* from, int channel) {
    from += kCount + channel * 8;
    return (from[0] + from[2]) + (from[4] + from[6]);
  }
};

#endif

template <typename T, int kSize>
GDFAST_KERNEL(kToeplitzThreads, 1)
depthwise_toeplitz_grad_weight_kernel(const GDFAST_GRID_CONSTANT DepthwiseArguments a,
                                      const GDFAST_GRID_CONSTANT WeightLines lines,
                                      const GDFAST_GRID_CONSTANT Tensors<T> tensors, bool with_bias,
                                      float* partial) {
#if defined(GDFAST_HOPPER)
  const BoxesArguments& boxes = lines.boxes;
  constexpr int kChannels = kWarpChannels, kGroups = kSeen<kSize>, kTaps = kSize * kSize;
  using Fragment = uint32_t[2];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSteps; ++i) {
      barrier_init(Rows::full(boxes, i), 1);
      barrier_init(Rows::empty(boxes, i), kToeplitzWarps);
    }
    barriers_ready();
  }
  // Zeros around lines are never written to again.
  for (int i = static_cast<int>(threadIdx.x) * 16; i < kSteps * boxes.stage;
       i += kToeplitzThreads * 16) {
    store_16(shared_memory() + i, {{0, 0, 0, 0}});
  }
  stores_ready();
  sync_block();
  // From lane 0, so that the compiler knows it to be the same for all of the warp.
  const int warp = shuffle(warp_index(), 0) - kBoxLoaders / kWarp;
  if (warp < 0) {
    give_registers<kLoaderRegisters>();
    if (warp == -1 && warp_lane() == 0) load_lines<kSize>(a, lines);
    return;
  }
  take_registers<kToeplitzWorkerRegisters>();
  const int first_channel = first_channel_of(boxes), channel = warp * kChannels;
  const bool exists = first_channel + channel < a.C;

  // Where this lane loads a window's pixels, of two lines that are two apart, and gradients; each
  // time also what is 4 columns further on. Eight slots on, chunks have changed places alike.
  const int line = warp_lane() / 4, quarter = warp_lane() % 4;
  int pixels_at[2], gradients_at[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pixels_at[i] = line / 4 * lines.line + channels_of_slot(quarter + line % 4 + i * 4, channel);
    const int eight_on = channels_of_slot(8 + quarter - line % 2 * kMove + i * 4, channel);
    gradients_at[i] = (kLines + line / 2) * lines.line + eight_on - 8 * kHalfBoxRow;
  }
  // Windows begin at multiples of eight slots.
  int first_at[kWindows];
#pragma unroll
  for (int i = 0; i < kWindows; ++i) first_at[i] = WeightLines::first_slot(lines, i) * kHalfBoxRow;
  const auto load = [](const unsigned char* from, const int (&at)[2], PackOf<T, 4>(&packs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packs[i] =
          load_pack<4>(reinterpret_cast<const T*>(from + at[i % 2] + i / 2 * 8 * kHalfBoxRow));
    }
  };

  MoveSums<kSize> sums{};
  RingPlace<kSteps> stage;
  for_each_box_piece(a, boxes, [&](const BoxesPiece& piece) {
    const int steps = steps_of(piece, kSize);
    Fragment alive[kGroups][kWindows][kChannels] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step += kGroups) {
#pragma unroll
      for (int u = 0; u < kGroups; ++u) {
        if (step + u >= steps) break;
        const bool graded = is_graded(piece, step + u);
        const unsigned char* const from = Rows::at(boxes, stage.index);
        barrier_wait(Rows::full(boxes, stage.index), stage.parity);
#pragma unroll
        for (int window = 0; window < kWindows; ++window) {
          if (window >= lines.windows || !exists) break;
          const unsigned char* const begin = from + first_at[window];
          PackOf<T, 4> packs[2][4] = {};
          if (graded) load(begin, gradients_at, packs[0]);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            Fragment& right = alive[u][window][c];
            right[0] = pair_of_pixels(packs[0][0], packs[0][1], c);
            right[1] = pair_of_pixels(packs[0][2], packs[0][3], c);
          }
          if (with_bias && graded) {
            const uint32_t ones = pack_two<T>(1.f, 1.f);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
              mma_m16n8k16<T>(sums.bias[c], {ones, ones, ones, ones}, alive[u][window][c]);
            }
          }
          load(begin, pixels_at, packs[0]);
          load(begin + 2 * lines.line, pixels_at, packs[1]);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            uint32_t left[4];
            left_operand(left, packs, c);
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
              mma_m16n8k16<T>(sums.pairs[group][c], left,
                              alive[(u - group + kGroups) % kGroups][window][c]);
            }
          }
        }
        sync_warp();
        if (warp_lane() == 0) barrier_arrive(Rows::empty(boxes, stage.index));
        RingPlace<kSteps>::advance(stage);
      }
    }
  });

  // All rows have come and been read: their place is free.
  const auto sync = [] { sync_threads_of(1, kToeplitzWorkers); };
  sync();
  constexpr int kOfWarp = MoveSums<kSize>::kShared;
  constexpr int kLeastStage = 2 * kLines * 2048;  // of lines of one window, between zeros
  static_assert(
      (kToeplitzWarps * kOfWarp + kToeplitzChannels * (kTaps + 1)) * 4 <= kSteps * kLeastStage,
      "sums fit");
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  float* const made = shared + kToeplitzWarps * kOfWarp;
  MoveSums<kSize>::share(sums, shared + warp * kOfWarp);
  sync();
  const int thread = static_cast<int>(threadIdx.x) - kBoxLoaders;
  for (int i = thread; i < kToeplitzChannels * (kTaps + 1); i += kToeplitzWorkers) {
    const bool is_bias = i >= kToeplitzChannels * kTaps;
    const int k = is_bias ? i - kToeplitzChannels * kTaps : i / kTaps, tap = i % kTaps;
    const float* const of_warp = shared + k / kChannels * kOfWarp;
    made[i] = is_bias ? MoveSums<kSize>::of_bias(of_warp, k % kChannels)
                      : MoveSums<kSize>::tap(of_warp, k % kChannels, tap / kSize, tap % kSize);
  }
  sync();
  write_sums<kToeplitzChannels, kSize, kToeplitzWorkers>(
      a, made, 1, first_channel, partial, static_cast<int>(gridDim.x) / boxes.chunks,
      first_piece(boxes), thread, [&](int k, int r, int s) {
        return exact_sum_of_pieces(a, boxes, tensors.grad_output, tensors.input, k, r, s);
      });
#endif
}

template <typename T, int kSize>
void launch_toeplitz(const DepthwiseArguments& a, const Tensors<T>& tensors, bool with_bias,
                     float* partial, uintptr_t stream) {
  WeightLines lines = weight_lines(a);
  BoxesArguments& boxes = lines.boxes;
  boxes.input =
      box_map(kOp, tensors.input, a, a.input, a.H, a.W, boxes.images, boxes.pitch, kHalfBoxRow);
  boxes.output = box_map(kOp, tensors.grad_output, a, a.output, a.P, a.Q, boxes.images,
                         lines.graded / boxes.images / kHalfBoxRow, kHalfBoxRow);
  launch(kOp, depthwise_toeplitz_grad_weight_kernel<T, kSize>, static_cast<unsigned>(boxes.blocks),
         kToeplitzThreads, static_cast<size_t>(kSteps * boxes.stage + kBarrierBytes), stream, a,
         lines, tensors, with_bias, partial);
}

}  // namespace

int depthwise_toeplitz_splits(const DepthwiseArguments& a) {
  const BoxesArguments boxes = weight_lines(a).boxes;
  return boxes.blocks / boxes.chunks;
}

void depthwise_toeplitz_grad_weight(DType dtype, const DepthwiseArguments& a,
                                    const void* grad_output, const void* input, bool with_bias,
                                    void* partial, uintptr_t stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const Tensors<T> tensors{static_cast<const T*>(grad_output), static_cast<const T*>(input)};
      auto* const chosen = a.R == 5 ? launch_toeplitz<T, 5> : launch_toeplitz<T, 7>;
      chosen(a, tensors, with_bias, static_cast<float*>(partial), stream);
    }
  });
}

}  // namespace gdfast::cuda
