"""The smallest convolutional network that reads handwritten digits well."""

from __future__ import annotations

import torch
from torch import Tensor

from gdfast import nn
from gdfast.models import register


@register("cnn")
class SimpleCNN(nn.Module):
    """One convolution, ReLU, max pooling and a linear layer: 28x28 grey images to 10 digits.

    Input [N, in_channels, 28, 28], output [N, num_classes] logits. The sizes on the way: conv1
    (3x3, no padding) [N, 32, 26, 26], pooling by 2 [N, 32, 13, 13], flat [N, 5408].
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3)
        self.fc = nn.Linear(32 * 13 * 13, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, in_channels, 28, 28]."""
        x = nn.conv_relu_max_pool(self.conv1, x, 2)  # max_pool2d(relu(conv1(x)), 2), in one kernel
        return self.fc(torch.flatten(x, 1))
