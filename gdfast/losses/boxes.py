"""How well boxes cover each other. Boxes are left, top, right, bottom, in any unit of length."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# Of a length: below it a box is taken for one of that length, so that no quotient is 0 / 0.
_EPS = 1e-7
_Size = tuple[Tensor, Tensor]


def iou(boxes: Tensor, targets: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4] and [..., 4], which broadcast: [...], 0 to 1.

    A box whose edges are swapped or one is empty: its overlap is 0.
    """
    return _overlap(boxes, targets)[0]


def ciou(boxes: Tensor, targets: Tensor) -> Tensor:
    """Complete IoU of boxes [..., 4] and targets [..., 4], which broadcast: [...], from -2 to 1.

    IoU, less the squared distance of the centres over the squared diagonal of the box around both,
    less a term for unlike shapes; 1 for equal boxes, and with a gradient where they do not overlap.
    Empty boxes give finite values and gradients. Half types are computed in float32. From
    "Distance-IoU loss" (Zheng et al., 2020); its trade-off alpha is differentiated like the rest.
    """
    if boxes.dtype in (torch.float16, torch.bfloat16):
        boxes, targets = boxes.float(), targets.float()
    overlap, size, target_size = _overlap(boxes, targets)

    left, top, right, bottom = boxes.unbind(-1)
    target_left, target_top, target_right, target_bottom = targets.unbind(-1)
    apart = _square(
        (left + right - target_left - target_right) / 2,
        (top + bottom - target_top - target_bottom) / 2,
    )
    around = _square(
        _extent(left, right, target_left, target_right),
        _extent(top, bottom, target_top, target_bottom),
    )
    angle, target_angle = (
        torch.atan2(width, height.clamp(min=_EPS)) for width, height in (size, target_size)
    )
    shape = (4 / math.pi**2) * (angle - target_angle).square()
    alpha = shape / (1 - overlap + shape + _EPS)
    return overlap - apart / (around + _EPS**2) - alpha * shape


def _overlap(boxes: Tensor, targets: Tensor) -> tuple[Tensor, _Size, _Size]:
    """IoU [...], and width and height of the boxes and of the targets."""
    left, top, right, bottom = boxes.unbind(-1)
    target_left, target_top, target_right, target_bottom = targets.unbind(-1)
    across = torch.minimum(right, target_right) - torch.maximum(left, target_left)
    down = torch.minimum(bottom, target_bottom) - torch.maximum(top, target_top)
    shared = across.clamp(min=0) * down.clamp(min=0)
    size = (right - left).clamp(min=0), (bottom - top).clamp(min=0)
    target_size = (
        (target_right - target_left).clamp(min=0),
        (target_bottom - target_top).clamp(min=0),
    )
    union = size[0] * size[1] + target_size[0] * target_size[1] - shared
    return shared / (union + _EPS**2), size, target_size


def _square(x: Tensor, y: Tensor) -> Tensor:
    return x.square() + y.square()


def _extent(*edges: Tensor) -> Tensor:
    """Of the edges along one axis, from the first to the last, in whatever order they come."""
    return functools.reduce(torch.maximum, edges) - functools.reduce(torch.minimum, edges)
