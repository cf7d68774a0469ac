"""The geometry of a 2-D convolution: output size, padding, memory layout, and what is legal.

Every layer of the package asks here, so that there is one formula and one set of messages. Sizes
may be symbolic (`torch.SymInt`): the fake kernels come this way too.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from gdfast.errors import mismatch

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]  # rows above, columns left, rows below, columns right
Size4 = tuple[int, int, int, int]

# Padding, and with it any step within a padded image, stays so small that no address that kernels
# compute from it leaves their 64 bits.
_MOST = 2**63 - 1
_MOST_PADDING = 2**31 - 1
_MOST_ELEMENTS = 2**61


def integer(name: str, value: Any, op: str = "conv2d") -> int:
    """`value` as an int. Raises TypeError for what is not a whole number, and for a bool."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(mismatch(op, name, "an int", f"{value!r} ({type(value).__name__})"))


def pair(name: str, value: Any, op: str = "conv2d") -> Pair:
    """`value` as (height, width); one number stands for both.

    Raises TypeError for what is not a number or a sequence of numbers, RuntimeError for a sequence
    of another length than 1 or 2.
    """
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value  # the usual case, which every call of every layer takes
    if type(value) is int:
        return value, value
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = [integer(name, number, op) for number in value]
        if len(numbers) not in (1, 2):
            raise RuntimeError(mismatch(op, name, "one number or a pair (height, width)", value))
        return numbers[0], numbers[-1]
    number = integer(name, value, op)
    return number, number


def named_padding(
    name: str, kernel: Sequence[int], stride: Pair, dilation: Pair, op: str = "conv2d"
) -> Padding:
    """The padding that "valid" (none) or "same" (the size stays, at stride 1) stands for.

    An odd row or column of "same" goes below or to the right. Raises RuntimeError for another name
    and for "same" with a stride.
    """
    if name == "valid":
        return 0, 0, 0, 0
    if name != "same":
        raise RuntimeError(
            mismatch(op, "padding", "'same', 'valid', a number or a pair", repr(name))
        )
    if len(kernel) != 2:
        raise RuntimeError(
            mismatch(op, "weight", "[K, C / groups, R, S]", f"{len(kernel)}-dimensional kernels")
        )
    if stride != (1, 1):
        raise RuntimeError(mismatch(op, "padding", "numbers, for a stride", f"'same', {stride=}"))
    rows, columns = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    top, left = rows // 2, columns // 2
    return top, left, rows - top, columns - left


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output positions along one axis, below 1 if none; `padding` counts both sides."""
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class Conv2dGeometry:
    """The sizes of one convolution.

    input [N, C, H, W], weight [K, C / groups, R, S], output [N, K, P, Q].

    Only `of` makes one, so that a geometry is always a legal one.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    stride: Pair
    padding: Padding
    dilation: Pair
    groups: int

    @classmethod
    def of(
        cls,
        op: str,
        input_size: Sequence[int],
        weight_size: Sequence[int],
        stride: Pair,
        padding: Padding,
        dilation: Pair,
        groups: int,
    ) -> Conv2dGeometry:
        """Checks a batched convolution. Raises RuntimeError and ValueError where native does."""
        if len(input_size) != 4:
            raise RuntimeError(
                mismatch(op, "input", "[N, C, H, W] or [C, H, W]", f"size {list(input_size)}")
            )
        if len(weight_size) != 4:
            raise RuntimeError(
                mismatch(op, "weight", "[K, C / groups, R, S]", f"size {list(weight_size)}")
            )
        for name, values, least, most in (
            ("stride", stride, 1, _MOST),
            ("padding", padding, 0, _MOST_PADDING),
            ("dilation", dilation, 1, _MOST),
            ("groups", (groups,), 1, _MOST),
        ):
            got = groups if name == "groups" else tuple(values)
            # Of symbolic numbers only the lower bound: the upper one would become a guard.
            numbers = [value for value in values if type(value) is int]
            if any(not -_MOST <= number <= _MOST for number in numbers):
                raise ValueError(mismatch(op, name, "numbers of at most 64 bits", got))
            if any(value < least for value in values):
                raise RuntimeError(mismatch(op, name, f"at least {least}", got))
            if any(number > most for number in numbers):
                raise RuntimeError(mismatch(op, name, f"at most {most}", got))
        N, C, H, W = input_size
        K, C_group, R, S = weight_size
        if groups * C_group != C:
            raise RuntimeError(
                mismatch(
                    op,
                    "input",
                    f"{groups * C_group} channels (weight {list(weight_size)}, {groups=})",
                    f"{C} channels in size {list(input_size)}",
                )
            )
        if groups > K or K % groups != 0:
            raise RuntimeError(
                mismatch(op, "weight", f"a multiple of {groups=} as first size", list(weight_size))
            )
        if R < 1 or S < 1:
            raise RuntimeError(mismatch(op, "weight", "a kernel of at least 1 x 1", f"{R} x {S}"))
        top, left, below, right = padding
        P = output_size(H, R, stride[0], top + below, dilation[0])
        Q = output_size(W, S, stride[1], left + right, dilation[1])
        if P < 1 or Q < 1:
            raise RuntimeError(
                mismatch(
                    op,
                    "input",
                    f"a padded image of at least {dilation[0] * (R - 1) + 1} x "
                    f"{dilation[1] * (S - 1) + 1}, the extent of the kernel",
                    f"{H + top + below} x {W + left + right}",
                    "Use a smaller kernel or dilation, or more padding",
                )
            )
        if H < 1 or W < 1:
            raise RuntimeError(
                mismatch(op, "input", "at least one row and one column", list(input_size))
            )
        output = N, K, P, Q
        if all(type(n) is int for n in output) and (N or 1) * K * P * Q > _MOST_ELEMENTS:
            expected = f"an output of at most {_MOST_ELEMENTS} elements"
            raise RuntimeError(mismatch(op, "padding", expected, f"size {list(output)}"))
        return cls(
            N, C, H, W, K, R, S, P, Q,
            (stride[0], stride[1]), (top, left, below, right), (dilation[0], dilation[1]), groups,
        )  # fmt: skip

    @property
    def input_size(self) -> Size4:
        return self.N, self.C, self.H, self.W

    @property
    def weight_size(self) -> Size4:
        return self.K, self.C // self.groups, self.R, self.S

    @property
    def output_size(self) -> Size4:
        # Without input channels native gives an output without channels, whatever K is.
        return self.N, self.K if self.C else 0, self.P, self.Q

    @property
    def flops(self) -> int:
        """Floating-point operations of any of the three passes, two for each multiply-add."""
        return 2 * prod(self.output_size) * prod(self.weight_size[1:])


