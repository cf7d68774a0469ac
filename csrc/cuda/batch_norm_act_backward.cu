// The gradients of batch normalisation, residual and activation: three kernels.
//
// With g the gradient before the activation, m(.) the mean over N and S, and x^ the normalised
// input:   grad_bias = sum g, grad_weight = sum g x^, grad_residual = g,
//          grad_input = invstd weight (g - m(g) - x^ m(g x^))     in training,
//                     = invstd weight g                           in evaluation.
//
// 1. sums_kernel       both sums over each split; writes g where it is wanted, so that the second
//                      pass over the tensors reads that in the place of what g is made of.
// 2. parameters_kernel joins the splits, and turns them into the factors of one pass:
//                      grad_input = g scale + (input - mean) slope + offset
// 3. gradients_kernel  that pass.
#include "activation.h"
#include "batch_norm.h"
#include "kernels.h"

namespace gdfast::cuda {
namespace {

constexpr char kOp[] = "batch_norm_act_backward";

// What makes g of grad_output.
template <typename T>
struct ActivationArguments {
  Activation activation;
  PreActivation from;
  const T* other;       // the residual or the output, null where neither is read
  const uint8_t* mask;  // or what tells as much, a byte for each whole vector; null else
  SumOf<T> negative_slope;
};

// The mask's bits of a vector, or the one of an element.
template <typename T, int kVector>
GDFAST_DEVICE unsigned mask_bits(const uint8_t* mask, int64_t element) {
  constexpr int kWhole = kWholeVector<T>;
  const unsigned bits = mask[element / kWhole];
  return kVector == kWhole ? bits : bits >> (element % kWhole);
}

// grads = g, of values (input - mean) and of the vector of `other` or its bits of the mask.
template <bool kAcross, bool kHasOther, typename T, int kVector, int kChannels, typename A>
GDFAST_DEVICE void before_activation(A (&grads)[kVector], const A (&centred)[kVector],
                                     const PackOf<T, kVector>& other, unsigned bits,
                                     const A (&scale)[kChannels], const A (&bias)[kChannels],
                                     const ActivationArguments<T>& a) {
  if (a.activation == Activation::kNone) return;
  if (a.mask != nullptr) {
    const bool leaks = a.activation == Activation::kLeakyRelu;
#pragma unroll
    for (int lane = 0; lane < kVector; ++lane) {
      if ((bits >> lane & 1) == 0) grads[lane] = leaks ? grads[lane] * a.negative_slope : A(0);
    }
    return;
  }
  A z[kVector] = {};
  if constexpr (kHasOther) unpack<T, kVector>(other, z);
  if (a.from != PreActivation::kOutput) {
#pragma unroll
    for (int lane = 0; lane < kVector; ++lane) {
      const int c = kAcross ? lane : 0;
      const A normalised = centred[lane] * scale[c] + bias[c];
      z[lane] = kHasOther ? normalised + z[lane] : normalised;
    }
  }
  activation_gradient(grads, z, a.activation, a.negative_slope);
}

// Sums of kCount channels side by side: of g, and of g (input - mean).
template <typename A, int kCount>
struct Sums {
  A grads[kCount];
  A products[kCount];

