"""Measures of detected boxes, as COCO judges them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gdfast.extras import require

RECALLS = np.linspace(0, 1, 101)
"""Where COCO reads the precision."""


@dataclass(frozen=True)
class Truth:
    """What one image shows: `boxes` [M, 4] (left, top, right, bottom), `classes` [M], and which
    boxes are `ignored` [M]: to find one of them is neither right nor wrong.

    That goes for one detection of an ignored box, by its IoU like any other. Of `crowds` [M], also
    ignored (None: no box is one), it goes for all that lie within one by more than the threshold.
    """

    boxes: np.ndarray
    classes: np.ndarray
    ignored: np.ndarray
    crowds: np.ndarray | None = None


@dataclass(frozen=True)
class Found:
    """What was found in one image: `boxes` [K, 4], `scores` [K] and `classes` [K]."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True)
class DetectionScore:
    """COCO's average precisions; a class without a box in the truth counts in no mean.

    `map50` is at IoU 0.5, `map` the mean over IoU 0.5 to 0.95; `ap50` and `ap` [classes] the same
    of each class, NaN for one without a box. `precision` [classes, 101] at IoU 0.5 is read at the
    recalls 0, 0.01 to 1.
    """

    map50: float
    map: float
    ap50: np.ndarray
    ap: np.ndarray
    precision: np.ndarray


def detection(truth: Sequence[Truth], found: Sequence[Found], classes: int) -> DetectionScore:
    """Judge what was found in N images by what they show, with pycocotools.

    At most the 100 boxes with the highest scores of an image count.

    Raises:
        MissingExtraError: pycocotools is not installed. ValueError: lists of unlike lengths.
    """
    coco = require("pycocotools.coco", "train", "mean average precision")
    cocoeval = require("pycocotools.cocoeval", "train", "mean average precision")
    rows = [row for image, each in enumerate(found) for row in _rows(image, each)]
    with contextlib.redirect_stdout(io.StringIO()):
        shown = coco.COCO()
        shown.dataset = _annotations(truth, len(found), classes)
        shown.createIndex()
        if rows and shown.dataset["annotations"]:
            judge = _judge(cocoeval.COCOeval, shown, shown.loadRes(np.array(rows)))
            judge.evaluate()
            judge.accumulate()
            # [IoU thresholds, recalls, classes, sizes, numbers of detections]: all sizes, most.
            precision = judge.eval["precision"][:, :, :, 0, -1]
        else:
            precision = np.zeros((10, len(RECALLS), classes))
            present = {int(label) for each in truth for label in each.classes[~each.ignored]}
            precision[:, :, [label for label in range(classes) if label not in present]] = -1
    return _score(precision)


def _judge(base: Any, shown: Any, found: Any) -> Any:
    class Judge(base):
        def _prepare(self) -> None:
            super()._prepare()  # which ignores crowds alone
            for boxes in self._gts.values():
                for box in boxes:
                    box["ignore"] = box["ignored"]

    return Judge(shown, found, "bbox")


def _score(precision: np.ndarray) -> DetectionScore:
    has_box = (precision > -1).all((0, 1))
    per_class = np.where(has_box, precision, np.nan)
    ap50, ap = per_class[0].mean(0), per_class.mean((0, 1))
    return DetectionScore(
        map50=float(ap50[has_box].mean()) if has_box.any() else 0.0,
        map=float(ap[has_box].mean()) if has_box.any() else 0.0,
        ap50=ap50,
        ap=ap,
        precision=per_class[0].T,
    )


def _annotations(truth: Sequence[Truth], images: int, classes: int) -> dict[str, Any]:
    if len(truth) != images:
        raise ValueError(
            f"detection: found: expected what was found in each of {len(truth)} images, "
            f"got {images}"
        )
    annotations: list[dict[str, Any]] = []
    for image, each in enumerate(truth):
        crowds = np.zeros_like(each.ignored) if each.crowds is None else each.crowds
        rows = zip(each.boxes, each.classes, each.ignored, crowds, strict=True)
        for box, label, ignored, crowd in rows:
            left, top, right, bottom = (float(edge) for edge in box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": int(crowd),
                    "ignored": int(ignored or crowd),
                }
            )
    return {
        "images": [{"id": image} for image in range(images)],
        "categories": [{"id": label} for label in range(classes)],
        "annotations": annotations,
    }


def _rows(image: int, found: Found) -> list[tuple[float, ...]]:
    return [
        (image, left, top, right - left, bottom - top, score, label)
        for (left, top, right, bottom), score, label in zip(
            found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True
        )
    ]
