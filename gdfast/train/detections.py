"""What a detector finds in images, and how that is shown: as pictures and as JSON."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gdfast.data.boxes.records import Sample
from gdfast.data.boxes.source import letterbox, to_input, undo_letterbox
from gdfast.extras import require
from gdfast.metrics import Found
from gdfast.models.yolo_head import Predictions, decode
from gdfast.ops import nms
from gdfast.train.errors import RunError, SettingsError

IOU_THRESHOLD = 0.6
MAX_DETECTIONS = 100  # of an image, as many as COCO judges
_MAX_CANDIDATES = 3000  # of an image, before non-maximum suppression
SHOWN_SCORE = 0.3
"""Below it a box is left out of pictures."""


def detect(
    model: nn.Module,
    image: np.ndarray,
    canvas: tuple[int, int],
    *,
    min_score: float = 0.05,
    iou_threshold: float = IOU_THRESHOLD,
) -> Found:
    """Boxes in an image [H, W, 3] of bytes, in its pixels, best first.

    `model` is a `YoloLite` in eval mode, `canvas` the height and width of its input.
    """
    sample = letterbox(Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64)), canvas)
    device = next(model.parameters()).device
    with torch.no_grad():
        maps = model(to_input(sample.image[None]).to(device))
    strides: Any = model.strides
    (found,) = select(decode(maps, strides), min_score, iou_threshold)
    size = (image.shape[0], image.shape[1])
    return Found(undo_letterbox(found.boxes, size, canvas), found.scores, found.classes)


def select(
    predictions: Predictions, min_score: float, iou_threshold: float = IOU_THRESHOLD
) -> list[Found]:
    """Each image's boxes in pixels of the model's input, best first, one for each object.

    Every class of a cell whose score is over `min_score` is a candidate; non-maximum suppression
    goes class by class.
    """
    found = []
    scores = predictions.scores().cpu()
    boxes = predictions.boxes.cpu()
    for image in range(len(scores)):
        cell, label = (scores[image] > min_score).nonzero(as_tuple=True)
        score = scores[image, cell, label]
        if len(score) > _MAX_CANDIDATES:
            best = score.argsort(descending=True, stable=True)[:_MAX_CANDIDATES]
            cell, label, score = cell[best], label[best], score[best]
        kept = nms(boxes[image, cell], score, label, iou_threshold, MAX_DETECTIONS)
        found.append(
            Found(boxes[image, cell[kept]].numpy(), score[kept].numpy(), label[kept].numpy())
        )
    return found


class DetectPredictor:
    """A trained detector, asked for one image at a time."""

    def __init__(
        self,
        model: nn.Module,
        metadata: Mapping[str, str],
        *,
        threshold: float = SHOWN_SCORE,
        **others: Any,
    ) -> None:
        """`threshold` is the least score of a box.

        Raises:
            RunError: metadata that is not a detector's. SettingsError: an unknown option.
        """
        if others:
            raise SettingsError(
                f"predict: {min(others)}: expected threshold alone for boxes, got this"
            )
        try:
            _, height, width = json.loads(metadata["shape"])
            self.canvas = int(height), int(width)
            self.classes = [str(name) for name in json.loads(metadata["classes"])]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"predict: expected weights of a detector, found: {error}") from None
        if len(self.classes) != model.num_classes:
            raise RunError(
                f"predict: expected the names of {model.num_classes} classes, found "
                f"{len(self.classes)}"
            )
        self.model = model
        self.threshold = threshold

    def __call__(self, image: np.ndarray) -> dict[str, Any]:
        """The boxes, best first, and how many there are of each class."""
        found = detect(self.model, image, self.canvas, min_score=self.threshold)
        boxes = to_json(found, self.classes)
        counts = Counter(box["class"] for box in boxes)
        words = [f"{counts[name]} {name}" for name in self.classes if counts[name]]
        return {"boxes": boxes, "summary": ", ".join(words) or "nothing"}

    def draw(self, image: np.ndarray, answer: dict[str, Any]) -> bytes:
        """The image with its boxes."""
        boxes = answer["boxes"]
        picture = draw(
            image,
            np.array([box["box"] for box in boxes], dtype=np.float32).reshape(-1, 4),
            np.array([self.classes.index(box["class"]) for box in boxes], dtype=np.int64),
            self.classes,
            np.array([box["score"] for box in boxes]),
        )
        png = io.BytesIO()
        pillow = require("PIL.Image", "train", "drawing boxes")
        pillow.fromarray(picture).save(png, format="PNG")
        return png.getvalue()


def to_json(found: Found, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The boxes as JSON has them: class, score, and box (left, top, right, bottom, in pixels)."""
    return [
        {
            "class": classes[int(label)],
            "score": round(float(score), 4),
            "box": [round(float(edge), 2) for edge in box],
        }
        for box, score, label in zip(found.boxes, found.scores, found.classes, strict=True)
    ]


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """The image [H, W, 3] with boxes [M, 4], each in its class's colour and with its name, and its
    score if `scores` [M] are given."""
    pillow = require("PIL.Image", "train", "drawing boxes")
    picture = pillow.fromarray(np.ascontiguousarray(image))
    pen = require("PIL.ImageDraw", "train", "drawing boxes").Draw(picture)
    line = max(1, round(max(picture.size) / 300))
    font = require("PIL.ImageFont", "train", "drawing boxes").load_default(
        max(9, round(max(picture.size) / 40))
    )
    for index, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        colour = _COLOURS[label % len(_COLOURS)]
        left, top, right, bottom = box
        pen.rectangle((left, top, max(right, left), max(bottom, top)), outline=colour, width=line)
        text = classes[label] if scores is None else f"{classes[label]} {scores[index]:.2f}"
        place = pen.textbbox((left + line, top), text, font=font)
        pen.rectangle(place, fill=colour)
        pen.text((left + line, top), text, fill="white", font=font)
    return np.asarray(picture)


_COLOURS = (
    "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e",
    "#8c564b", "#e377c2", "#17becf", "#7f7f7f", "#bcbd22",
)  # fmt: skip


def shown(found: Found, min_score: float = SHOWN_SCORE) -> Found:
    """The boxes that a picture shows."""
    kept = found.scores >= min_score
    return Found(found.boxes[kept], found.scores[kept], found.classes[kept])
