// The CUDA kernels' launchers. They return at once; what went wrong is thrown as
// std::runtime_error with the operation's name.
#pragma once

#include <cstdint>
#include <string>

#include "../batch_norm_problem.h"
#include "../max_pool2d_problem.h"
#include "../sgd_math.h"
#include "sgd_chunks.h"

namespace gdfast::cuda {

// Why no kernel of this module runs on a device, or "".
std::string why_not_device(int device);

// One SGD update of several tensors on a stream of a device; hyper.grad_scale is not looked at.
void sgd(const SgdTensor* tensors, int64_t count, const SgdHyper& hyper, const SgdScalars& scalars,
         int device, uintptr_t stream);

// Batch normalisation as in ../cpu/kernels.h. N S, C <= 65535 and N S < 2^31. The workspace has as
// many bytes as batch_norm_workspace_bytes says, from an address that 16 divides. Moments of the
// input, which conv2d may have written with it, take the place of a pass over it.
struct BatchNormMoments {
  const void* parts;  // [count, 3, C] in the type that sums are taken in (moments.h), or null
  int64_t count;
};
int64_t batch_norm_workspace_bytes(const BatchNormProblem& problem);
// `batches` is a counter of batches on the device, to which it adds 1, or null.
void batch_norm(const BatchNormProblem& problem, const BatchNormForward& to, bool training,
                double momentum, const BatchNormMoments& moments, int64_t* batches, void* workspace,
                int device, uintptr_t stream);
void batch_norm_backward(const BatchNormProblem& problem, const BatchNormBackward& to,
                         bool training, PreActivation from, void* workspace, int device,
                         uintptr_t stream);

// Max pooling; images of less than 2^31 elements.
void max_pool2d(const MaxPool2dProblem& problem, const void* input, void* output, void* argmax,
                int device, uintptr_t stream);
void max_pool2d_grad(const MaxPool2dProblem& problem, const void* grad_output, const void* argmax,
                     void* grad_input, int device, uintptr_t stream);

}  // namespace gdfast::cuda
