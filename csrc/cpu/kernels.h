// The CPU kernels' entry points. Every source beside this header is compiled once per instruction
// set, into a namespace of that name; dispatch.cpp picks one table when the module is loaded.
// conv2d_bf16.cpp alone makes avx512_bf16, which is avx512 with other convolutions of bfloat16.
#pragma once

#include <cstdint>

#include "../batch_norm_problem.h"
#include "../conv2d_problem.h"
#include "../linear_problem.h"
#include "../max_pool2d_problem.h"
#include "../sgd_math.h"

namespace gdfast::cpu {

#define GDFAST_DECLARE_CONV2D(isa)                                                             \
  namespace isa {                                                                              \
  /* output = activation(conv2d(input, weight) + bias); bias [K] may be null. */               \
  void conv2d(const Conv2dProblem& problem, const void* input, const void* weight,             \
              const void* bias, void* output, int threads);                                    \
  /* grad_input = the transpose of conv2d in its input, applied to grad_output. */             \
  void conv2d_grad_input(const Conv2dProblem& problem, const void* grad_output,                \
                         const void* weight, void* grad_input, int threads);                   \
  /* grad_weight = the transpose of conv2d in its weight; grad_bias [K] may be null. */        \
  void conv2d_grad_weight(const Conv2dProblem& problem, const void* grad_output,               \
                          const void* input, void* grad_weight, void* grad_bias, int threads); \
  }

#define GDFAST_DECLARE_KERNELS(isa)                                                                \
  GDFAST_DECLARE_CONV2D(isa)                                                                       \
  namespace isa {                                                                                  \
  /* The passes of conv2d for a problem that is_depthwise(). */                                    \
  void depthwise(const Conv2dProblem& problem, const void* input, const void* weight,              \
                 const void* bias, void* output, int threads);                                     \
  void depthwise_grad_input(const Conv2dProblem& problem, const void* grad_output,                 \
                            const void* weight, void* grad_input, int threads);                    \
  void depthwise_grad_weight(const Conv2dProblem& problem, const void* grad_output,                \
                             const void* input, void* grad_weight, void* grad_bias, int threads);  \
  /* output = max_pool2d(input), and where in its window each value was. */                        \
  void max_pool2d(const MaxPool2dProblem& problem, const void* input, void* output, void* argmax,  \
                  int threads);                                                                    \
  /* grad_input = the transpose of taking the values at argmax, applied to grad_output. */         \
  void max_pool2d_grad(const MaxPool2dProblem& problem, const void* grad_output,                   \
                       const void* argmax, void* grad_input, int threads);                         \
  /* output = max_pool2d(relu(conv2d(input, weight) + bias)) and its argmax, [N, K, P, Q] of       \
     `pool`, whose input is the output of `conv`: for windows of at most 255 places that do not    \
     overlap and lie within that output. conv.output strides are not read. */                      \
  void conv2d_relu_max_pool2d(const Conv2dProblem& conv, const MaxPool2dProblem& pool,             \
                              const void* input, const void* weight, const void* bias,             \
                              void* output, uint8_t* argmax, int threads);                         \
  /* Its gradients in weight and bias; grad_bias [K] may be null. */                               \
  void conv2d_relu_max_pool2d_grad_weight(const Conv2dProblem& conv, const MaxPool2dProblem& pool, \
                                          const void* grad_output, const uint8_t* argmax,          \
                                          const void* input, void* grad_weight, void* grad_bias,   \
                                          int threads);                                            \
  /* output [N, K] = input [N, C] times weight [K, C] transposed, plus bias [K], which may be      \
     null. For few outputs, and at least a vector's worth of columns. */                           \
  void linear(const LinearProblem& problem, const void* input, const void* weight,                 \
              const void* bias, void* output, int threads);                                        \
  /* Its gradients; each may be null. grad_output, grad_input and grad_weight are contiguous. */   \
  void linear_backward(const LinearProblem& problem, const void* grad_output, const void* input,   \
                       const void* weight, void* grad_input, void* grad_weight, void* grad_bias,   \
                       int threads);                                                               \
  /* One SGD update of several tensors in one pass over memory; see sgd_math.h. */                 \
  void sgd(const SgdTensor* tensors, int64_t count, const SgdHyper& hyper, int threads);           \
  /* Batch normalisation, residual and activation; see batch_norm_problem.h. In training the       \
     statistics are those of the input, or follow from sums where not null, and move the           \
     running ones by momentum; in evaluation they are the running ones. */                         \
  void batch_norm(const BatchNormProblem& problem, const BatchNormForward& to, bool training,      \
                  double momentum, const BatchNormSums* sums, int threads);                        \
  /* Its gradients. */                                                                             \
  void batch_norm_backward(const BatchNormProblem& problem, const BatchNormBackward& to,           \
                           bool training, PreActivation from, int threads);                        \
  /* A convolution and the batch normalisation behind it, in training, as one kernel: what one     \
     writes and the other reads stays in a cache. It gives what both give, bit by bit, but by      \
     kStrassen. `to` and the problems are those of both; between is the convolution's output,      \
     to.input. */                                                                                  \
  void conv2d_norm(const Conv2dProblem& conv, const BatchNormProblem& norm, const void* input,     \
                   const void* weight, const void* bias, const BatchNormForward& to,               \
                   void* between, double momentum, int threads);                                   \
  /* All gradients, to.grad_input null; the convolution has a problem for each. */                 \
  void conv2d_norm_backward(const Conv2dProblem& of_input, const Conv2dProblem& of_weight,         \
                            const BatchNormProblem& norm, const BatchNormBackward& to,             \
                            PreActivation from, const Conv2dGradients& conv, int threads);         \
  /* Whether they take a convolution, or `backward` the problem of one of its gradients. */        \
  bool conv2d_norm_fits(const Conv2dProblem& conv, bool backward, int threads);                    \
  /* Whether conv2d_grad_input, and conv2d_norm_backward where that takes the problem, can add to  \
     grad_input, bit by bit as if both were added up afterwards. */                                \
  bool conv2d_adds(const Conv2dProblem& conv);                                                     \
  /* The same for a problem that is_depthwise(). */                                                \
  void depthwise_norm(const Conv2dProblem& conv, const BatchNormProblem& norm, const void* input,  \
                      const void* weight, const void* bias, const BatchNormForward& to,            \
                      void* between, double momentum, int threads);                                \
  void depthwise_norm_backward(const Conv2dProblem& of_input, const Conv2dProblem& of_weight,      \
                               const BatchNormProblem& norm, const BatchNormBackward& to,          \
                               PreActivation from, const Conv2dGradients& conv, int threads);      \
  }

GDFAST_DECLARE_KERNELS(baseline)
GDFAST_DECLARE_KERNELS(avx2)
GDFAST_DECLARE_KERNELS(avx512)
GDFAST_DECLARE_CONV2D(avx512_bf16)
GDFAST_DECLARE_CONV2D(emulated_bf16)
#undef GDFAST_DECLARE_KERNELS
#undef GDFAST_DECLARE_CONV2D

struct KernelTable {
  const char* isa;
  decltype(&baseline::conv2d) conv2d;
  decltype(&baseline::conv2d_grad_input) conv2d_grad_input;
  decltype(&baseline::conv2d_grad_weight) conv2d_grad_weight;
  decltype(&baseline::max_pool2d) max_pool2d;
  decltype(&baseline::max_pool2d_grad) max_pool2d_grad;
  decltype(&baseline::conv2d_relu_max_pool2d) conv2d_relu_max_pool2d;
  decltype(&baseline::conv2d_relu_max_pool2d_grad_weight) conv2d_relu_max_pool2d_grad_weight;
  decltype(&baseline::linear) linear;
  decltype(&baseline::linear_backward) linear_backward;
  decltype(&baseline::sgd) sgd;
  decltype(&baseline::batch_norm) batch_norm;
  decltype(&baseline::batch_norm_backward) batch_norm_backward;
  decltype(&baseline::conv2d_norm_fits) conv2d_norm_fits;
  decltype(&baseline::conv2d_norm) conv2d_norm;
  decltype(&baseline::conv2d_norm_backward) conv2d_norm_backward;
  decltype(&baseline::conv2d_adds) conv2d_adds;
};

// The table in force: the best that this processor runs, or the one that select_isa() asked for.
const KernelTable& kernels();

constexpr int kMostIsas = 4;

// Names of the instruction sets that were compiled and that this processor runs, lowest first.
int supported_isas(const char* names[kMostIsas]);

// Chooses one by name; false where it was not compiled or the processor lacks it. Beside those of
// supported_isas() there is "emulated_bf16": the kernels of avx512_bf16 for any processor, slow, to
// test them where it is not.
bool select_isa(const char* name);

}  // namespace gdfast::cpu