@dataclass(frozen=True)
class MaxPool2dGeometry:
    """The sizes of one max pooling: input [N, C, H, W], windows R x S, output [N, C, P, Q].

    Only `of` makes one, so that a geometry is always a legal one.
    """

    N: int
    C: int
    H: int
    W: int
    R: int
    S: int
    P: int
    Q: int
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool

    @classmethod
    def of(
        cls,
        op: str,
        input_size: Sequence[int],
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        ceil_mode: bool,
    ) -> MaxPool2dGeometry:
        """Checks a batched pooling. Raises RuntimeError and ValueError where native does."""
        if len(input_size) != 4:
            raise RuntimeError(
                mismatch(op, "input", "[N, C, H, W] or [C, H, W]", f"size {list(input_size)}")
            )
        for name, values, least in (
            ("kernel_size", kernel, 1),
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        ):
            if any(type(value) is int and not -_MOST <= value <= _MOST for value in values):
                raise ValueError(mismatch(op, name, "numbers of at most 64 bits", tuple(values)))
            if any(value < least for value in values):
                raise RuntimeError(mismatch(op, name, f"at least {least}", tuple(values)))
        N, C, H, W = input_size
        if C < 1 or H < 1 or W < 1:
            raise RuntimeError(
                mismatch(op, "input", "at least one channel, row and column", list(input_size))
            )
        if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
            expected = f"at most half of kernel_size {tuple(kernel)}"
            raise RuntimeError(mismatch(op, "padding", expected, tuple(padding)))
        P, Q = (
            _pooled_size(*axis, ceil_mode)
            for axis in zip((H, W), kernel, stride, padding, dilation, strict=True)
        )
        if P < 1 or Q < 1:
            extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
            raise RuntimeError(
                mismatch(
                    op,
                    "input",
                    f"a padded image of at least {extent[0]} x {extent[1]}, the window's extent",
                    f"{H + 2 * padding[0]} x {W + 2 * padding[1]}",
                    "Use a smaller window or dilation, or more padding",
                )
            )
        return cls(
            N, C, H, W, kernel[0], kernel[1], P, Q, (stride[0], stride[1]),
            (padding[0], padding[1]), (dilation[0], dilation[1]), ceil_mode,
        )  # fmt: skip

    @property
    def input_size(self) -> Size4:
        return self.N, self.C, self.H, self.W

    @property
    def output_size(self) -> Size4:
        return self.N, self.C, self.P, self.Q


def _pooled_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """Windows along one axis; in ceil mode one more may hang over the end, if it begins inside."""
    pooled = output_size(
        size + (stride - 1 if ceil_mode else 0), kernel, stride, 2 * padding, dilation
    )
    if ceil_mode and (pooled - 1) * stride >= size + padding:
        pooled -= 1
    return pooled


def is_channels_last(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether native PyTorch takes a 4-D tensor with these strides for channels_last.

    The rule of `Tensor.suggest_memory_format()` in C++: strides that could be either layout (one
    channel, 1x1 images) count as contiguous when they are written as contiguous ones.
    """
    if len(size) != 4:
        return False
    _, C, H, W = size
    n, c, h, w = stride
    return (
        c != 0
        and w >= c * C
        and h >= w * W
        and n >= h * H
        and h * H != c  # N x 1 x 1 x 1
        and 0 not in size
    )


def conv2d_is_channels_last(
    input_size: Sequence[int],
    input_stride: Sequence[int],
    weight_size: Sequence[int],
    weight_stride: Sequence[int],
) -> bool:
    """Whether the output and grad_input are channels_last: where the input or the weight is."""
    if input_size[0] == 0:
        return False  # native makes empty batches contiguous
    return is_channels_last(input_size, input_stride) or is_channels_last(
        weight_size, weight_stride
    )


def dense_strides(size: Sequence[int], channels_last: bool) -> Size4:
    """Strides of fresh memory for a 4-D size, as `torch.empty(..., memory_format=...)` gives them.

    Only the first two sizes may be 0.
    """
    _, C, H, W = size
    if channels_last:
        return H * W * C, 1, W * C, C
    return (C or 1) * H * W, H * W, W, 1
