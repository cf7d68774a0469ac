// Binds the convolution kernels.
#include "../bindings_conv2d_problem.h"
#include "../sgd_arguments.h"
#include "bindings.h"
#include "bindings_ways.h"
#include "conv2d.h"
#include "conv2d_hopper_planes.h"

namespace gdfast::cuda {
namespace {

Precision precision_named(const std::string& name) {
  if (name == "tf32") return Precision::kTf32;
  if (name == "tf32x3") return Precision::kTf32x3;
  if (name == "ieee") return Precision::kIeee;
  throw py::value_error("Conv2dWay: precision: expected tf32, tf32x3 or ieee, got " + name);
}

BlockTile tile_named(const std::string& name) {
  if (name == "128x128") return BlockTile::k128x128;
  if (name == "128x64") return BlockTile::k128x64;
  if (name == "64x64") return BlockTile::k64x64;
  throw py::value_error("Conv2dWay: tile: expected 128x128, 128x64 or 64x64, got " + name);
}

void check_weight_dtype(DType weight, DType images) {
  const bool half = images == DType::kBFloat16 || images == DType::kFloat16;
  if (weight == images || (half && weight == DType::kFloat32)) return;
  throw py::value_error(
      "conv2d_grad_weight_sgd: dtype: expected the problem's, or float32 where that is a half "
      "type");
}

void bind_hopper(py::module_& m) {
  m.def("hopper_missing", &hopper_missing, py::arg("device"),
        "Why the kernels for Hopper do not run on a device, or an empty string.");
  m.def(
      "conv2d_hopper_why_not", &conv2d_hopper_why_not, py::arg("problem"), py::arg("gradient"),
      "Why conv2d_hopper, or its gradient, does not take a problem, or an empty string. Addresses "
      "must be multiples of 16 too.");
  m.def(
      "conv2d_hopper",
      [](const Conv2dProblem& problem, int pixels, int channels, uintptr_t input, uintptr_t weight,
         uintptr_t bias, uintptr_t output, uintptr_t moments, int device, uintptr_t stream) {
        const HopperTileSize tile = hopper_tile(pixels, channels);
        launching(problem, [&] {
          conv2d_hopper(problem, tile, pointer(input), pointer(weight), pointer(bias),
                        pointer(output), pointer(moments), {device, stream});
        });
      },
      py::arg("problem"), py::arg("pixels"), py::arg("channels"), py::arg("input"),
      py::arg("weight"), py::arg("bias"), py::arg("output"), py::arg("moments"), py::arg("device"),
      py::arg("stream"),
      "As conv2d, for problems that conv2d_hopper_why_not has nothing against, in tiles of 128 "
      "pixels by 64, 128 or 256 channels or of 256 by 128, or 0 by 0 for a guess which.");
  m.def(
      "conv2d_hopper_moment_splits",
      [](const Conv2dProblem& problem, int pixels, int channels, int device) {
        return conv2d_hopper_moment_splits(problem, hopper_tile(pixels, channels), device);
      },
      py::arg("problem"), py::arg("pixels"), py::arg("channels"), py::arg("device"),
      "The first size of the moments that conv2d_hopper writes; 0 where they are not worth it.");
  m.def(
      "conv2d_grad_input_hopper",
      [](const Conv2dProblem& problem, int pixels, int channels, uintptr_t grad_output,
         uintptr_t weight, uintptr_t grad_input, int device, uintptr_t stream) {
        const HopperTileSize tile = hopper_tile(pixels, channels);
        launching(problem, [&] {
          conv2d_grad_input_hopper(problem, tile, pointer(grad_output), pointer(weight),
                                   pointer(grad_input), {device, stream});
        });
      },
      py::arg("problem"), py::arg("pixels"), py::arg("channels"), py::arg("grad_output"),
      py::arg("weight"), py::arg("grad_input"), py::arg("device"), py::arg("stream"),
      "As conv2d_grad_input, likewise.");
}

void bind_halo(py::module_& m) {
  m.def(
      "conv2d_halo_why_not",
      [](const Conv2dProblem& problem, int channels, bool gradient) {
        return conv2d_halo_why_not(problem, halo_channels(channels), gradient);
      },
      py::arg("problem"), py::arg("channels"), py::arg("gradient"),
      "Why conv2d_halo, or its gradient, does not take a problem, or an empty string. Addresses "
      "must be multiples of 16 too.");
  m.def(
      "conv2d_halo",
      [](const Conv2dProblem& problem, int channels, uintptr_t input, uintptr_t weight,
         uintptr_t bias, uintptr_t output, uintptr_t moments, int device, uintptr_t stream) {
        const int made = halo_channels(channels);
        launching(problem, [&] {
          conv2d_halo(problem, made, pointer(input), pointer(weight), pointer(bias),
                      pointer(output), pointer(moments), {device, stream});
        });
      },
      py::arg("problem"), py::arg("channels"), py::arg("input"), py::arg("weight"), py::arg("bias"),
      py::arg("output"), py::arg("moments"), py::arg("device"), py::arg("stream"),
      "As conv2d, for problems that conv2d_halo_why_not has nothing against, in tiles of 64 or 128 "
      "channels.");
  m.def(
      "conv2d_halo_moment_splits",
      [](const Conv2dProblem& problem, int channels, int device) {
        return conv2d_halo_moment_splits(problem, halo_channels(channels), device);
      },
      py::arg("problem"), py::arg("channels"), py::arg("device"),
      "The first size of the moments that conv2d_halo writes; 0 where they are not worth it.");
  m.def(
      "conv2d_grad_input_halo",
      [](const Conv2dProblem& problem, int channels, uintptr_t grad_output, uintptr_t weight,
         uintptr_t grad_input, int device, uintptr_t stream) {
        const int made = halo_channels(channels);
        launching(problem, [&] {
          conv2d_grad_input_halo(problem, made, pointer(grad_output), pointer(weight),
                                 pointer(grad_input), {device, stream});
        });
      },
      py::arg("problem"), py::arg("channels"), py::arg("grad_output"), py::arg("weight"),
      py::arg("grad_input"), py::arg("device"), py::arg("stream"),
      "As conv2d_grad_input, likewise.");
}

void bind_planes(py::module_& m) {
  m.def("conv2d_planes_why_not", &conv2d_planes_why_not, py::arg("problem"), py::arg("gradient"),
        "Why conv2d_planes, or its gradient, does not take a problem, or an empty string. "
        "Addresses must be multiples of 16 too.");
  m.def(
      "conv2d_planes",
      [](const Conv2dProblem& problem, uintptr_t input, uintptr_t weight, uintptr_t bias,
         uintptr_t output, int device, uintptr_t stream) {
        launching(problem, [&] {
          conv2d_planes(problem, pointer(input), pointer(weight), pointer(bias), pointer(output),
                        {device, stream});
        });
      },
      py::arg("problem"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
      py::arg("device"), py::arg("stream"),
      "As conv2d, for 1x1 convolutions in NCHW that conv2d_planes_why_not has nothing against.");
  m.def(
      "conv2d_grad_input_planes",
      [](const Conv2dProblem& problem, uintptr_t grad_output, uintptr_t weight,
         uintptr_t grad_input, int device, uintptr_t stream) {
        launching(problem, [&] {
          conv2d_grad_input_planes(problem, pointer(grad_output), pointer(weight),
                                   pointer(grad_input), {device, stream});
        });
      },
      py::arg("problem"), py::arg("grad_output"), py::arg("weight"), py::arg("grad_input"),
      py::arg("device"), py::arg("stream"), "As conv2d_grad_input, likewise.");
}

void bind_hopper_grad_weight(py::module_& m) {
  m.def("conv2d_grad_weight_hopper_why_not", &conv2d_grad_weight_hopper_why_not, py::arg("problem"),
        "Why conv2d_grad_weight_hopper does not take a problem, or an empty string. Addresses must "
        "be multiples of 16 too.");
  m.def("conv2d_grad_weight_planes_why_not", &conv2d_grad_weight_planes_why_not, py::arg("problem"),
        "Likewise for images in NCHW, in blocks other than 64 x 576.");
  m.def(
      "conv2d_grad_weight_hopper_splits",
      [](const Conv2dProblem& problem, int filters, int columns, int64_t multiprocessors) {
        return conv2d_grad_weight_hopper_splits(problem, hopper_weight_block(filters, columns),
                                                multiprocessors);
      },
      py::arg("problem"), py::arg("filters"), py::arg("columns"), py::arg("multiprocessors"),
      "In how many splits positions are best summed: a guess.");
  m.def(
      "conv2d_grad_weight_hopper",
      [](const Conv2dProblem& problem, int filters, int columns, uintptr_t grad_output,
         uintptr_t input, uintptr_t workspace, int64_t splits, int device, uintptr_t stream) {
        check_splits(splits);
        const HopperWeightBlock block = hopper_weight_block(filters, columns);
        launching(problem, [&] {
          conv2d_grad_weight_hopper(problem, block, pointer(grad_output), pointer(input),
                                    pointer(workspace), splits, {device, stream});
        });
      },
      py::arg("problem"), py::arg("filters"), py::arg("columns"), py::arg("grad_output"),
      py::arg("input"), py::arg("workspace"), py::arg("splits"), py::arg("device"),
      py::arg("stream"),
      "Leaves the parts of grad_weight in the workspace, as conv2d_grad_weight does, for problems "
      "that conv2d_grad_weight_hopper_why_not has nothing against; a block makes 64 filters x 576 "
      "columns, 128 x 128, 128 x 192, 128 x 256 or 256 x 128.");
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
         uintptr_t bias, uintptr_t output, uintptr_t moments, uintptr_t workspace, int device,
         uintptr_t stream) {
        launching(problem, [&] {
          conv2d(problem, way, pointer(input), pointer(weight), pointer(bias), pointer(output),
                 pointer(moments), pointer(workspace), {device, stream});
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("input"), py::arg("weight"), py::arg("bias"),
      py::arg("output"), py::arg("moments"), py::arg("workspace"), py::arg("device"),
      py::arg("stream"),
      "Writes activation(conv2d + bias) to output and, unless its address is 0, what a batch "
      "normalisation of that begins with to moments [splits, 3, K]. Tensors are addresses on the "
      "device, bias 0 for none.");
  m.def("conv2d_moment_splits", &conv2d_moment_splits, py::arg("problem"),
        "The first size of the moments that conv2d writes.");
  m.def("conv2d_moments_workspace", &conv2d_moments_workspace, py::arg("problem"),
        "The bytes of workspace that conv2d needs for moments.");
  m.def(
      "conv2d_grad_input",
      [](const Conv2dProblem& problem, const Conv2dWay& way, uintptr_t grad_output,
         uintptr_t weight, uintptr_t grad_input, int device, uintptr_t stream) {
        launching(problem, [&] {
          conv2d_grad_input(problem, way, pointer(grad_output), pointer(weight),
                            pointer(grad_input), {device, stream});
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("grad_output"), py::arg("weight"),
      py::arg("grad_input"), py::arg("device"), py::arg("stream"), "Writes grad_input.");
  m.def("conv2d_grad_weight_workspace", &conv2d_grad_weight_workspace, py::arg("problem"),
        py::arg("splits"), py::arg("bias"),
        "The bytes of workspace that conv2d_grad_weight needs for so many splits.");
  m.def(
      "conv2d_grad_weight",
      [](const Conv2dProblem& problem, const Conv2dWay& way, uintptr_t grad_output, uintptr_t input,
         uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t workspace, int64_t splits,
         int device, uintptr_t stream) {
        check_splits(splits);
        launching(problem, [&] {
          conv2d_grad_weight(problem, way, pointer(grad_output), pointer(input),
                             pointer(grad_weight), pointer(grad_bias), pointer(workspace), splits,
                             {device, stream});
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("grad_output"), py::arg("input"),
      py::arg("grad_weight"), py::arg("grad_bias"), py::arg("workspace"), py::arg("splits"),
      py::arg("device"), py::arg("stream"),
      "Writes grad_weight and grad_bias, unless their address is 0; positions are summed in "
      "splits, "
      "which are then added up in order. Without grad_weight its parts stay in the workspace, from "
      "which a call without grad_output and grad_bias makes it.");
  m.def(
      "conv2d_grad_weight_sgd",
      [](const Conv2dProblem& problem, const Conv2dWay& way, uintptr_t grad_output, uintptr_t input,
         uintptr_t workspace, int64_t splits, uintptr_t weight, uintptr_t momentum_buffer,
         uintptr_t master, const std::string& dtype, double lr, double momentum, double dampening,
         double weight_decay, bool nesterov, bool maximize, bool first_step, uintptr_t lr_address,
         int device, uintptr_t stream) {
        check_splits(grad_output == 0 ? splits : 1);
        const DType type = sgd_dtype(dtype).first;
        check_weight_dtype(type, problem.dtype);
        const SgdHyper hyper{type,     lr,       momentum,   dampening, weight_decay, 1.0,
                             nesterov, maximize, first_step, false,     master != 0};
        const SgdTensor tensor{pointer(weight), nullptr, pointer(momentum_buffer), pointer(master),
                               0};
        launching(problem, [&] {
          conv2d_grad_weight_sgd(
              problem, way, pointer(grad_output), pointer(input), pointer(workspace), splits,
              {tensor, hyper, pointer<const double>(lr_address)}, {device, stream});
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("grad_output"), py::arg("input"),
      py::arg("workspace"), py::arg("splits"), py::arg("weight"), py::arg("momentum_buffer"),
      py::arg("master"), py::arg("dtype"), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
      py::arg("weight_decay"), py::arg("nesterov"), py::arg("maximize"), py::arg("first_step"),
      py::arg("lr_address"), py::arg("device"), py::arg("stream"),
      "Updates a weight by SGD instead of writing its gradient: by what conv2d_grad_weight left in "
      "the workspace or, where grad_output is not 0, without any. The momentum buffer (none where "
      "momentum is 0) and the master copy (none but for half types: then both are float32) lie in "
      "memory as the weight does, which is of the problem's dtype or, where that is a half type, "
      "float32; lr_address (float64, instead of lr) is on the device, 0 for "
      "none.");
  bind_hopper(m);
  bind_halo(m);
  bind_planes(m);
  bind_hopper_grad_weight(m);
}

}  // namespace gdfast::cuda
