// The convolution of Hopper's tensor cores: what it takes, and its launcher.
#pragma once

#include <cstdint>
#include <string>

#include "conv2d.h"

namespace gdfast::cuda {

// Why conv2d_hopper, or conv2d_grad_input_hopper where `gradient`, does not take a problem, or "".
// It looks at the geometry, dtype and strides; addresses must be multiples of 16 too.
std::string conv2d_hopper_why_not(const Conv2dProblem& problem, bool gradient);

// Why the kernels do not run on a device, or "".
std::string hopper_missing(int device);

// channels: of a tile, 64, 128 or 256, or 0 for the one that a guess at its time gives.
// output = activation(conv2d(input, weight) + bias); bias may be null.
void conv2d_hopper(const Conv2dProblem& problem, int channels, const void* input,
                   const void* weight, const void* bias, void* output, const Where& where);

void conv2d_grad_input_hopper(const Conv2dProblem& problem, int channels, const void* grad_output,
                              const void* weight, void* grad_input, const Where& where);

}  // namespace gdfast::cuda
