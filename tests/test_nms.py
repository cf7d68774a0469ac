"""Non-maximum suppression against a naive one, its ties, its bad numbers and its arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gdfast import native, ops

BACKENDS = ["reference", *(["cpu"] if hasattr(native.cpu, "nms") else [])]


def naive(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, most: int) -> list[int]:
    rows = [[float(edge) for edge in box] for box in boxes]
    order = sorted(range(len(rows)), key=lambda i: (-float(scores[i]), i))
    kept: list[int] = []
    for i in order:
        for k in kept:
            a, b = rows[i], rows[k]
            w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
            h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
            if classes[i] == classes[k] and union > 0 and w * h / union > threshold:
                break
        else:
            kept.append(i)
    return kept[:most]


def some(count: int, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    corner = torch.rand(count, 2) * 60
    boxes = torch.cat((corner, corner + 5 + torch.rand(count, 2) * 40), 1)
    # Few levels, so that there are ties.
    scores = torch.randint(0, 20, (count,)) / 20
    return boxes, scores, torch.randint(0, classes, (count,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.55, 1.0])
@pytest.mark.parametrize(("count", "most"), [(0, 10), (1, 10), (33, 100), (200, 7), (200, 300)])
def test_it_keeps_what_a_naive_one_keeps(
    backend: str, threshold: float, count: int, most: int
) -> None:
    boxes, scores, classes = some(count)
    kept = ops.nms(boxes, scores, classes, threshold, most, backend=backend)
    assert kept.dtype == torch.int64
    assert kept.tolist() == naive(boxes, scores, classes, threshold, most)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_stay_in_their_order(backend: str) -> None:
    boxes = torch.tensor([[0, 0, 4, 4], [9, 9, 12, 12], [0, 0, 4, 4], [5, 0, 8, 4]])
    kept = ops.nms(boxes, torch.ones(4), backend=backend)
    assert kept.tolist() == [0, 1, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_do_not_suppress_each_other(backend: str) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4]]).repeat(4, 1)
    kept = ops.nms(boxes, torch.tensor([0.2, 0.9, 0.5, 0.3]), torch.tensor([7, -2, 7, -2]),
                   backend=backend)  # fmt: skip
    assert kept.tolist() == [1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_goes_and_disturbs_nothing(backend: str) -> None:
    boxes, scores, classes = some(60)
    bad = torch.tensor([3, 17, 40, 41])
    boxes[3, 0], boxes[17, 3], boxes[40, 2] = torch.nan, torch.inf, -torch.inf
    scores[41] = torch.nan
    good = torch.tensor([i for i in range(60) if i not in bad])
    kept = ops.nms(boxes, scores, classes, 0.4, backend=backend)
    alone = ops.nms(boxes[good], scores[good], classes[good], 0.4, backend=backend)
    assert kept.tolist() == good[alone].tolist()
    scores[5] = torch.inf
    assert ops.nms(boxes, scores, classes, 0.4, backend=backend)[0] == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_swapped_boxes_suppress_nothing(backend: str) -> None:
    boxes = torch.tensor([[1.0, 1, 1, 9], [1, 1, 1, 9], [9, 9, 1, 1], [0, 0, 8, 8]])
    assert ops.nms(boxes, torch.ones(4), backend=backend).tolist() == [0, 1, 2, 3]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs a compiled module with nms")
@pytest.mark.kernels
def test_the_kernel_agrees_with_numpy_on_many() -> None:
    boxes, scores, classes = some(3000, classes=2)
    boxes[::7] = boxes[0]
    boxes[::91] = torch.nan
    both = [ops.nms(boxes, scores, classes, 0.5, backend=name).tolist() for name in BACKENDS]
    assert both[0] == both[1] and len(both[0]) > 10


def test_numpy_like_layouts_and_dtypes_are_taken() -> None:
    boxes, scores, classes = some(50)
    expected = ops.nms(boxes, scores, classes).tolist()
    turned = torch.from_numpy(np.asfortranarray(boxes.numpy()))
    assert ops.nms(turned, scores.double(), classes.to(torch.uint8)).tolist() == expected


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"boxes": torch.zeros(3, 5)}, ValueError, r"boxes: expected \[M, 4\], got \[3, 5\]"),
        ({"scores": torch.zeros(2)}, ValueError, r"scores: expected \[3\], got \[2\]"),
        ({"classes": torch.zeros(4).long()}, ValueError, r"classes: expected \[3\]"),
        ({"classes": torch.zeros(3)}, TypeError, "classes: expected whole numbers"),
        ({"iou_threshold": 1.5}, ValueError, "iou_threshold: expected 0 to 1, got 1.5"),
        ({"iou_threshold": float("nan")}, ValueError, "iou_threshold"),
        ({"max_detections": -1}, ValueError, "max_detections: expected 0 or more, got -1"),
        ({"backend": "fast"}, ValueError, "backend: expected auto, cpu or reference"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], words: str) -> None:
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3)}
    with pytest.raises(error, match=words):
        ops.nms(**{**arguments, **change})
