"""Gradient descent for image models, fast: drop-in layers and optimizers with their own kernels."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = ("backends", "data", "models", "nn", "ops", "optim")
_FUNCTIONS = {
    "backend": "backends",
    "restore_": "swap",
    "swap": "swap",
    "swap_": "swap",
    "swapped": "swap",
}

__all__ = [*_MODULES, *_FUNCTIONS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'gdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
