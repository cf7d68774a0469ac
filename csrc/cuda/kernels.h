// The CUDA kernels' launchers. They return at once; what went wrong is thrown as
// std::runtime_error with the operation's name.
#pragma once

#include <cstdint>

#include "../sgd_math.h"
#include "sgd_chunks.h"

namespace gdfast::cuda {

// One SGD update of several tensors on a stream of a device; hyper.grad_scale is not looked at.
void sgd(const SgdTensor* tensors, int64_t count, const SgdHyper& hyper, const SgdScalars& scalars,
         int device, uintptr_t stream);

}  // namespace gdfast::cuda
