"""Where a training stands, and what it has measured so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class State:
    """The next batch is `batch` of `epoch`, both from 0.

    `steps` has a list for each thing measured at every step, `epochs` a row for every epoch
    done. `seconds` counts everything, `training_seconds` the steps alone.
    """

    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    steps: dict[str, list[float]] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)

    def epoch_means(self) -> dict[str, float]:
        """Means, over the images of the current epoch so far, of what its steps recorded."""
        columns = {name: values[-self.batch :] for name, values in self.steps.items()}
        images = columns.pop("images")
        del columns["lr"]
        return {
            name: math.fsum(value * n for value, n in zip(values, images, strict=True))
            / sum(images)
            for name, values in columns.items()
        }

    def images_per_second(self) -> float:
        """How many images a second of training takes in, all steps so far."""
        return sum(self.steps["images"]) / self.training_seconds

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        steps = {
            name: torch.tensor(values, dtype=torch.float64) for name, values in self.steps.items()
        }
        return {**vars(self), "steps": steps}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> State:
        """The inverse of `to_dict`."""
        steps = {name: column.tolist() for name, column in values["steps"].items()}
        return cls(**{**values, "steps": steps})
