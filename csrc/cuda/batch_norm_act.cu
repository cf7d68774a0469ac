// Batch normalisation, residual and activation, forward: three kernels.
//
//   output = activation((input - mean) * invstd * weight + bias + residual)
//
// 1. moments_kernel     mean and sum of squared deviations of each channel in each split. Threads
//                       sum what values differ from their own first one, and its squares: that
//                       value is as far from the mean as deviations are, so nothing is lost to a
//                       large mean. Then they join (moments.h). A convolution that wrote the input
//                       may have done it.
// 2. statistics_kernel  joins the splits, or takes the running statistics; moves the latter; turns
//                       all into the factors of one pass.
// 3. normalise_kernel   that pass.
#include "activation.h"
#include "batch_norm.h"
#include "kernels.h"
#include "moments.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "batch_norm_act";

// Blocks for each multiprocessor, all of which are there from beginning to end.
constexpr int kMomentsBlocks = 4;
template <bool kHasResidual>
constexpr int kNormaliseBlocks = kHasResidual ? 2 : 3;

template <typename T, int kVector, bool kAcross>
GDFAST_KERNEL(kBatchNormThreads, kMomentsBlocks)
moments_kernel(const GDFAST_GRID_CONSTANT BatchNormWalk walk, const T* input, SumOf<T>* partial) {
  using A = SumOf<T>;
  const WalkPlace place = WalkPlace::of(walk);
  A near[kVector] = {}, sums[kVector] = {}, squares[kVector] = {};
  const int first = static_cast<int>(blockIdx.x) * walk.rows_per_round + place.tile_row;
  if (place.exists && first < walk.rows) {
    load_values<kVector>(input + element_of<kAcross>(walk, first, place.column), near);
  }
  int count = 0;
  for_each_round<false, kAtOnce>(walk, place, [&](int row) {
    PackOf<T, kVector> packs[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = row + i * walk.tile_rows;
      if (at < walk.rows) {
        packs[i] = load_pack<kVector>(input + element_of<kAcross>(walk, at, place.column));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row + i * walk.tile_rows >= walk.rows) break;
      A values[kVector];
      unpack<T, kVector>(packs[i], values);
      ++count;
#pragma unroll
      for (int lane = 0; lane < kVector; ++lane) {
        const A away = values[lane] - near[lane];
        sums[lane] += away;
        squares[lane] += away * away;
      }
    }
  });
  Moments<A, kVector> own{};
  own.count = static_cast<A>(count);
  const A share = count > 0 ? A(1) / own.count : A(0);
#pragma unroll
  for (int lane = 0; lane < kVector; ++lane) {
    const A shift = sums[lane] * share;
    own.mean[lane] = near[lane] + shift;
    own.squares[lane] = squares[lane] - sums[lane] * shift;
    // A NaN stays one.
    if (own.squares[lane] < 0) own.squares[lane] = 0;
  }

  constexpr int kChannels = kAcross ? kVector : 1;
  Moments<A, kChannels> joint;
  if constexpr (kChannels == kVector) {
    joint = own;
  } else {
    joint = {own.count, {own.mean[0]}, {own.squares[0]}};
#pragma unroll
    for (int lane = 1; lane < kVector; ++lane) {
      Moments<A, 1>::join(joint, {own.count, {own.mean[lane]}, {own.squares[lane]}});
    }
  }
  join_rows(joint, place.tile_row, walk.tile_rows, walk.tile_columns);
  if (place.tile_row > 0 || !place.exists) return;
  A* const to = partial + int64_t{3} * blockIdx.x * walk.C + place.column * kChannels;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    write_part<A, A>(to + i, walk.C, {joint.count, {joint.mean[i]}, {joint.squares[i]}});
  }
}

struct StatisticsArguments {
  bool training;
  BatchNormForward to;
  bool wide_params;
  double momentum, eps;
  int C;
  int64_t splits;
  int64_t* batches;  // a counter to add 1 to, or null
};

