"""Residual networks: ResNet 18 to 152 for photographs, 20 to 56 for CIFAR's small images.

Parameters go by torchvision's names, so that weights published for its models load with
strict=True; those of the CIFAR networks are named in the same way. As there, activations and sums
work in place: plain PyTorch then needs less memory, and less time to map it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import init

from gdfast import nn
from gdfast.models import register


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2015): [N, C, H, W] to [N, width, P, Q].

    The stride is that of the first; `downsample` brings the shortcut to the output's shape.
    """

    expansion = 1  # channels of the output, as a multiple of the width

    def __init__(
        self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut
        return self.relu(x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: [N, C, H, W] to [N, 4 width, P, Q].

    The stride is that of the 3x3 ("v1.5", as torchvision has it), where the paper's is on the
    first 1x1.
    """

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += shortcut
        return self.relu(x)


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """7x7 stem, max pooling, four stages of residual blocks, global pooling, one linear layer.

    Input [N, in_channels, H, W], made for 224 x 224; output [N, num_classes] logits.
    `zero_init_residual` starts every block as its shortcut, by a last norm of weight 0 (Goyal et
    al., 2017). He et al., "Deep residual learning for image recognition", 2015.
    """

    def __init__(
        self,
        block: Block,
        depths: tuple[int, int, int, int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = stage(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = stage(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = stage(block, 256 * block.expansion, 512, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.fc(self.avgpool(x).flatten(1))


class CifarResNet(nn.Module):
    """3x3 stem and three stages of 16, 32 and 64 channels: the paper's networks for CIFAR-10.

    Input [N, in_channels, H, W], made for 32 x 32; output [N, num_classes] logits. Shortcuts that
    change shape are 1x1 convolutions (the paper's option B).
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6  # in each of three stages, two convolutions each; stem and fc
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(BasicBlock, 16, 16, blocks, stride=1)
        self.layer2 = stage(BasicBlock, 16, 32, blocks, stride=2)
        self.layer3 = stage(BasicBlock, 32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialise(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, H, W]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.fc(self.avgpool(x).flatten(1))


def stage(block: Block, inputs: int, width: int, depth: int, stride: int) -> nn.Sequential:
    """So many blocks in a row; the first has the stride, and a projection if the shape changes."""
    outputs = width * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
    first = block(inputs, width, stride, downsample)
    return nn.Sequential(first, *(block(outputs, width) for _ in range(depth - 1)))


def initialise(model: nn.Module, zero_init_residual: bool = False) -> None:
    """He's normal initialisation of the convolutions by their outputs, as torchvision does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, Bottleneck):
                init.zeros_(module.bn3.weight)
            elif isinstance(module, BasicBlock):
                init.zeros_(module.bn2.weight)


def _register(name: str, build: Callable[..., nn.Module], *arguments: Any) -> None:
    def builder(**options: Any) -> nn.Module:
        return build(*arguments, **options)

    register(name)(builder)


_register("resnet18", ResNet, BasicBlock, (2, 2, 2, 2))
_register("resnet34", ResNet, BasicBlock, (3, 4, 6, 3))
_register("resnet50", ResNet, Bottleneck, (3, 4, 6, 3))
_register("resnet101", ResNet, Bottleneck, (3, 4, 23, 3))
_register("resnet152", ResNet, Bottleneck, (3, 8, 36, 3))
for _depth in (20, 32, 56):
    _register(f"resnet{_depth}", CifarResNet, _depth)
