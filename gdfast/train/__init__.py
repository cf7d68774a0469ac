"""Training: tasks, recipes, the loop that all of them share, and runs that can be resumed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gdfast.train.errors import DivergedError, InterruptedRun, RunError, SettingsError
from gdfast.train.recipe import SCHEDULES, Recipe, Settings
from gdfast.train.tasks import TASKS

if TYPE_CHECKING:
    from gdfast.train.onnx_file import export
    from gdfast.train.run import Result
    from gdfast.train.start import find_learning_rate, resume, train
    from gdfast.train.validation import validate

# Imported when first asked for, so that the command line can show tasks before torch is loaded.
_LATER = {
    "Result": "run",
    "export": "onnx_file",
    "find_learning_rate": "start",
    "resume": "start",
    "train": "start",
    "validate": "validation",
}

__all__ = [
    "SCHEDULES",
    "TASKS",
    "DivergedError",
    "InterruptedRun",
    "Recipe",
    "Result",
    "RunError",
    "Settings",
    "SettingsError",
    "export",
    "find_learning_rate",
    "resume",
    "train",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"gdfast.train.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
