"""Recipes: the settings of gradient descent, checked, and the schedules of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from gdfast.train.errors import SettingsError

# Factor of the learning rate, given the share of the steps after warm-up that is done (0 to 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "poly": lambda done: (1.0 - done) ** 0.9,
    # A tenth after half of the steps, a hundredth after three quarters, as He et al. (2015) do.
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),
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

    A step takes `batch_size` images, in `accumulate` parts whose gradients are summed. `clip`
    bounds the norm of all gradients together. `weight_decay` leaves biases and norms alone. `amp`
    "bf16" computes under autocast. `ema` is the decay of a running mean of the weights, which then
    is what gets measured and saved. `patience` stops after so many epochs without a better score.
    `label_smoothing` is the share of a target that all classes divide between them. 0, and "" for
    `amp`, turn each of these off.

    Raises:
        SettingsError: a value out of its range.
    """

    lr: float = 0.1
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: int = 100
    batch_size: int = 64
    epochs: int | None = None
    weight_decay: float = 0.0
    nesterov: bool = False
    accumulate: int = 1
    clip: float = 0.0
    amp: str = ""
    ema: float = 0.0
    label_smoothing: float = 0.0
    patience: int = 0

    def __post_init__(self) -> None:
        def finite(value: float) -> bool:
            return math.isfinite(value) and value >= 0

        _check("lr", "a finite number above 0", self.lr, finite(self.lr) and self.lr > 0)
        _check("momentum", "a number from 0 to below 1", self.momentum, 0 <= self.momentum < 1)
        known = " or ".join(SCHEDULES)
        _check("schedule", known, self.schedule, self.schedule in SCHEDULES)
        _check("warmup", "0 or more", self.warmup, self.warmup >= 0)
        _check("batch_size", "1 to 2**31 - 1", self.batch_size, 1 <= self.batch_size < 1 << 31)
        _check("epochs", "1 or more", self.epochs, self.epochs is None or self.epochs >= 1)
        decay = self.weight_decay
        _check("weight_decay", "a finite number, 0 or more", decay, finite(decay))
        _check(
            "nesterov", "a momentum above 0", self.momentum, not self.nesterov or self.momentum > 0
        )
        parts = self.accumulate
        _check("accumulate", "1 to the batch size", parts, 1 <= parts <= self.batch_size)
        _check("clip", "a finite number, 0 or more", self.clip, finite(self.clip))
        _check("amp", "bf16 or nothing", self.amp, self.amp in ("", "bf16"))
        _check("ema", "a number from 0 to below 1", self.ema, 0 <= self.ema < 1)
        smoothing = self.label_smoothing
        _check("label_smoothing", "a number from 0 to below 1", smoothing, 0 <= smoothing < 1)
        _check("patience", "0 or more", self.patience, self.patience >= 0)

    def learning_rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0) of `steps`."""
        warmup = min(self.warmup, steps // 2)
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        return self.lr * SCHEDULES[self.schedule]((step - warmup) / (steps - warmup))


@dataclass(frozen=True)
class Settings:
    """All that decides a run's outcome; `args.yaml` and the checkpoint keep it.

    `data` "" and `recipe` None are the task's own. `options` has a value for each option of the
    task that is not to be its default. `max_bad` is the share of bad items that data may have;
    `workers` processes read it.

    Raises:
        SettingsError: a value out of its range.
    """

    task: str = "cnn"
    data: str = ""
    recipe: Recipe | None = None
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"
    workers: int = 0
    max_bad: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("seed", "0 to 2**63 - 1", self.seed, 0 <= self.seed < 1 << 63)
        _check("workers", "0 to 256", self.workers, 0 <= self.workers <= 256)
        _check("max_bad", "a share from 0 to 1", self.max_bad, 0 <= self.max_bad <= 1)

    @property
    def descent(self) -> Recipe:
        """The recipe of settings that nothing is left open in."""
        assert self.recipe is not None
        return self.recipe

    def to_dict(self) -> dict[str, Any]:
        """One flat dictionary of plain values, but for `options`, which is a dictionary in it."""
        settings = asdict(self)
        recipe = settings.pop("recipe") or {}
        return {**settings, **recipe}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of `to_dict`, for settings with a recipe.

        Raises:
            SettingsError: values that are missing, unknown, or out of range.
        """
        recipe_names = {field.name for field in fields(Recipe)}
        own = {name: value for name, value in values.items() if name not in recipe_names}
        try:
            for name, kind in {**get_type_hints(Recipe), **get_type_hints(cls)}.items():
                if name == "recipe":
                    continue
                plain: Any = {float: (int, float), dict[str, Any]: dict}.get(kind, kind)
                if not isinstance(values[name], plain):
                    raise TypeError(f"{name} of type {type(values[name]).__name__}")
            recipe = Recipe(**{name: values[name] for name in recipe_names})
            return cls(recipe=recipe, **own)
        except (KeyError, TypeError) as error:
            raise SettingsError(
                f"train: settings: expected a run's settings, got {error}"
            ) from None
