"""YOLO-lite: a backbone of 3x3 convolutions, and the detector of less than 5 M parameters on it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F
from torch.nn import init

from gdfast import nn
from gdfast.models import register
from gdfast.models.yolo_head import Head, Neck

_SLOPE = 0.1  # of LeakyReLU, as in all of YOLO's own networks


class ConvBlock(nn.Module):
    """leaky_relu(norm(conv(x))), by a 3x3 convolution that keeps the image's size but for stride.

    [N, inputs, H, W] to [N, outputs, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.LeakyReLU(_SLOPE, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """leaky_relu(norm(conv(x)))."""
        return self.act(self.norm(self.conv(x)))


class YoloLiteBackbone(nn.Module):
    """Images [N, in_channels, H, W] to maps of 64, 128 and 512 channels at strides 8, 16 and 32.

    The stem halves the image; so does the first block of each stage, which doubles the channels
    too. The last stage has one block more, to 512 channels. After "You only look once" (Redmon et
    al., 2016) and the smaller networks that followed it.
    """

    channels = (64, 128, 512)
    strides = (8, 16, 32)

    def __init__(self, *, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = ConvBlock(in_channels, 16, stride=2)
        self.stage1 = _stage(16, 32)
        self.stage2 = _stage(32, 64)
        self.stage3 = _stage(64, 128)
        self.stage4 = _stage(128, 256)
        self.last = ConvBlock(256, 512)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init.kaiming_normal_(module.weight, a=_SLOPE, mode="fan_out")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps at strides 8, 16 and 32."""
        x = self.stage1(self.stem(x))
        eighth = self.stage2(x)
        sixteenth = self.stage3(eighth)
        return eighth, sixteenth, self.last(self.stage4(sixteenth))


class BackboneClassifier(nn.Module):
    """A backbone that names the image: its coarsest map, averaged, through one linear layer.

    Output [N, num_classes] logits.
    """

    def __init__(self, backbone: YoloLiteBackbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        coarsest = self.backbone(x)[-1]
        return self.fc(F.adaptive_avg_pool2d(coarsest, 1).flatten(1))


class YoloLite(nn.Module):
    """Finds boxes: the backbone, a top-down neck, and a head at each of `strides`.

    Images [N, in_channels, H, W] to one map [N, 5 + num_classes, ceil(H / s), ceil(W / s)] for each
    stride s, finest first. Every cell holds, in this order: the logarithms of the distances from
    its centre to a box's left, top, right and bottom edge, in strides; the logit of the confidence
    that there is such a box; a logit for each class. `gdfast.models.yolo_head.decode` turns
    the maps into boxes in pixels.

    Raises:
        ValueError: strides other than some of 8, 16, 32, or no classes.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, strides: Sequence[int] = (8, 16, 32)
    ) -> None:
        super().__init__()
        known = YoloLiteBackbone.strides
        if not strides or list(strides) != [stride for stride in known if stride in strides]:
            raise ValueError(
                f"yolo_lite: strides: expected some of {known}, ascending, got {strides}"
            )
        if num_classes < 1:
            raise ValueError(f"yolo_lite: num_classes: expected 1 or more, got {num_classes}")
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.backbone = YoloLiteBackbone(in_channels=in_channels)
        first = known.index(self.strides[0])
        self.neck = Neck(self.backbone.channels[first:], slope=_SLOPE)
        self._levels = [known.index(stride) - first for stride in self.strides]
        self.heads = nn.ModuleList(
            Head(self.neck.channels[level], num_classes, slope=_SLOPE) for level in self._levels
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps, finest first."""
        maps = self.neck(self.backbone(x)[-len(self.neck.channels) :])
        return [head(maps[level]) for head, level in zip(self.heads, self._levels, strict=True)]


@register("yolo_lite")
def yolo_lite(
    *, num_classes: int = 20, in_channels: int = 3, strides: Sequence[int] = (8, 16, 32)
) -> nn.Module:
    """The detector."""
    return YoloLite(num_classes, in_channels, strides)


@register("yolo_lite_backbone")
def yolo_lite_backbone(*, num_classes: int | None = None, in_channels: int = 3) -> nn.Module:
    """The backbone, which gives its three maps; with `num_classes`, a classifier built on it."""
    backbone = YoloLiteBackbone(in_channels=in_channels)
    return backbone if num_classes is None else BackboneClassifier(backbone, num_classes)


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvBlock(inputs, outputs, stride=2), ConvBlock(outputs, outputs))
