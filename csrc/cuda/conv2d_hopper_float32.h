// Convolutions of float32 as it is, without TF32, by Hopper's tensor cores: what they take, and
// their launchers. Products are made of bfloat16 parts (bfloat16_parts.h) and summed in float32.
#pragma once

#include <cstdint>
#include <string>

#include "conv2d_hopper.h"

namespace gdfast::cuda {

// Why conv2d_hopper_float32, or its gradient in the input where `gradient`, does not take a
// problem, or "". It looks at the geometry, dtype and strides; input, output and their gradients
// must lie at multiples of 16 too, the weight may lie as it likes.
std::string conv2d_hopper_float32_why_not(const Conv2dProblem& problem, bool gradient);

// What a block makes at a time: 128 pixels by 64 or 128 channels, or 256 by 64.
bool is_hopper_float32_tile(const HopperTileSize& tile);

// Bytes of workspace, at a multiple of 16: the weight's parts.
int64_t conv2d_hopper_float32_workspace(const Conv2dProblem& problem, bool gradient);

// output = activation(conv2d(input, weight) + bias); bias may be null.
void conv2d_hopper_float32(const Conv2dProblem& problem, const HopperTileSize& tile,
                           const void* input, const void* weight, const void* bias, void* output,
                           void* workspace, const Where& where);

void conv2d_grad_input_hopper_float32(const Conv2dProblem& problem, const HopperTileSize& tile,
                                      const void* grad_output, const void* weight, void* grad_input,
                                      void* workspace, const Where& where);

}  // namespace gdfast::cuda
