"""Training: tasks, recipes, the loop that all of them share, and runs that can be resumed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gdfast.train.errors import DivergedError, InterruptedRun, RunError, SettingsError
from gdfast.train.recipe import SCHEDULES, Recipe, Settings
from gdfast.train.tasks import TASKS

if TYPE_CHECKING:
    from gdfast.train.run import Result, find_learning_rate, resume, train

# Imported when first asked for, so that the command line can show tasks before torch is loaded.
_OF_RUN = ("Result", "find_learning_rate", "resume", "train")

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
    "find_learning_rate",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _OF_RUN:
        return getattr(importlib.import_module("gdfast.train.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
