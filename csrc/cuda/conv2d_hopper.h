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

// What a block makes at a time: 128 pixels by 64, 128 or 256 channels, or 256 by 128; 0 by 0 is the
// one that a guess at its time gives.
struct HopperTileSize {
  int pixels, channels;
};

bool is_hopper_tile(const HopperTileSize& tile);

// output = activation(conv2d(input, weight) + bias); bias may be null. So may be `moments`
// [splits, 3, K] in float32, which gets what a batch normalisation of output begins with
// (moments.h).
void conv2d_hopper(const Conv2dProblem& problem, const HopperTileSize& tile, const void* input,
                   const void* weight, const void* bias, void* output, void* moments,
                   const Where& where);

// 0 where there would be so many that a pass over the output is as good.
int64_t conv2d_hopper_moment_splits(const Conv2dProblem& problem, const HopperTileSize& tile,
                                    int device);

void conv2d_grad_input_hopper(const Conv2dProblem& problem, const HopperTileSize& tile,
                              const void* grad_output, const void* weight, void* grad_input,
                              const Where& where);

}  // namespace gdfast::cuda
