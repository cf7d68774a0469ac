// Binds the float32 convolutions of Hopper's tensor cores.
#include <pybind11/pybind11.h>

#include "../bindings.h"
#include "bindings.h"
#include "conv2d_hopper_float32.h"
#include "conv2d_hopper_float32_grad_weight.h"

namespace gdfast::cuda {

namespace py = pybind11;

namespace {

std::string sizes(int rows, int columns) {
  return std::to_string(rows) + " x " + std::to_string(columns);
}

HopperTileSize tile_of(int pixels, int channels) {
  const HopperTileSize tile{pixels, channels};
  if (is_hopper_float32_tile(tile)) return tile;
  throw py::value_error(
      "conv2d_hopper_float32: tile: expected 128 x 64, 128 x 128 or 256 x 64, got " +
      sizes(pixels, channels));
}

HopperWeightBlock block_of(int filters, int columns) {
  const HopperWeightBlock block{filters, columns};
  if (is_hopper_float32_weight_block(block)) return block;
  throw py::value_error(
      "conv2d_grad_weight_hopper_float32: block: expected 128 x 128, 64 x 192 or 64 x 256, got " +
      sizes(filters, columns));
}

}  // namespace

void bind_hopper_float32(py::module_& m) {
  m.def("conv2d_hopper_float32_why_not", &conv2d_hopper_float32_why_not, py::arg("problem"),
        py::arg("gradient"),
        "Why conv2d_hopper_float32, or its gradient, does not take a problem, or an empty string. "
        "Addresses but the weight's must be multiples of 16 too.");
  m.def("conv2d_hopper_float32_workspace", &conv2d_hopper_float32_workspace, py::arg("problem"),
        py::arg("gradient"), "The bytes of workspace that they need.");
  m.def(
      "conv2d_hopper_float32",
      [](const Conv2dProblem& problem, int pixels, int channels, uintptr_t input, uintptr_t weight,
         uintptr_t bias, uintptr_t output, uintptr_t workspace, int device, uintptr_t stream) {
        const HopperTileSize tile = tile_of(pixels, channels);
        launching(problem, [&] {
          conv2d_hopper_float32(problem, tile, pointer(input), pointer(weight), pointer(bias),
                                pointer(output), pointer(workspace), {device, stream});
        });
      },
      py::arg("problem"), py::arg("pixels"), py::arg("channels"), py::arg("input"),
      py::arg("weight"), py::arg("bias"), py::arg("output"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"),
      "As conv2d, for problems that conv2d_hopper_float32_why_not has nothing against, in tiles of "
      "128 pixels by 64 or 128 channels or of 256 by 64.");
  m.def(
      "conv2d_grad_input_hopper_float32",
      [](const Conv2dProblem& problem, int pixels, int channels, uintptr_t grad_output,
         uintptr_t weight, uintptr_t grad_input, uintptr_t workspace, int device,
         uintptr_t stream) {
        const HopperTileSize tile = tile_of(pixels, channels);
        launching(problem, [&] {
          conv2d_grad_input_hopper_float32(problem, tile, pointer(grad_output), pointer(weight),
                                           pointer(grad_input), pointer(workspace),
                                           {device, stream});
        });
      },
      py::arg("problem"), py::arg("pixels"), py::arg("channels"), py::arg("grad_output"),
      py::arg("weight"), py::arg("grad_input"), py::arg("workspace"), py::arg("device"),
      py::arg("stream"), "As conv2d_grad_input, likewise.");
  m.def("conv2d_grad_weight_hopper_float32_why_not", &conv2d_grad_weight_hopper_float32_why_not,
        py::arg("problem"),
        "Why conv2d_grad_weight_hopper_float32 does not take a problem, or an empty string. "
        "Addresses must be multiples of 16 too.");
  m.def(
      "conv2d_grad_weight_hopper_float32_splits",
      [](const Conv2dProblem& problem, int filters, int columns, int64_t multiprocessors) {
        return conv2d_grad_weight_hopper_float32_splits(problem, block_of(filters, columns),
                                                        multiprocessors);
      },
      py::arg("problem"), py::arg("filters"), py::arg("columns"), py::arg("multiprocessors"),
      "In how many splits positions are best summed: a guess.");
  m.def("conv2d_grad_weight_hopper_float32_parts", &conv2d_grad_weight_hopper_float32_parts,
        py::arg("problem"), "The bytes that grad_output's parts take.");
  m.def(
      "conv2d_grad_weight_hopper_float32",
      [](const Conv2dProblem& problem, int filters, int columns, uintptr_t grad_output,
         uintptr_t input, uintptr_t parts, uintptr_t workspace, int64_t splits, int device,
         uintptr_t stream) {
        const HopperWeightBlock block = block_of(filters, columns);
        launching(problem, [&] {
          conv2d_grad_weight_hopper_float32(problem, block, pointer(grad_output), pointer(input),
                                            pointer(parts), pointer(workspace), splits,
                                            {device, stream});
        });
      },
      py::arg("problem"), py::arg("filters"), py::arg("columns"), py::arg("grad_output"),
      py::arg("input"), py::arg("parts"), py::arg("workspace"), py::arg("splits"),
      py::arg("device"), py::arg("stream"),
      "Leaves the splits' sums of grad_weight in the workspace, as conv2d_grad_weight does, and "
      "grad_output's parts beside it; a block makes 128 filters x 128 columns, 64 x 192 or 64 x "
      "256.");
}

}  // namespace gdfast::cuda
