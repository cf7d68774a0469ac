"""Training: recipes, the loop that all of them share, and runs that can be resumed."""

from gdfast.train.classify import Result, resume, train
from gdfast.train.errors import DivergedError, InterruptedRun, RunError, SettingsError
from gdfast.train.recipe import RECIPES, SCHEDULES, Recipe, Settings

__all__ = [
    "RECIPES",
    "SCHEDULES",
    "DivergedError",
    "InterruptedRun",
    "Recipe",
    "Result",
    "RunError",
    "Settings",
    "SettingsError",
    "resume",
    "train",
]
