"""Convolution on our CUDA kernels: what they take, in which tiles, and on which tensors.

The kernels read 16 bytes of channels at a time where those lie side by side, and number by number
else. A tensor of another layout is copied to channels_last first, which costs a pass over it; the
result may be made in channels_last too, and copied. A few channels, those of a picture say, may be
copied with zeros beside them that make up 16 bytes, or have kernels of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import (
    batch_norm,
    cuda_depthwise,
    cuda_grouped,
    cuda_hopper,
    cuda_hopper_float32,
    cuda_hopper_grad_weight,
    cuda_hopper_halo,
    cuda_hopper_planes,
    cuda_layout,
    cuda_stem,
    cuda_stream,
    cuda_tiles,
    sgd,
)
from gdfast.backends.cuda_depthwise import depthwise_fits
from gdfast.backends.cuda_grad_weight import GradWeight
from gdfast.backends.cuda_hopper import CHUNK, HOPPER
from gdfast.backends.cuda_hopper_float32 import HopperFloat32GradWeight
from gdfast.backends.cuda_hopper_grad_weight import BLOCKS, PLANES_BLOCKS, HopperGradWeight
from gdfast.backends.cuda_hopper_halo import HALO
from gdfast.backends.cuda_hopper_planes import PLANES
from gdfast.backends.cuda_tiles import LARGEST, PADDED, SMALLEST, blocks_of, padded_query, splits
from gdfast.backends.precision import is_strict
from gdfast.backends.registry import Conv2dActQuery, Conv2dQuery
from gdfast.geometry import dense_strides
from gdfast.tensor_cores import input_precision
from gdfast.windows import Windows

Copy = Callable[[Tensor], Tensor]

# The images that a pass reads.
_READ = {
    "conv2d": ("input",), "conv2d_grad_input": ("output",),
    "conv2d_grad_weight": ("input", "output"),
}  # fmt: skip
# Ways that read 16 bytes at a time by the TMA unit, and of those the ones that read NCHW.
_BY_TMA = {
    *HOPPER, *HALO, *PLANES, *BLOCKS, *PLANES_BLOCKS, *cuda_hopper_float32.TILES,
    *cuda_hopper_float32.BLOCKS,
}  # fmt: skip
_OF_PLANES = {*PLANES, *PLANES_BLOCKS}
TURNED = "-channels_last"  # after a way's name: tensors go there, and the result comes back
_FEW = 16  # channels: with fewer, a copy to channels_last brings few of them together
_MOST = 2**31 - 1
_MOST_STEP = 2**29  # rows and columns that kernels count with, padding included
_MOST_BLOCKS = 65535  # a grid's second and third axis


def why_not(query: Conv2dQuery) -> str:
    """Why the kernels do not take a convolution, or ""."""
    g, windows = query.geometry, Windows(query.geometry)
    if g.C == 0:
        return "it takes at least one input channel"
    top, left, below, right = g.padding
    spans = (g.R - 1) * windows.dilation[0], (g.S - 1) * windows.dilation[1]
    if max(g.H + top + below, g.W + left + right, *spans) >= _MOST_STEP:
        return "it takes padded images of less than 2^29 rows and columns"
    if max(g.P * g.Q, windows.pixels, prod(g.weight_size)) >= _MOST // 2:
        return "it takes images and weights of less than 2^30 pixels and elements"
    if g.groups > _MOST_BLOCKS or prod(windows.phases) > _MOST_BLOCKS:
        return f"it takes at most {_MOST_BLOCKS} groups and phases of the stride"
    if any(blocks_of(op, query, SMALLEST) > _MOST for op in ("conv2d", "conv2d_grad_input")):
        return "it takes fewer images at a time"
    return ""


def candidates(op: str, query: Conv2dQuery) -> tuple[str, ...]:
    """The ways of running one pass that are worth timing, the one expected to be fastest first."""
    op = "conv2d" if op == "conv2d_act" else op
    if depthwise_fits(query):
        return _depthwise_candidates(op, query)
    if _may_turn(op, query):
        # What is written number by number is expected to be slower, but where launches count.
        turned, planes = candidates(op, _turned(op, query)), _planes_candidates(op, query)
        return (*planes, *(name + TURNED for name in turned), cuda_tiles.candidates(op, query)[0])
    tiles = cuda_tiles.candidates(op, query)
    if query.device.type == "cuda" and cuda_stem.fits(op, query):
        tiles = (cuda_stem.NAME, *tiles)
    if query.device.type == "cuda" and native.cuda is not None:
        grouped = (by for by in cuda_grouped.candidates() if not grouped_why_not(op, query, by))
        tiles = (*grouped, *tiles)
    return (*_hopper_candidates(op, query), *tiles)


def _depthwise_candidates(op: str, query: Conv2dQuery) -> tuple[str, ...]:
    if not _may_turn(op, query):
        fits = query.dtype.itemsize == 2 and native.cuda is not None
        if not fits or depthwise_tensor_why_not(query):
            return (cuda_depthwise.NAME,)
        one = op == "conv2d_grad_weight"
        return tuple(way for way in cuda_depthwise.WAYS if not one or way != cuda_depthwise.WIDE)
    turned = tuple(name + TURNED for name in _depthwise_candidates(op, _turned(op, query)))
    in_place = (cuda_depthwise.NAME,)
    return turned + in_place if cuda_depthwise.is_large(query) else in_place + turned


def _hopper_candidates(op: str, query: Conv2dQuery) -> tuple[str, ...]:
    ending = ""
    if op == "conv2d_grad_input" and query.geometry.C % CHUNK and query.geometry.groups == 1:
        query, ending = padded_query(query), PADDED
    if not _has_hopper(query):
        return ()
    is_weight = op == "conv2d_grad_weight"
    if is_weight and os.environ.get("GDFAST_HOPPER") == "no_grad_weight":
        return ()
    if query.dtype == torch.float32:
        if cuda_hopper_float32.allows_tf32(query) or hopper_float32_why_not(op, query):
            return ()
        return cuda_hopper_float32.candidates(op, query)
    if hopper_why_not(op, query):
        return ()
    if is_weight:
        names = cuda_hopper_grad_weight.candidates(query)
        if not planes_why_not(op, query):
            names = *cuda_hopper_grad_weight.planes_candidates(query), *names
        return names
    made = query.geometry.K if op == "conv2d" else query.geometry.C
    halo = (name for name in cuda_hopper_halo.candidates(made) if not halo_why_not(op, query, name))
    return tuple(name + ending for name in (*cuda_hopper.candidates(made), *halo))


def _planes_candidates(op: str, query: Conv2dQuery) -> tuple[str, ...]:
    if not _has_hopper(query) or planes_why_not(op, query):
        return ()
    made = query.geometry.K if op == "conv2d" else query.geometry.C
    return cuda_hopper_planes.candidates(made)


def _has_hopper(query: Conv2dQuery) -> bool:
    """Whether Hopper's kernels may be candidates."""
    on_gpu = query.device.type == "cuda" and native.cuda is not None
    return on_gpu and os.environ.get("GDFAST_HOPPER") != "0"


