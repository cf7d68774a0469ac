"""MobileNetV2: inverted residual blocks around depthwise convolutions.

Parameters go by torchvision's names, so that weights published for its model load with
strict=True.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import init

from gdfast import nn
from gdfast.models import register

# Expansion, channels, blocks and stride of the first block of each stage (the paper's table 2).
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 convolution to `expansion` times the channels, 3x3 depthwise, 1x1 back to few.

    [N, inputs, H, W] to [N, outputs, P, Q], plus the input where the shapes are the same. The last
    norm has no activation after it: few channels would lose too much.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_conv_norm_act(inputs, width, 1))
        layers += [
            _conv_norm_act(width, width, 3, stride, groups=width),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """conv(x), plus x where the block keeps its shape."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


@register("mobilenet_v2")
class MobileNetV2(nn.Module):
    """Stem, seventeen inverted residual blocks, a last 1x1, global pooling, one linear layer.

    Input [N, in_channels, H, W], made for 224 x 224; output [N, num_classes] logits. `width`
    multiplies the channels, rounded to multiples of 8; `dropout` is that before the linear layer.
    Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", 2018.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        channels = _round_channels(32 * width)
        layers: list[nn.Module] = [_conv_norm_act(in_channels, channels, 3, stride=2)]
        for expansion, outputs, blocks, stride in _STAGES:
            outputs = _round_channels(outputs * width)
            for block in range(blocks):
                layers.append(
                    InvertedResidual(channels, outputs, stride if block == 0 else 1, expansion)
                )
                channels = outputs
        last = _round_channels(1280 * max(1.0, width))
        layers.append(_conv_norm_act(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        x = self.avgpool(self.features(x))
        return self.classifier(x.flatten(1))

    def _initialise(self) -> None:
        """As torchvision does."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                init.normal_(module.weight, std=0.01)
                init.zeros_(module.bias)


def _conv_norm_act(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


def _round_channels(channels: float) -> int:
    """The nearest multiple of 8, from 8 up, that is not over a tenth less."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
