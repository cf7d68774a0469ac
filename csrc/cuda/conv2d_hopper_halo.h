// The convolution of Hopper's tensor cores whose taps share boxes: what it takes, and its launcher.
#pragma once

#include <string>

#include "conv2d.h"

namespace gdfast::cuda {

// Why conv2d_halo, or conv2d_grad_input_halo where `gradient`, does not take a problem, or "". It
// looks at the geometry, dtype and strides; addresses must be multiples of 16 too. Here and below,
// a block makes `channels` at a time, 64 or 128, of as many pixels as one product has.
std::string conv2d_halo_why_not(const Conv2dProblem& problem, int channels, bool gradient);

// output = activation(conv2d(input, weight) + bias); bias may be null. So may be `moments`
// [splits, 3, K] in float32, which gets what a batch normalisation of output begins with
// (moments.h); it is where there are no splits.
void conv2d_halo(const Conv2dProblem& problem, int channels, const void* input, const void* weight,
                 const void* bias, void* output, void* moments, const Where& where);
// 0 where there is an activation, or more of them than one kernel joins.
int64_t conv2d_halo_moment_splits(const Conv2dProblem& problem, int channels, int device);

void conv2d_grad_input_halo(const Conv2dProblem& problem, int channels, const void* grad_output,
                            const void* weight, void* grad_input, const Where& where);

}  // namespace gdfast::cuda
