"""Which learning rate to use: the loss while the rate rises from far too low to far too high."""

from __future__ import annotations

import math

from gdfast.train import plots
from gdfast.train.errors import SettingsError
from gdfast.train.folder import RunFolder
from gdfast.train.loop import Trainer
from gdfast.train.progress import Progress

_FROM, _TO = 1e-5, 10.0
_STEPS = 120
_SMOOTHING = 0.9
_WORSE = 4.0  # times the best loss: there is nothing more to see


def sweep(trainer: Trainer, folder: RunFolder, progress: Progress) -> float:
    """Take steps at rising rates and return a tenth of the one at which the loss was lowest.

    Leaves `lr.csv` and `lr.png` in the folder. After Smith (2017), "Cyclical learning rates for
    training neural networks".

    Raises:
        SettingsError: the loss was not finite even at the lowest rates.
    """
    rates: list[float] = []
    losses: list[float] = []
    smooth: list[float] = []
    mean = 0.0
    trainer.model.train()
    steps = _endless(trainer)
    for number in range(_STEPS):
        rate = _FROM * (_TO / _FROM) ** (number / (_STEPS - 1))
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        parts = next(steps)
        (images,) = trainer.group.sum(sum(len(part.images) for part in parts))
        loss = trainer.step(parts, images)["loss"]
        if not math.isfinite(loss):
            break
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        rates.append(rate)
        losses.append(loss)
        smooth.append(mean / (1 - _SMOOTHING ** (number + 1)))
        progress.sweep(number + 1, _STEPS, rate, loss)
        if smooth[-1] > _WORSE * min(smooth):
            break
    progress.clear()
    if len(rates) < 2:
        raise SettingsError(
            f"train: find-lr: expected a finite loss at learning rate {_FROM:g}, got none: "
            "are there infinities or NaN among the images or the weights?"
        )
    suggestion = rates[smooth.index(min(smooth))] / 10
    if trainer.group.leads:
        rows = [list(row) for row in zip(rates, losses, smooth, strict=True)]
        folder.write_csv("lr.csv", ["lr", "loss", "smoothed"], rows)
        folder.write_figure("lr.png", plots.learning_rates(rates, losses, smooth, suggestion))
    beyond = "and rises beyond" if smooth[-1] > min(smooth) else "the highest tried"
    progress.say(
        f"the loss is lowest at {10 * suggestion:.2g}, {beyond}; a tenth of that is safe: "
        f"--lr {suggestion:.2g}; the plot is {folder.path / 'lr.png'}"
    )
    return suggestion


def _endless(trainer: Trainer):  # type: ignore[no-untyped-def]
    epoch = 0
    while True:
        yield from trainer.batches.steps(epoch, parts=trainer.recipe.accumulate)
        epoch += 1
