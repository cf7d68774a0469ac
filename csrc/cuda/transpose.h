// Matrices transposed one by one: what changes the layout of images. NCHW is a [C, H W] matrix for
// each image, channels_last a [H W, C] one.
#pragma once

#include <cstdint>

#include "conv2d.h"

namespace gdfast::cuda {

// to[i, b, a] = from[i, a, b] for `count` matrices of [rows, columns], dense in row order, of
// elements that are 2, 4 or 8 bytes. `from` and `to` share no memory.
void transpose(const void* from, void* to, int64_t count, int64_t rows, int64_t columns,
               int element_bytes, const Where& where);

}  // namespace gdfast::cuda
