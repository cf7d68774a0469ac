"""Gradient descent for image models, fast: drop-in layers and optimizers with their own kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from gdfast.backends import backend

# Not on demand: the first import of the module gdfast.swap sets the attribute of that name, which
# is to be the function.
from gdfast.swap import restore_, swap, swap_, swapped

if TYPE_CHECKING:
    from gdfast import backends, data, models, nn, ops, optim

_MODULES = ("backends", "data", "models", "nn", "ops", "optim")

__all__ = [
    "__version__",
    "backend",
    "backends",
    "data",
    "models",
    "nn",
    "ops",
    "optim",
    "restore_",
    "swap",
    "swap_",
    "swapped",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'gdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
