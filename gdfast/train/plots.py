"""The pictures of a run: curves, kernels before and after, worst mistakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gdfast.extras import require
from gdfast.metrics import Classification
from gdfast.train.state import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRAIN, _TEST = "tab:blue", "tab:orange"
_SHOWN_MISTAKES = 24


def curves(state: State, title: str) -> Figure:
    """Loss of every step and epoch, and accuracy of every epoch, training beside test."""
    figure = _figure(11, 4.2)
    loss, accuracy = figure.subplots(1, 2)
    rows = state.epochs
    steps_per_epoch = len(state.steps["loss"]) / len(rows)
    at_step = (np.arange(len(state.steps["loss"])) + 1) / steps_per_epoch
    epochs = [row["epoch"] for row in rows]

    loss.plot(at_step, state.steps["loss"], color=_TRAIN, alpha=0.25, linewidth=0.8)
    marker = "o" if len(rows) <= 40 else None
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        for split, colour in (("train", _TRAIN), ("test", _TEST)):
            values = [row[f"{split}_{name}"] for row in rows]
            axes.plot(epochs, values, color=colour, marker=marker, markersize=4, label=split)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    loss.plot([], [], color=_TRAIN, alpha=0.25, label="train, each step")
    loss.set_ylabel("cross entropy (log scale)")
    loss.set_yscale("log")
    loss.set_title("Loss")
    loss.legend()
    accuracy.set_ylabel("share read correctly")
    accuracy.set_title(f"Accuracy (test, at the end: {rows[-1]['test_accuracy']:.4f})")
    accuracy.legend(loc="lower right")
    figure.suptitle(title)
    return figure


def kernels(before: Tensor, after: Tensor, title: str) -> Figure:
    """The kernels [K, C, R, S] of a layer, mean over C, before and after training."""
    figure = _figure(11, 3.6)
    panels = figure.subplots(1, 2)
    tiles = [_tile(weight.detach().cpu().mean(1)) for weight in (before, after)]
    limit = max(float(np.nanmax(np.abs(tile))) for tile in tiles)
    for axes, tile, name in zip(panels, tiles, ("before", "after"), strict=True):
        image = axes.imshow(tile, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_facecolor("0.85")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{name} training")
    figure.colorbar(image, ax=list(panels), label="weight", shrink=0.8)
    figure.suptitle(title)
    return figure


def mistakes(images: Tensor, result: Classification, classes: Sequence[str], title: str) -> Figure:
    """The misread images with the highest loss: what each was taken for, and what it is."""
    wrong = result.mistakes().tolist()
    worst = wrong[:_SHOWN_MISTAKES]
    columns = 6
    rows = max(1, math.ceil(len(worst) / columns))
    figure = _figure(11, 0.5 + 1.9 * rows)
    figure.suptitle(f"{title}: {len(wrong):,} of {len(images):,} test images misread, worst first")
    for place, index in zip(figure.subplots(rows, columns).flat, worst, strict=False):
        shown = images[index].permute(1, 2, 0).expand(-1, -1, 3)
        place.imshow(shown.numpy())
        taken, true = (classes[int(each[index])] for each in (result.predicted, result.labels))
        place.set_title(
            f"taken for {taken} ({result.confidence[index]:.0%}), is {true}\ntest image {index}",
            fontsize=8,
        )
    for place in figure.axes:
        place.axis("off")
    return figure


def first_convolution(model: torch.nn.Module) -> Tensor | None:
    """A copy of the weight of the model's first convolution, None where there is none."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            return module.weight.detach().cpu().clone()
    return None


def _figure(width: float, height: float) -> Figure:
    figure: Figure = require("matplotlib.figure", "train", "drawing").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure


def _tile(kernels: Tensor) -> np.ndarray:
    """Kernels [K, R, S] in rows and columns, enlarged, with gaps of NaN between them."""
    pixel, gap = 8, 6
    columns = math.ceil(math.sqrt(2 * len(kernels)))
    rows = math.ceil(len(kernels) / columns)
    height, width = (pixel * size + gap for size in kernels.shape[1:])
    tile = np.full((rows * height + gap, columns * width + gap), np.nan)
    for index, kernel in enumerate(kernels.numpy()):
        top, left = gap + index // columns * height, gap + index % columns * width
        large = np.kron(kernel, np.ones((pixel, pixel)))
        tile[top : top + large.shape[0], left : left + large.shape[1]] = large
    return tile
