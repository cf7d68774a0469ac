"""Non-maximum suppression: of boxes that show the same object, the best one stays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gdfast import native
from gdfast.errors import mismatch

_OP = "nms"


def nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None = None,
    iou_threshold: float = 0.5,
    max_detections: int = 300,
    *,
    backend: str = "auto",
) -> Tensor:
    """Indices of the boxes that stay, best first: [K] int64, K at most `max_detections`.

    boxes [M, 4] are left, top, right, bottom, scores [M], and classes [M] whole numbers; boxes of
    different classes never suppress each other, without classes all are of one. In the order of
    their scores, equal ones in that of their indices, each box that stays removes those of its
    class whose IoU with it is over `iou_threshold`. A box with a NaN or an infinity, or with a NaN
    for its score, goes. Computed in float64 on the CPU, with memory for M boxes; `backend` is
    "auto", "cpu" (the compiled kernel) or "reference" (numpy), which agree in every index.

    Raises ValueError for other shapes and values, TypeError for classes that are no whole numbers,
    RuntimeError where the compiled kernel is asked for and missing.
    """
    _check(boxes, scores, classes, iou_threshold, max_detections)
    kernel = getattr(native.cpu, "nms", None)
    if backend not in ("auto", "cpu", "reference"):
        raise ValueError(mismatch(_OP, "backend", "auto, cpu or reference", repr(backend)))
    if backend == "cpu" and kernel is None:
        reason = native.failure("cpu") or "an older build"
        raise RuntimeError(mismatch(_OP, "backend", "a compiled kernel for cpu", reason))
    corners = _array(boxes, torch.float64)
    ranks = _array(scores, torch.float64)
    labels = (
        np.zeros(len(ranks), dtype=np.int64) if classes is None else _array(classes, torch.int64)
    )
    if kernel is None or backend == "reference":
        kept = _reference(corners, ranks, labels, iou_threshold, max_detections)
    else:
        kept = np.empty(min(len(ranks), max_detections), dtype=np.int64)
        count = kernel(
            corners.ctypes.data, ranks.ctypes.data, labels.ctypes.data, len(ranks),
            iou_threshold, len(kept), kept.ctypes.data,
        )  # fmt: skip
        kept = kept[:count]
    return torch.from_numpy(kept).to(boxes.device)


def _check(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    iou_threshold: float,
    max_detections: int,
) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(mismatch(_OP, "boxes", "[M, 4]", list(boxes.shape)))
    for name, values in (("scores", scores), ("classes", classes)):
        if values is not None and values.shape != boxes.shape[:1]:
            raise ValueError(mismatch(_OP, name, f"[{len(boxes)}]", list(values.shape)))
    if classes is not None and (classes.is_floating_point() or classes.is_complex()):
        raise TypeError(mismatch(_OP, "classes", "whole numbers", classes.dtype))
    if not 0 <= iou_threshold <= 1:
        raise ValueError(mismatch(_OP, "iou_threshold", "0 to 1", iou_threshold))
    if max_detections < 0:
        raise ValueError(mismatch(_OP, "max_detections", "0 or more", max_detections))


def _array(values: Tensor, dtype: torch.dtype) -> np.ndarray:
    return values.detach().to("cpu", dtype).contiguous().numpy()


def _reference(
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    iou_threshold: float,
    max_detections: int,
) -> np.ndarray:
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(boxes[order]).all(1) & ~np.isnan(scores[order])]
    kept: list[int] = []
    with np.errstate(over="ignore", invalid="ignore"):
        while len(order) and len(kept) < max_detections:
            best, order = order[0], order[1:]
            kept.append(int(best))
            overlap = _iou(boxes[best], boxes[order])
            order = order[~((classes[order] == classes[best]) & (overlap > iou_threshold))]
    return np.array(kept, dtype=np.int64)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    corner = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = corner.clip(min=0).prod(1)
    area = (box[2:] - box[:2]).clip(min=0).prod()
    areas = (others[:, 2:] - others[:, :2]).clip(min=0).prod(1)
    union = area + areas - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
