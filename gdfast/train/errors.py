"""What training can raise."""

from __future__ import annotations

from pathlib import Path

from gdfast.errors import UserError


class SettingsError(UserError, ValueError):
    """A setting that no training can have: one line with what was expected and got."""


class RunError(UserError, RuntimeError):
    """A run folder or checkpoint that cannot be used as asked: one line that says why."""


class DivergedError(UserError, ArithmeticError):
    """The loss is not a number any more; names the batch."""


class InterruptedRun(Exception):
    """The user asked to stop; a checkpoint has been left behind.

    `signal` is the number of the signal that asked, `folder` the run's folder.
    """

    def __init__(self, message: str, signal: int, folder: Path | None = None) -> None:
        super().__init__(message)
        self.signal = signal
        self.folder = folder
