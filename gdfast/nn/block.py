"""What the layers share that are made of others: activations by name, hooks, and torch.fx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.modules.module as _module

from gdfast.errors import mismatch

ACTIVATIONS: dict[str, Callable[[float], torch.nn.Module]] = {
    "none": lambda _: torch.nn.Identity(),
    "relu": lambda _: torch.nn.ReLU(),
    "relu6": lambda _: torch.nn.ReLU6(),
    "leaky_relu": lambda slope: torch.nn.LeakyReLU(slope),
    "silu": lambda _: torch.nn.SiLU(),
}
NAMES = {type(make(0.0)): name for name, make in ACTIVATIONS.items()}


def check_activation(owner: str, activation: str) -> None:
    """Raises ValueError for the name of no activation."""
    if activation not in ACTIVATIONS:
        expected = f"one of {', '.join(ACTIVATIONS)}"
        raise ValueError(mismatch(owner, "activation", expected, repr(activation)))


def slope_of(act: torch.nn.Module) -> float:
    """The slope of a leaky ReLU, 0 for other activations."""
    return act.negative_slope if isinstance(act, torch.nn.LeakyReLU) else 0.0


def same_padding(
    kernel_size: int | tuple[int, int], dilation: int | tuple[int, int]
) -> tuple[int, int]:
    """The padding that keeps the size of an image, for odd kernels and stride 1."""
    (R, S), (rows, columns) = (
        (value, value) if isinstance(value, int) else value for value in (kernel_size, dilation)
    )
    return rows * (R - 1) // 2, columns * (S - 1) // 2


def has_hooks(*modules: torch.nn.Module) -> bool:
    """Whether a call of one of the modules would run hooks, or a forward of its own."""
    if _module._has_any_global_hook():
        return True
    for module in modules:
        own = vars(module)  # faster than attributes
        if (
            own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
            or own["_backward_pre_hooks"] or "forward" in own
        ):  # fmt: skip
            return True
    return False


def is_traced(module: torch.nn.Module, input: Any) -> bool:
    """Whether torch.fx traces a model that has this layer within."""
    return isinstance(input, torch.fx.Proxy) and getattr(input.tracer, "root", None) is not module


def traced(module: torch.nn.Module, input: Any, *more: Any) -> Any:
    """A call of the layer itself, as torch.fx records it for native's: its mode stays free."""
    path = input.tracer.path_of_module(module)
    return input.tracer.create_proxy("call_module", path, (input, *more), {})
