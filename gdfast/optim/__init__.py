"""`SGD` in one pass over memory; every other name is torch.optim's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.optim

if TYPE_CHECKING:
    from torch.optim import *  # noqa: F403

from gdfast.mirror import mirror_submodules as _mirror_submodules
from gdfast.optim.sgd import SGD as SGD


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch.optim, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*dir(torch.optim), *globals()})


# Ours go by the names of torch's.
__all__ = [name for name in dir(torch.optim) if not name.startswith("_")]
_mirror_submodules(__name__, "torch.optim", own=("sgd",))
