// The gradients in the weight and the bias in groups of few channels (grouped.h). A warp sums 16
// filters by 16 channels by up to nine taps, over 8 x 8 positions of each tile of its block's
// split; filters and channels of different groups are left out when sums are written. What the
// splits have summed is added up as it is for other convolutions.
#include "conv2d.h"
#include "device.h"
#include "grouped.h"

namespace gdfast::cuda {
namespace {

constexpr int kTaps = 9;  // of a block

struct Arguments {
  GroupedPatch input, grad;
  GroupedTiles tiles;  // of grad
  bool two_buffers;
  int32_t grad_at, buffer_bytes;  // in shared memory: the input, then grad
  int32_t group, taps, S;
  int32_t units;       // warps that share the sums of a slab
  float* weight_sums;  // [splits, K, R, S, C / groups]
  float* bias_sums;    // [splits, K], or null
};

// The sums of a warp.
struct Sums {
  float weight[kTaps][2][4];
  float bias[2];  // of the filters of two rows, the positions of this lane
};
constexpr int kSums = kTaps * 8 + 2;
using FlatSums = float[kSums];

// The part of the slab's sums that a warp makes.
struct Unit {
  int filter, channel;
};

GDFAST_DEVICE Unit unit_of(const Arguments& a, int index) {
  const int side = a.group > kChannelsOfWarp ? a.group / kChannelsOfWarp : 1;
  const int first = index / (side * side) * side;
  return {(first + index / side % side) * kChannelsOfWarp,
          (first + index % side) * kChannelsOfWarp};
}

// Positions of a tile that exist, and of this lane's pair of columns which, as a mask.
struct Existing {
  int32_t rows;
  uint32_t columns;
};

// A zero of grad for a position beyond the output does not undo an infinity of the input: there,
// these are zeros too.
template <typename T>
GDFAST_DEVICE void multiply_add(float (&sums)[2][4], const uint32_t (&grads)[4],
                                const uint32_t (&pixels)[4], int row, int32_t rows) {
  if (row >= rows) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t lower = pixels[half * 2 + 1];
    mma_m16n8k16<T>(sums[half], grads, {pixels[half * 2], row + kPairs < rows ? lower : 0});
  }
}

GDFAST_DEVICE void load_pixels(uint32_t (&pixels)[4], const unsigned char* from, uint32_t columns) {
  ldmatrix_x4_transposed(pixels, from);
#pragma unroll
  for (uint32_t& word : pixels) word &= columns;
}

// Of two filters, the positions that this lane has.
template <typename T>
GDFAST_DEVICE void add_to_bias(Sums& sums, const uint32_t (&grads)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float values[2];
    unpack<T, 2>({{grads[i]}}, values);
    sums.bias[i & 1] += values[0] + values[1];
  }
}

// All taps of 3 x 3 with stride 1: each pair of rows of the input is loaded once for all three.
template <typename T, int kParts>
GDFAST_DEVICE void sum_three_rows(Sums& sums, const unsigned char* grad,
                                  const unsigned char* pixels, const Existing& existing,
                                  bool sums_bias) {
  constexpr int kGradRow = kSide * kParts * kPixelBytes, kRow = kGradRow + 2 * kPixelBytes;
  uint32_t grads[kPairs][4];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    ldmatrix_x4_transposed(grads[p], grad + p * kGradRow);
    if (sums_bias) add_to_bias<T>(sums, grads[p]);
  }
#pragma unroll
  for (int h = 0; h < kPairs + 2; ++h) {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      uint32_t loaded[4];
      load_pixels(loaded, pixels + (h * kRow + s * kPixelBytes), existing.columns);
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        const int p = h - r;
        if (p < 0 || p >= kPairs) continue;
        multiply_add<T>(sums.weight[r * 3 + s], grads[p], loaded, p, existing.rows);
      }
    }
  }
}

template <typename T>
GDFAST_DEVICE void sum_any_taps(Sums& sums, const Arguments& a, const unsigned char* grad,
                                int grad_row, const unsigned char* pixels, int row, int first_tap,
                                const Existing& existing, bool sums_bias) {
#pragma unroll 1
  for (int p = 0; p < kPairs; ++p) {
    uint32_t grads[4];
    ldmatrix_x4_transposed(grads, grad + p * grad_row);
    if (sums_bias) add_to_bias<T>(sums, grads);
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      const int tap = first_tap + i;
      if (tap >= a.taps) break;
      const int r = tap / a.S, s = tap % a.S;
      uint32_t loaded[4];
      load_pixels(loaded, pixels + ((p * a.input.step_h + r) * row + s * kPixelBytes),
                  existing.columns);
      multiply_add<T>(sums.weight[i], grads, loaded, p, existing.rows);
    }
  }
}

constexpr int kUnits = kSlab / kChannelsOfWarp;  // where groups have no more than 16 channels

