// The gradient in the weight by Hopper's tensor cores: what it takes, and its launcher.
#pragma once

#include <cstdint>
#include <string>

#include "conv2d.h"

namespace gdfast::cuda {

// Filters by columns of the weight that a block makes, which are 64 channels of a tap each:
// 64 x 576, 128 x 128, 128 x 192, 128 x 256 or 256 x 128.
struct HopperWeightBlock {
  int filters, columns;
};

bool is_hopper_weight_block(const HopperWeightBlock& block);

// Why conv2d_grad_weight_hopper does not take a problem, or "". It looks at the geometry, dtype and
// strides; addresses must be multiples of 16 too.
std::string conv2d_grad_weight_hopper_why_not(const Conv2dProblem& problem);

// Likewise for images in NCHW, which it reads as they lie where this has nothing against it and the
// block is not 64 x 576.
std::string conv2d_grad_weight_planes_why_not(const Conv2dProblem& problem);

// In how many parts a GPU of so many multiprocessors should sum positions: a guess at what is
// fastest.
int64_t conv2d_grad_weight_hopper_splits(const Conv2dProblem& problem,
                                         const HopperWeightBlock& block, int64_t multiprocessors);

// Sums positions in `splits` parts, and leaves these in the workspace as conv2d_grad_weight does.
void conv2d_grad_weight_hopper(const Conv2dProblem& problem, const HopperWeightBlock& block,
                               const void* grad_output, const void* input, void* workspace,
                               int64_t splits, const Where& where);

}  // namespace gdfast::cuda
