"""Convolution on our CUDA kernels: each pass in the way that is named.

A few channels, those of a picture say, may be copied with zeros beside them that make up 16 bytes,
or have kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import (
    batch_norm,
    cuda_depthwise,
    cuda_grouped,
    cuda_hopper_float32,
    cuda_hopper_planes,
    cuda_layout,
    cuda_stem,
    cuda_stream,
    cuda_tiles,
    plans,
    sgd,
)
from gdfast.backends.cuda_candidates import algorithm
from gdfast.backends.cuda_grad_weight import GradWeight
from gdfast.backends.cuda_hopper import HOPPER
from gdfast.backends.cuda_hopper_float32 import HopperFloat32GradWeight
from gdfast.backends.cuda_hopper_grad_weight import BLOCKS, PLANES_BLOCKS, HopperGradWeight
from gdfast.backends.cuda_hopper_halo import HALO
from gdfast.backends.cuda_operands import Copy, may_plan
from gdfast.backends.cuda_problem import TURNED, pad, problem_of, turned
from gdfast.backends.cuda_tiles import LARGEST, PADDED, SMALLEST, padded_query, splits
from gdfast.backends.precision import is_strict
from gdfast.backends.registry import Conv2dQuery
from gdfast.tensor_cores import input_precision


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
        return getattr(native.cuda, f"{op}_halo"), lambda: (HALO[by],)
    if by == cuda_hopper_planes.NAME:
        return getattr(native.cuda, f"{op}_planes"), lambda: ()
    way = _way(query, by)
    return getattr(native.cuda, op), lambda: (way(),)


class Kernel:
    """A forward pass for one query.

    `run(input, weight, bias, moments)` gives the output and, if asked for, what
    `batch_norm.CudaForward` takes of it in the place of a pass over it: [splits, 3, K], or None
    where there are no positions or, on Hopper, too many splits to be worth it.
    """

    on_gpu = True

    def __init__(
        self, run: Callable[..., tuple[Tensor, Tensor | None]],
        draft: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self.run = run
        self.draft: Any = draft  # gives the numbers of output and moments, and the splits of these

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.run(input, weight, bias, False)[0]

    def with_moments(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return self.run(input, weight, bias, True)


# Each pass is run in the tile that is named, or in the cost model's; a depthwise layer has kernels
# of its own, and one with few channels may have. Forward ends with the activation that the query
# has, if any.
def conv2d(query: Conv2dQuery, by: str = "") -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    assert native.cuda is not None
    by = by or algorithm("conv2d", query)
    if by in cuda_depthwise.WAYS:
        return cuda_depthwise.conv2d(query, problem_of(query)[0], by)
    if by.endswith(TURNED):
        return _turned_conv2d(conv2d(turned("conv2d", query), by.removesuffix(TURNED)))
    if by in HOPPER or by in HALO:
        return _hopper_conv2d(query, by)
    if by == cuda_hopper_planes.NAME:
        return _hopper_conv2d_alone(query, by)
    if by in cuda_hopper_float32.TILES:
        problem, (copy_input,) = problem_of(query, "input", by=by)
        in_parts = cuda_hopper_float32.conv2d(query, problem, copy_input, by)
        return _unless_tf32(query, in_parts, conv2d(query, LARGEST))
    if by in cuda_grouped.BINDINGS:
        problem, (copy_input,) = problem_of(query, "input", by=by)
        return cuda_grouped.conv2d(query, problem, copy_input, by)
    if by == cuda_stem.NAME:
        stem, exact = _forward(query, by), _forward(query, SMALLEST)
        return Kernel(
            lambda *arguments: (exact if _is_exact(query) else stem).run(*arguments),
            lambda *arguments: (exact if _is_exact(query) else stem).draft(*arguments),
        )
    if by.endswith(PADDED):
        padded = padded_query(query)
        whole, channels = _forward(padded, by.removesuffix(PADDED)), padded.geometry.C
        return Kernel(
            lambda input, weight, bias, moments: whole.run(
                pad(input, channels), pad(weight, channels), bias, moments
            )
        )
    return _forward(query, by)


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


def _draft(
    query: Conv2dQuery, copies: Sequence[Copy], launch: Callable[[], Any], splits: int,
    workspace_bytes: int = 0,
) -> Callable[..., tuple[int, int, int] | None]:  # fmt: skip
    """The draft of a `Kernel`: `launch` makes its launch."""
    size, dtype = query.geometry.output_size, query.dtype
    part_bytes = 3 * size[1] * batch_norm.sum_dtype(dtype).itemsize
    new_output = _allocator(query, size, query.strides[2])

    def draft(
        plan: plans.Draft, input: int, weight: int, bias: int, with_moments: bool
    ) -> tuple[int, int, int] | None:
        if not may_plan(plan, copies, (input, weight)):
            return None
        output, moments, workspace = plan.fresh(new_output), plans.NONE, plans.NONE
        if with_moments and splits:
            moments, workspace = plan.scratch(splits * part_bytes), plan.scratch(workspace_bytes)
        plan.launch(launch(), input, weight, bias, output, moments, workspace)
        return output, moments, splits if moments != plans.NONE else 0

    return draft


def _allocator(
    query: Conv2dQuery, size: Sequence[int], strides: Sequence[int]
) -> Callable[[], Tensor]:
    return partial(torch.empty_strided, size, strides, dtype=query.dtype, device=query.device)


def _forward(query: Conv2dQuery, by: str) -> Kernel:
    """A `Kernel` in a tile, or the one for few channels."""
    assert native.cuda is not None
    way = _way(query, SMALLEST if by == cuda_stem.NAME else by)
    more: tuple[Any, ...] = ()
    run, bytes_of = native.cuda.conv2d, native.cuda.conv2d_moments_workspace
    make_launch = native.cuda.conv2d_launch
    if by == cuda_stem.NAME:
        run, bytes_of = native.cuda.conv2d_stem, native.cuda.conv2d_stem_moments_workspace
        make_launch = native.cuda.conv2d_stem_launch
        more = (cuda_stem.tiles_of_block(query),)
    # Fewer channels than _FEW are read where they lie.
    problem, (copy_input, copy_weight) = problem_of(query, "input", "weight")
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

    copies = copy_input, copy_weight
    launch = partial(_launch, make_launch, problem, lambda: (way(), *more))
    return Kernel(kernel, _draft(query, copies, launch, splits, workspace_bytes))


def _launch(make: Callable[..., Any], problem: Any, how: Callable[[], Any]) -> Any:
    """A launch in the way that is told now."""
    return make(problem, *how())


def _hopper_conv2d(query: Conv2dQuery, by: str) -> Kernel:
    """A `Kernel` in a tile for Hopper."""
    assert native.cuda is not None
    problem, (copy_input, copy_weight) = problem_of(query, "input", "weight", by=by)
    run, how = _kernel("conv2d", query, by)
    size, strides = query.geometry.output_size, query.strides[2]
    device = cuda_stream.current(query.device)[0]
    kind = "halo" if by in HALO else "hopper"
    splits = getattr(native.cuda, f"conv2d_{kind}_moment_splits")(problem, *how(), device)

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

    make_launch = getattr(native.cuda, f"conv2d_{kind}_launch")
    launch = partial(_launch, make_launch, problem, how)
    return Kernel(kernel, _draft(query, (copy_input, copy_weight), launch, splits))


def _hopper_conv2d_alone(query: Conv2dQuery, by: str) -> Callable[..., Tensor]:
    """A forward pass by the kernel for Hopper that takes no moments of its output."""
    problem, (copy_input, copy_weight) = problem_of(query, "input", "weight", by=by)
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
        return cuda_depthwise.conv2d_grad_input(query, problem_of(query)[0], by)
    if by in cuda_grouped.BINDINGS:
        problem, (copy_grad,) = problem_of(query, "output", by=by)
        return cuda_grouped.conv2d_grad_input(query, problem, copy_grad, by)
    if by.endswith(TURNED):
        there = turned("conv2d_grad_input", query)
        inside = conv2d_grad_input(there, by.removesuffix(TURNED))
        turn, turn_back = cuda_layout.channels_last, cuda_layout.contiguous
        return lambda grad_output, weight: turn_back(inside(turn(grad_output), turn(weight)))
    if by.endswith(PADDED):
        return _padded_grad_input(query, by.removesuffix(PADDED))
    if by in cuda_hopper_float32.TILES:
        problem, (copy_grad,) = problem_of(query, "output", by=by)
        in_parts = cuda_hopper_float32.conv2d_grad_input(query, problem, copy_grad, by)
        return _unless_tf32(query, in_parts, conv2d_grad_input(query, LARGEST))
    problem, (copy_weight, copy_grad) = problem_of(query, "weight", "output", by=by)
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

    def draft(plan: plans.Draft, grad_output: int, weight: int) -> int | None:
        if not may_plan(plan, (copy_grad, copy_weight), (grad_output, weight)):
            return None
        grad_input = plan.fresh(_allocator(query, size, strides))
        plan.launch(_launch(make_launch, problem, how), grad_output, weight, grad_input)
        return grad_input

    make_launch = getattr(native.cuda, f"{run.__name__}_launch")
    return plans.drafted(kernel, draft, on_gpu=True)


def _padded_grad_input(query: Conv2dQuery, tile: str) -> Callable[[Tensor, Tensor], Tensor]:
    padded = padded_query(query)
    whole = conv2d_grad_input(padded, tile)
    channels, C = padded.geometry.C, query.geometry.C
    size, strides = query.geometry.input_size, query.strides[0]

    def kernel(grad_output: Tensor, weight: Tensor) -> Tensor:
        grad_input = whole(grad_output, pad(weight, channels))
        narrow = torch.empty_strided(size, strides, dtype=weight.dtype, device=weight.device)
        return narrow.copy_(grad_input[:, :C])

    return kernel


def conv2d_grad_weight(
    query: Conv2dQuery, by: str = ""
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    assert native.cuda is not None
    by = by or algorithm("conv2d_grad_weight", query)
    if by in cuda_depthwise.WAYS:
        return cuda_depthwise.conv2d_grad_weight(query, problem_of(query)[0], by)
    if by.endswith(TURNED):
        there = turned("conv2d_grad_weight", query)
        inside, turn = (
            conv2d_grad_weight(there, by.removesuffix(TURNED)),
            cuda_layout.channels_last,
        )
        return lambda grad_output, input, bias: inside(turn(grad_output), turn(input), bias)
    if by == cuda_stem.NAME:
        way = _way(query, SMALLEST)
        stem = cuda_stem.conv2d_grad_weight(query, problem_of(query)[0], way)
        exact: Any = conv2d_grad_weight(query, SMALLEST)

        def either(*tensors: Any) -> tuple[Tensor, Tensor | None]:
            results: tuple[Tensor, Tensor | None] = (exact if _is_exact(query) else stem)(*tensors)
            return results

        def draft(*arguments: Any) -> Any:
            make: Any = plans.draft_of(exact if _is_exact(query) else stem)
            return make(*arguments)

        return plans.drafted(either, draft, on_gpu=True)
    if by in cuda_grouped.BINDINGS:
        problem, copies = problem_of(query, "input", "output", by=by)
        return cuda_grouped.GroupedGradWeight(query, problem, copies, _way(query, SMALLEST), by)
    if by.endswith(PADDED):
        return _padded_grad_weight(query, by.removesuffix(PADDED))
    problem, copies = problem_of(query, "input", "output", by=by)
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
        grad_weight, grad_bias = whole(grad_output, pad(input, channels), bias)
        narrow = torch.empty_strided(size, strides, dtype=input.dtype, device=input.device)
        return narrow.copy_(grad_weight[:, :C]), grad_bias

    return kernel
