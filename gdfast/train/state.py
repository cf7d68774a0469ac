"""Where a training stands, and what it has measured so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

# What the loop itself records of an epoch, beside means of its steps and what was measured.
LOOP_COLUMNS = ("epoch", "step", "lr", "images_per_second")


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

    def best_epoch(self, score: str) -> int:
        """The number, from 1, of the epoch with the highest `score`, the first of them; 0: none."""
        scores = [row[score] for row in self.epochs]
        return scores.index(max(scores)) + 1 if scores else 0

    def check(
        self, epochs: int, batches: int, step_columns: set[str], epoch_columns: set[str]
    ) -> None:
        """Check that a run of `epochs` times `batches` steps can stand here.

        Raises:
            ValueError: it cannot, or what it has measured is not one number for every step done and
                each of `step_columns`, and for every epoch done, `epoch_columns` among them.
        """
        whole = isinstance(self.epoch, int) and isinstance(self.batch, int)
        if not whole or not 0 <= self.epoch <= epochs or not 0 <= self.batch <= batches:
            raise ValueError(f"epoch {self.epoch!r}, batch {self.batch!r} of {epochs}, {batches}")
        done = self.epoch * batches + self.batch
        if done > epochs * batches:
            raise ValueError(f"{done} steps of {epochs * batches}")
        if (self.steps or done) and self.steps.keys() != step_columns:
            raise ValueError(f"steps with the columns {sorted(self.steps)}")
        if any(len(column) != done for column in self.steps.values()):
            raise ValueError(f"not {done} steps in every column")
        if len(self.epochs) != self.epoch:
            raise ValueError(f"{len(self.epochs)} rows for {self.epoch} epochs")
        if any(not row.keys() >= epoch_columns for row in self.epochs):
            raise ValueError("epochs without every column")
        if any(row.keys() != self.epochs[0].keys() for row in self.epochs):
            raise ValueError("epochs with different columns")
        timings = [self.seconds, self.training_seconds]
        tables = [*self.steps.values(), *(row.values() for row in self.epochs), timings]
        values = [value for column in tables for value in column]
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise ValueError("measurements that are no finite numbers")
        if min(timings) < 0 or (done and not self.training_seconds):
            raise ValueError(f"{self.training_seconds} of {self.seconds} seconds for {done} steps")

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