template <typename T>
GDFAST_KERNEL(kJoinChannels* kJoinThreads, 1)
statistics_kernel(const GDFAST_GRID_CONSTANT StatisticsArguments a, const SumOf<T>* partial,
                  SumOf<T>* factors) {
  using A = SumOf<T>;
  const int c = join_channel();
  Moments<double, 1> joint{};
  if (a.training) joint = join_parts(partial, a.C, c, 0, a.splits);
  if (threadIdx.x >= kJoinChannels || c >= a.C) return;
  if (a.batches != nullptr && c == 0) ++*a.batches;

  double mean, variance;
  if (a.training) {
    mean = joint.mean[0];
    variance = joint.squares[0] / joint.count;
    const auto move = [&](void* running, double value) {
      const double before = param_at<T>(running, a.wide_params, c, A(0));
      set_param<T>(running, a.wide_params, c, (1 - a.momentum) * before + a.momentum * value);
    };
    move(a.to.running_mean, mean);
    move(a.to.running_var, variance * (joint.count / (joint.count - 1)));
  } else {
    mean = param_at<T>(a.to.running_mean, a.wide_params, c, A(0));
    variance = param_at<T>(a.to.running_var, a.wide_params, c, A(1));
  }
  const A invstd = static_cast<A>(1 / std::sqrt(variance + a.eps));
  static_cast<A*>(a.to.mean)[c] = static_cast<A>(mean);
  static_cast<A*>(a.to.invstd)[c] = invstd;
  factors[c] = static_cast<A>(mean);
  factors[a.C + c] = invstd * param_at<T>(a.to.weight, a.wide_params, c, A(1));
  factors[2 * a.C + c] = param_at<T>(a.to.bias, a.wide_params, c, A(0));
}

template <typename T>
struct NormaliseArguments {
  const T* input;
  const T* residual;
  T* output;
  const SumOf<T>* factors;
  Activation activation;
  SumOf<T> negative_slope;
  uint8_t* mask;  // null where backward does without
};

// Of each value whether its activation hands the gradient on as it is, as its output, rounded to T,
// tells.
template <typename T, int kVector, typename A>
GDFAST_DEVICE uint8_t handed_on(const A (&outputs)[kVector], Activation activation,
                                A negative_slope) {
  A gradients[kVector], rounded[kVector];
#pragma unroll
  for (int lane = 0; lane < kVector; ++lane) {
    gradients[lane] = A(1);
    rounded[lane] = A(to_float(from_float<T>(outputs[lane])));
  }
  activation_gradient(gradients, rounded, activation, negative_slope);
  unsigned bits = 0;
#pragma unroll
  for (int lane = 0; lane < kVector; ++lane) bits |= unsigned{gradients[lane] == 1} << lane;
  return static_cast<uint8_t>(bits);
}

