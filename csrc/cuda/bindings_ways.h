// Checks of the ways of convolving that bindings are told, by the numbers that name them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "conv2d_hopper.h"
#include "conv2d_hopper_grad_weight.h"
#include "conv2d_hopper_halo.h"

namespace gdfast::cuda {

namespace py = pybind11;

inline HopperTileSize hopper_tile(int pixels, int channels) {
  const HopperTileSize tile{pixels, channels};
  if (is_hopper_tile(tile)) return tile;
  throw py::value_error(
      "conv2d_hopper: tile: expected 128 x 64, 128 x 128, 128 x 256, 256 x 128 or 0 x 0, got " +
      std::to_string(pixels) + " x " + std::to_string(channels));
}

inline HopperWeightBlock hopper_weight_block(int filters, int columns) {
  const HopperWeightBlock block{filters, columns};
  if (is_hopper_weight_block(block)) return block;
  throw py::value_error(
      "conv2d_grad_weight_hopper: block: expected 64 x 576, 128 x 128, 128 x 192, 128 x 256 or "
      "256 x 128, got " +
      std::to_string(filters) + " x " + std::to_string(columns));
}

inline void check_splits(int64_t splits) {
  if (splits >= 1 && splits <= 65535) return;
  throw py::value_error("conv2d_grad_weight: splits: expected 1 to 65535, got " +
                        std::to_string(splits));
}

inline int halo_channels(int channels) {
  if (channels == 64 || channels == 128) return channels;
  throw py::value_error("conv2d_halo: channels: expected 64 or 128, got " +
                        std::to_string(channels));
}

}  // namespace gdfast::cuda
