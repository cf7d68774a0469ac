// The matrices of a convolution: how the index of a row or a column becomes a place in a tensor.
//
// All three passes are products of two matrices that are never stored:
//
//   forward      output[position, filter] = sum over taps of input[position, tap]
//                                                            weight[filter, tap]
//   grad_input   grad_input[position, channel] = sum over taps of grad_output[position, tap]
//                                                                 weight[tap, channel]
//   grad_weight  grad_weight[filter, tap] = sum over positions of grad_output[position, filter]
//                                                                 input[position, tap]
//
// A position is (image, row, column), a tap (row, column, channel): three digits of one index.
// Each of the two axes of a matrix gives a part of an element's address and of the row and column
// of the image that it lies in. The parts add up; where the sum falls outside of the image, the
// element is zero.
#pragma once

#include <cstdint>

#include "../conv2d_problem.h"
#include "divisor.h"

namespace gdfast::cuda {

// A part of an element's place. Rows and columns stay below 2^29 beside kOutside, which leaves no
// sum inside of an image.
struct Place {
  int64_t offset;  // bytes
  int32_t h, w;
};

constexpr int32_t kOutside = -(1 << 30);

// What one unit of row, column and channel (or image) adds to an address, in bytes.
struct Steps {
  int64_t outer, h, w;
};

// An axis of (image, row, column), in that order. Its 64 bits are those of the whole axis: a block
// begins at `start_at` and counts on from there in 32.
struct Positions {
  Divisor pixels, columns;  // of one image
  Steps bytes;
  int32_t step_h, step_w, first_h, first_w;  // h = first_h + row * step_h
  int64_t total;
  int64_t offset = 0;
  int32_t first = 0, count = 0;
};

GDFAST_DEVICE void start_at(Positions& axis, int64_t first, int64_t most) {
  const int64_t left = axis.total - first;
  const int64_t image = first / static_cast<int64_t>(axis.pixels.divisor);
  axis.offset = image * axis.bytes.outer;
  axis.first = static_cast<int32_t>(first - image * static_cast<int64_t>(axis.pixels.divisor));
  axis.count = static_cast<int32_t>(left < most ? left : most);
}

GDFAST_DEVICE Place place_at(const Positions& axis, int32_t index) {
  if (index >= axis.count) return {0, kOutside, 0};
  const Divided image = divide(axis.first + index, axis.pixels);
  const Divided row = divide(image.rest, axis.columns);
  const int32_t h = axis.first_h + row.quotient * axis.step_h;
  const int32_t w = axis.first_w + row.rest * axis.step_w;
  const int64_t offset = axis.offset + image.quotient * axis.bytes.outer;
  return {offset + h * axis.bytes.h + w * axis.bytes.w, h, w};
}

// An axis of (row, column, channel), in that order.
struct Taps {
  Divisor channels, columns;
  Steps bytes;
  int32_t step_h, step_w, first_h, first_w;
  int32_t count;
};

GDFAST_DEVICE Place place_at(const Taps& axis, int32_t index) {
  if (index >= axis.count) return {0, kOutside, 0};
  const Divided tap = divide(index, axis.channels);
  const Divided row = divide(tap.quotient, axis.columns);
  const int32_t h = axis.first_h + row.quotient * axis.step_h;
  const int32_t w = axis.first_w + row.rest * axis.step_w;
  return {tap.rest * axis.bytes.outer + h * axis.bytes.h + w * axis.bytes.w, h, w};
}

// An axis of channels alone.
struct Channels {
  int64_t bytes;
  int32_t count;
};

GDFAST_DEVICE Place place_at(const Channels& axis, int32_t index) {
  return {index * axis.bytes, index < axis.count ? 0 : kOutside, 0};
}

// A matrix of elements at data + offset of row and column, in an image of height x width.
template <typename Rows, typename Columns>
struct Operand {
  const unsigned char* data;
  int64_t group_bytes;
  int32_t height, width;
  Rows rows;
  Columns columns;
};

GDFAST_DEVICE bool is_inside(int32_t height, int32_t width, int32_t h, int32_t w) {
  return static_cast<uint32_t>(h) < static_cast<uint32_t>(height) &&
         static_cast<uint32_t>(w) < static_cast<uint32_t>(width);
}

// --- From a problem ---------------------------------------------------------------------------

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline Steps image_steps(const Strides4& strides, int64_t bytes) {
  return {strides.n * bytes, strides.h * bytes, strides.w * bytes};
}

inline Steps channel_steps(const Strides4& strides, int64_t bytes) {
  return {strides.c * bytes, strides.h * bytes, strides.w * bytes};
}

inline int32_t small(int64_t number) { return static_cast<int32_t>(number); }

// Where the windows of all output positions begin in the input.
inline Positions window_positions(const Conv2dProblem& p) {
  return {Divisor::of(p.P * p.Q), Divisor::of(p.Q),  image_steps(p.input, bytes_of(p.dtype)),
          small(p.stride_h),      small(p.stride_w), small(-p.pad_h),
          small(-p.pad_w),        p.N * p.P * p.Q};
}

inline Positions output_positions(const Conv2dProblem& p) {
  return {Divisor::of(p.P * p.Q),
          Divisor::of(p.Q),
          image_steps(p.output, bytes_of(p.dtype)),
          1,
          1,
          0,
          0,
          p.N * p.P * p.Q};
}

// The taps of one window in the input.
inline Taps window_taps(const Conv2dProblem& p) {
  const int64_t C = p.C / p.groups;
  return {Divisor::of(C),
          Divisor::of(p.S),
          channel_steps(p.input, bytes_of(p.dtype)),
          small(p.dilation_h),
          small(p.dilation_w),
          0,
          0,
          small(C * p.R * p.S)};
}

// The same taps in the weight, an image of R x S.
inline Taps weight_taps(const Conv2dProblem& p) {
  Taps taps = window_taps(p);
  taps.bytes = channel_steps(p.weight, bytes_of(p.dtype));
  taps.step_h = taps.step_w = 1;
  return taps;
}

inline Channels filters(const Conv2dProblem& p, int64_t stride) {
  return {stride * bytes_of(p.dtype), small(p.K / p.groups)};
}

template <typename Rows, typename Columns>
Operand<Rows, Columns> input_operand(const Conv2dProblem& p, const void* input, const Rows& rows,
                                     const Columns& columns) {
  return {static_cast<const unsigned char*>(input),
          p.C / p.groups * p.input.c * bytes_of(p.dtype),
          small(p.H),
          small(p.W),
          rows,
          columns};
}

template <typename Rows, typename Columns>
Operand<Rows, Columns> weight_operand(const Conv2dProblem& p, const void* weight, const Rows& rows,
                                      const Columns& columns) {
  return {static_cast<const unsigned char*>(weight),
          p.K / p.groups * p.weight.n * bytes_of(p.dtype),
          small(p.R),
          small(p.S),
          rows,
          columns};
}

template <typename Rows, typename Columns>
Operand<Rows, Columns> output_operand(const Conv2dProblem& p, const void* output, const Rows& rows,
                                      const Columns& columns) {
  return {static_cast<const unsigned char*>(output),
          p.K / p.groups * p.output.c * bytes_of(p.dtype),
          small(p.P),
          small(p.Q),
          rows,
          columns};
}

// --- Phases of a stride -----------------------------------------------------------------------

// Along one axis of the input, pixel h is reached by tap r from output p where
// h + pad = p * stride + r * dilation. Pixels of one phase, h = phase + i * stride, are all reached
// by the same taps, r = tap + j * tap_step, from p = first + i - j * output_step.
struct PhaseAxis {
  int32_t stride, dilation, pad, taps;
  int32_t tap_step, output_step;  // stride and dilation over their greatest common divisor
  Divisor most, fewest;           // the numbers of taps that phases have, if they have any
};

struct Phase {
  int32_t tap, first, taps;
};

GDFAST_DEVICE Phase phase_of(const PhaseAxis& axis, int32_t phase) {
  for (int32_t tap = 0; tap < axis.tap_step && tap < axis.taps; ++tap) {
    const int64_t ahead = int64_t{phase} + axis.pad - int64_t{tap} * axis.dilation;
    if (ahead % axis.stride == 0) {
      return {tap, static_cast<int32_t>(ahead / axis.stride),
              (axis.taps - tap + axis.tap_step - 1) / axis.tap_step};
    }
  }
  return {0, 0, 0};
}

inline PhaseAxis phase_axis(int64_t stride, int64_t dilation, int64_t pad, int64_t taps) {
  int64_t divisor = stride, rest = dilation;
  while (rest != 0) {
    const int64_t next = divisor % rest;
    divisor = rest;
    rest = next;
  }
  const int64_t tap_step = stride / divisor, fewest = taps / tap_step;
  return {small(stride),
          small(dilation),
          small(pad),
          small(taps),
          small(tap_step),
          small(dilation / divisor),
          Divisor::of((taps + tap_step - 1) / tap_step),
          Divisor::of(fewest > 0 ? fewest : 1)};
}

// --- Where results go -------------------------------------------------------------------------

// A matrix [position, channel] that is written.
struct Output {
  unsigned char* data;
  int64_t group_bytes;
  int32_t height, width;
  Positions rows;
  Channels columns;
  bool in_chunks;      // 16 bytes of channels at a time
  bool columns_first;  // channels lie closer to one another than pixels
};

// Whether a tensor of this size may be read or written 16 bytes of channels at a time; `channels`
// are those of one group.
inline bool has_chunks(const void* data, const Strides4& strides, int64_t channels, int64_t N,
                       int64_t H, int64_t W, int64_t bytes) {
  const int64_t lanes = 16 / bytes;
  // The stride of an axis of size 1 means nothing.
  const auto whole = [lanes](int64_t size, int64_t stride) {
    return size == 1 || stride % lanes == 0;
  };
  return strides.c == 1 && channels % lanes == 0 && whole(N, strides.n) && whole(H, strides.h) &&
         whole(W, strides.w) && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

}  // namespace gdfast::cuda
