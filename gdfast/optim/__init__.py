"""`SGD` in one pass over memory; every other name is torch.optim's."""

from __future__ import annotations

from typing import Any

import torch.optim

from gdfast.optim.sgd import SGD

__all__ = ["SGD"]


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch.optim, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.optim)})
