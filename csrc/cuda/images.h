// Threads over images: where a vector of neighbouring channels of one pixel is in memory, and which
// of them a thread takes.
#pragma once

#include "../conv2d_problem.h"
#include "divisor.h"
#include "vectors.h"

namespace gdfast::cuda {

// Element strides; within an image offsets have 32 bits.
struct ImageStrides {
  int64_t n;
  int c, h, w;

  static ImageStrides of(const Strides4& strides) {
    return {strides.n, static_cast<int>(strides.c), static_cast<int>(strides.h),
            static_cast<int>(strides.w)};
  }
};

// Whether vectors of `vector` channels lie side by side, at addresses that their size divides.
inline bool has_channel_vectors(const Strides4& strides, int64_t vector) {
  return strides.c == 1 && strides.n % vector == 0 && strides.h % vector == 0 &&
         strides.w % vector == 0;
}

constexpr int kImageThreads = 256;

// One thread for each pixel and vector of channels of an image, then for the next images. Threads
// side by side take what lies side by side: channels in channels_last, else columns.
struct ImageWalk {
  int N;
  int threads;  // for one image
  bool channels_inside;
  Divisor inside, middle;

  static ImageWalk of(int64_t N, int64_t groups, int64_t rows, int64_t columns,
                      bool channels_inside) {
    return {static_cast<int>(N), static_cast<int>(groups * rows * columns), channels_inside,
            Divisor::of(channels_inside ? groups : columns),
            Divisor::of(channels_inside ? columns : rows)};
  }

  dim3 grid() const {
    constexpr int kMost = 65535;  // of the second axis
    return dim3(static_cast<unsigned>(ceil_div(threads, kImageThreads)),
                static_cast<unsigned>(N < kMost ? N : kMost));
  }
};

struct ImagePlace {
  int group, row, column;
  bool exists;
};

GDFAST_DEVICE ImagePlace place_in_image(const ImageWalk& walk) {
  const int index = static_cast<int>(blockIdx.x) * kImageThreads + static_cast<int>(threadIdx.x);
  const Divided first = divide(index, walk.inside), second = divide(first.quotient, walk.middle);
  const bool exists = index < walk.threads;
  if (walk.channels_inside) return {first.rest, second.quotient, second.rest, exists};
  return {second.quotient, second.rest, first.rest, exists};
}

}  // namespace gdfast::cuda
