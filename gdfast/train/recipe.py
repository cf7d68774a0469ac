"""Recipes: the settings of gradient descent, checked, and the schedules of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from gdfast.train.errors import SettingsError

# Factor of the learning rate, given the share of the steps after warm-up that is done (0 to 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def _check(name: str, expected: str, value: object, good: bool) -> None:
    if not good:
        raise SettingsError(f"train: {name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class Recipe:
    """How to descend: `lr` is the peak that `schedule` scales; `epochs` None is the data's own.

    The learning rate first rises linearly for `warmup` steps, at most half of all. Without that,
    momentum at lr 0.1 magnifies the rounding of the first steps so much that runs which differ in
    nothing else (native PyTorch with 1 and with 2 threads, say) part within 50 steps.

    Raises:
        SettingsError: a value out of its range.
    """

    lr: float = 0.1
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: int = 100
    batch_size: int = 64
    epochs: int | None = None

    def __post_init__(self) -> None:
        _check("lr", "a finite number above 0", self.lr, math.isfinite(self.lr) and self.lr > 0)
        _check("momentum", "a number from 0 to below 1", self.momentum, 0 <= self.momentum < 1)
        known = " or ".join(SCHEDULES)
        _check("schedule", known, self.schedule, self.schedule in SCHEDULES)
        _check("warmup", "0 or more", self.warmup, self.warmup >= 0)
        _check("batch_size", "1 to 2**31 - 1", self.batch_size, 1 <= self.batch_size < 1 << 31)
        _check("epochs", "1 or more", self.epochs, self.epochs is None or self.epochs >= 1)

    def learning_rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0) of `steps`."""
        warmup = min(self.warmup, steps // 2)
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        return self.lr * SCHEDULES[self.schedule]((step - warmup) / (steps - warmup))


RECIPES = {
    "default": Recipe(),
    "article": Recipe(lr=0.01, momentum=0.0, schedule="constant", warmup=0),
}


@dataclass(frozen=True)
class Settings:
    """All that decides a run's outcome; `args.yaml` and the checkpoint keep it.

    Raises:
        SettingsError: a value out of its range.
    """

    model: str = "cnn"
    data: str = "digits"
    recipe: Recipe = RECIPES["default"]
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check("seed", "0 to 2**63 - 1", self.seed, 0 <= self.seed < 1 << 63)

    def to_dict(self) -> dict[str, Any]:
        """One flat dictionary of plain values."""
        settings = asdict(self)
        recipe = settings.pop("recipe")
        return {**settings, **recipe}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of `to_dict`.

        Raises:
            SettingsError: values that are missing, unknown, or out of range.
        """
        recipe_names = {field.name for field in fields(Recipe)}
        own = {name: value for name, value in values.items() if name not in recipe_names}
        try:
            for name, kind in {**get_type_hints(Recipe), **get_type_hints(cls)}.items():
                number = (int, float) if kind is float else kind
                if name != "recipe" and not isinstance(values[name], number):
                    raise TypeError(f"{name} {values[name]!r}")
            recipe = Recipe(**{name: values[name] for name in recipe_names})
            return cls(recipe=recipe, **own)
        except (KeyError, TypeError) as error:
            raise SettingsError(
                f"train: settings: expected a run's settings, got {error}"
            ) from None
