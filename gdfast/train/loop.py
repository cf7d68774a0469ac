"""The training loop that all recipes share: zero_grad, forward, loss, backward, step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from torch import Tensor, nn, optim

from gdfast.data import Batches
from gdfast.train.errors import DivergedError, InterruptedRun
from gdfast.train.progress import Progress
from gdfast.train.recipe import Recipe
from gdfast.train.signals import StopRequest
from gdfast.train.state import State

_SECONDS_BETWEEN_SAVES = 60.0


class Trainer:
    """Gradient descent of `model` on `batches`, from `state` to the last epoch.

    `measure(outputs, labels)` gives what to record of a step beside its loss (each a mean over
    the batch's images), `evaluate()` what to record after an epoch. `save()` is called at
    every point from where the training can go on bit by bit: before the first step, after each
    epoch, every minute, and when the user asks to stop.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        optimizer: optim.Optimizer,
        batches: Batches,
        recipe: Recipe,
        epochs: int,
        measure: Callable[[Tensor, Tensor], dict[str, float]],
        evaluate: Callable[[], dict[str, float]],
        save: Callable[[], None],
        progress: Progress,
        state: State,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.batches = batches
        self.recipe = recipe
        self.epochs = epochs
        self.measure = measure
        self.evaluate = evaluate
        self.save = save
        self.progress = progress
        self.state = state

    def fit(self) -> None:
        """Train until the last epoch is done.

        Raises:
            DivergedError: the loss is not finite any more; the last checkpoint is from before.
            InterruptedRun: the user asked to stop; there is a checkpoint of this very point.
        """
        state = self.state
        self._clock = time.perf_counter()
        with StopRequest() as stop:
            self._save()
            while state.epoch < self.epochs:
                self._train_epoch(stop)
                self._finish_epoch()
                if stop.signal is not None and state.epoch < self.epochs:
                    self._interrupt(stop.signal)

    def _train_epoch(self, stop: StopRequest) -> None:
        state = self.state
        started = saved = time.perf_counter()
        self.model.train()
        for images, labels in self.batches.epoch(state.epoch, start=state.batch):
            lr = self._set_learning_rate()

            self.optimizer.zero_grad()
            outputs = self.model(images)
            loss = self.loss_fn(outputs, labels)
            loss.backward()
            self.optimizer.step()

            self._record(lr, loss.item(), len(labels), self.measure(outputs.detach(), labels))
            state.batch += 1
            now = time.perf_counter()
            state.training_seconds += now - started
            started = now
            if stop.signal is None:  # otherwise the terminal may be gone
                self.progress.step(state)
            if stop.signal is not None:
                self._save()
                self._interrupt(stop.signal)
            if now - saved > _SECONDS_BETWEEN_SAVES:
                self._save()
                started = saved = time.perf_counter()

    def _finish_epoch(self) -> None:
        state = self.state
        row = {"epoch": state.epoch + 1, "step": self._step(), "lr": state.steps["lr"][-1]}
        for name, value in state.epoch_means().items():
            row[f"train_{name}"] = value
        row.update(self.evaluate())
        for name, value in row.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"train: {name}: expected a finite number, got {value} after epoch "
                    f"{state.epoch + 1}: try a lower lr than {self.recipe.lr}"
                )
        row["images_per_second"] = state.images_per_second()
        state.epochs.append(row)
        state.epoch += 1
        state.batch = 0
        self._save()
        self.progress.epoch(state)

    def _set_learning_rate(self) -> float:
        lr = self.recipe.learning_rate(self._step(), self.epochs * len(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _record(self, lr: float, loss: float, images: int, measures: dict[str, float]) -> None:
        state = self.state
        if not math.isfinite(loss):
            raise DivergedError(
                f"train: loss: expected a finite number, got {loss} at epoch {state.epoch + 1}, "
                f"batch {state.batch + 1} of {len(self.batches)}: try a lower lr than "
                f"{self.recipe.lr}"
            )
        for name, value in {"lr": lr, "images": images, "loss": loss, **measures}.items():
            state.steps.setdefault(name, []).append(float(value))

    def _step(self) -> int:
        return self.state.epoch * len(self.batches) + self.state.batch

    def _save(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self._clock
        self._clock = now
        self.save()

    def _interrupt(self, signal: int) -> None:
        state = self.state
        raise InterruptedRun(
            f"stopped in epoch {state.epoch + 1}, after batch {state.batch} of {len(self.batches)}",
            signal,
        )
