"""Curves for TensorBoard, beside the CSV files that every run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdfast.extras import require
from gdfast.train.state import State


class Board:
    """Writes what is new in a run's state to the folder `tensorboard` of the run, if `wanted`."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._writer: Any = None
        self._steps = self._epochs = 0

    def show(self, folder: Path, state: State) -> None:
        """Write the steps and epochs since the last call; a continued run's, all of them.

        Raises:
            MissingExtraError: tensorboard is not installed.
        """
        if not self._wanted:
            return
        if self._writer is None:
            require("tensorboard", "tensorboard", "gdfast train --tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))
        done = len(state.steps.get("loss", ()))
        for step in range(self._steps, done):
            for name, values in state.steps.items():
                self._writer.add_scalar(f"step/{name}", values[step], step + 1)
        for row in state.epochs[self._epochs :]:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    self._writer.add_scalar(f"epoch/{name}", value, int(row["epoch"]))
        self._steps, self._epochs = done, len(state.epochs)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
