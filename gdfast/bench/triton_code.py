"""What the compiler makes of the Triton kernels, for a GPU that need not be here.

Within `ahead_of_time` the kernels of `gdfast.backends.triton` take tensors on the meta device: each
launch compiles its kernel with the very arguments that it would be launched with, and is listed
with the registers and the instructions of the result.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gdfast.bench.cases import Conv2dCase
from gdfast.extras import require
from gdfast.geometry import Conv2dGeometry, MaxPool2dGeometry, dense_strides

META = torch.device("meta")


@dataclass(frozen=True)
class Code:
    """One compiled kernel; bytes are those of one program, `instructions` by name."""

    kernel: str
    capability: int
    settings: dict[str, Any]
    warps: int
    stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: Counter[str]

    @property
    def loads(self) -> int:
        """Instructions that load from global memory."""
        return self.count(r"LDG\.|LDGSTS|UTMALDG")

    @property
    def wide_loads(self) -> int:
        """Those that load 16 bytes for each thread, or a box of a tensor for all."""
        return self.count(r"LDG(STS)?\.(.*\.)?128|UTMALDG")

    def count(self, pattern: str) -> int:
        """How many instructions have a name that a regular expression matches from its start."""
        found = re.compile(pattern)
        return sum(n for name, n in self.instructions.items() if found.match(name))


@contextmanager
def ahead_of_time(capability: int) -> Iterator[list[Code]]:
    """Compiles for capability 80 or 90 whatever is launched within; gives the growing list."""
    require("triton", "triton", "compiling Triton kernels")
    from gdfast.backends.triton import launch

    if launch.INTERPRETED:
        raise RuntimeError("triton_code: TRITON_INTERPRET: expected kernels that are compiled")
    gpu = launch.H100 if capability >= 90 else launch.A100
    compiled: list[Code] = []

    def run(self: Any, tensors: Sequence[Tensor], changing: tuple[Any, ...]) -> None:
        arguments = *self.seen(tensors), *changing, *self._rest
        compiled.append(_compile(self._kernel, self._grid, arguments, self._options, capability))

    with (
        mock.patch.object(launch, "gpu", lambda device: gpu),
        mock.patch.object(launch.Launch, "_run", run),
        no_driver(capability),
    ):
        yield compiled


@contextmanager
def no_driver(capability: int, **parts: Any) -> Iterator[None]:
    """Has Triton bind arguments and compile for a GPU with no driver but what `parts` stand for."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    absent = SimpleNamespace(
        # Triton keeps what it compiled for each device: here for each capability.
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        **parts,
    )
    with mock.patch.object(driver, "_active", absent):
        yield


def _compile(kernel: Any, grid: Any, arguments: Any, options: Any, capability: int) -> Code:
    result = kernel.warmup(*arguments, grid=grid, **options)
    registers, stack = _resources(result.asm["cubin"])
    settings = {p.name: arguments[p.num] for p in kernel.params if p.is_constexpr}
    return Code(
        kernel.fn.__name__, capability, settings, options["num_warps"], options["num_stages"],
        registers, stack, result.metadata.shared, Counter(_instructions(result.asm["sass"])),
    )  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, where what spills goes."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def _instructions(sass: str) -> list[str]:
    return re.findall(r"^[^\n;]*?\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", sass, re.MULTILINE)


def _images(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(size), dtype=dtype, device=META).to(memory_format=torch.channels_last)


def _problem(case: Conv2dCase, dtype: torch.dtype, precision: str) -> tuple[Any, list[Tensor]]:
    """A layer in channels_last, and tensors for its input, weight and output."""
    from gdfast.backends.triton.bind_conv2d import Problem

    geometry = Conv2dGeometry.of(
        "conv2d", case.input_shape, case.weight_shape, case.stride, case.padding * 2, case.dilation,
        case.groups,
    )  # fmt: skip
    sizes = geometry.input_size, geometry.weight_size, geometry.output_size
    strides = tuple(dense_strides(size, True) for size in sizes)
    problem = Problem(geometry, strides, dtype, META, precision)  # type: ignore[arg-type]
    return problem, [_images(size, dtype) for size in sizes]


