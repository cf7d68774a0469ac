"""`torch.nn.functional` with our functions in place of native's where there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional

if TYPE_CHECKING:
    from torch.nn.functional import *  # noqa: F403

from torch import Tensor

from gdfast.ops.conv2d import conv2d as conv2d  # type: ignore[no-redef]
from gdfast.ops.linear import linear as linear
from gdfast.ops.max_pool2d import max_pool2d as _max_pool2d


def max_pool2d(  # type: ignore[no-redef]
    input: Tensor,
    kernel_size: int | list[int] | tuple[int, ...],
    stride: int | list[int] | tuple[int, ...] | None = None,
    padding: int | list[int] | tuple[int, ...] = 0,
    dilation: int | list[int] | tuple[int, ...] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """`gdfast.ops.max_pool2d`; with return_indices native PyTorch's function."""
    if return_indices:
        return torch.nn.functional.max_pool2d(
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
        )
    return _max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch.nn.functional, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*dir(torch.nn.functional), *globals()})


# Ours go by the names of torch's.
__all__ = [name for name in dir(torch.nn.functional) if not name.startswith("_")]
