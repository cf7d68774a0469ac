"""Training a detector: `gdfast train yolo`."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gdfast import models
from gdfast.data import boxes
from gdfast.data.boxes.records import Record
from gdfast.data.boxes.source import (
    Augmentation,
    BoxSource,
    canvas_for,
    undo_letterbox,
)
from gdfast.data.loader import Batch, Loader
from gdfast.losses import YoloLoss
from gdfast.metrics import Found, Truth, detection
from gdfast.models.yolo_head import decode
from gdfast.train import detection_plots, plots, weights
from gdfast.train.detections import DetectPredictor, select
from gdfast.train.folder import RunFolder
from gdfast.train.recipe import Settings
from gdfast.train.task import Task

LARGEST_BY_ITSELF = 416  # of the canvas's longer side, in pixels
_EVALUATION_BATCH = 16
# Average precision counts boxes of low scores too.
_MIN_SCORE = 0.005


class Detect(Task):
    """Finding boxes with YOLO-lite."""

    score = "map"
    terms = ("box", "confidence", "class")

    @classmethod
    def load(cls, settings: Settings, *, download: bool = False) -> boxes.Detections:
        """`scenes`, `voc:DIR`, `coco:JSON,IMAGES` or `yolo:YAML`."""
        return boxes.load(settings.data, max_bad=settings.max_bad)

    def __init__(self, settings: Settings, data: boxes.Detections) -> None:
        options = settings.options
        self.settings = settings
        self.data = data
        self.title = plots.title(settings.task, data.name, settings.seed)
        self.canvas = _canvas(data, options["size"])
        self.strides = tuple(int(stride) for stride in options["strides"].split(","))
        self.model_options = {"num_classes": len(data.classes), "strides": self.strides}
        # In the layout that images come in, a step takes a fifth less time on a CPU.
        self.model = models.create("yolo_lite", **self.model_options).to(
            memory_format=torch.channels_last  # type: ignore[call-overload]
        )
        self.loss_fn = YoloLoss(self.strides, label_smoothing=settings.descent.label_smoothing)
        self._test = Loader(self._source(data.test), _EVALUATION_BATCH, device=settings.device)

    def begin(self) -> None:
        """Take the weights that were named; heads for other classes are drawn anew."""
        if path := self.settings.options["weights"]:
            weights.load_matching(self.model, path, skip=("heads.",))

    def skipped(self) -> int:
        """Test images that could not be decoded."""
        return len(self._test.skipped)

    @functools.cached_property
    def source(self) -> BoxSource:  # type: ignore[override]
        """The training images, augmented; read when first asked for, as measuring needs none."""
        options = self.settings.options
        epochs = self.settings.descent.epochs or self.epochs
        augmentation = Augmentation(
            flips=self.data.flips if options["flips"] == "auto" else options["flips"],
            mosaic=options["mosaic"],
            mixup=options["mixup"],
            scale=options["scale"],
            closed=math.floor(epochs * (1 - options["close"])),
        )
        return self._source(self.data.train, augmentation)

    def _source(
        self, records: Sequence[Record], augmentation: Augmentation | None = None
    ) -> BoxSource:
        source = BoxSource(records, self.canvas, augmentation)
        source.problems.refuse_beyond(self.settings.max_bad, len(records), self.data.name)
        return source

    @property
    def epochs(self) -> int:
        """The data's own number."""
        return self.data.epochs

    def sizes(self) -> tuple[int, int]:
        """Images to train on, images to test with."""
        return len(self.data.train), len(self.data.test)

    def loss(self, outputs: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The loss and its parts, see `YoloLoss`."""
        true_boxes, classes, _ = batch.targets
        parts: dict[str, Tensor] = self.loss_fn(outputs, true_boxes, classes)
        return parts

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Mean test loss and its parts, and COCO's mean average precision: `map50` at IoU 0.5,
        `map` over IoU 0.5 to 0.95."""
        sums = dict.fromkeys(("loss", *self.terms), 0.0)
        found: dict[int, Found] = {}
        for batch in self._test.epoch():
            maps = model(batch.images)
            indices = batch.targets[-1].tolist()
            for name, value in self.loss(maps, batch).items():
                sums[name] += float(value) * len(indices)
            candidates = select(decode(maps, self.strides), _MIN_SCORE)
            for index, each in zip(indices, candidates, strict=True):
                size = self.data.test[index].size
                edges = undo_letterbox(each.boxes, size, self.canvas)
                found[index] = Found(edges, each.scores, each.classes)
        seen = [self.data.test[index] for index in found]
        truth = [Truth(each.boxes, each.classes, each.ignored, each.crowds) for each in seen]
        self._found = [(self.data.test[index], each) for index, each in found.items()]
        self._score = detection(truth, list(found.values()), len(self.data.classes))
        means = {f"test_{name}": value / len(found) for name, value in sums.items()}
        return {**means, "map50": self._score.map50, "map": self._score.map}

    def write_results(self, model: nn.Module, folder: RunFolder) -> dict[str, Any]:
        """Curves of precision, pictures of found boxes, and each class's average precision."""
        classes, score = self.data.classes, self._score
        picture = detection_plots.precision_recall(score, classes, self.title)
        folder.write_figure("precision_recall.png", picture)
        folder.write_figure(
            "detections.png", detection_plots.detections(self._found, classes, self.title)
        )
        return {
            "canvas": list(self.canvas),
            "classes": list(classes),
            "ap50": _by_class(classes, score.ap50),
            "ap": _by_class(classes, score.ap),
        }

    def metadata(self) -> Mapping[str, str]:
        """The model's name and options, the names of the classes, and the size of its input."""
        return {
            "model": "yolo_lite",
            "options": json.dumps(self.model_options),
            "classes": json.dumps(self.data.classes),
            "shape": json.dumps([3, *self.canvas]),
        }

    @classmethod
    def predictor(
        cls, model: nn.Module, metadata: Mapping[str, str], **options: Any
    ) -> DetectPredictor:
        """Finds boxes in new images; `threshold` is their least score."""
        return DetectPredictor(model, metadata, **options)


def _canvas(data: boxes.Detections, size: int) -> tuple[int, int]:
    longer = float(np.median([max(record.size) for record in data.train]))
    return canvas_for(data.train, size or min(LARGEST_BY_ITSELF, int(longer)))


def _by_class(classes: tuple[str, ...], values: np.ndarray) -> dict[str, float | None]:
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in zip(classes, values, strict=True)
    }
