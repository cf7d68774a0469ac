// What both directions of max pooling share. A thread makes a vector of neighbouring channels of
// one pixel: 16 bytes in channels_last, else a single one. Windows overlap; L1 has what
// neighbouring threads read twice.
#pragma once

#include "../max_pool2d_problem.h"
#include "images.h"

namespace gdfast::cuda {

struct PoolArguments {
  ImageWalk walk;
  int H, W, P, Q, R, S;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  ImageStrides input, output, argmax;
  bool relu;

  // With a thread for each of the pixels [rows, columns] of an image.
  static PoolArguments of(const MaxPool2dProblem& p, int vector, int64_t rows, int64_t columns) {
    PoolArguments a{};
    a.walk = ImageWalk::of(p.N, p.C / vector, rows, columns, p.input.c == 1 && p.C > 1);
    a.H = static_cast<int>(p.H);
    a.W = static_cast<int>(p.W);
    a.P = static_cast<int>(p.P);
    a.Q = static_cast<int>(p.Q);
    a.R = static_cast<int>(p.R);
    a.S = static_cast<int>(p.S);
    a.stride_h = static_cast<int>(p.stride_h);
    a.stride_w = static_cast<int>(p.stride_w);
    a.pad_h = static_cast<int>(p.pad_h);
    a.pad_w = static_cast<int>(p.pad_w);
    a.dilation_h = static_cast<int>(p.dilation_h);
    a.dilation_w = static_cast<int>(p.dilation_w);
    a.input = ImageStrides::of(p.input);
    a.output = ImageStrides::of(p.output);
    a.argmax = ImageStrides::of(p.argmax);
    a.relu = p.relu;
    return a;
  }
};

// Calls f(vector, place): a constant for how many channels a thread takes, and a value of the type
// of argmax.
template <typename T, typename F>
void with_pool_vectors(const MaxPool2dProblem& p, bool aligned, F&& f) {
  constexpr int kVector = kWholeVector<T>;
  if (!p.is_narrow()) return f(Constant<1>{}, int32_t{});
  if constexpr (kVector > 1) {
    if (aligned && p.C % kVector == 0 && has_channel_vectors(p.input, kVector) &&
        has_channel_vectors(p.output, kVector) && has_channel_vectors(p.argmax, kVector)) {
      return f(Constant<kVector>{}, uint8_t{});
    }
  }
  f(Constant<1>{}, uint8_t{});
}

}  // namespace gdfast::cuda
