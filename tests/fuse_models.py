"""Models whose layers can be fused, as people write them, and what should become of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Article(nn.Module):
    """The article's CNN, its activation and its pooling as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4 * 25, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        x = F.max_pool2d(x, 2)
        return self.fc(torch.flatten(x, 1))


class PoolFirst(nn.Module):
    """As PyTorch's first MNIST example had it: pooling before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        return F.relu(F.max_pool2d(self.conv2(x), kernel_size=3, stride=1, ceil_mode=True))


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return self.relu(x + self.bn3(self.conv3(out)))


class TwoNorms(nn.Module):
    """A projection written out: both that are added are norms' results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv_down, self.bn_down = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.add(self.bn(self.conv(x)), self.bn_down(self.conv_down(x))))


class PreActivation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = (
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.bn2, self.conv2 = (
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.silu(self.bn2(out)))
        return out + x


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, use_res_connect: bool = True) -> None:
        super().__init__()
        self.use_res_connect = use_res_connect
        width = 2 * channels
        self.conv = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(True)
            ),
            nn.Conv2d(width, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class Yolo(nn.Module):
    """conv-BN-leaky as one module, an Identity between, as some libraries leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.drop, self.act = nn.Identity(), nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.norm(self.conv(x))))


class Loop(nn.Module):
    """A ModuleList, walked through; functions of another module's result."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)])
        self.scale, self.slopes = 0.5, [0.2, 0.3]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.leaky_relu(x, self.slopes[0]) * self.scale


class Vgg(nn.Module):
    """Convolutions with activations and no norm between, as modules and as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, 2, padding=1, groups=2), nn.LeakyReLU(0.2),
            nn.Conv2d(6, 5, (1, 2), padding=1, padding_mode="replicate", bias=False), nn.ReLU6(),
        )  # fmt: skip
        self.conv, self.last = nn.Conv2d(5, 4, 3, padding="same"), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.features(x)))
        return F.silu(self.last(x)).mean((2, 3))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.BatchNorm2d(4))), nn.SiLU(),
        nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.LeakyReLU(0.3),
    )  # fmt: skip


def blocks() -> nn.Module:
    return nn.Sequential(Basic(3, 4), Basic(4, 4), Basic(4, 6, 2), nn.MaxPool2d(2, ceil_mode=True))


NORM, POOL, TRIPLE = "batch_norm_act", "max_pool2d", "conv2d_relu_max_pool2d"
CONV = "conv2d_act"
Row = tuple[str, list[str], str]

# What makes the model, and what the report should say of it.
CASES: dict[str, tuple[Callable[[], nn.Module], list[Row]]] = {
    "article": (
        Article,
        [("", ["conv1", "torch.relu", "F.max_pool2d"], TRIPLE), ("", ["fc"], "linear")],
    ),
    "pool first": (
        PoolFirst,
        [
            ("", ["conv1", "F.max_pool2d", "F.relu"], TRIPLE),
            ("", ["conv2", "F.max_pool2d", "F.relu"], TRIPLE),
        ],
    ),
    "basic blocks": (
        blocks,
        [
            ("0", ["bn1", "relu"], f"{NORM}(relu)"),
            ("0", ["bn2", "+=", "relu"], f"{NORM}(residual, relu)"),
            ("0.downsample", ["1"], NORM),
            ("1", ["bn1", "relu"], f"{NORM}(relu)"),
            ("1", ["bn2", "+=", "relu"], f"{NORM}(residual, relu)"),
            ("2", ["bn1", "relu"], f"{NORM}(relu)"),
            ("2", ["bn2", "+=", "relu"], f"{NORM}(residual, relu)"),
            ("2.downsample", ["1"], NORM),
            ("", ["3"], POOL),
        ],
    ),
    "bottleneck": (
        lambda: Bottleneck(3),
        [
            ("", ["bn1", "relu"], f"{NORM}(relu)"),
            ("", ["bn2", "F.relu"], f"{NORM}(relu)"),
            ("", ["bn3", "+", "relu"], f"{NORM}(residual, relu)"),
        ],
    ),
    "two norms": (
        TwoNorms,
        [
            ("", ["bn", "torch.add", "torch.relu"], f"{NORM}(residual, relu)"),
            ("", ["bn_down"], NORM),
        ],
    ),
    "pre-activation": (
        lambda: PreActivation(3),
        [("", ["bn1", "F.relu"], f"{NORM}(relu)"), ("", ["bn2", "F.silu"], f"{NORM}(silu)")],
    ),
    "inverted residual": (
        lambda: nn.Sequential(InvertedResidual(3), InvertedResidual(3, False)),
        [
            ("0", ["conv.0.1", "conv.0.2"], f"{NORM}(relu6)"),
            ("0", ["conv.2", "+"], f"{NORM}(residual)"),
            ("1.conv.0", ["1", "2"], f"{NORM}(relu6)"),
            ("1.conv", ["2"], NORM),
        ],
    ),
    "yolo": (Yolo, [("", ["norm", "act"], f"{NORM}(leaky_relu)")]),
    "loop": (Loop, [("", ["layers.1", "F.leaky_relu"], f"{NORM}(leaky_relu)")]),
    "vgg": (
        Vgg,
        [
            ("features", ["0", "1"], f"{CONV}(relu)"),
            ("features", ["2", "3", "4"], TRIPLE),
            ("features", ["5", "6"], f"{CONV}(leaky_relu)"),
            ("features", ["7", "8"], f"{CONV}(relu6, without gradients)"),
            ("", ["conv", "torch.relu"], f"{CONV}(relu)"),
            ("", ["last", "F.silu"], f"{CONV}(silu)"),
        ],
    ),
    "sequential": (
        sequential,
        [
            ("", ["1", "2"], f"{NORM}(relu)"),
            ("3", ["0", "1", "2"], TRIPLE),
            ("", ["4.1.0", "5"], f"{NORM}(silu)"),
            ("", ["6"], NORM),
            ("", ["7", "8"], f"{CONV}(leaky_relu, without gradients)"),
        ],
    ),
}


def fill(model: nn.Module) -> nn.Module:
    """Gives norms values off their defaults, so that every one of them counts."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.momentum, module.eps = 0.2, 1e-3
    return model


def images(dtype: Any = torch.float64) -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(5), dtype=dtype)