// Adds what warps of further parts of tiles have summed to the sums of the first one's. There are
// further ones where a slab has no more units than these.
GDFAST_DEVICE void join_parts(Sums& sums, int part, int parts) {
  FlatSums& flat = reinterpret_cast<FlatSums&>(sums);
  constexpr int kThreads = kUnits * kWarp;
  float* const all = reinterpret_cast<float*>(shared_memory()) + this_thread() % kThreads;
  for (int other = 1; other < parts; ++other) {
    if (part == other) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) all[i * kThreads] = flat[i];
    }
    sync_block();
    if (part == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) flat[i] += all[i * kThreads];
    }
    sync_block();
  }
}

GDFAST_DEVICE void write_sums(const Sums& sums, const Arguments& a, const Unit& unit,
                              int32_t first_channel, int first_tap, bool sums_bias) {
  const int64_t K = a.grad.C, split = blockIdx.x;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int filter = unit.filter + half * 8 + warp_lane() / 4;
    if (first_channel + filter >= K) continue;
    const int64_t index = split * K + first_channel + filter;
    if (sums_bias && warp_lane() % 4 == 0) a.bias_sums[index] = sums.bias[half];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = unit.channel + (i >> 1) * 8 + warp_lane() % 4 * 2 + i % 2;
      if (channel / a.group != filter / a.group) continue;
      float* const to = a.weight_sums + (index * a.taps * a.group + channel % a.group);
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        if (first_tap + tap >= a.taps) break;
        to[(first_tap + tap) * a.group] = sums.weight[tap][i >> 1][half * 2 + i % 2];
      }
    }
  }
}

// kParts is those of tiles where filters are 3 x 3 and the stride is 1, and else 0.
template <typename T, int kParts>
GDFAST_KERNEL(kGroupedThreads, 2)
grouped_grad_weight_kernel(GDFAST_GRID_CONSTANT const Arguments a) {
  const auto first_channel = static_cast<int32_t>(blockIdx.y) * kSlab;
  const int first_tap = static_cast<int>(blockIdx.z) * kTaps;
  const int lane = warp_lane(), matrix = lane / 8, line = lane % 8;
  const int unit_index = warp_index() % a.units, first_part = warp_index() / a.units;
  const int part_step = static_cast<int>(blockDim.x) / kWarp / a.units;
  const Unit unit = unit_of(a, unit_index);
  const bool sums_bias =
      a.bias_sums != nullptr && first_tap == 0 && unit.channel / a.group == unit.filter / a.group &&
      unit.channel % (a.group > kChannelsOfWarp ? a.group : kChannelsOfWarp) == 0;
  const int row = static_cast<int>(a.input.columns.divisor) * kPixelBytes;
  const int grad_row = static_cast<int>(a.grad.columns.divisor) * kPixelBytes;
  // Of this lane, for ldmatrix: its pixel of the first pair of rows, and its chunk.
  const int grad_at = a.grad_at + (matrix >> 1) * kPairs * grad_row + line * kPixelBytes +
                      unit.filter * 2 + (matrix & 1) * 16;
  const int input_at = (matrix & 1) * kPairs * a.input.step_h * row +
                       line * a.input.step_w * kPixelBytes + unit.channel * 2 + (matrix >> 1) * 16;
  Sums sums;
#pragma unroll
  for (float& sum : reinterpret_cast<FlatSums&>(sums)) sum = 0;
  walk_tiles(
      a.tiles, a.two_buffers,
      [&](const GroupedTile& tile, int buffer) {
        unsigned char* const to = shared_memory() + buffer * a.buffer_bytes;
        stage_pixels(a.input, tile, first_channel, to);
        stage_pixels(a.grad, tile, first_channel, to + a.grad_at);
      },
      [&](const GroupedTile& tile, int buffer) {
        const unsigned char* const from = shared_memory() + buffer * a.buffer_bytes;
        for (int part = first_part; part < a.tiles.parts; part += part_step) {
          const int32_t left = a.grad.W - tile.column - part * kSide - lane % 4 * 2;
          const Existing existing{a.grad.H - tile.row, left > 1 ? ~0u : left == 1 ? 0xffffu : 0u};
          const unsigned char* const grad = from + (grad_at + part * kSide * kPixelBytes);
          const unsigned char* const pixels =
              from + (input_at + part * kSide * a.input.step_w * kPixelBytes);
          if constexpr (kParts == 0) {
            sum_any_taps<T>(sums, a, grad, grad_row, pixels, row, first_tap, existing, sums_bias);
          } else {
            sum_three_rows<T, kParts>(sums, grad, pixels, existing, sums_bias);
          }
        }
      });
  join_parts(sums, first_part, part_step);
  if (sums_bias) {
#pragma unroll
    for (float& sum : sums.bias) {
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
    }
  }
  if (first_part == 0) write_sums(sums, a, unit, first_channel, first_tap, sums_bias);
}