template <typename T, int kVector, bool kAcross, bool kHasResidual>
GDFAST_KERNEL(kBatchNormThreads, kNormaliseBlocks<kHasResidual>)
normalise_kernel(const GDFAST_GRID_CONSTANT BatchNormWalk walk,
                 const GDFAST_GRID_CONSTANT NormaliseArguments<T> a) {
  using A = SumOf<T>;
  const WalkPlace place = WalkPlace::of(walk);
  if (!place.exists) return;
  constexpr int kChannels = kAcross ? kVector : 1;
  A mean[kChannels], scale[kChannels], bias[kChannels];
  const A* const factors = a.factors + place.column * kChannels;
  load_factors(factors, mean);
  load_factors(factors + walk.C, scale);
  load_factors(factors + 2 * walk.C, bias);
  for_each_round<true, kAtOnce>(walk, place, [&](int row) {
    PackOf<T, kVector> inputs[kAtOnce] = {}, residuals[kAtOnce] = {};
    int64_t element[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = row + i * walk.tile_rows;
      element[i] = element_of<kAcross>(walk, at, place.column);
      if (at < walk.rows) {
        inputs[i] = load_pack_streaming<kVector>(a.input + element[i]);
        if constexpr (kHasResidual) {
          residuals[i] = load_pack_streaming<kVector>(a.residual + element[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row + i * walk.tile_rows >= walk.rows) break;
      A values[kVector];
      unpack<T, kVector>(inputs[i], values);
#pragma unroll
      for (int lane = 0; lane < kVector; ++lane) {
        const int c = kAcross ? lane : 0;
        values[lane] = (values[lane] - mean[c]) * scale[c] + bias[c];
      }
      if constexpr (kHasResidual) {
        A more[kVector];
        unpack<T, kVector>(residuals[i], more);
#pragma unroll
        for (int lane = 0; lane < kVector; ++lane) values[lane] += more[lane];
      }
      activate(values, a.activation, a.negative_slope);
      store_values<kVector>(a.output + element[i], values);
      if (a.mask != nullptr) {
        a.mask[element[i] / kVector] =
            handed_on<T, kVector>(values, a.activation, a.negative_slope);
      }
    }
  });
}

template <typename T>
void forward(const BatchNormProblem& p, const BatchNormForward& to, bool training, double momentum,
             const BatchNormMoments& moments, int64_t* batches, void* memory, uintptr_t stream) {
  using A = SumOf<T>;
  const BatchNormWorkspace<T> workspace(p, memory);
  const auto* const input = static_cast<const T*>(to.input);
  const auto* partial = static_cast<const A*>(moments.parts);
  StatisticsArguments statistics{training,      to,     p.param_dtype != p.dtype,
                                 momentum,      p.eps,  static_cast<int>(p.C),
                                 moments.count, batches};
  if (training && partial == nullptr) {
    with_vectors<T>(p, are_aligned(to.input), [&](auto kind) {
      constexpr int kVector = decltype(kind)::kVector;
      constexpr bool kAcross = decltype(kind)::kAcross;
      const int64_t blocks = sum_blocks(kMomentsBlocks * multiprocessors(kOp));
      const BatchNormWalk walk = batch_norm_walk(p, kVector, kAcross, blocks, true);
      launch(kOp, moments_kernel<T, kVector, kAcross>, batch_norm_grid(walk), kBatchNormThreads,
             kBatchNormThreads * kValuesStep<Moments<A, kAcross ? kVector : 1>>, stream, walk,
             input, workspace.partial);
      statistics.splits = walk.splits;
    });
    partial = workspace.partial;
  }
  launch(kOp, statistics_kernel<T>, dim3(static_cast<unsigned>(ceil_div(p.C, kJoinChannels))),
         kJoinChannels * kJoinThreads, kJoinMemory, stream, statistics, partial, workspace.factors);
  with_vectors<T>(p, are_aligned(to.input, to.residual, to.output), [&](auto kind) {
    constexpr int kVector = decltype(kind)::kVector;
    constexpr bool kAcross = decltype(kind)::kAcross;
    const NormaliseArguments<T> arguments{input,
                                          static_cast<const T*>(to.residual),
                                          static_cast<T*>(to.output),
                                          workspace.factors,
                                          p.activation,
                                          static_cast<A>(p.negative_slope),
                                          static_cast<uint8_t*>(to.mask)};
    if (to.mask != nullptr && kVector != kWholeVector<T>) {
      throw std::invalid_argument("batch_norm_act: mask: expected sizes and addresses for vectors");
    }
    const auto normalise = [&](auto has_residual) {
      constexpr bool kHas = decltype(has_residual)::value;
      const int64_t blocks = kNormaliseBlocks<kHas> * multiprocessors(kOp);
      const BatchNormWalk walk = batch_norm_walk(p, kVector, kAcross, blocks, false);
      launch(kOp, normalise_kernel<T, kVector, kAcross, kHas>, batch_norm_grid(walk),
             kBatchNormThreads, 0, stream, walk, arguments);
    };
    to.residual == nullptr ? normalise(std::false_type{}) : normalise(std::true_type{});
  });
}

}  // namespace

int64_t batch_norm_workspace_bytes(const BatchNormProblem& p) {
  int64_t bytes = 0;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t splits = 1;
    // Which vectors a pass takes depends on addresses too: room for either.
    for (const bool aligned : {false, true}) {
      with_vectors<T>(p, aligned, [&](auto kind) {
        using Kind = decltype(kind);
        const auto walk = batch_norm_walk(p, Kind::kVector, Kind::kAcross, kMostSumBlocks, true);
        if (walk.splits > splits) splits = walk.splits;
      });
    }
    const auto tables = (ceil_div(p.C, 4) * 4 * kFactorTables + 3 * splits * p.C);
    bytes = tables * static_cast<int64_t>(sizeof(SumOf<T>));
  });
  return bytes;
}

void batch_norm(const BatchNormProblem& problem, const BatchNormForward& to, bool training,
                double momentum, const BatchNormMoments& moments, int64_t* batches, void* workspace,
                int device, uintptr_t stream) {
  const DeviceGuard guard(kOp, device);
  with_dtype(problem.dtype, [&](auto zero) {
    forward<decltype(zero)>(problem, to, training, momentum, moments, batches, workspace, stream);
  });
}

}  // namespace gdfast::cuda
