"""YOLO-lite's loss: which cells answer for which box, and how wrong they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdfast.losses.boxes import ciou, iou
from gdfast.models.yolo_head import Predictions, decode

_CELLS_PER_BOX = 10


class Assignment(NamedTuple):
    """For each of A cells of N images: does it answer for a box (`chosen` [N, A] bool), for which
    one (`box` [N, A], an index), and how good it ought to be (`quality` [N, A], 0 to 1)."""

    chosen: Tensor
    box: Tensor
    quality: Tensor


class YoloLoss(nn.Module):
    """Location, confidence and class of the maps that `YoloLite` gives.

    Location is 1 - CIoU, confidence and class binary cross entropies: confidence of all cells, the
    other two of the cells that answer for a box, each weighted with the quality that is asked of
    it. All three are divided by the sum of the qualities, so that a box counts the same
    in a crowded batch and in an empty one. Computed in float32, under autocast too.
    """

    def __init__(
        self,
        strides: Sequence[int] = (8, 16, 32),
        *,
        box: float = 4.0,
        confidence: float = 1.0,
        classes: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        """The parts' weights in the sum; smoothing moves class targets from 0 and 1 inwards."""
        super().__init__()
        self.strides = tuple(strides)
        self.weights = {"box": box, "confidence": confidence, "class": classes}
        self.label_smoothing = label_smoothing

    def forward(self, maps: Sequence[Tensor], boxes: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Scalars: "loss", and its parts, weighted, "box", "confidence" and "class".

        boxes [N, M, 4] in pixels and classes [N, M]; class -1 marks the rows that only fill up.
        M may be 0.
        """
        with torch.autocast(maps[0].device.type, enabled=False):
            predictions = decode(maps, self.strides)
            boxes = boxes.to(predictions.boxes)
            parts = self._parts(predictions, boxes, classes, assign(predictions, boxes, classes))
        weighted = {name: self.weights[name] * value for name, value in parts.items()}
        return {"loss": torch.stack(list(weighted.values())).sum(), **weighted}

    def _parts(
        self, predictions: Predictions, boxes: Tensor, classes: Tensor, assigned: Assignment
    ) -> dict[str, Tensor]:
        chosen, quality = assigned.chosen, assigned.quality
        total = quality.sum().clamp(min=1.0)
        confidence = F.binary_cross_entropy_with_logits(
            predictions.confidence, quality, reduction="sum"
        )
        image, cell = chosen.nonzero(as_tuple=True)
        box = assigned.box[image, cell]
        weight = quality[image, cell]
        location = (1 - ciou(predictions.boxes[image, cell], boxes[image, box])) * weight

        logits = predictions.classes[image, cell]
        smoothing = self.label_smoothing
        target = torch.full_like(logits, smoothing / logits.shape[-1])
        target.scatter_add_(
            1, classes[image, box][:, None], torch.full_like(target[:, :1], 1 - smoothing)
        )
        named = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        return {
            "box": location.sum() / total,
            "confidence": confidence / total,
            "class": (named * weight).sum() / total,
        }


@torch.no_grad()
def assign(predictions: Predictions, boxes: Tensor, classes: Tensor) -> Assignment:
    """Choose the cells that answer for each box, by what they predict now.

    Only cells whose centre lies within a box may, or, where a box holds no centre, the cell of the
    finest level that is nearest to its middle. Of these the ten with the highest alignment are
    chosen, score ** 0.5 * IoU ** 6, where score is what the cell gives to the box's class. A
    cell that several boxes choose goes to the one with the highest IoU. The quality asked of a cell
    is its alignment, scaled so that the best cell of a box is asked for the highest IoU among
    that box's cells. After the task alignment of "TOOD" (Feng et al., 2021); nothing is drawn.
    """
    cells = predictions.confidence.shape[1]
    if boxes.shape[1] == 0:
        empty = torch.zeros_like(predictions.confidence)
        return Assignment(empty.bool(), empty.long(), empty)
    real = classes >= 0
    allowed, nearness = _candidates(predictions, boxes)
    allowed &= real[..., None]

    overlap = iou(predictions.boxes[:, None], boxes[:, :, None])  # [N, M, A]
    index = classes.clamp(min=0)[..., None].expand(-1, -1, cells)
    score = predictions.scores().transpose(1, 2).gather(1, index)
    # The nearness decides between cells that are all equally bad, in the first steps.
    alignment = score.sqrt() * overlap.square().pow(3) + 1e-9 * nearness
    alignment = torch.where(allowed, alignment, -torch.ones_like(alignment))

    best = alignment.topk(min(_CELLS_PER_BOX, cells), dim=-1)
    claimed = torch.zeros_like(allowed).scatter_(-1, best.indices, best.values >= 0)

    # Contested cells: the highest IoU has it, of equal ones the first box.
    rank = torch.where(claimed, overlap, -torch.ones_like(overlap))
    box = rank.argmax(1)  # [N, A]
    chosen = claimed.any(1)
    own = torch.zeros_like(claimed).scatter_(1, box[:, None], chosen[:, None])

    alignment = alignment * own
    overlap = overlap * own
    scale = overlap.amax(-1, keepdim=True) / alignment.amax(-1, keepdim=True).clamp(min=1e-12)
    quality = (alignment * scale).amax(1)
    return Assignment(chosen, box, quality * chosen)


def _candidates(predictions: Predictions, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Which cells may answer for which box, [N, M, A], and how near they are to its middle."""
    strides = predictions.strides
    x, y = predictions.centres.unbind(-1)
    left, top, right, bottom = boxes[:, :, None].unbind(-1)
    inside = (x > left) & (x < right) & (y > top) & (y < bottom)
    apart = (
        (x - (left + right) / 2).square() + (y - (top + bottom) / 2).square()
    ) / strides.square()
    finest = int((strides == strides[0]).sum())
    nearest = apart[..., :finest].argmin(-1)
    lonely = ~inside.any(-1, keepdim=True)
    instead = torch.zeros_like(inside).scatter_(-1, nearest[..., None], True) & lonely
    return inside | instead, (-apart).exp()
