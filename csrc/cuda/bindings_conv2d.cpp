// Binds the convolution kernels.
#include "../bindings_conv2d_problem.h"
#include "bindings.h"
#include "conv2d.h"

namespace gdfast::cuda {
namespace {

Precision precision_named(const std::string& name) {
  if (name == "tf32") return Precision::kTf32;
  if (name == "tf32x3") return Precision::kTf32x3;
  if (name == "ieee") return Precision::kIeee;
  throw py::value_error("Conv2dRun: precision: expected tf32, tf32x3 or ieee, got " + name);
}

BlockTile tile_named(const std::string& name) {
  if (name == "128x128") return BlockTile::k128x128;
  if (name == "128x64") return BlockTile::k128x64;
  if (name == "64x64") return BlockTile::k64x64;
  throw py::value_error("Conv2dRun: tile: expected 128x128, 128x64 or 64x64, got " + name);
}

Activation activation_named(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  if (name == "silu") return Activation::kSilu;
  throw py::value_error("conv2d: activation: expected none, relu, relu6, leaky_relu or silu, got " +
                        name);
}

}  // namespace

void bind_conv2d(py::module_& m) {
  bind_conv2d_problem(m);
  py::class_<Conv2dWay>(m, "Conv2dWay",
                        "How float32 is multiplied (tf32, tf32x3 or ieee), and the positions x "
                        "filters or channels that a block makes (128x128, 128x64 or 64x64).")
      .def(py::init([](const std::string& precision, const std::string& tile) {
             return Conv2dWay{precision_named(precision), tile_named(tile)};
           }),
           py::arg("precision"), py::arg("tile"));
  m.def(
      "conv2d",
      [](const Conv2dProblem& problem, const Conv2dWay& way, uintptr_t input, uintptr_t weight,
         uintptr_t bias, uintptr_t output, const std::string& activation, double negative_slope,
         int device, uintptr_t stream) {
        const Activation what = activation_named(activation);
        py::gil_scoped_release release;
        conv2d(problem, way, pointer(input), pointer(weight), pointer(bias), pointer(output), what,
               negative_slope, {device, stream});
      },
      py::arg("problem"), py::arg("way"), py::arg("input"), py::arg("weight"), py::arg("bias"),
      py::arg("output"), py::arg("activation"), py::arg("negative_slope"), py::arg("device"),
      py::arg("stream"),
      "Writes activation(conv2d + bias) to output. Tensors are addresses on the device, bias 0 for "
      "none.");
}

}  // namespace gdfast::cuda
