// The 1x1 convolution of images in NCHW on Hopper's tensor cores: what it takes, and its launcher.
#pragma once

#include <string>

#include "conv2d.h"

namespace gdfast::cuda {

// Why conv2d_planes, or conv2d_grad_input_planes where `gradient`, does not take a problem, or "".
// It looks at the geometry, dtype and strides; addresses must be multiples of 16 too.
std::string conv2d_planes_why_not(const Conv2dProblem& problem, bool gradient);

// output = activation(conv2d(input, weight) + bias); bias may be null.
void conv2d_planes(const Conv2dProblem& problem, const void* input, const void* weight,
                   const void* bias, void* output, const Where& where);

void conv2d_grad_input_planes(const Conv2dProblem& problem, const void* grad_output,
                              const void* weight, void* grad_input, const Where& where);

}  // namespace gdfast::cuda
