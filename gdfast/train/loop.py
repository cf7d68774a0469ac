"""The training loop that all tasks share: zero_grad, forward, loss, backward, step."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim

from gdfast.data import DataError
from gdfast.data.loader import Batch, Loader
from gdfast.train.distributed import Group
from gdfast.train.ema import EMA
from gdfast.train.errors import DivergedError, InterruptedRun, SettingsError
from gdfast.train.progress import Progress
from gdfast.train.recipe import Recipe
from gdfast.train.signals import StopRequest
from gdfast.train.state import State
from gdfast.train.task import Task

_SECONDS_BETWEEN_SAVES = 60.0


class Trainer:
    """Gradient descent of `model` on `batches`, from `state` to the last epoch.

    `evaluate()` gives what to record after an epoch. `save()` is called at every point from where
    the training can go on bit by bit: before the first step, after each epoch, every minute, and
    when the user asks to stop; `save_best()` after an epoch with the best score yet.
    """

    def __init__(
        self,
        *,
        task: Task,
        model: nn.Module,
        optimizer: optim.Optimizer,
        batches: Loader,
        recipe: Recipe,
        epochs: int,
        ema: EMA | None,
        evaluate: Callable[[], dict[str, float]],
        save: Callable[[], None],
        save_best: Callable[[], None],
        progress: Progress,
        state: State,
        group: Group,
    ) -> None:
        self.task = task
        self.model = model
        self.optimizer = optimizer
        self.batches = batches
        self.recipe = recipe
        self.epochs = epochs
        self.ema = ema
        self.evaluate = evaluate
        self.save = save
        self.save_best = save_best
        self.progress = progress
        self.state = state
        self.group = group
        self.device_type = batches.device.type
        self.autocast = bool(recipe.amp)

    def fit(self) -> None:
        """Train until the last epoch is done, or the score has not risen for too long.

        Raises:
            DivergedError: the loss is not finite any more; the last checkpoint is from before.
            InterruptedRun: the user asked to stop; there is a checkpoint of this very point.
        """
        state = self.state
        self._clock = time.perf_counter()
        with StopRequest() as stop:
            self._save()
            while state.epoch < self.epochs and not self._patience_is_over():
                self._train_epoch(stop)
                self._finish_epoch()
                if stop.signal is not None and state.epoch < self.epochs:
                    self._interrupt(stop.signal)

    def _train_epoch(self, stop: StopRequest) -> None:
        state = self.state
        started = saved = time.perf_counter()
        self.model.train()
        for parts in self.batches.steps(state.epoch, state.batch, self.recipe.accumulate):
            # One exchange for both: processes must stop at the same step.
            images, signals = self.group.sum(_images(parts), stop.signal or 0)
            if not images:
                reason = next(iter(self.batches.skipped.values()), "")
                raise DataError(f"data: expected a good item in every step, found none: {reason}")
            self._record(self._set_learning_rate(), images, self.step(parts, images))
            state.batch += 1
            now = time.perf_counter()
            state.training_seconds += now - started
            started = now
            if stop.signal is None:  # otherwise the terminal may be gone
                self.progress.step(state)
            if signals or (stop.signal is not None and self.group.ranks == 1):
                self._save()
                self._interrupt(stop.signal or signal.SIGTERM)
            if now - saved > _SECONDS_BETWEEN_SAVES:
                self._save()
                started = saved = time.perf_counter()

    def step(self, parts: list[Batch], images: float) -> dict[str, float]:
        """One step of gradient descent over `images` images, of which `parts` are this process's.

        Returns the loss and its terms, means over all the images.
        """
        self.optimizer.zero_grad()
        sums: dict[str, Any] = {}
        for number, part in enumerate(parts, 1):
            # Gradients of several processes meet once, in the backward of the last part.
            with self._alone() if number < len(parts) else contextlib.nullcontext():
                with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
                    losses = self.task.loss(self._forward(part), part)
                # A mean over all images: each part counts by its size. As gradients are averaged
                # over processes, each process gives `ranks` times its share.
                share = _images([part]) / images
                loss = losses["loss"]
                (loss if share == 1 else loss * (share * self.group.ranks)).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() * share
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(getattr(self.model, "module", self.model))
        values = self.group.sum(*torch.stack([*sums.values()]).tolist())
        return dict(zip(sums, values, strict=True))

    def _forward(self, part: Batch) -> Any:
        try:
            return self.task.forward(self.model, part)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise SettingsError(
                "train: batch_size: expected two images or more in each part of a batch, for batch "
                f"normalisation, got {len(part.images)}: a larger --batch-size or less --accumulate"
            ) from None

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """While entered, gradients are summed up in this process alone."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _finish_epoch(self) -> None:
        state = self.state
        row = {"epoch": state.epoch + 1, "step": self._step(), "lr": state.steps["lr"][-1]}
        for name, value in state.epoch_means().items():
            row[f"train_{name}"] = value
        row.update(self.group.from_leader(self.evaluate() if self.group.leads else {}))
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
        if state.best_epoch(self.task.score) == state.epoch:
            self.save_best()
        self._save()
        self.progress.epoch(state)

    def _patience_is_over(self) -> bool:
        state, patience = self.state, self.recipe.patience
        return bool(
            patience
            and state.epochs
            and state.epoch - state.best_epoch(self.task.score) >= patience
        )

    def _set_learning_rate(self) -> float:
        lr = self.recipe.learning_rate(self._step(), self.epochs * len(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _record(self, lr: float, images: float, losses: dict[str, float]) -> None:
        state = self.state
        if not math.isfinite(losses["loss"]):
            raise DivergedError(
                f"train: loss: expected a finite number, got {losses['loss']} at epoch "
                f"{state.epoch + 1}, batch {state.batch + 1} of {len(self.batches)}: try a lower "
                f"lr than {self.recipe.lr}"
            )
        for name, value in {"lr": lr, "images": images, **losses}.items():
            state.steps.setdefault(name, []).append(float(value))

    def _step(self) -> int:
        return self.state.epoch * len(self.batches) + self.state.batch

    def _save(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self._clock
        self._clock = now
        self.save()

    def _interrupt(self, number: int) -> None:
        state = self.state
        raise InterruptedRun(
            f"stopped in epoch {state.epoch + 1}, after batch {state.batch} of {len(self.batches)}",
            number,
        )


def _images(parts: list[Batch]) -> int:
    return sum(len(part.images) for part in parts)
