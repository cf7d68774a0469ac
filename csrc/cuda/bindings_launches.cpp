// Binds launches of the convolution kernels, for plans (see ../launch.h): each takes what the
// binding of its kernel takes before the addresses, and has their order.
#include "../bindings.h"
#include "bindings.h"
#include "bindings_ways.h"
#include "cast.h"
#include "conv2d.h"
#include "conv2d_hopper_planes.h"

namespace gdfast::cuda {
namespace {

// `run(at, where)` launches kernels on addresses.
template <typename Run>
py::object launch_of(const Conv2dProblem& problem, Run run) {
  return as_object([problem, run](void* const* at, const Call& call) {
    telling(problem, [&] { run(problem, at, Where{call.where, call.stream}); });
  });
}

using Problem = const Conv2dProblem&;
using Addresses = void* const*;
using At = const Where&;

void bind_forward(py::module_& m) {
  m.def(
      "conv2d_launch",
      [](Problem problem, const Conv2dWay& way) {
        return launch_of(problem, [way](Problem p, Addresses at, At where) {
          conv2d(p, way, at[0], at[1], at[2], at[3], at[4], at[5], where);
        });
      },
      py::arg("problem"), py::arg("way"), "A launch of conv2d.");
  m.def(
      "conv2d_stem_launch",
      [](Problem problem, const Conv2dWay& way, int64_t tiles_of_block) {
        return launch_of(problem, [way, tiles_of_block](Problem p, Addresses at, At where) {
          conv2d_stem(p, way.precision, tiles_of_block, at[0], at[1], at[2], at[3], at[4], at[5],
                      where);
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("tiles_of_block"), "A launch of conv2d_stem.");
  m.def(
      "conv2d_hopper_launch",
      [](Problem problem, int pixels, int channels) {
        const HopperTileSize tile = hopper_tile(pixels, channels);
        return launch_of(problem, [tile](Problem p, Addresses at, At where) {
          conv2d_hopper(p, tile, at[0], at[1], at[2], at[3], at[4], where);
        });
      },
      py::arg("problem"), py::arg("pixels"), py::arg("channels"), "A launch of conv2d_hopper.");
  m.def(
      "conv2d_halo_launch",
      [](Problem problem, int channels) {
        const int made = halo_channels(channels);
        return launch_of(problem, [made](Problem p, Addresses at, At where) {
          conv2d_halo(p, made, at[0], at[1], at[2], at[3], at[4], where);
        });
      },
      py::arg("problem"), py::arg("channels"), "A launch of conv2d_halo.");
}

void bind_grad_input(py::module_& m) {
  m.def(
      "conv2d_grad_input_launch",
      [](Problem problem, const Conv2dWay& way) {
        return launch_of(problem, [way](Problem p, Addresses at, At where) {
          conv2d_grad_input(p, way, at[0], at[1], at[2], where);
        });
      },
      py::arg("problem"), py::arg("way"), "A launch of conv2d_grad_input.");
  m.def(
      "conv2d_grad_input_hopper_launch",
      [](Problem problem, int pixels, int channels) {
        const HopperTileSize tile = hopper_tile(pixels, channels);
        return launch_of(problem, [tile](Problem p, Addresses at, At where) {
          conv2d_grad_input_hopper(p, tile, at[0], at[1], at[2], where);
        });
      },
      py::arg("problem"), py::arg("pixels"), py::arg("channels"),
      "A launch of conv2d_grad_input_hopper.");
  m.def(
      "conv2d_grad_input_halo_launch",
      [](Problem problem, int channels) {
        const int made = halo_channels(channels);
        return launch_of(problem, [made](Problem p, Addresses at, At where) {
          conv2d_grad_input_halo(p, made, at[0], at[1], at[2], where);
        });
      },
      py::arg("problem"), py::arg("channels"), "A launch of conv2d_grad_input_halo.");
  m.def(
      "conv2d_grad_input_planes_launch",
      [](Problem problem) {
        return launch_of(problem, [](Problem p, Addresses at, At where) {
          conv2d_grad_input_planes(p, at[0], at[1], at[2], where);
        });
      },
      py::arg("problem"), "A launch of conv2d_grad_input_planes.");
}

void bind_grad_weight(py::module_& m) {
  m.def(
      "conv2d_grad_weight_launch",
      [](Problem problem, const Conv2dWay& way, int64_t splits, bool wide) {
        check_splits(splits);
        return launch_of(problem, [way, splits, wide](Problem p, Addresses at, At where) {
          if (wide) {
            return conv2d_grad_weight_wide(p, way, at[0], at[1], at[2], at[4], splits, where);
          }
          conv2d_grad_weight(p, way, at[0], at[1], at[2], at[3], at[4], splits, where);
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("splits"), py::arg("wide") = false,
      "A launch of conv2d_grad_weight; `wide` stores the weight's gradient in float32, without the "
      "bias's.");
  m.def(
      "conv2d_stem_grad_weight_launch",
      [](Problem problem, const Conv2dWay& way, int64_t splits) {
        return launch_of(problem, [way, splits](Problem p, Addresses at, At where) {
          conv2d_stem_grad_weight(p, way.precision, at[0], at[1], at[2], at[3], at[4], splits,
                                  where);
        });
      },
      py::arg("problem"), py::arg("way"), py::arg("splits"),
      "A launch of conv2d_stem_grad_weight.");
  m.def(
      "conv2d_grad_weight_hopper_launch",
      [](Problem problem, int filters, int columns, int64_t splits) {
        check_splits(splits);
        const HopperWeightBlock block = hopper_weight_block(filters, columns);
        return launch_of(problem, [block, splits](Problem p, Addresses at, At where) {
          conv2d_grad_weight_hopper(p, block, at[0], at[1], at[2], splits, where);
        });
      },
      py::arg("problem"), py::arg("filters"), py::arg("columns"), py::arg("splits"),
      "A launch of conv2d_grad_weight_hopper, which leaves parts in its workspace.");
}

void bind_cast(py::module_& m) {
  m.def(
      "cast_launch",
      [](int64_t count, const std::string& half, bool to_half) {
        const DType type = dtype_named("cast", half);
        if (type != DType::kBFloat16 && type != DType::kFloat16) {
          throw py::value_error("cast: half: expected bfloat16 or float16, got " + half);
        }
        return as_object([count, type, to_half](void* const* at, const Call& call) {
          cast(at[0], at[1], count, type, to_half, Where{call.where, call.stream});
        });
      },
      py::arg("count"), py::arg("half"), py::arg("to_half"),
      "A launch that makes `count` numbers of float32 those of a half type, or the other way, from "
      "one tensor to another.");
}

}  // namespace

void bind_launches(py::module_& m) {
  bind_cast(m);
  bind_forward(m);
  bind_grad_input(m);
  bind_grad_weight(m);
}

}  // namespace gdfast::cuda
