"""Images with boxes, for detection: `load("voc:DIR")`, `load("scenes")`."""

from __future__ import annotations

from gdfast.data.boxes import coco, scenes, voc, yolo
from gdfast.data.boxes.examples import examples
from gdfast.data.boxes.records import Detections, Record, Sample
from gdfast.data.boxes.source import BoxSource, canvas_for, letterbox
from gdfast.data.errors import DataError
from gdfast.data.problems import DEFAULT_SHARE, Problems

__all__ = [
    "KINDS",
    "BoxSource",
    "Detections",
    "Record",
    "Sample",
    "canvas_for",
    "examples",
    "letterbox",
    "load",
    "read",
]

_READERS = {"scenes": scenes.load, "voc": voc.load, "coco": coco.load, "yolo": yolo.load}
KINDS = tuple(_READERS)


def load(spec: str, *, max_bad: float = DEFAULT_SHARE) -> Detections:
    """Read the boxes that `spec` names; images are read when they are needed.

    `scenes` are drawn here of scikit-learn's digits; `voc:DIR` has Annotations, JPEGImages and
    ImageSets/Main; `coco:JSON,IMAGES` is split, `coco:JSON,IMAGES,JSON,IMAGES` has a second pair
    for testing; `yolo:YAML` lists images that have labels as text. Bad items are left out and
    listed in the data's `problems`.

    Raises:
        DataError: an unknown spec, nothing to train or test on, or a share of bad items of more
            than `max_bad`.
        MissingExtraError: a package that the data needs is not installed.
    """
    problems = Problems()
    data = read(spec, problems)
    problems.refuse_beyond(max_bad, len(data.train) + len(data.test) + problems.skipped(), spec)
    for part, records in (("training", data.train), ("testing", data.test)):
        if not records:
            first = next(iter(problems), None)
            why = f": {first}" if first else ""
            raise DataError(f"data: {spec}: expected images for {part}, found none{why}")
    return data


def read(spec: str, problems: Problems) -> Detections:
    """What `spec` names, however much of it is bad; raises DataError for lists that are."""
    kind, colon, where = spec.partition(":")
    if kind not in _READERS or (kind == "scenes") == bool(colon) or bool(colon) != bool(where):
        known = "scenes, voc:DIR, coco:JSON,IMAGES or yolo:YAML"
        raise DataError(f"data: spec: expected {known}, got {spec!r}")
    data = _READERS[kind](where, problems)
    data.look_for_missing_classes(problems)
    return data
