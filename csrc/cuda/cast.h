// Numbers of one type made another: what autocast does to weights, and backward to their gradients.
#pragma once

#include <cstdint>

#include "conv2d.h"

namespace gdfast::cuda {

// to[i] = from[i], rounded to nearest, for `count` numbers side by side: from float32 to a half
// type or back.
void cast(const void* from, void* to, int64_t count, DType half, bool to_half, const Where& where);

}  // namespace gdfast::cuda
