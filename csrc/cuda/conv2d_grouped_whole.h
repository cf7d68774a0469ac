// Convolution in groups on Hopper whose images are small enough for a block to have them whole
// or to walk down them (grouped_whole.h), as conv2d.h has it for others: groups of 32 channels on
// images of 7 x 7, of 16 on 14 x 14, of 8 on 28 x 28 and of 4 on 56 x 56, in bfloat16. The gradient
// of the weight (grouped_whole_grad_weight.cu) is of any layout.
#pragma once

#include <string>

#include "conv2d.h"

namespace gdfast::cuda {

std::string grouped_whole_why_not(const Conv2dProblem& problem, GroupedPass pass);
void conv2d_grouped_whole(const Conv2dProblem& problem, const void* input, const void* weight,
                          const void* bias, void* output, const Where& where);
void conv2d_grad_input_grouped_whole(const Conv2dProblem& problem, const void* grad_output,
                                     const void* weight, void* grad_input, const Where& where);
int64_t grouped_whole_splits(const Conv2dProblem& problem);
void conv2d_grad_weight_grouped_whole(const Conv2dProblem& problem, const void* grad_output,
                                      const void* input, void* grad_weight, void* grad_bias,
                                      void* workspace, int64_t splits, const Where& where);

}  // namespace gdfast::cuda