def launch_conv2d(
    case: Conv2dCase, dtype: torch.dtype, precision: str = "ieee", tiles: str = "best"
) -> None:
    """Launches the three passes of a layer in channels_last, each by its best tile by the model.

    `tiles` "every" launches all that the model leaves, "tma" those of the TMA kernel; `precision`
    is what `tl.dot` is told for float32.
    """
    from gdfast.backends.triton import bind_conv2d

    problem, (input, weight, output) = _problem(case, dtype, precision)
    passes: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "conv2d": (bind_conv2d.bind_forward, (input, weight, None)),
        "conv2d_grad_input": (bind_conv2d.bind_grad_input, (output, weight)),
        "conv2d_grad_weight": (bind_conv2d.bind_grad_weight, (output, input, False)),
    }
    for op, (bind, arguments) in passes.items():
        found: list[Any] = problem.candidates(op) or [None]  # None for depthwise
        if tiles == "best":
            found = found[:1]
        elif tiles == "tma":
            found = [tile for tile in found if tile is not None and tile.box]
        for tile in found:
            bind(problem, tile)(*arguments)


def launch_conv2d_act(case: Conv2dCase, dtype: torch.dtype, activation: str) -> None:
    """Launches a layer's forward pass with bias and activation, by its best tile by the model."""
    from gdfast.backends.triton.bind_conv2d import bind_forward

    problem, (input, weight, _) = _problem(case, dtype, "ieee")
    tile = next(iter(problem.candidates("conv2d_act")), None)
    bias = torch.empty(case.K, dtype=dtype, device=META)
    bind_forward(problem, tile, activation)(input, weight, bias)


def launch_batch_norm(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Launches training's forward and backward of a batch normalisation + residual + ReLU."""
    from gdfast.backends.triton.bind_batch_norm import Problem, bind_backward, bind_forward

    float32 = torch.float32
    problem = Problem(size, True, dtype, float32, META, True, 1e-5, "relu", 0.0, "output")
    input = _images(size, dtype)
    param = torch.empty(size[1], device=META)
    forward = bind_forward(problem, True, True, True, True)
    output, mean, invstd = forward(input, param, param, input, param, param, 0.1)
    backward = bind_backward(problem, True, True, (True, True, True, True))
    backward(output, input, param, param, output, mean, invstd)


def launch_max_pool2d(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Launches forward and backward of ResNet's max pooling, 3 x 3 with stride 2."""
    from gdfast.backends.triton.bind_max_pool2d import bind_forward, bind_grad

    geometry = MaxPool2dGeometry.of("max_pool2d", size, (3, 3), (2, 2), (1, 1), (1, 1), False)
    input, output = (dense_strides(s, True) for s in (geometry.input_size, geometry.output_size))
    strides = input, output, output
    forward = bind_forward(geometry, strides, False, torch.uint8, 255, META)
    pooled, argmax = forward(_images(size, dtype))
    bind_grad(geometry, strides, 255, META)(pooled, argmax)


def launch_sgd(dtype: torch.dtype) -> None:
    """Launches an update with momentum and weight decay; half types with master copies too."""
    from gdfast.backends.triton import bind_sgd

    settings = bind_sgd.Settings(0.1, 0.9, 0.0, 1e-4, True, False, False, False, None, None)
    somewhere = [1 << 40]
    for masters in ([], somewhere) if dtype.itemsize == 2 else ([],):
        bind_sgd.update(
            torch.empty(1, dtype=dtype, device=META), somewhere, somewhere, somewhere, masters,
            [25_000_000], settings,
        )  # fmt: skip


# A layer for each way through the convolution kernels, of ResNet-50 and MobileNetV2.
LAYERS = (
    Conv2dCase("3x3 64->64 @56", 256, 64, 56, 56, 64, 3, 3, padding=(1, 1)),
    Conv2dCase("3x3/2 256->256 @28", 256, 256, 28, 28, 256, 3, 3, (2, 2), (1, 1)),
    Conv2dCase("1x1 256->128 @56", 256, 256, 56, 56, 128, 1, 1),
    Conv2dCase("stem 7x7/2 3->64 @224", 256, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3)),
    Conv2dCase("depthwise 3x3/2 96 @112", 256, 96, 112, 112, 96, 3, 3, (2, 2), (1, 1), groups=96),
)
