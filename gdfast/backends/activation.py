"""The activations behind convolutions and normalisations: names, values and gradients natively."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu")


def activate(
    value: Tensor, activation: str, negative_slope: float, inplace: bool = False
) -> Tensor:
    """Native PyTorch's activation of that name."""
    if activation == "relu":
        return F.relu(value, inplace)
    if activation == "relu6":
        return F.relu6(value, inplace)
    if activation == "leaky_relu":
        return F.leaky_relu(value, negative_slope, inplace)
    if activation == "silu":
        return F.silu(value, inplace)
    return value


def output_tells(activation: str, negative_slope: float) -> bool:
    """Whether an activation's gradient follows from what it gave, in the place of its argument."""
    return activation != "silu" and (activation != "leaky_relu" or negative_slope >= 0)


def activation_gradient(grad: Tensor, z: Tensor, activation: str, slope: float) -> Tensor:
    """grad * activation'(z), as a formula that is differentiable in both any number of times."""
    if activation == "relu":
        return torch.where(z <= 0, 0, grad)
    if activation == "relu6":
        return torch.where((z <= 0) | (z >= 6), 0, grad)
    if activation == "leaky_relu":
        return torch.where(z > 0, grad, grad * slope)
    if activation == "silu":
        sigmoid = z.sigmoid()
        return grad * (sigmoid * (1 + z * (1 - sigmoid)))
    return grad


def activation_gradient_of_output(
    grad: Tensor, output: Tensor, activation: str, slope: float, into: Tensor
) -> Tensor:
    """The same for activations whose output tells, written to `into` by one native operator."""
    aten = torch.ops.aten
    operators: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "relu": (aten.threshold_backward, (0,)),
        "relu6": (aten.hardtanh_backward, (0, 6)),
        "leaky_relu": (aten.leaky_relu_backward, (slope, True)),
    }
    operator, arguments = operators[activation]
    result: Tensor = operator.grad_input(grad, output, *arguments, grad_input=into)
    return result
