"""Models and steps for the tests of swapping."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor


class ConvNormActivation(torch.nn.Sequential):
    """As torchvision builds its models: a Sequential that makes torch.nn.Conv2d itself."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, **arguments: Any) -> None:
        convolution = torch.nn.Conv2d(
            inputs, outputs, kernel, padding=kernel // 2, bias=False, **arguments
        )
        norm = torch.nn.BatchNorm2d(outputs)
        super().__init__(convolution, norm, torch.nn.ReLU(inplace=True))


class Residual(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNormActivation(channels, channels)
        self.conv2 = ConvNormActivation(channels, channels, groups=channels)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.conv2(self.conv1(input))


def make_model() -> torch.nn.Module:
    layers = OrderedDict(
        stem=ConvNormActivation(3, 8, stride=2),
        block=Residual(8),
        drop=torch.nn.Dropout(0.5),
        head=torch.nn.Conv2d(8, 5, 1),
        pool=torch.nn.AdaptiveAvgPool2d(1),
    )
    return torch.nn.Sequential(layers)


NAMES = ["stem.0", "block.conv1.0", "block.conv2.0", "head"]
BATCH = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(5))


def classes(model: torch.nn.Module) -> list[type]:
    return [type(m) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    torch.manual_seed(7)
    optimizer.zero_grad()
    loss = model(BATCH).square().sum()
    loss.backward()
    optimizer.step()
    return loss.item()
