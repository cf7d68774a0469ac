"""What fused forwards call: our operations on the modules' parameters, settings and modes as they
are at the call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast import ops
from gdfast.backends.activation import activate
from gdfast.nn.conv_act import convolve, padded
from gdfast.nn.linear import run_linear
from gdfast.nn.norm import convolve_for, normalise, run_as_one
from gdfast.nn.pool import conv_relu_max_pool, run_max_pool
from gdfast.nn.residual import run_block


def norm_act(
    norm: Any,
    input: Tensor,
    residual: Any = None,
    activation: str = "none",
    slope: Any = None,
    in_place: bool = False,
    moments: Tensor | None = None,
) -> Tensor:
    """activation(norm(input) + residual) for a `torch.nn.BatchNorm2d`, its statistics updated.

    `slope` is leaky_relu's or the module that has it; `in_place` says that the residual is added
    to the normalized input in place, which decides the dtype where the two have different ones;
    `moments` are those that `convolve_for` gave with the input.
    """
    slope = _number(slope)
    if residual is None or (
        isinstance(residual, Tensor)
        and residual.dtype == input.dtype
        and residual.shape == input.shape
    ):
        return normalise(norm, input, residual, activation, slope, moments)
    output = normalise(norm, input, None, "none", slope, moments)
    output = output.add_(residual) if in_place else output + residual
    return activate(output, activation, slope)


def conv_norm_act(
    conv: Any,
    norm: Any,
    input: Tensor,
    residual: Any = None,
    activation: str = "none",
    slope: Any = None,
    in_place: bool = False,
) -> Tensor:
    """activation(norm(conv(input)) + residual); arguments as in `norm_act`, any module as conv."""
    output = run_as_one(norm, conv, input, residual, activation, _number(slope))
    if output is not None:
        return output
    between, moments = convolve_for(norm, conv, input)
    return norm_act(norm, between, residual, activation, slope, in_place, moments)


def residual_block(
    input: Tensor, in_place: bool, shortcut: tuple[Any, ...] | None, *chain: tuple[Any, ...]
) -> Tensor:
    """A chain of `conv_norm_act`, each layer as conv, norm, activation and slope: the residual of
    the last one is the input, or what the shortcut, a layer too, makes of it."""
    if shortcut is not None:
        shortcut = *shortcut[:3], _number(shortcut[3])
    layers = tuple((*layer[:3], _number(layer[3])) for layer in chain)

    def by_layers() -> list[Tensor]:
        outputs, source, residual = [], input, input
        if shortcut is not None:
            conv, norm, name, slope = shortcut
            outputs.append(residual := conv_norm_act(conv, norm, input, None, name, slope))
        for conv, norm, name, slope in layers[:-1]:
            outputs.append(source := conv_norm_act(conv, norm, source, None, name, slope))
        conv, norm, name, slope = layers[-1]
        return [*outputs, conv_norm_act(conv, norm, source, residual, name, slope, in_place)]

    output: Tensor = run_block(input, shortcut, layers, by_layers)
    return output


def conv_act(
    conv: Any, input: Tensor, activation: str, slope: Any = None, result_may_change: bool = False
) -> Tensor:
    """activation(conv(input)) for a `gdfast.nn.Conv2d`; `slope` as in `norm_act`.

    `result_may_change` says that somebody may write to the result before backward: then the
    activation keeps its argument, as native's does.
    """
    slope = _number(slope)
    if result_may_change and torch.is_grad_enabled():
        return activate(conv(input), activation, slope)
    return convolve(conv, input, activation, slope)


def conv_relu_pool(conv: Any, input: Tensor, *pool: Any) -> Tensor:
    """max_pool(relu(conv(input))) for a `gdfast.nn.Conv2d`; `pool` as in `max_pool`."""
    size, stride, padding, dilation, ceil_mode = _pool_arguments(pool)
    if stride in (None, size) and (padding, dilation, ceil_mode) == (0, 1, False):
        return conv_relu_max_pool(conv, input, size)
    if dilation not in (1, (1, 1), [1, 1]) or ceil_mode:
        return ops.max_pool2d(F.relu(conv(input)), size, stride, padding, dilation, ceil_mode)
    input, sides = padded(conv, input)
    return ops.conv2d_relu_max_pool2d(
        input, conv.weight, conv.bias, conv.stride, sides, conv.dilation, conv.groups,
        pool_size=size, pool_stride=stride, pool_padding=padding,
    )  # fmt: skip


def max_pool(input: Tensor, *pool: Any) -> Tensor:
    """Max pooling; `pool` is a `torch.nn.MaxPool2d`, or kernel_size, stride, padding, dilation and
    ceil_mode.
    """
    if len(pool) == 1:
        return run_max_pool(pool[0], input)
    return ops.max_pool2d(input, *pool)


def pool(module: Any, input: Tensor) -> Tensor:
    """Max pooling as a `torch.nn.MaxPool2d` says."""
    return run_max_pool(module, input)


def _pool_arguments(pool: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(pool) > 1:
        return pool
    (module,) = pool
    return module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode


def _number(slope: Any) -> float:
    if slope is None:
        return 0.01
    number: float = slope if isinstance(slope, (int, float)) else slope.negative_slope
    return number


def linear(module: torch.nn.Linear, input: Tensor) -> Tensor:
    """A linear layer as a `torch.nn.Linear` says."""
    return run_linear(module, input)
