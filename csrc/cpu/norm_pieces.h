// Batch normalisation piece by piece, for kernels that have a piece's pixels in a cache: what it
// normalises is written as it comes to read that, or its gradient is computed where it is needed.
//
// The results are those of one kernel after the other, bit by bit. For float32 with channels side
// by side.
#pragma once

#include <cstdint>

#include "../batch_norm_problem.h"

namespace gdfast::cpu {

// Writes pixels [first, end) of the input of a batch normalisation, on the calling thread alone.
struct PixelSource {
  void (*write)(const void* self, int64_t first, int64_t end, int thread);
  const void* self;
};

// The gradient of a batch normalisation in its input.
struct PixelGradient {
  // Writes that of pixels [first, end) to `to`, side by side, on the calling thread alone.
  void (*write)(const void* self, int64_t first, int64_t end, float* to);
  const void* self;
  const float* reads[2];  // what it reads of every pixel, side by side, to be fetched ahead
};

// What is called with the gradient when all but that is done.
struct GradientUser {
  void (*run)(const void* self, const PixelGradient& gradient);
  const void* self;
};

#define GDFAST_DECLARE_NORM_PIECES(isa)                                                         \
  namespace isa {                                                                               \
  /* batch_norm() in training, of an input that the source writes. */                           \
  void batch_norm_pieces(const BatchNormProblem& problem, const BatchNormForward& to,           \
                         double momentum, const PixelSource& source, int threads);              \
  /* batch_norm_backward() with grad_input null, which the user gets in its place. */           \
  void batch_norm_backward_pieces(const BatchNormProblem& problem, const BatchNormBackward& to, \
                                  bool training, PreActivation from, const GradientUser& user,  \
                                  int threads);                                                 \
  }

GDFAST_DECLARE_NORM_PIECES(baseline)
GDFAST_DECLARE_NORM_PIECES(avx2)
GDFAST_DECLARE_NORM_PIECES(avx512)
#undef GDFAST_DECLARE_NORM_PIECES

}  // namespace gdfast::cpu
