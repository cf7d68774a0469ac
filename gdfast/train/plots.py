"""The pictures of a run: curves, kernels before and after, worst mistakes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gdfast.data.images import Labelled
from gdfast.extras import require
from gdfast.metrics import Classification
from gdfast.train.state import LOOP_COLUMNS, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRAIN, _TEST = "tab:blue", "tab:orange"
_SHOWN_MISTAKES = 24


def title(task: str, data: str, seed: int) -> str:
    """What a run's pictures are headed by; of data that is named by a path, its last part."""
    kind, colon, where = data.partition(":")
    return f"{task} on {kind}{colon}{Path(where).name}, seed {seed}"


def curves(state: State, score: str, title: str) -> Figure:
    """Loss of every step and epoch, and measures of every epoch, training beside test."""
    figure = _figure(11, 4.2)
    loss, measures = figure.subplots(1, 2)
    rows = state.epochs
    steps_per_epoch = len(state.steps["loss"]) / len(rows)
    at_step = (np.arange(len(state.steps["loss"])) + 1) / steps_per_epoch
    epochs = [row["epoch"] for row in rows]
    style: dict[str, Any] = {"marker": "o" if len(rows) <= 40 else None, "markersize": 4}

    loss.plot(at_step, state.steps["loss"], color=_TRAIN, alpha=0.25, linewidth=0.8)
    for split, colour in (("train", _TRAIN), ("test", _TEST)):
        if f"{split}_loss" in rows[0]:
            values = [row[f"{split}_loss"] for row in rows]
            loss.plot(epochs, values, color=colour, label=split, **style)
    loss.plot([], [], color=_TRAIN, alpha=0.25, label="train, each step")
    loss.set_ylabel("loss (log scale)")
    loss.set_yscale("log")
    loss.set_title("Loss")
    loss.legend()
    if (train := score.replace("test_", "train_")) != score and train in rows[0]:
        shown = {"train": (train, _TRAIN), "test": (score, _TEST)}
    else:
        others = [name for name in rows[0] if _is_share(name, rows) and name != score]
        shown = {score: (score, _TEST)}
        shown |= {name: (name, f"C{4 + place}") for place, name in enumerate(others[:5])}
    for label, (name, colour) in shown.items():
        values = [row[name] for row in rows]
        measures.plot(epochs, values, color=colour, label=label, **style)
    name = score.removeprefix("test_").replace("_", " ")
    measures.set_ylabel(name)
    measures.set_title(f"{name.capitalize()} (test, at the end: {rows[-1][score]:.4f})")
    measures.legend(loc="lower right")
    for axes in (loss, measures):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    return figure


def _is_share(name: str, rows: Sequence[dict[str, float]]) -> bool:
    if name in LOOP_COLUMNS or name.startswith("train_"):
        return False
    if name.replace("test_", "train_") in rows[0]:  # the loss, or a term of it
        return False
    return all(0 <= row[name] <= 1 for row in rows)


def learning_rates(
    rates: Sequence[float], losses: Sequence[float], smooth: Sequence[float], chosen: float
) -> Figure:
    """Losses of steps at rising learning rates, and the rate to choose."""
    figure = _figure(8, 4.2)
    axes = figure.subplots()
    axes.plot(rates, losses, color=_TRAIN, alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(rates, smooth, color=_TRAIN, label="smoothed")
    axes.axvline(chosen, color=_TEST, label=f"to choose: {chosen:.2g}")
    axes.set_xscale("log")
    low, high = min(smooth), max(smooth[0], min(smooth) * 2)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel("loss")
    axes.set_title("The loss as the learning rate rises, one step each")
    axes.grid(alpha=0.3)
    axes.legend()
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


def mistakes(
    images: Labelled,
    measured: Sequence[int],
    result: Classification,
    classes: Sequence[str],
    title: str,
) -> Figure:
    """The misread images with the highest loss: what each was taken for, and what it is.

    `measured` has the index among `images` of each that `result` is about.
    """
    wrong = result.mistakes().tolist()
    worst = wrong[:_SHOWN_MISTAKES]
    columns = 6
    rows = max(1, math.ceil(len(worst) / columns))
    figure = _figure(11, 0.5 + 1.9 * rows)
    figure.suptitle(
        f"{title}: {len(wrong):,} of {len(measured):,} test images misread, worst first"
    )
    for place, index in zip(figure.subplots(rows, columns).flat, worst, strict=False):
        pixels = images.image(measured[index])
        place.imshow(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        taken, true = (classes[int(each[index])] for each in (result.predicted, result.labels))
        place.set_title(
            f"taken for {taken} ({result.confidence[index]:.0%}), is {true}\n"
            f"test image {measured[index]}",
            fontsize=8,
        )
    for place in figure.axes:
        place.axis("off")
    return figure


def confusion(result: Classification, classes: Sequence[str], title: str) -> Figure:
    """How many images of each class (rows) were taken for each class (columns)."""
    counts = result.confusion(len(classes)).numpy()
    side = min(4 + 0.35 * len(classes), 14)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 30:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if len(classes) > 10 else 0)
        axes.set_yticks(range(len(classes)), classes)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center",
                      color=colour, fontsize=8)  # fmt: skip
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    figure.colorbar(image, label="share of the class", shrink=0.8)
    axes.set_title(title)
    return figure


def named(image: np.ndarray, shares: Mapping[str, float]) -> Figure:
    """An image, bytes [H, W, C], beside bars of the probability of each class."""
    figure = _figure(8, 3.6)
    picture, bars = figure.subplots(1, 2)
    picture.imshow(np.broadcast_to(image, (*image.shape[:2], 3)))
    picture.axis("off")
    names = list(shares)[::-1]
    drawn = bars.barh(names, [shares[name] for name in names], color=_TRAIN)
    bars.bar_label(drawn, [f"{shares[name]:.1%}" for name in names], padding=3)
    bars.set_xlim(0, 1.18)
    bars.set_xlabel("probability")
    bars.spines[["top", "right"]].set_visible(False)
    return figure


def grid(rows: Mapping[str, Sequence[np.ndarray]], title: str) -> Figure:
    """Images, bytes [H, W, C], in rows with a name each."""
    columns = max(map(len, rows.values()))
    figure = _figure(1.4 * columns + 1.4, 1.5 * len(rows) + 0.6)
    places = figure.subplots(len(rows), columns, squeeze=False)
    for place in places.flat:
        place.set_xticks([])
        place.set_yticks([])
        place.set_frame_on(False)
    for line, (name, images) in zip(places, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for place, image in zip(line, images, strict=False):
            place.imshow(np.broadcast_to(image, (*image.shape[:2], 3)))
    figure.suptitle(title)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                _write_plainly(axis)
    for text in figure.findobj(require("matplotlib.text", "train", "drawing").Text):
        text.set_parse_math(False)  # names of classes and folders may have dollar signs
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _write_plainly(axis: Any) -> None:
    """Ticks of a logarithmic axis without TeX, which powers of ten are written in."""
    low, high = axis.get_view_interval()
    is_short = high < 100 * low  # then powers of ten alone are too few

    def between(value: float, _: int) -> str:
        return f"{value:g}" if is_short and f"{value:e}"[0] in "25" else ""

    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(between)


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
