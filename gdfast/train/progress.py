"""What a training tells on the terminal while it runs."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

from gdfast.train.state import LOOP_COLUMNS, State

_REFRESH_SECONDS = 0.2
_LINE_SECONDS = 10.0


class Progress:
    """Prints loss, accuracy, images per second and the time left.

    On a terminal one line is redrawn; elsewhere (a file, a pipe) a plain line is added every ten
    seconds. Each epoch leaves a line of its own.
    """

    def __init__(self, stream: TextIO, epochs: int, batches: int) -> None:
        """`batches` is the number of batches in an epoch."""
        self._stream = stream
        self._live = stream.isatty()
        self._epochs = epochs
        self._batches = batches
        self._shown = self._started = time.perf_counter()
        self._first_step: int | None = None

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self.clear()
        print(text, file=self._stream, flush=True)

    def step(self, state: State) -> None:
        """Tell of a step, if the last word was long enough ago."""
        done = state.epoch * self._batches + state.batch
        if self._first_step is None:
            self._first_step = done - 1
        now = time.perf_counter()
        if not self._is_due(now):
            return
        means = state.epoch_means()
        self._tell(
            f"epoch {state.epoch + 1}/{self._epochs}  batch {state.batch}/{self._batches}  "
            f"{_values(means)}  "
            f"{state.images_per_second():,.0f} images/s  {self._left(done, now)} left",
            now,
        )

    def _is_due(self, now: float) -> bool:
        return now - self._shown >= (_REFRESH_SECONDS if self._live else _LINE_SECONDS)

    def _tell(self, text: str, now: float) -> None:
        if not self._is_due(now):
            return
        self._shown = now
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{text[:width]:<{width}}")
            self._stream.flush()
        else:
            self.say(text)

    def sweep(self, step: int, steps: int, lr: float, loss: float) -> None:
        """Tell of a step of a search, if the last word was long enough ago."""
        self._tell(f"step {step}/{steps}  lr {lr:.2g}  loss {loss:.4f}", time.perf_counter())

    def epoch(self, state: State) -> None:
        """Tell of the epoch that has just ended."""
        row = state.epochs[-1]
        now = time.perf_counter()
        self._shown = now
        left = self._left(state.epoch * self._batches, now)
        self.say(
            f"epoch {state.epoch:>{len(str(self._epochs))}}/{self._epochs}  "
            f"train {_values(_named(row, 'train_'))}  test {_values(_measured(row))}  "
            f"{state.images_per_second():,.0f} images/s  {left} left"
        )

    def _left(self, done: int, now: float) -> str:
        first = done if self._first_step is None else self._first_step
        pace = (now - self._started) / max(done - first, 1)
        return _clock(pace * (self._epochs * self._batches - done))

    def clear(self) -> None:
        """Take the redrawn line away."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def _values(row: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in row.items())


def _named(row: dict[str, float], prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)
    }


def _measured(row: dict[str, float]) -> dict[str, float]:
    """What an evaluation gave: all that the loop did not."""
    return {
        name.removeprefix("test_"): value
        for name, value in row.items()
        if not name.startswith("train_") and name not in LOOP_COLUMNS
    }


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
