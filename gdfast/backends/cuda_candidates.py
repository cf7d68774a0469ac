"""In which ways our CUDA kernels may run a convolution, and what they do not take."""

from __future__ import annotations

import os
from math import prod

import torch

from gdfast import native
from gdfast.backends import (
    cuda_depthwise,
    cuda_grouped,
    cuda_hopper,
    cuda_hopper_float32,
    cuda_hopper_grad_weight,
    cuda_hopper_halo,
    cuda_hopper_planes,
    cuda_stem,
    cuda_tiles,
)
from gdfast.backends.cuda_depthwise import depthwise_fits
from gdfast.backends.cuda_problem import FEW, READ, TURNED, problem_of, turned
from gdfast.backends.cuda_tiles import PADDED, SMALLEST, blocks_of, padded_query
from gdfast.backends.registry import Conv2dQuery
from gdfast.geometry import dense_strides
from gdfast.windows import Windows

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
        direct = cuda_tiles.candidates(op, query)[0]
        ways = *(way + TURNED for way in candidates(op, turned(op, query))), direct
        if _has_hopper(query) and not planes_why_not(op, query):
            return (cuda_hopper_planes.NAME, *ways)
        return ways
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
        hopper = cuda_depthwise.HOPPER if _has_hopper(query) else ()
        fitting = {by for by in hopper if not depthwise_hopper_why_not(query, by)}
        ways = cuda_depthwise.WAYS
        return tuple(by for by in ways if by in fitting or by not in cuda_depthwise.HOPPER)
    there = tuple(name + TURNED for name in _depthwise_candidates(op, turned(op, query)))
    in_place = (cuda_depthwise.NAME,)
    return there + in_place if cuda_depthwise.is_large(query) else in_place + there


def _hopper_candidates(op: str, query: Conv2dQuery) -> tuple[str, ...]:
    ending = ""
    if (
        op == "conv2d_grad_input"
        and query.geometry.C % cuda_hopper.CHUNK
        and query.geometry.groups == 1
    ):
        query, ending = padded_query(query), PADDED
    if not _has_hopper(query):
        return ()
    is_weight = op == "conv2d_grad_weight"
    if is_weight and os.environ.get("GDFAST_HOPPER") == "no_grad_weight":
        return ()
    if query.dtype == torch.float32:
        if cuda_hopper_float32.allows_tf32(query) or hopper_float32_why_not(op, query):
            return ()
        return tuple(name + ending for name in cuda_hopper_float32.candidates(op, query))
    if hopper_why_not(op, query):
        return ()
    if is_weight:
        names = cuda_hopper_grad_weight.candidates(query)
        if not planes_why_not(op, query):
            names = *cuda_hopper_grad_weight.planes_candidates(query), *names
        return names
    made = query.geometry.K if op == "conv2d" else query.geometry.C
    halo = [name for name in cuda_hopper_halo.candidates(made) if not halo_why_not(op, query, name)]
    names = *cuda_hopper.candidates(made), *halo
    if made <= cuda_hopper_halo.FEW:
        names = *halo, *cuda_hopper.candidates(made)
    return tuple(name + ending for name in names)


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
    return g.N > 0 and channels >= FEW and strides[1] > 1 and strides == dense_strides(size, False)


def hopper_why_not(op: str, query: Conv2dQuery) -> str:
    """Why the kernel for Hopper does not run one pass here, or ""."""
    assert native.cuda is not None
    if reason := cuda_hopper.missing(query.device):
        return reason
    if op == "conv2d_grad_weight":
        problem, _ = problem_of(query, "input", "output")
        return str(native.cuda.conv2d_grad_weight_hopper_why_not(problem))
    gradient = op == "conv2d_grad_input"
    problem, _ = problem_of(query, "weight", "output" if gradient else "input")
    return str(native.cuda.conv2d_hopper_why_not(problem, gradient))


def halo_why_not(op: str, query: Conv2dQuery, name: str) -> str:
    """Why the kernel for Hopper whose taps share boxes does not run one pass here, or ""."""
    if reason := cuda_hopper.missing(query.device):
        return reason
    problem, _ = problem_of(query, "weight", "output" if op == "conv2d_grad_input" else "input")
    return cuda_hopper_halo.why_not(op, problem, name)


def planes_why_not(op: str, query: Conv2dQuery) -> str:
    """Why the kernel for Hopper that reads and writes NCHW does not run one pass here, or ""."""
    if reason := cuda_hopper.missing(query.device):
        return reason
    return cuda_hopper_planes.why_not(op, problem_of(query)[0])


def hopper_float32_why_not(op: str, query: Conv2dQuery) -> str:
    """Why the kernels of float32 for Hopper do not run one pass here, or ""."""
    problem, _ = problem_of(query, *READ[op])
    return cuda_hopper_float32.why_not(op, query, problem)


def depthwise_tensor_why_not(query: Conv2dQuery) -> str:
    """Why a depthwise convolution does not run on the tensor cores, or ""."""
    return cuda_depthwise.tensor_why_not(problem_of(query)[0])


def depthwise_hopper_why_not(query: Conv2dQuery, by: str) -> str:
    """Why a depthwise convolution does not run by one of the ways for Hopper, or ""."""
    if reason := cuda_hopper.missing(query.device):
        return reason
    return cuda_depthwise.hopper_why_not(problem_of(query)[0], by)


def grouped_why_not(op: str, query: Conv2dQuery, by: str = cuda_grouped.NAME) -> str:
    """Why the kernels for groups of few channels do not run one pass here, or ""."""
    problem, _ = problem_of(query, *READ[op], by=by)
    return cuda_grouped.why_not(op, query, problem, by)
