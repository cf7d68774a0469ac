"""The kernels of one max pooling: for a geometry and strides, functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod

import torch
from torch import Tensor

from gdfast.backends.triton import max_pool2d, max_pool2d_grad
from gdfast.backends.triton.launch import Launch, channel_tile
from gdfast.geometry import MaxPool2dGeometry
from gdfast.windows import Windows

Strides = tuple[int, ...]


def why_not(geometry: MaxPool2dGeometry, strides: tuple[Strides, Strides, Strides]) -> str:
    """Why the kernels do not take it, or ""."""
    windows = Windows(geometry)
    if windows.images(*strides) < geometry.N:
        return "it takes tensors of less than 2^31 elements"
    return windows.why_not()


def bind_forward(
    geometry: MaxPool2dGeometry, strides: tuple[Strides, Strides, Strides], relu: bool,
    places: torch.dtype, nowhere: int, device: torch.device,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """Pools; `strides` are those of input, output and argmax, `places` is argmax's dtype."""
    g, windows, (x, y, a) = geometry, Windows(geometry), strides
    rows = g.N * g.P * g.Q
    m, n = channel_tile(g.C, y[1] == 1)
    numbers = rows, g.C, g.H, g.W, g.P, g.Q, g.R, g.S, *x, *y, *a, *windows.numbers
    settings = {"RELU": relu, "NOWHERE": nowhere, "BLOCK_M": m, "BLOCK_N": n}
    grid = ceil(rows / m), ceil(g.C / n)
    launch = Launch(max_pool2d.max_pool2d_kernel, grid, device, numbers, settings)

    def kernel(input: Tensor) -> tuple[Tensor, Tensor]:
        size = g.output_size
        output = torch.empty_strided(size, y, dtype=input.dtype, device=input.device)
        argmax = torch.empty_strided(size, a, dtype=places, device=input.device)
        if rows:
            launch(input, output, argmax)
        return output, argmax

    return kernel


def bind_grad(
    geometry: MaxPool2dGeometry, strides: tuple[Strides, Strides, Strides], nowhere: int,
    device: torch.device,
) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    """The gradient in the input from that in the output and argmax."""
    g, windows, (x, y, a) = geometry, Windows(geometry), strides
    rows = g.N * windows.pixels
    m, n = channel_tile(g.C, x[1] == 1)
    numbers = (
        rows, g.C, g.H, g.W, g.P, g.Q, g.R, g.S, *x, *y, *a, *windows.numbers,
        *windows.phase_numbers,
    )  # fmt: skip
    settings = {"NOWHERE": nowhere, "BLOCK_M": m, "BLOCK_N": n}
    grid = ceil(rows / m), ceil(g.C / n), prod(windows.phases)
    launch = Launch(max_pool2d_grad.max_pool2d_grad_kernel, grid, device, numbers, settings)

    def kernel(grad_output: Tensor, argmax: Tensor) -> Tensor:
        grad_input = torch.empty_strided(
            g.input_size, x, dtype=grad_output.dtype, device=grad_output.device
        )
        if rows:
            launch(grad_output, argmax, grad_input)
        return grad_input

    return kernel
