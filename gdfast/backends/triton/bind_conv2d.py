"""The kernels of one convolution: for a geometry, strides and a tile, functions of tensors.

Offsets are of 32 bits: a batch whose tensors are larger is run in parts. The matrix kernels read
channels that lie side by side; a tensor of another layout is copied to channels_last first, which
costs a pass over it instead of one scattered load for each number and tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from gdfast.backends.triton import (
    bind_conv2d_tma,
    conv2d,
    conv2d_grad_input,
    conv2d_grad_weight,
    depthwise,
    depthwise_grad_input,
    depthwise_grad_weight,
    launch,
    sum_splits,
    tiles,
)
from gdfast.backends.triton.launch import INTERPRETED, Launch, channel_tile, power_of_2
from gdfast.backends.triton.tiles import Product, Tile
from gdfast.geometry import Conv2dGeometry, dense_strides
from gdfast.tensor_cores import PASSES
from gdfast.windows import MOST, Windows

Strides = tuple[int, ...]
_FEW = 16  # channels: with fewer, a step takes several taps
_MOST_COPIES = 8  # filters of one channel that the depthwise kernels unroll
_MOST_WIDTH = 32  # columns of a filter, likewise


@dataclass(frozen=True)
class Problem:
    """One convolution as kernels see it; `strides` are those of input, weight and output."""

    geometry: Conv2dGeometry
    strides: tuple[Strides, Strides, Strides]
    dtype: torch.dtype
    device: torch.device
    precision: str  # for tl.dot

    @property
    def is_depthwise(self) -> bool:
        g = self.geometry
        return g.groups == g.C > 1 and g.K <= _MOST_COPIES * g.C and g.S <= _MOST_WIDTH

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self.geometry.C // self.geometry.groups

    @property
    def filters(self) -> int:
        """Filters of one group."""
        return self.geometry.K // self.geometry.groups

    @property
    def windows(self) -> Windows:
        return Windows(self.geometry)

    @property
    def is_plain(self) -> bool:
        """Whether each output pixel is made of the input pixel in its place alone."""
        g = self.geometry
        return (g.R, g.S, g.P, g.Q) == (1, 1, g.H, g.W) and not any(g.padding)

    @property
    def upcast(self) -> bool:
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        return INTERPRETED and self.dtype == torch.bfloat16

    def why_not(self) -> str:
        """Why the kernels do not take it, or ""."""
        g = self.geometry
        for input, weight, output in (self.strides, self.packed("input", "output")[0].strides):
            last = sum((n - 1) * s for n, s in zip(g.weight_size, weight, strict=True))
            images = self.windows.images(input, output)
            if images == 0 or max(last, prod(g.weight_size)) > MOST:
                return "it takes images and weights of less than 2^31 elements"
        return self.windows.why_not(g.groups)

    def parts(self) -> Iterator[tuple[int, Problem]]:
        """The problem in parts that 32 bits reach, each with the number of its first image."""
        images = self.windows.images(self.strides[0], self.strides[2])
        for first in range(0, self.geometry.N, images):
            count = min(images, self.geometry.N - first)
            yield first, replace(self, geometry=replace(self.geometry, N=count))

    def product(self, op: str) -> Product:
        """The matrix product that a pass is."""
        g, C, K = self.geometry, self.channels, self.filters
        rows = g.N * g.P * g.Q
        if op in ("conv2d", "conv2d_act"):
            if C < _FEW:
                return Product(g.groups, rows, K, 1, C * g.R * g.S, folded="rows")
            return Product(g.groups, rows, K, g.R * g.S, C)
        if op == "conv2d_grad_input":
            windows = self.windows
            phases, runs = prod(windows.phases), g.R * g.S / prod(windows.stride)
            return Product(g.groups * phases, g.N * windows.pixels, C, runs, K)
        if C < _FEW:
            return Product(g.groups, K, C * g.R * g.S, 1, rows, split=True, folded="columns")
        return Product(g.groups * g.R * g.S, K, C, 1, rows, split=True)

    def candidates(self, op: str) -> list[Tile]:
        """A few tiles for one pass, the one expected to be fastest first; none for depthwise."""
        if self.is_depthwise:
            return []
        passes = PASSES[self.precision] if self.dtype == torch.float32 else 1
        where = launch.gpu(self.device)
        found = tiles.candidates(self.product(op), self.dtype.itemsize, where, passes)
        return found + bind_conv2d_tma.candidates(self, op, where)

    def packed(self, *names: str) -> tuple[Problem, list[Callable[[Tensor], Tensor]]]:
        """The problem on tensors in channels_last, and what copies those named, if need be."""
        g, strides = (
            self.geometry,
            dict(zip(("input", "weight", "output"), self.strides, strict=True)),
        )
        sizes = {"input": g.input_size, "weight": g.weight_size, "output": g.output_size}
        steps = {"input": self.channels, "weight": self.channels, "output": self.filters}
        copies: list[Callable[[Tensor], Tensor]] = []
        for name in names:
            scattered = steps[name] >= _FEW and strides[name][1] != 1 and not self.is_depthwise
            copies.append(_channels_last if scattered else _as_it_is)
            if scattered:
                strides[name] = dense_strides(sizes[name], True)
        input, weight, output = strides.values()
        return replace(self, strides=(input, weight, output)), copies

    def sizes(self, channels: int, filters: int) -> tuple[int, ...]:
        g = self.geometry
        return channels, filters, g.H, g.W, g.P, g.Q, g.R, g.S


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def bind_forward(
    problem: Problem, tile: Tile | None, activation: str = "none", negative_slope: float = 0.0
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """act(conv2d(input, weight, bias)); `tile` is one of the candidates, None for depthwise."""
    if tile is not None and tile.box:
        return bind_conv2d_tma.bind_forward(problem, tile, activation, negative_slope)
    size, strides = problem.geometry.output_size, problem.strides[2]
    problem, (copy_input, copy_weight) = problem.packed("input", "weight")
    launches = {
        with_bias: [
            (first, _forward(part, tile, with_bias, activation, negative_slope))
            for first, part in problem.parts()
        ]
        for with_bias in (False, True)
    }

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        input, weight = copy_input(input), copy_weight(weight)
        if bias is not None:
            bias = bias.contiguous()
        for first, run in launches[bias is not None]:
            # The kernel reads no bias where there is none: any tensor takes its place.
            some = weight if bias is None else bias
            run(_from(input, first), weight, some, _from(output, first))
        return output

    return kernel


def _from(images: Tensor, first: int) -> Tensor:
    return images[first:] if first else images


def _forward(
    problem: Problem, tile: Tile | None, with_bias: bool, activation: str, slope: float
) -> Launch:
    g, (x, w, y) = problem.geometry, problem.strides
    rows = g.N * g.P * g.Q
    ending = {"BIAS": with_bias, "ACTIVATION": activation}
    if tile is None:
        m, n = channel_tile(g.K, y[1] == 1)
        blocks = {"BLOCK_M": m, "BLOCK_N": n}
        numbers = (
            rows, g.K, g.H, g.W, g.P, g.Q, g.R, *x, w[0], *w[2:], *y, *problem.windows.numbers,
            slope,
        )  # fmt: skip
        return Launch(
            depthwise.depthwise_kernel, (ceil(rows / m), ceil(g.K / n)), problem.device, numbers,
            {"S": g.S, "MULTIPLIER": g.K // g.C, **ending, **blocks},
        )  # fmt: skip
    C, K = problem.channels, problem.filters
    settings = {
        "PADDED": any(g.padding), "FOLD": C < _FEW, "EVEN": C % tile.k == 0, **ending,
        "PRECISION": problem.precision, "UPCAST": problem.upcast, **tile.settings(),
    }  # fmt: skip
    numbers = rows, *problem.sizes(C, K), *x, *w, *y, *problem.windows.numbers, slope
    programs = ceil(rows / tile.m) * ceil(K / tile.n) * g.groups
    return Launch(
        conv2d.conv2d_kernel, (programs,), problem.device, numbers, settings, tile.warps,
        tile.stages,
    )  # fmt: skip


def bind_grad_input(problem: Problem, tile: Tile | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The gradient in the input from those in the output and the weight."""
    if tile is not None and tile.box:
        return bind_conv2d_tma.bind_grad_input(problem, tile)
    size, strides = problem.geometry.input_size, problem.strides[0]
    problem, (copy_weight, copy_grad) = problem.packed("weight", "output")
    launches = [(first, _grad_input(part, tile)) for first, part in problem.parts()]

    def kernel(grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_input = torch.empty_strided(size, strides, dtype=weight.dtype, device=weight.device)
        grad_output, weight = copy_grad(grad_output), copy_weight(weight)
        for first, run in launches:
            run(_from(grad_output, first), weight, _from(grad_input, first))
        return grad_input

    return kernel


def _grad_input(problem: Problem, tile: Tile | None) -> Launch:
    g, (x, w, y) = problem.geometry, problem.strides
    rows = g.N * problem.windows.pixels
    phases = prod(problem.windows.phases)
    steps = *problem.windows.numbers, *problem.windows.phase_numbers
    if tile is None:
        m, n = channel_tile(g.C, x[1] == 1)
        return Launch(
            depthwise_grad_input.depthwise_grad_input_kernel,
            (ceil(rows / m), ceil(g.C / n), phases), problem.device,
            (rows, g.C, g.H, g.W, g.P, g.Q, g.R, g.S, *x, w[0], *w[2:], *y, *steps),
            {"MULTIPLIER": g.K // g.C, "BLOCK_M": m, "BLOCK_N": n},
        )  # fmt: skip
    C, K = problem.channels, problem.filters
    settings: dict[str, Any] = {
        "PADDED": not problem.is_plain, "EVEN": K % tile.k == 0, "WHOLE": C % tile.n == 0,
        "PRECISION": problem.precision, "UPCAST": problem.upcast, **tile.settings(),
    }  # fmt: skip
    numbers = rows, *problem.sizes(C, K), *x, *w, *y, *steps
    grid = ceil(rows / tile.m) * ceil(C / tile.n), g.groups * phases
    kernel = conv2d_grad_input.conv2d_grad_input_kernel
    return Launch(kernel, grid, problem.device, numbers, settings, tile.warps, tile.stages)


def bind_grad_weight(
    problem: Problem, tile: Tile | None
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    """The gradients in the weight and, where asked for, the bias."""
    problem, (copy_input, copy_grad) = problem.packed("input", "output")
    g = problem.geometry
    K, w_strides = g.K, problem.strides[1]
    RS, count = g.R * g.S, prod(g.weight_size)
    launches: dict[bool, list[tuple[int, Launch]]] = {False: [], True: []}
    splits = 0
    for first, part in problem.parts():
        launches[False].append((first, _grad_weight(part, tile, False, splits)[0]))
        last, more = _grad_weight(part, tile, True, splits)
        launches[True].append((first, last))
        splits += more
    device = problem.device
    weight_sizes = count, splits, count // (K * RS), g.R, g.S
    sum_weight = _sum_splits(weight_sizes, w_strides, device)
    sum_bias = _sum_splits((K, splits, 1, 1, 1), (1, 0, 0, 0), device)
    bias_from = ceil(splits * count / 4) * 4

    def kernel(grad_output: Tensor, input: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        grad_output, input = copy_grad(grad_output), copy_input(input)
        # One stretch of memory for the sums of both, each from an address of 16 bytes on.
        partial = input.new_empty(bias_from + splits * K * bias, dtype=torch.float32)
        partial_bias = partial[bias_from:]
        for first, run in launches[bias]:
            run(_from(grad_output, first), _from(input, first), partial, partial_bias)
        grad_weight = torch.empty_strided(
            g.weight_size, w_strides, dtype=input.dtype, device=input.device
        )
        sum_weight(partial, grad_weight)
        if not bias:
            return grad_weight, None
        grad_bias = input.new_empty(K)
        sum_bias(partial_bias, grad_bias)
        return grad_weight, grad_bias

    return kernel


def _grad_weight(
    problem: Problem, tile: Tile | None, with_bias: bool, first_split: int
) -> tuple[Launch, int]:
    """A launch, and how many splits it makes."""
    g, (x, _, y) = problem.geometry, problem.strides
    rows = g.N * g.P * g.Q
    where = launch.gpu(problem.device)
    if tile is None:
        return _depthwise_grad_weight(problem, with_bias, first_split)
    C, K = problem.channels, problem.filters
    product = problem.product("conv2d_grad_weight")
    wanted = tiles.splits(product, tile, where)
    rows_per_split = ceil(ceil(rows / wanted) / tile.k) * tile.k
    splits = ceil(rows / rows_per_split)
    fold = C < _FEW
    # Positions lie at even steps where rows and images follow one another without gaps.
    settings = {
        "PADDED": any(g.padding), "FOLD": fold, "EVEN": rows % rows_per_split == 0,
        "WHOLE": K % tile.m == 0 and (fold or C % tile.n == 0),
        "X_LINEAR": problem.is_plain and _is_linear(g.N, g.H, g.W, x),
        "Y_LINEAR": _is_linear(g.N, g.P, g.Q, y), "BIAS": with_bias,
        "PRECISION": problem.precision, "UPCAST": problem.upcast, **tile.settings(),
    }  # fmt: skip
    numbers = (
        rows, rows_per_split, *problem.sizes(C, K), *x, *y, *problem.windows.numbers,
        *problem.windows.digits(tile.k), g.K, first_split,
    )  # fmt: skip
    columns = ceil(C * g.R * g.S / tile.n) if fold else g.R * g.S * ceil(C / tile.n)
    grid = ceil(K / tile.m) * columns, g.groups, splits
    kernel = conv2d_grad_weight.conv2d_grad_weight_kernel
    made = Launch(kernel, grid, problem.device, numbers, settings, tile.warps, tile.stages)
    return made, splits


def _is_linear(images: int, rows: int, columns: int, strides: Strides) -> bool:
    n, _, h, w = strides
    return (rows == 1 or h == columns * w) and (images == 1 or n == rows * columns * w)


def _depthwise_grad_weight(
    problem: Problem, with_bias: bool, first_split: int
) -> tuple[Launch, int]:
    g, (x, _, y) = problem.geometry, problem.strides
    rows = g.N * g.P * g.Q
    # Sums of taps x positions x filters fill a quarter of the registers of four warps.
    taps = min(16, power_of_2(g.R * g.S))
    n = min(64, max(16, power_of_2(g.K)))
    m = max(1, 8192 // (taps * n))
    programs = ceil(g.K / n) * ceil(g.R * g.S / taps)
    wanted = max(1, min(4 * launch.gpu(problem.device).multiprocessors // programs,
                        rows // (16 * m), 256))  # fmt: skip
    rows_per_split = ceil(rows / wanted)
    splits = ceil(rows / rows_per_split)
    settings = {
        "MULTIPLIER": g.K // g.C, "BIAS": with_bias, "TAPS": taps, "BLOCK_M": m, "BLOCK_N": n,
    }  # fmt: skip
    numbers = (
        rows, rows_per_split, g.K, g.H, g.W, g.P, g.Q, g.R, g.S, *x, *y, *problem.windows.numbers,
        *problem.windows.digits(m), first_split,
    )  # fmt: skip
    grid = ceil(g.K / n), ceil(g.R * g.S / taps), splits
    kernel = depthwise_grad_weight.depthwise_grad_weight_kernel
    return Launch(kernel, grid, problem.device, numbers, settings), splits


def _sum_splits(sizes: tuple[int, ...], strides: Strides, device: torch.device) -> Launch:
    count, splits, C, R, S = sizes
    k, c, r, s = strides
    block, parts = (4096, 4) if INTERPRETED else (128, 32)
    numbers = count, splits, C, R, S, k, c, r, s
    grid = (ceil(count / block),)
    kernel = sum_splits.sum_splits_kernel
    return Launch(kernel, grid, device, numbers, {"PARTS": parts, "BLOCK": block})