def algorithm(op: str, query: Conv2dQuery) -> str:
    """The candidate that the cost model gives one pass."""
    return candidates(op, query)[0]


def _may_turn(op: str, query: Conv2dQuery) -> bool:
    """Whether a pass writes NCHW from and to many channels, or reads it where that is slow."""
    depthwise = depthwise_fits(query)
    if query.device.type != "cuda" or (op == "conv2d_grad_weight" and not depthwise):
        return False
    g, image = query.geometry, 0 if op == "conv2d_grad_input" else 2
    size, strides = (g.input_size, g.weight_size, g.output_size)[image], query.strides[image]
    if depthwise and not cuda_depthwise.has_vectors(g):
        return False
    channels = g.C if depthwise else min(g.C, g.K) // g.groups
    return g.N > 0 and channels >= _FEW and strides[1] > 1 and strides == dense_strides(size, False)


def _turned(op: str, query: Conv2dQuery) -> Conv2dQuery:
    """The query of tensors in channels_last, but for a weight that is written."""
    g = query.geometry
    input, output = dense_strides(g.input_size, True), dense_strides(g.output_size, True)
    is_written = op == "conv2d_grad_weight"
    weight = query.strides[1] if is_written else dense_strides(g.weight_size, True)
    return replace(query, strides=(input, weight, output))


