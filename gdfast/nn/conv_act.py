"""Convolution and activation in one kernel: the function and the block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast import ops
from gdfast.nn.block import (
    ACTIVATIONS,
    NAMES,
    check_activation,
    has_hooks,
    is_traced,
    same_padding,
    slope_of,
    traced,
)
from gdfast.nn.conv import Conv2d


def convolve(conv: Any, input: Tensor, activation: str, negative_slope: float) -> Tensor:
    """activation(conv(input)) for a `torch.nn.Conv2d`; activation as in `ConvAct`.

    input [N, C, H, W] or [C, H, W]. Raises what `gdfast.ops.conv2d_act` raises.
    """
    input, padding = padded(conv, input)
    return ops.conv2d_act(
        input, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups,
        activation=activation, negative_slope=negative_slope,
    )  # fmt: skip


def padded(conv: Any, input: Tensor) -> tuple[Tensor, Any]:
    """The input, padded where a `torch.nn.Conv2d` pads with other than zeros, and the padding that
    is left to the operation.
    """
    if conv.padding_mode == "zeros":
        return input, conv.padding
    around = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    return around, (0, 0)


class ConvAct(torch.nn.Module):
    """Convolution and activation: `act(conv(input))`.

    The first arguments are those of `torch.nn.Conv2d`; padding None keeps the size of the image
    for odd kernels and stride 1: dilation * (kernel_size - 1) // 2. `activation` is "none", "relu",
    "relu6", "leaky_relu" (with `negative_slope`) or "silu". `conv` and `act` are modules with the
    state_dict keys conv.weight and conv.bias; they run in one pass unless one of them was replaced
    or carries hooks. input [N, C, H, W] or [C, H, W]. Backward reads the result of "relu", "relu6"
    and "leaky_relu": it raises where that was written to meanwhile.

    Raises ValueError for another activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        activation: str = "relu",
        negative_slope: float = 0.01,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation("ConvAct", activation)
        super().__init__()
        if padding is None:
            padding = same_padding(kernel_size, dilation)
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.act = ACTIVATIONS[activation](negative_slope)

    def forward(self, input: Tensor) -> Tensor:
        if is_traced(self, input):
            return traced(self, input)
        conv, act = self.conv, self.act
        name = NAMES.get(type(act))
        if name is not None and type(conv) is Conv2d and not has_hooks(conv, act):
            return convolve(conv, input, name, slope_of(act))
        return act(conv(input))