// --- From a problem ---------------------------------------------------------------------------

GroupedPatch grad_patch(const Conv2dProblem& p, const void* grad_output, int64_t parts) {
  return {static_cast<const unsigned char*>(grad_output),
          p.output.n * 2,
          small(p.output.h * 2),
          small(p.output.w * 2),
          small(p.P),
          small(p.Q),
          small(p.K),
          1,
          1,
          0,
          0,
          Divisor::of(kSide * parts),
          kSide / 2,
          small(kSide / 2 * kSide * parts)};
}

// Warps for the sums of a slab.
int64_t units_of(const Conv2dProblem& p) {
  const int64_t group = p.C / p.groups,
                side = group > kChannelsOfWarp ? group / kChannelsOfWarp : 1;
  return kUnits * side;
}

struct Plan {
  int64_t parts, buffers, threads, buffer_bytes, bytes;
};

// Two parts and two buffers where they fit.
Plan plan_of(const Conv2dProblem& p) {
  const int64_t units = units_of(p);
  for (int64_t parts = most_parts(p);; --parts) {
    const int64_t most = kGroupedThreads / kWarp / units,
                  warps = units * (parts < most ? parts : most);
    const int64_t joined = warps > units ? kSums * units * kWarp * 4 : 0;
    const int64_t buffer = window_bytes(p, parts) + kSide * kSide * parts * kPixelBytes;
    for (int64_t buffers = 2; buffers >= 1; --buffers) {
      const int64_t tiles = buffers * buffer, bytes = tiles > joined ? tiles : joined;
      if (bytes <= kGroupedMemory || (parts == 1 && buffers == 1)) {
        return {parts, buffers, warps * kWarp, buffer, bytes};
      }
    }
  }
}

int64_t tap_blocks(const Conv2dProblem& p) { return ceil_div(p.R * p.S, kTaps); }

}  // namespace

int64_t grouped_grad_weight_memory(const Conv2dProblem& p) { return plan_of(p).bytes; }

int64_t grouped_splits(const Conv2dProblem& p) {
  const Plan plan = plan_of(p);
  const int64_t tiles = grouped_tiles(p, plan.parts).total;
  const int64_t at_once = grouped_blocks_of_multiprocessor(plan.bytes, plan.threads);
  const int64_t blocks = ceil_div(p.C, kSlab) * tap_blocks(p);
  int64_t splits = at_once * multiprocessors("conv2d_grad_weight") / blocks;
  // Sums, which stay in L2, are written and read again: twice the bytes of images at most.
  const int64_t weights = p.K * (p.C / p.groups) * p.R * p.S;
  const int64_t most = p.N * p.P * p.Q * p.K / weights;
  if (splits > most) splits = most;
  if (splits > tiles) splits = tiles;
  return splits < 1 ? 1 : splits;
}

void conv2d_grad_weight_grouped(const Conv2dProblem& p, const void* grad_output, const void* input,
                                void* grad_weight, void* grad_bias, void* workspace, int64_t splits,
                                const Where& where) {
  const Plan plan = plan_of(p);
  const GroupedTiles tiles = grouped_tiles(p, plan.parts);
  const int64_t group = p.C / p.groups, weights = p.K * group * p.R * p.S;
  auto* const weight_sums = static_cast<float*>(workspace);
  const Arguments a{window_patch(p, input, plan.parts),
                    grad_patch(p, grad_output, plan.parts),
                    tiles,
                    plan.buffers == 2,
                    small(window_bytes(p, plan.parts)),
                    small(plan.buffer_bytes),
                    small(group),
                    small(p.R * p.S),
                    small(p.S),
                    small(units_of(p)),
                    weight_sums,
                    grad_bias == nullptr ? nullptr : weight_sums + splits * weights};
  const DeviceGuard guard("conv2d_grad_weight", where.device);
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(ceil_div(p.C, kSlab)),
                  static_cast<unsigned>(tap_blocks(p)));
  const bool three = p.R == 3 && p.S == 3 && p.stride_h == 1;
  const auto start = [&](auto kernel) {
    launch("conv2d_grad_weight", kernel, grid, static_cast<unsigned>(plan.threads),
           static_cast<size_t>(plan.bytes), where.stream, a);
  };
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    if (!three) return start(grouped_grad_weight_kernel<T, 0>);
    plan.parts == 2 ? start(grouped_grad_weight_kernel<T, 2>)
                    : start(grouped_grad_weight_kernel<T, 1>);
  };
  if (tiles.total > 0) p.dtype == DType::kBFloat16 ? with_type(BFloat16{}) : with_type(Half{});
  if (grad_weight == nullptr && grad_bias == nullptr) return;
  const Conv2dWay way{Precision::kIeee, BlockTile::k64x64};
  conv2d_grad_weight(p, way, nullptr, nullptr, grad_weight, grad_bias, workspace, splits, where);
}

}  // namespace gdfast::cuda
