"""Gradient descent for image models, fast: drop-in layers and optimizers with their own kernels."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gdfast import backends, data, losses, metrics, models, nn, ops, optim
    from gdfast.backends import autotune, backend
    from gdfast.backends.precision import precision
    from gdfast.graphs import GraphedStep
    from gdfast.swap import restore_, swap, swap_, swapped

# Imported when first asked for, so that the command line answers before torch is loaded.
_MODULES = ("backends", "data", "losses", "metrics", "models", "nn", "ops", "optim")
_FUNCTIONS = {
    "GraphedStep": "graphs",
    "autotune": "backends",
    "backend": "backends",
    "precision": "backends",
    "restore_": "swap",
    "swap": "swap",
    "swap_": "swap",
    "swapped": "swap",
}

__all__ = [
    "GraphedStep",
    "__version__",
    "autotune",
    "backend",
    "backends",
    "data",
    "losses",
    "metrics",
    "models",
    "nn",
    "ops",
    "optim",
    "precision",
    "restore_",
    "swap",
    "swap_",
    "swapped",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        function = getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
        globals()[name] = function
        return function
    raise AttributeError(f"module 'gdfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    # Importing a submodule sets the package's attribute of its name; `swap` stays the function.
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "swap" and isinstance(value, ModuleType):
            value = value.swap
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
