"""`torch.nn.functional` with our functions in place of native's where there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional

if TYPE_CHECKING:
    from torch.nn.functional import *  # noqa: F403

from gdfast.ops.conv2d import conv2d as conv2d  # type: ignore[no-redef]


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch.nn.functional, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*dir(torch.nn.functional), *globals()})


# Ours go by the names of torch's.
__all__ = [name for name in dir(torch.nn.functional) if not name.startswith("_")]
