"""The pictures of a detector: precision against recall, and its boxes beside the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gdfast.data.boxes.records import Record
from gdfast.data.errors import DataError
from gdfast.extras import require
from gdfast.metrics.detection import RECALLS, DetectionScore, Found
from gdfast.train.detections import draw, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN_IMAGES = 6


def precision_recall(score: DetectionScore, classes: Sequence[str], title: str) -> Figure:
    """Precision against recall at IoU 0.5, one curve a class; classes without a box have none."""
    figure = _figure(7, 5)
    axes = figure.subplots()
    for name, curve, ap in zip(classes, score.precision, score.ap50, strict=True):
        if np.isfinite(ap):
            axes.plot(RECALLS, curve, label=f"{name}: AP {ap:.3f}")
    axes.set_xlabel("recall: share of the true boxes that is found")
    axes.set_ylabel("precision: share of the found boxes that is true")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    axes.set_title(f"{title}\nmAP@0.5 {score.map50:.3f}, mAP@0.5:0.95 {score.map:.3f}", fontsize=10)
    return figure


def detections(found: Sequence[tuple[Record, Found]], classes: Sequence[str], title: str) -> Figure:
    """The first images: the true boxes above, those found below."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for record, each in found:
        if len(pairs) == _SHOWN_IMAGES:
            break
        try:
            image = record.read().image
        except DataError:
            continue
        seen = shown(each)
        pairs.append(
            (
                draw(image, record.boxes, record.classes, classes),
                draw(image, seen.boxes, seen.classes, classes, seen.scores),
            )
        )
    figure = _figure(3 * len(pairs) + 0.5, 6)
    figure.suptitle(f"{title}: true boxes above, found ones below")
    for column, pair in zip(
        np.transpose(figure.subplots(2, len(pairs), squeeze=False)), pairs, strict=True
    ):
        for axes, picture in zip(column, pair, strict=True):
            axes.imshow(picture)
            axes.axis("off")
    return figure


def _figure(width: float, height: float) -> Figure:
    figure: Figure = require("matplotlib.figure", "train", "drawing").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure
