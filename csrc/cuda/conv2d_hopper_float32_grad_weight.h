// The gradient in the weight of float32 as it is by Hopper's tensor cores: what it takes, and its
// launcher.
#pragma once

#include <cstdint>
#include <string>

#include "conv2d_hopper_grad_weight.h"

namespace gdfast::cuda {

// Whether there are such blocks: 128 filters x 128 columns, 64 x 192 or 64 x 256.
bool is_hopper_float32_weight_block(const HopperWeightBlock& block);

// As for conv2d_grad_weight_hopper; input and grad_output must be dense in memory too.
std::string conv2d_grad_weight_hopper_float32_why_not(const Conv2dProblem& problem);

int64_t conv2d_grad_weight_hopper_float32_splits(const Conv2dProblem& problem,
                                                 const HopperWeightBlock& block,
                                                 int64_t multiprocessors);

// Bytes of workspace for the parts of grad_output.
int64_t conv2d_grad_weight_hopper_float32_parts(const Conv2dProblem& problem);

// Leaves sums in a workspace as conv2d_grad_weight_hopper does.
void conv2d_grad_weight_hopper_float32(const Conv2dProblem& problem, const HopperWeightBlock& block,
                                       const void* grad_output, const void* input, void* parts,
                                       void* workspace, int64_t splits, const Where& where);

}  // namespace gdfast::cuda
