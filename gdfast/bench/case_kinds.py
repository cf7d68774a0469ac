"""What a case is that is tested or timed, of each kind: sizes, and what follows from them.

Pure data. It imports nothing but the standard library, so anything may import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any


@dataclass(frozen=True)
class Conv2dCase:
    """One 2-D convolution: input [N, C, H, W], weight [K, C / groups, R, S], output [N, K, P, Q].

    stride, padding and dilation are (height, width) pairs. `count` says how many times the layer
    occurs in `model`.
    """

    name: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    model: str = ""
    count: int = 1

    def __str__(self) -> str:
        return f"{self.model} {self.name}".strip()

    @property
    def P(self) -> int:
        """Rows of the output."""
        return _output_size(self.H, self.R, self.stride[0], self.padding[0], self.dilation[0])

    @property
    def Q(self) -> int:
        """Columns of the output."""
        return _output_size(self.W, self.S, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.K, self.C // self.groups, self.R, self.S)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.K, self.P, self.Q)

    @property
    def geometry(self) -> dict[str, Any]:
        """The keyword arguments after weight and bias: stride, padding, dilation, groups."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def flops(self) -> int:
        """Floating-point operations of one pass, two for each multiply-add, padding included."""
        return 2 * prod(self.output_shape) * prod(self.weight_shape[1:])

    @property
    def bytes(self) -> int:
        """Least traffic of one pass in float32: input, weight and output cross memory once each."""
        return 4 * (prod(self.input_shape) + prod(self.weight_shape) + prod(self.output_shape))

    def with_batch(self, N: int) -> Conv2dCase:
        """The same layer for another batch size."""
        return replace(self, N=N)


@dataclass(frozen=True)
class PoolCase:
    """One max pooling of [N, C, H, W]; windows, steps and padding are (height, width) pairs."""

    name: str
    N: int
    C: int
    H: int
    W: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments after the input."""
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
        }


@dataclass(frozen=True)
class FusedPoolCase:
    """A convolution, ReLU and max pooling; `fused` says whether one kernel does all."""

    name: str
    conv: Conv2dCase
    pool_size: tuple[int, int] = (2, 2)
    pool_stride: tuple[int, int] = (2, 2)
    pool_padding: tuple[int, int] = (0, 0)
    fused: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments after input, weight and bias."""
        return {
            **self.conv.geometry,
            "pool_size": self.pool_size,
            "pool_stride": self.pool_stride,
            "pool_padding": self.pool_padding,
        }


@dataclass(frozen=True)
class SgdCase:
    """One update of parameters of these sizes (elements of each tensor)."""

    name: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def parameters(self) -> int:
        return sum(self.sizes)

    @property
    def bytes(self) -> int:
        """Least traffic in float32 with momentum: read p, g and m, write p and m."""
        return 5 * 4 * self.parameters


@dataclass(frozen=True)
class NormCase:
    """One batch normalisation of images [N, C, H, W] with ReLU, or with a residual before that."""

    size: tuple[int, int, int, int]
    residual: bool = False

    @property
    def name(self) -> str:
        N, C, H, _ = self.size
        return f"{N} x {C} @{H}" + " + residual" * self.residual

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class StepCase:
    """One training step of a whole model on images [N, C, H, W].

    `options` are those of `gdfast.models.create`. Models of dropout are made without: both sides
    must compute the same.
    """

    name: str
    model: str  # a name that gdfast.models.create knows
    N: int
    C: int
    H: int
    W: int
    classes: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
