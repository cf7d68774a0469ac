// The convolution kernels' launchers. They return at once; what went wrong is thrown as
// std::runtime_error with the operation's name.
#pragma once

#include <cstdint>
#include <string>

#include "../conv2d_problem.h"
#include "../sgd_math.h"

namespace gdfast::cuda {

// How float32 numbers are multiplied: as one TF32 number, as the sum of two, or as they are.
enum class Precision : int32_t { kTf32, kTf32x3, kIeee };

// The sums that a block makes, rows x columns. Where operands cannot be read 16 bytes at a time,
// and where float32 is multiplied as it is, k64x64 takes the place of the others; where as the sum
// of two, k128x64 that of k128x128.
enum class BlockTile : int32_t { k128x128, k128x64, k64x64 };

// How a kernel computes what it does.
struct Conv2dWay {
  Precision precision;
  BlockTile tile;
};

struct Where {
  int device;
  uintptr_t stream;
};

// output = activation(conv2d(input, weight) + bias); bias may be null. `moments` [splits, 3, K], in
// the type that sums are taken in, gets what a batch normalisation of output begins with
// (moments.h). No moments are taken, and no workspace needed, where it is null.
void conv2d(const Conv2dProblem& problem, const Conv2dWay& way, const void* input,
            const void* weight, const void* bias, void* output, void* moments, void* workspace,
            const Where& where);
int64_t conv2d_moment_splits(const Conv2dProblem& problem);
int64_t conv2d_moments_workspace(const Conv2dProblem& problem);  // bytes

// Joins `count` parts [count, 3, K] to the moments of conv2d.
void join_moments(const Conv2dProblem& problem, const void* parts, int64_t count, void* moments,
                  const Where& where);

void conv2d_grad_input(const Conv2dProblem& problem, const Conv2dWay& way, const void* grad_output,
                       const void* weight, void* grad_input, const Where& where);

// The bytes of workspace that conv2d_grad_weight needs for so many splits.
int64_t conv2d_grad_weight_workspace(const Conv2dProblem& problem, int64_t splits, bool bias);

// Positions are summed in `splits` parts, which are then added up in order; grad_bias may be null.
// Where grad_weight is, its parts stay in the workspace; where grad_output is, they are there
// already.
void conv2d_grad_weight(const Conv2dProblem& problem, const Conv2dWay& way, const void* grad_output,
                        const void* input, void* grad_weight, void* grad_bias, void* workspace,
                        int64_t splits, const Where& where);

// The same of half types, with the weight's gradient rounded to them and stored in float32.
void conv2d_grad_weight_wide(const Conv2dProblem& problem, const Conv2dWay& way,
                             const void* grad_output, const void* input, void* grad_weight,
                             void* workspace, int64_t splits, const Where& where);

// A weight, its momentum buffer and its master copy, all in the memory order of problem.weight, and
// how they are updated. hyper.dtype is the problem's or, where that is a half type, float32: of a
// weight that was cast for the convolution. tensor.grad and hyper.grad_scale are not looked at.
struct SgdWeight {
  SgdTensor tensor;
  SgdHyper hyper;
  const double* lr;  // on the device, instead of hyper.lr, or null
};

// Updates a weight by the gradient that conv2d_grad_weight would have written, to the same bits in
// float32 and float64. grad_output null: by the parts that it left in the workspace. Else without
// any, in one split.
void conv2d_grad_weight_sgd(const Conv2dProblem& problem, const Conv2dWay& way,
                            const void* grad_output, const void* input, const void* workspace,
                            int64_t splits, const SgdWeight& weight, const Where& where);

// --- Few channels (conv2d_stem.h): one group, no dilation, not float64, not kIeee ---------------

// Bytes of shared memory of a block; a GPU may have fewer than some problems ask for.
int64_t conv2d_stem_shared_bytes(const Conv2dProblem& problem);
int64_t conv2d_stem_moments_workspace(const Conv2dProblem& problem);  // bytes
// As conv2d; a block makes so many tiles of 8 x 16 positions by 64 filters.
void conv2d_stem(const Conv2dProblem& problem, Precision precision, int64_t tiles_of_block,
                 const void* input, const void* weight, const void* bias, void* output,
                 void* moments, void* workspace, const Where& where);

int64_t conv2d_stem_grad_weight_workspace(const Conv2dProblem& problem, int64_t splits, bool bias);
// As conv2d_grad_weight.
void conv2d_stem_grad_weight(const Conv2dProblem& problem, Precision precision,
                             const void* grad_output, const void* input, void* grad_weight,
                             void* grad_bias, void* workspace, int64_t splits, const Where& where);

// --- Groups of few channels (grouped.h): half types in channels_last ----------------------------

enum class GroupedPass { kForward, kGradInput, kGradWeight };

// Why a pass does not take a problem, or ""; tensors but the weight must lie at multiples of 16.
std::string grouped_why_not(const Conv2dProblem& problem, GroupedPass pass);
// Bytes of shared memory of a block, whatever there is.
int64_t grouped_grad_weight_memory(const Conv2dProblem& problem);
void conv2d_grouped(const Conv2dProblem& problem, const void* input, const void* weight,
                    const void* bias, void* output, const Where& where);
void conv2d_grad_input_grouped(const Conv2dProblem& problem, const void* grad_output,
                               const void* weight, void* grad_input, const Where& where);
// As many splits as fill the current device.
int64_t grouped_splits(const Conv2dProblem& problem);
// As conv2d_grad_weight, and with its workspace; grad_weight null leaves the parts there.
void conv2d_grad_weight_grouped(const Conv2dProblem& problem, const void* grad_output,
                                const void* input, void* grad_weight, void* grad_bias,
                                void* workspace, int64_t splits, const Where& where);

// The same on Hopper (grouped_hopper.h), for filters of 3 x 3 and stride 1.
std::string grouped_hopper_why_not(const Conv2dProblem& problem, GroupedPass pass);
void conv2d_grouped_hopper(const Conv2dProblem& problem, const void* input, const void* weight,
                           const void* bias, void* output, const Where& where);
void conv2d_grad_input_grouped_hopper(const Conv2dProblem& problem, const void* grad_output,
                                      const void* weight, void* grad_input, const Where& where);
int64_t grouped_hopper_splits(const Conv2dProblem& problem);
void conv2d_grad_weight_grouped_hopper(const Conv2dProblem& problem, const void* grad_output,
                                       const void* input, void* grad_weight, void* grad_bias,
                                       void* workspace, int64_t splits, const Where& where);

}  // namespace gdfast::cuda