def _way(query: Conv2dQuery, tile: str) -> Callable[[], Any]:
    """What kernels are told, at each call: whether TF32 is allowed may change between them."""
    assert native.cuda is not None
    strict, make = is_strict(), native.cuda.Conv2dWay
    ways = {name: make(name, tile) for name in ("tf32", "tf32x3", "ieee")}
    if query.dtype != torch.float32:
        return lambda: ways["ieee"]
    return lambda: ways[input_precision(torch.float32, strict)]


def _kernel(op: str, query: Conv2dQuery, by: str) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """A binding, and what it is told at each call between the problem and the addresses."""
    if by in HOPPER:
        return getattr(native.cuda, f"{op}_hopper"), lambda: HOPPER[by]
    if by in HALO:
        return getattr(native.cuda, f"{op}_halo"), lambda: HALO[by]
    if by in PLANES:
        return getattr(native.cuda, f"{op}_planes"), lambda: PLANES[by]
    way = _way(query, by)
    return getattr(native.cuda, op), lambda: (way(),)


def hopper_why_not(op: str, query: Conv2dQuery) -> str:
    """Why the kernel for Hopper does not run one pass here, or ""."""
    assert native.cuda is not None
    if reason := cuda_hopper.missing(query.device):
        return reason
    if op == "conv2d_grad_weight":
        problem, _ = _problem(query, "input", "output")
        return str(native.cuda.conv2d_grad_weight_hopper_why_not(problem))
    gradient = op == "conv2d_grad_input"
    problem, _ = _problem(query, "weight", "output" if gradient else "input")
    return str(native.cuda.conv2d_hopper_why_not(problem, gradient))


def halo_why_not(op: str, query: Conv2dQuery, name: str) -> str:
    """Why the kernel for Hopper whose taps share boxes does not run one pass here, or ""."""
    if reason := cuda_hopper.missing(query.device):
        return reason
    problem, _ = _problem(query, "weight", "output" if op == "conv2d_grad_input" else "input")
    return cuda_hopper_halo.why_not(op, problem, name)


def planes_why_not(op: str, query: Conv2dQuery) -> str:
    """Why the kernel for Hopper that reads and writes NCHW does not run one pass here, or ""."""
    if reason := cuda_hopper.missing(query.device):
        return reason
    return cuda_hopper_planes.why_not(op, _problem(query)[0])


def hopper_float32_why_not(op: str, query: Conv2dQuery) -> str:
    """Why the kernels of float32 for Hopper do not run one pass here, or ""."""
    problem, _ = _problem(query, *_READ[op])
    return cuda_hopper_float32.why_not(op, query, problem)


def depthwise_tensor_why_not(query: Conv2dQuery) -> str:
    """Why a depthwise convolution does not run on the tensor cores, or ""."""
    return cuda_depthwise.tensor_why_not(_problem(query)[0])


def grouped_why_not(op: str, query: Conv2dQuery, by: str = cuda_grouped.NAME) -> str:
    """Why the kernels for groups of few channels do not run one pass here, or ""."""
    problem, _ = _problem(query, *_READ[op], by=by)
    return cuda_grouped.why_not(op, query, problem, by)


