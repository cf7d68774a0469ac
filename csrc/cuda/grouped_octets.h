// The forward pass and the gradient in the input in groups of 32 channels on Hopper, for images of
// 7 x 7 in bfloat16, as conv2d.h has them for other groups.
#pragma once

#include <string>

#include "conv2d.h"

namespace gdfast::cuda {

std::string grouped_octets_why_not(const Conv2dProblem& problem, GroupedPass pass);
void conv2d_grouped_octets(const Conv2dProblem& problem, const void* input, const void* weight,
                           const void* bias, void* output, const Where& where);
void conv2d_grad_input_grouped_octets(const Conv2dProblem& problem, const void* grad_output,
                                      const void* weight, void* grad_input, const Where& where);

}  // namespace gdfast::cuda
