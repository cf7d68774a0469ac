"""What autocast makes of the tensors of a convolution or a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdfast.ops import in_backward

# Asked once: torch.compile of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla"))
)


def autocast(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """What autocast makes of the arguments of aten.conv2d: all but float64 is lowered."""
    device = input.device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    cast: tuple[Any, ...] = tuple(
        tensor.to(dtype)
        if tensor is not None
        and tensor.dtype != dtype
        and tensor.device.type == device
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
        else tensor
        for tensor in (input, weight, bias)
    )
    if not torch.compiler.is_compiling() and in_backward.targets and cast[1] is not weight:
        in_backward.note_cast(cast[1])
    return cast