def _problem(query: Conv2dQuery, *copied: str, by: str = "") -> tuple[Any, list[Copy]]:
    """The problem on tensors in channels_last, and what copies those named, if need be."""
    assert native.cuda is not None
    g, windows = query.geometry, Windows(query.geometry)
    sizes = {"input": g.input_size, "weight": g.weight_size, "output": g.output_size}
    channels = {"input": g.C, "weight": g.C, "output": g.K}
    strides = dict(zip(sizes, query.strides, strict=True))
    copies: list[Copy] = []
    is_grouped = by in cuda_grouped.BINDINGS
    unscattered = _at_16 if by in _BY_TMA or is_grouped else _as_it_is
    few = 0 if is_grouped else _MOST if by in _OF_PLANES else _FEW
    for name in copied:
        scattered = channels[name] // g.groups >= few and strides[name][1] != 1
        copies.append(cuda_layout.channels_last if scattered else unscattered)
        if scattered:
            strides[name] = dense_strides(sizes[name], True)
    ending: tuple[Any, ...] = ()
    if isinstance(query, Conv2dActQuery):
        ending = "direct", query.activation, query.negative_slope
    problem = native.cuda.Conv2dProblem(
        (g.N, g.C, g.H, g.W, g.K, g.R, g.S, g.P, g.Q), windows.stride, g.padding[:2],
        windows.dilation, g.groups, sgd.DTYPES[query.dtype], *strides.values(), *ending,
    )  # fmt: skip
    return problem, copies


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _at_16(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where 16 does not divide its address."""
    if tensor.data_ptr() % 16 == 0:
        return tensor
    like = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return like.copy_(tensor)


def _pad(tensor: Tensor, channels: int) -> Tensor:
    n, c, h, w = tensor.shape
    size = n, channels, h, w
    padded = tensor.new_empty_strided(size, dense_strides(size, True))
    padded[:, :c] = tensor
    padded[:, c:] = 0
    return padded


class Kernel:
    """A forward pass for one query.

    `run(input, weight, bias, moments)` gives the output and, if asked for, what
    `batch_norm.CudaForward` takes of it in the place of a pass over it: [splits, 3, K], or None
    where there are no positions or, on Hopper, too many splits to be worth it.
    """

    def __init__(self, run: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._run = run

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._run(input, weight, bias, False)[0]

    def with_moments(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return self._run(input, weight, bias, True)


# Each pass is run in the tile that is named, or in the cost model's; a depthwise layer has kernels
# of its own, and one with few channels may have. Forward ends with the activation that the query
# has, if any.
def conv2d(query: Conv2dQuery, by: str = "") -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    assert native.cuda is not None
    by = by or algorithm("conv2d", query)
    if by in cuda_depthwise.WAYS:
        return cuda_depthwise.conv2d(query, _problem(query)[0], by)
    if by.endswith(TURNED):
        return _turned_conv2d(conv2d(_turned("conv2d", query), by.removesuffix(TURNED)))
    if by in HOPPER:
        return Kernel(_hopper_conv2d(query, by))
    if by in (*HALO, *PLANES):
        return _hopper_conv2d_alone(query, by)
    if by in cuda_hopper_float32.TILES:
        problem, (copy_input,) = _problem(query, "input", by=by)
        in_parts = cuda_hopper_float32.conv2d(query, problem, copy_input, by)
        return _unless_tf32(query, in_parts, conv2d(query, LARGEST))
    if by in cuda_grouped.BINDINGS:
        problem, (copy_input,) = _problem(query, "input", by=by)
        return cuda_grouped.conv2d(query, problem, copy_input, by)
    if by == cuda_stem.NAME:
        stem, exact = _forward(query, by), _forward(query, SMALLEST)
        return Kernel(lambda *arguments: (exact if _is_exact(query) else stem)(*arguments))
    if by.endswith(PADDED):
        padded = padded_query(query)
        whole, channels = _forward(padded, by.removesuffix(PADDED)), padded.geometry.C
        return Kernel(
            lambda input, weight, bias, moments: whole(
                _pad(input, channels), _pad(weight, channels), bias, moments
            )
        )
    return Kernel(_forward(query, by))


def _unless_tf32(
    query: Conv2dQuery, exact: Callable[..., Tensor], tiled: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """What is exact but where TF32 is allowed: that may change between calls, and is faster."""
    allows = cuda_hopper_float32.allows_tf32
    return lambda *tensors: (tiled if allows(query) else exact)(*tensors)


def _turned_conv2d(
    inside: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A forward pass in NCHW by one in channels_last."""
    turn, turn_back = cuda_layout.channels_last, cuda_layout.contiguous

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return turn_back(inside(turn(input), turn(weight), bias))

    if not isinstance(inside, Kernel):
        return kernel
    with_moments = inside.with_moments

    def run(
        input: Tensor, weight: Tensor, bias: Tensor | None, moments: bool
    ) -> tuple[Tensor, Tensor | None]:
        if not moments:
            return kernel(input, weight, bias), None
        output, parts = with_moments(turn(input), turn(weight), bias)
        return turn_back(output), parts

    return Kernel(run)


def _is_exact(query: Conv2dQuery) -> bool:
    """Whether float32 is to be multiplied in full now, which the kernel for few channels cannot."""
    return query.dtype == torch.float32 and cuda_tiles.precision_of(query) == "ieee"


def _forward(query: Conv2dQuery, by: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What a `Kernel` runs, in a tile or by the kernel for few channels."""
    assert native.cuda is not None
    way = _way(query, SMALLEST if by == cuda_stem.NAME else by)
    more: tuple[Any, ...] = ()
    run, bytes_of = native.cuda.conv2d, native.cuda.conv2d_moments_workspace
    if by == cuda_stem.NAME:
        run, bytes_of = native.cuda.conv2d_stem, native.cuda.conv2d_stem_moments_workspace
        more = (cuda_stem.tiles_of_block(query),)
    # Fewer channels than _FEW are read where they lie.
    problem, (copy_input, copy_weight) = _problem(query, "input", "weight")
    size, strides = query.geometry.output_size, query.strides[2]
    splits = native.cuda.conv2d_moment_splits(problem)
    workspace_bytes = bytes_of(problem)

    def kernel(
        input: Tensor, weight: Tensor, bias: Tensor | None, with_moments: bool
    ) -> tuple[Tensor, Tensor | None]:
        output = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        input, weight = copy_input(input), copy_weight(weight)
        if bias is not None:
            bias = bias.contiguous()
        moments = workspace = None
        if with_moments and splits:
            dtype = batch_norm.sum_dtype(input.dtype)
            moments = torch.empty(splits, 3, size[1], dtype=dtype, device=input.device)
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=input.device)
        run(
            problem, way(), *more, input.data_ptr(), weight.data_ptr(), sgd.address(bias),
            output.data_ptr(), sgd.address(moments), sgd.address(workspace),
            *cuda_stream.current(input.device),
        )  # fmt: skip
        return output, moments

    return kernel


def _hopper_conv2d(query: Conv2dQuery, by: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What a `Kernel` runs, in a tile for Hopper."""
    assert native.cuda is not None
    problem, (copy_input, copy_weight) = _problem(query, "input", "weight", by=by)
    run, how = _kernel("conv2d", query, by)
    size, strides = query.geometry.output_size, query.strides[2]
    device = cuda_stream.current(query.device)[0]
    splits = native.cuda.conv2d_hopper_moment_splits(problem, *HOPPER[by], device)

    def kernel(
        input: Tensor, weight: Tensor, bias: Tensor | None, with_moments: bool
    ) -> tuple[Tensor, Tensor | None]:
        output = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        input, weight = copy_input(input), copy_weight(weight)
        if bias is not None:
            bias = bias.contiguous()
        moments = None
        if with_moments and splits:
            moments = torch.empty(splits, 3, size[1], dtype=torch.float32, device=input.device)
        run(
            problem, *how(), input.data_ptr(), weight.data_ptr(), sgd.address(bias),
            output.data_ptr(), sgd.address(moments), *cuda_stream.current(input.device),
        )  # fmt: skip
        return output, moments

    return kernel


def _hopper_conv2d_alone(query: Conv2dQuery, by: str) -> Callable[..., Tensor]:
    """A forward pass by one of the kernels for Hopper that take no moments of its output."""
    problem, (copy_input, copy_weight) = _problem(query, "input", "weight", by=by)
    run, how = _kernel("conv2d", query, by)
    size, strides = query.geometry.output_size, query.strides[2]

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        input, weight = copy_input(input), copy_weight(weight)
        if bias is not None:
            bias = bias.contiguous()
        run(
            problem, *how(), input.data_ptr(), weight.data_ptr(), sgd.address(bias),
            output.data_ptr(), *cuda_stream.current(input.device),
        )  # fmt: skip
        return output

    return kernel


def conv2d_grad_input(query: Conv2dQuery, by: str = "") -> Callable[[Tensor, Tensor], Tensor]:
    assert native.cuda is not None
    by = by or algorithm("conv2d_grad_input", query)
    if by in cuda_depthwise.WAYS:
        return cuda_depthwise.conv2d_grad_input(query, _problem(query)[0], by)
    if by in cuda_grouped.BINDINGS:
        problem, (copy_grad,) = _problem(query, "output", by=by)
        return cuda_grouped.conv2d_grad_input(query, problem, copy_grad, by)
    if by.endswith(TURNED):
        turned = _turned("conv2d_grad_input", query)
        inside = conv2d_grad_input(turned, by.removesuffix(TURNED))
        turn, turn_back = cuda_layout.channels_last, cuda_layout.contiguous
        return lambda grad_output, weight: turn_back(inside(turn(grad_output), turn(weight)))
    if by.endswith(PADDED):
        return _padded_grad_input(query, by.removesuffix(PADDED))
    if by in cuda_hopper_float32.TILES:
        problem, (copy_grad,) = _problem(query, "output", by=by)
        in_parts = cuda_hopper_float32.conv2d_grad_input(query, problem, copy_grad, by)
        return _unless_tf32(query, in_parts, conv2d_grad_input(query, LARGEST))
    problem, (copy_weight, copy_grad) = _problem(query, "weight", "output", by=by)
    run, how = _kernel("conv2d_grad_input", query, by)
    size, strides = query.geometry.input_size, query.strides[0]

    def kernel(grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_input = torch.empty_strided(size, strides, dtype=weight.dtype, device=weight.device)
        grad_output, weight = copy_grad(grad_output), copy_weight(weight)
        run(
            problem, *how(), grad_output.data_ptr(), weight.data_ptr(), grad_input.data_ptr(),
            *cuda_stream.current(weight.device),
        )  # fmt: skip
        return grad_input

    return kernel


def _padded_grad_input(query: Conv2dQuery, tile: str) -> Callable[[Tensor, Tensor], Tensor]:
    padded = padded_query(query)
    whole = conv2d_grad_input(padded, tile)
    channels, C = padded.geometry.C, query.geometry.C
    size, strides = query.geometry.input_size, query.strides[0]

    def kernel(grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_input = whole(grad_output, _pad(weight, channels))
        narrow = torch.empty_strided(size, strides, dtype=weight.dtype, device=weight.device)
        return narrow.copy_(grad_input[:, :C])

    return kernel


def conv2d_grad_weight(
    query: Conv2dQuery, by: str = ""
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    assert native.cuda is not None
    by = by or algorithm("conv2d_grad_weight", query)
    if by in cuda_depthwise.WAYS:
        return cuda_depthwise.conv2d_grad_weight(query, _problem(query)[0], by)
    if by.endswith(TURNED):
        turned = _turned("conv2d_grad_weight", query)
        inside, turn = (
            conv2d_grad_weight(turned, by.removesuffix(TURNED)),
            cuda_layout.channels_last,
        )
        return lambda grad_output, input, bias: inside(turn(grad_output), turn(input), bias)
    if by == cuda_stem.NAME:
        way = _way(query, SMALLEST)
        stem = cuda_stem.conv2d_grad_weight(query, _problem(query)[0], way)
        exact = conv2d_grad_weight(query, SMALLEST)
        return lambda *tensors: (exact if _is_exact(query) else stem)(*tensors)
    if by in cuda_grouped.BINDINGS:
        problem, copies = _problem(query, "input", "output", by=by)
        return cuda_grouped.GroupedGradWeight(query, problem, copies, _way(query, SMALLEST), by)
    if by.endswith(PADDED):
        return _padded_grad_weight(query, by.removesuffix(PADDED))
    problem, copies = _problem(query, "input", "output", by=by)
    if by in (*BLOCKS, *PLANES_BLOCKS):
        return HopperGradWeight(query, problem, copies, _way(query, SMALLEST), by)
    if by in cuda_hopper_float32.BLOCKS:
        tiled = GradWeight(query, problem, copies, _way(query, LARGEST), splits(query, LARGEST))
        return HopperFloat32GradWeight(query, problem, copies, tiled, by)
    return GradWeight(query, problem, copies, _way(query, by), splits(query, by))


def _padded_grad_weight(
    query: Conv2dQuery, tile: str
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    padded = padded_query(query)
    whole = conv2d_grad_weight(padded, tile)
    channels, C = padded.geometry.C, query.geometry.C
    size, strides = query.geometry.weight_size, query.strides[1]

    def kernel(grad_output: Tensor, input: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        grad_weight, grad_bias = whole(grad_output, _pad(input, channels), bias)
        narrow = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        return narrow.copy_(grad_weight[:, :C]), grad_bias

    return kernel
