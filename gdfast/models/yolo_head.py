"""What YOLO-lite has on its backbone: the neck, the heads, and how their maps become boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import init

from gdfast import nn

BOX, CONFIDENCE, CLASSES = slice(0, 4), 4, slice(5, None)
"""Where a map's channels hold what."""

_WIDTHS = (64, 96, 128)  # of the maps at strides 8, 16 and 32
# Of all cells, about one in a hundred holds a box: confidence starts there, or the many empty cells
# drown the few others in the first steps.
_PRIOR = 0.01
_FIRST_DISTANCE = 2.0  # strides: boxes start 4 cells wide, with which every level fits some objects
# exp(9) strides are beyond every image, and what exceeds it must not become infinite.
_MOST = 9.0


class Predictions(NamedTuple):
    """What all cells of all levels predict for N images: A cells each, finest level first.

    `boxes` [N, A, 4] are left, top, right, bottom in pixels, float32; `confidence` [N, A] and
    `classes` [N, A, classes] are logits, float32. `centres` [A, 2] are the cells' x and y, and
    `strides` [A] their widths, in pixels.
    """

    boxes: Tensor
    confidence: Tensor
    classes: Tensor
    centres: Tensor
    strides: Tensor

    def scores(self) -> Tensor:
        """Probability [N, A, classes] that there is a box of this class: confidence x class."""
        return self.confidence.sigmoid()[..., None] * self.classes.sigmoid()


def decode(maps: Sequence[Tensor], strides: Sequence[int]) -> Predictions:
    """Turn the maps of `YoloLite`, one per stride, into boxes in the pixels of its input.

    Half types become float32; float64 stays.
    """
    rows, centres, widths = [], [], []
    for level, stride in zip(maps, strides, strict=True):
        height, width = level.shape[-2:]
        values = level.flatten(2).transpose(1, 2)
        rows.append(values if values.dtype == torch.float64 else values.float())
        x, y = (
            (torch.arange(size, device=level.device, dtype=rows[-1].dtype) + 0.5) * stride
            for size in (width, height)
        )
        grid = (x[None].expand(height, -1), y[:, None].expand(-1, width))
        centres.append(torch.stack(grid, -1).flatten(0, 1))
        widths.append(x.new_full((height * width,), stride))
    cells, centre, cell_width = torch.cat(rows, 1), torch.cat(centres), torch.cat(widths)
    distance = cells[..., BOX].clamp(-_MOST, _MOST).exp() * cell_width[:, None]
    boxes = torch.cat((centre - distance[..., :2], centre + distance[..., 2:]), -1)
    return Predictions(boxes, cells[..., CONFIDENCE], cells[..., CLASSES], centre, cell_width)


class Neck(nn.Module):
    """Takes what the coarse maps know to the finer ones, top-down.

    Maps [N, `inputs[i]`, ...], each half as large as the one before, to as many of `channels`. Each
    is brought to its width by a 1x1 block; the coarser one is added, enlarged; a 3x3 block mends
    the seams. After "Feature pyramid networks" (Lin et al., 2017).
    """

    def __init__(self, inputs: Sequence[int], *, slope: float) -> None:
        super().__init__()
        self.channels = _WIDTHS[-len(inputs) :]
        pairs = zip(inputs, self.channels, strict=True)
        self.lateral = nn.ModuleList(_block(inside, out, 1, slope) for inside, out in pairs)
        self.down = nn.ModuleList(
            _block(coarse, fine, 1, slope)
            for fine, coarse in zip(self.channels, self.channels[1:], strict=False)
        )
        self.smooth = nn.ModuleList(_block(out, out, 3, slope) for out in self.channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps, finest first as they came."""
        coarsest = len(self.channels) - 1
        outputs: list[Tensor] = []
        for level in range(coarsest, -1, -1):
            x = self.lateral[level](maps[level])
            if level < coarsest:
                coarse = self.down[level](outputs[0])
                x = x + F.interpolate(coarse, size=x.shape[-2:], mode="nearest")
            outputs.insert(0, self.smooth[level](x))
        return outputs


class Head(nn.Module):
    """What each cell of a map predicts, its box and its class from branches of their own.

    [N, inputs, h, w] to [N, 5 + num_classes, h, w]. After "YOLOX" (Ge et al., 2021), whose heads
    are deeper.
    """

    def __init__(self, inputs: int, num_classes: int, *, slope: float) -> None:
        super().__init__()
        self.locate = _block(inputs, inputs, 3, slope)
        self.name = _block(inputs, inputs, 3, slope)
        self.box = nn.Conv2d(inputs, 4, 1)
        self.confidence = nn.Conv2d(inputs, 1, 1)
        self.classes = nn.Conv2d(inputs, num_classes, 1)
        for layer, bias in (
            (self.box, math.log(_FIRST_DISTANCE)),
            (self.confidence, -math.log(1 / _PRIOR - 1)),
            (self.classes, 0.0),
        ):
            assert layer.bias is not None
            init.normal_(layer.weight, std=0.01)
            init.constant_(layer.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """The cells' box, confidence and classes, as channels."""
        place = self.locate(x)
        return torch.cat((self.box(place), self.confidence(place), self.classes(self.name(x))), 1)


def _block(inputs: int, outputs: int, kernel: int, slope: float) -> nn.Module:
    block = nn.ConvNormAct(inputs, outputs, kernel, activation="leaky_relu", negative_slope=slope)
    init.kaiming_normal_(block.conv.weight, a=slope, mode="fan_out")
    return block
