"""What CUDA kernels are told of a convolution, and the tensors that they are given for it.

The kernels read 16 bytes of channels at a time where those lie side by side, and number by number
else. A tensor of another layout is copied to channels_last first, which costs a pass over it; the
result may be made in channels_last too, and copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from gdfast import native
from gdfast.backends import (
    cuda_grouped,
    cuda_hopper_float32,
    cuda_hopper_planes,
    cuda_layout,
    sgd,
)
from gdfast.backends.cuda_hopper import HOPPER
from gdfast.backends.cuda_hopper_grad_weight import BLOCKS, PLANES_BLOCKS
from gdfast.backends.cuda_hopper_halo import HALO
from gdfast.backends.cuda_operands import Copy, as_it_is, at_16
from gdfast.backends.registry import Conv2dActQuery, Conv2dQuery
from gdfast.geometry import dense_strides
from gdfast.windows import Windows

TURNED = "-channels_last"  # after a way's name: tensors go there, and the result comes back
FEW = 16  # channels: with fewer, a copy to channels_last brings few of them together
# The images that a pass reads.
READ = {
    "conv2d": ("input",), "conv2d_grad_input": ("output",),
    "conv2d_grad_weight": ("input", "output"),
}  # fmt: skip
# Ways that read 16 bytes at a time by the TMA unit, and of those the ones that read NCHW.
_BY_TMA = {
    *HOPPER, *HALO, cuda_hopper_planes.NAME, *BLOCKS, *PLANES_BLOCKS, *cuda_hopper_float32.TILES,
    *cuda_hopper_float32.BLOCKS,
}  # fmt: skip
_OF_PLANES = {cuda_hopper_planes.NAME, *PLANES_BLOCKS}
_ANY = 2**31  # more channels than there are


def problem_of(query: Conv2dQuery, *copied: str, by: str = "") -> tuple[Any, list[Copy]]:
    """The problem on tensors in channels_last, and what copies those named, if need be."""
    assert native.cuda is not None
    g, windows = query.geometry, Windows(query.geometry)
    sizes = {"input": g.input_size, "weight": g.weight_size, "output": g.output_size}
    channels = {"input": g.C, "weight": g.C, "output": g.K}
    strides = dict(zip(sizes, query.strides, strict=True))
    copies: list[Copy] = []
    is_grouped = by in cuda_grouped.BINDINGS
    unscattered = at_16 if by in _BY_TMA or is_grouped else as_it_is
    few = 0 if is_grouped else _ANY if by in _OF_PLANES else FEW
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


def turned(op: str, query: Conv2dQuery) -> Conv2dQuery:
    """The query of tensors in channels_last, but for a weight that is written."""
    g = query.geometry
    input, output = dense_strides(g.input_size, True), dense_strides(g.output_size, True)
    is_written = op == "conv2d_grad_weight"
    weight = query.strides[1] if is_written else dense_strides(g.weight_size, True)
    return replace(query, strides=(input, weight, output))


def pad(tensor: Tensor, channels: int) -> Tensor:
    """A copy in channels_last with zeros for more channels."""
    n, c, h, w = tensor.shape
    size = n, channels, h, w
    padded = tensor.new_empty_strided(size, dense_strides(size, True))
    padded[:, :c] = tensor
    padded[:, c:] = 0
    return padded