  GDFAST_DEVICE void join(Sums& to, const Sums& other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to.grads[i] += other.grads[i];
      to.products[i] += other.products[i];
    }
  }
};

template <typename T>
struct SumsArguments {
  const T* grad_output;
  const T* input;
  T* grad_residual;  // null where the second pass does without g
  ActivationArguments<T> act;
  const void* weight;
  const void* bias;
  bool wide_params;
  const SumOf<T>* mean;
  const SumOf<T>* invstd;
  SumOf<T>* partial;
};

// Blocks for each multiprocessor, all of which are there from beginning to end.
constexpr int kBlocks = 2;
// Vectors of each tensor that a thread asks for at a time.
template <bool kHasOther>
constexpr int kLoadsOf = kHasOther ? kAtOnce / 2 : kAtOnce;

template <typename T, int kVector, bool kAcross, bool kHasOther>
GDFAST_KERNEL(kBatchNormThreads, kBlocks)
sums_kernel(const GDFAST_GRID_CONSTANT BatchNormWalk walk,
            const GDFAST_GRID_CONSTANT SumsArguments<T> a) {
  using A = SumOf<T>;
  constexpr int kChannels = kAcross ? kVector : 1, kLoads = kLoadsOf<kHasOther>;
  const WalkPlace place = WalkPlace::of(walk);
  A mean[kChannels], scale[kChannels], bias[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const int c = place.exists ? place.column * kChannels + i : 0;
    mean[i] = a.mean[c];
    scale[i] = a.invstd[c] * param_at<T>(a.weight, a.wide_params, c, A(1));
    bias[i] = param_at<T>(a.bias, a.wide_params, c, A(0));
  }
  Sums<A, kVector> own{};
  for_each_round<false, kLoads>(walk, place, [&](int row) {
    PackOf<T, kVector> inputs[kLoads] = {}, grads[kLoads] = {}, others[kLoads] = {};
    unsigned bits[kLoads] = {};
    int64_t element[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = row + i * walk.tile_rows;
      element[i] = element_of<kAcross>(walk, at, place.column);
      if (at < walk.rows) {
        inputs[i] = load_pack<kVector>(a.input + element[i]);
        // Where g is written, the second pass reads that in the place of these.
        grads[i] = a.grad_residual != nullptr
                       ? load_pack_streaming<kVector>(a.grad_output + element[i])
                       : load_pack<kVector>(a.grad_output + element[i]);
        if constexpr (kHasOther) {
          others[i] = load_pack_streaming<kVector>(a.act.other + element[i]);
        }
        if (a.act.mask != nullptr) bits[i] = mask_bits<T, kVector>(a.act.mask, element[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (row + i * walk.tile_rows >= walk.rows) break;
      A centred[kVector], g[kVector];
      unpack<T, kVector>(inputs[i], centred);
      unpack<T, kVector>(grads[i], g);
#pragma unroll
      for (int lane = 0; lane < kVector; ++lane) centred[lane] -= mean[kAcross ? lane : 0];
      before_activation<kAcross, kHasOther>(g, centred, others[i], bits[i], scale, bias, a.act);
      if (a.grad_residual != nullptr) store_values<kVector>(a.grad_residual + element[i], g);
#pragma unroll
      for (int lane = 0; lane < kVector; ++lane) {
        own.grads[lane] += g[lane];
        own.products[lane] += g[lane] * centred[lane];
      }
    }
  });

  Sums<A, kChannels> joint;
  if constexpr (kChannels == kVector) {
    joint = own;
  } else {
    joint = {{own.grads[0]}, {own.products[0]}};
#pragma unroll
    for (int lane = 1; lane < kVector; ++lane) {
      Sums<A, 1>::join(joint, {{own.grads[lane]}, {own.products[lane]}});
    }
  }
  join_rows(joint, place.tile_row, walk.tile_rows, walk.tile_columns);
  if (place.tile_row > 0 || !place.exists) return;
  A* const to = a.partial + int64_t{2} * blockIdx.x * walk.C + place.column * kChannels;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    to[i] = joint.grads[i];
    to[walk.C + i] = joint.products[i];
  }
}

struct ParametersArguments {
  BatchNormBackward to;
  bool wide_params;
  double count;  // values of a channel, of which grad_input has the mean; 0 in evaluation
  int C, splits;
};

template <typename T>
GDFAST_KERNEL(kJoinChannels* kJoinThreads, 1)
parameters_kernel(const GDFAST_GRID_CONSTANT ParametersArguments a, const SumOf<T>* partial,
                  SumOf<T>* factors) {
  using A = SumOf<T>;
  const int c =
      static_cast<int>(blockIdx.x) * kJoinChannels + static_cast<int>(threadIdx.x) % kJoinChannels;
  const int thread = static_cast<int>(threadIdx.x) / kJoinChannels;
  Sums<double, 1> joint{};
  if (c < a.C) {
#pragma unroll 8
    for (int split = thread; split < a.splits; split += kJoinThreads) {
      const A* const from = partial + int64_t{2} * split * a.C + c;
      Sums<double, 1>::join(joint, {{from[0]}, {from[a.C]}});
    }
  }
  join_rows(joint, thread, kJoinThreads, kJoinChannels);
  if (thread > 0 || c >= a.C) return;

  const double sum = joint.grads[0], product = joint.products[0];
  const A invstd = static_cast<const A*>(a.to.invstd)[c];
  const A scale = invstd * param_at<T>(a.to.weight, a.wide_params, c, A(1));
  set_param<T>(a.to.grad_bias, a.wide_params, c, sum);
  set_param<T>(a.to.grad_weight, a.wide_params, c, product * invstd);
  const double factor = a.count > 0 ? -static_cast<double>(scale) / a.count : 0.0;
  factors[c] = static_cast<const A*>(a.to.mean)[c];
  factors[a.C + c] = scale;
  factors[2 * a.C + c] = param_at<T>(a.to.bias, a.wide_params, c, A(0));
  factors[3 * a.C + c] = static_cast<A>(factor * product * invstd * invstd);
  factors[4 * a.C + c] = static_cast<A>(factor * sum);
}

template <typename T>
struct GradientsArguments {
  const T* grad_output;
  const T* input;
  T* grad_input;
  ActivationArguments<T> act;
  const SumOf<T>* factors;
  bool training;
};

template <typename T, int kVector, bool kAcross, bool kHasOther>
GDFAST_KERNEL(kBatchNormThreads, kBlocks)
gradients_kernel(const GDFAST_GRID_CONSTANT BatchNormWalk walk,
                 const GDFAST_GRID_CONSTANT GradientsArguments<T> a) {
  using A = SumOf<T>;
  constexpr int kChannels = kAcross ? kVector : 1, kLoads = kLoadsOf<kHasOther>;
  const WalkPlace place = WalkPlace::of(walk);
  if (!place.exists) return;
  A mean[kChannels], scale[kChannels], bias[kChannels], slope[kChannels], offset[kChannels];
  const A* const factors = a.factors + place.column * kChannels;
  load_factors(factors, mean);
  load_factors(factors + walk.C, scale);
  load_factors(factors + 2 * walk.C, bias);
  load_factors(factors + 3 * walk.C, slope);
  load_factors(factors + 4 * walk.C, offset);
  // In evaluation the input tells at most what the activation passes on.
  const bool reads_input = a.training || a.act.activation != Activation::kNone;
  for_each_round<true, kLoads>(walk, place, [&](int row) {
    PackOf<T, kVector> inputs[kLoads] = {}, grads[kLoads] = {}, others[kLoads] = {};
    unsigned bits[kLoads] = {};
    int64_t element[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = row + i * walk.tile_rows;
      element[i] = element_of<kAcross>(walk, at, place.column);
      if (at < walk.rows) {
        grads[i] = load_pack_streaming<kVector>(a.grad_output + element[i]);
        if (reads_input) inputs[i] = load_pack_streaming<kVector>(a.input + element[i]);
        if constexpr (kHasOther) {
          others[i] = load_pack_streaming<kVector>(a.act.other + element[i]);
        }
        if (a.act.mask != nullptr) bits[i] = mask_bits<T, kVector>(a.act.mask, element[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (row + i * walk.tile_rows >= walk.rows) break;
      A centred[kVector] = {}, g[kVector];
      if (reads_input) {
        unpack<T, kVector>(inputs[i], centred);
#pragma unroll
        for (int lane = 0; lane < kVector; ++lane) centred[lane] -= mean[kAcross ? lane : 0];
      }
      unpack<T, kVector>(grads[i], g);
      before_activation<kAcross, kHasOther>(g, centred, others[i], bits[i], scale, bias, a.act);
#pragma unroll
      for (int lane = 0; lane < kVector; ++lane) {
        const int c = kAcross ? lane : 0;
        g[lane] *= scale[c];
        if (a.training) g[lane] += centred[lane] * slope[c] + offset[c];
      }
      store_values<kVector>(a.grad_input + element[i], g);
    }
  });
}

template <typename T>
void backward(const BatchNormProblem& p, const BatchNormBackward& to, bool training,
              PreActivation from, void* memory, uintptr_t stream) {
  using A = SumOf<T>;
  const BatchNormWorkspace<T> workspace(p, memory);
  const auto* const grad_output = static_cast<const T*>(to.grad_output);
  const auto* const input = static_cast<const T*>(to.input);
  auto* const grad_residual = static_cast<T*>(to.grad_residual);
  const bool wide_params = p.param_dtype != p.dtype;
  const bool acts = p.activation != Activation::kNone && from != PreActivation::kInput;
  const void* const other = acts ? to.residual_or_output : nullptr;
  const bool masked = from == PreActivation::kMask;
  const ActivationArguments<T> act{
      p.activation, from, masked ? nullptr : static_cast<const T*>(other),
      masked ? static_cast<const uint8_t*>(other) : nullptr, static_cast<A>(p.negative_slope)};
  const bool aligned = are_aligned(grad_output, input, act.other, grad_residual, to.grad_input);

  const bool sums =
      training || grad_residual != nullptr || to.grad_weight != nullptr || to.grad_bias != nullptr;
  ParametersArguments parameters{to, wide_params, training ? static_cast<double>(p.N * p.S) : 0.0,
                                 static_cast<int>(p.C), 0};
  with_vectors<T>(p, aligned, [&](auto kind) {
    constexpr int kVector = decltype(kind)::kVector;
    constexpr bool kAcross = decltype(kind)::kAcross;
    const auto with_other = [](const ActivationArguments<T>& act, auto&& run) {
      act.other == nullptr ? run(std::false_type{}) : run(std::true_type{});
    };
    const int64_t blocks = int64_t{kBlocks} * multiprocessors(kOp);
    if (sums) {
      const SumsArguments<T> arguments{grad_output,
                                       input,
                                       grad_residual,
                                       act,
                                       to.weight,
                                       to.bias,
                                       wide_params,
                                       static_cast<const A*>(to.mean),
                                       static_cast<const A*>(to.invstd),
                                       workspace.partial};
      with_other(act, [&](auto has_other) {
        constexpr bool kHas = decltype(has_other)::value;
        const BatchNormWalk walk = batch_norm_walk(p, kVector, kAcross, sum_blocks(blocks), true);
        launch(kOp, sums_kernel<T, kVector, kAcross, kHas>, batch_norm_grid(walk),
               kBatchNormThreads, kBatchNormThreads * kValuesStep<Sums<A, kAcross ? kVector : 1>>,
               stream, walk, arguments);
        parameters.splits = walk.splits;
      });
    }
    launch(kOp, parameters_kernel<T>, dim3(static_cast<unsigned>(ceil_div(p.C, kJoinChannels))),
           kJoinChannels * kJoinThreads,
           kJoinChannels * kJoinThreads * kValuesStep<Sums<double, 1>>, stream, parameters,
           workspace.partial, workspace.factors);
    if (to.grad_input == nullptr) return;
    GradientsArguments<T> arguments{grad_output,       input,   static_cast<T*>(to.grad_input), act,
                                    workspace.factors, training};
    if (grad_residual != nullptr) {
      // g is there: the second pass reads one tensor in the place of two.
      arguments.grad_output = grad_residual;
      arguments.act = {Activation::kNone, PreActivation::kInput, nullptr, nullptr, A(0)};
    }
    with_other(arguments.act, [&](auto has_other) {
      constexpr bool kHas = decltype(has_other)::value;
      const BatchNormWalk walk = batch_norm_walk(p, kVector, kAcross, blocks, false);
      launch(kOp, gradients_kernel<T, kVector, kAcross, kHas>, batch_norm_grid(walk),
             kBatchNormThreads, 0, stream, walk, arguments);
    });
  });
}

}  // namespace

void batch_norm_backward(const BatchNormProblem& problem, const BatchNormBackward& to,
                         bool training, PreActivation from, void* workspace, int device,
                         uintptr_t stream) {
  const DeviceGuard guard(kOp, device);
  with_dtype(problem.dtype, [&](auto zero) {
    backward<decltype(zero)>(problem, to, training, from, workspace, stream);
  });
}

}  // namespace gdfast::cuda
