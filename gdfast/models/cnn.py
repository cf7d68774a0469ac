"""The smallest convolutional network that reads handwritten digits well."""

from __future__ import annotations

import torch
from torch import Tensor

from gdfast import nn
from gdfast.models import register


@register("cnn")
class SimpleCNN(nn.Module):
    """One convolution, ReLU, max pooling and a linear layer: 28x28 grey images to 10 digits.

    Input [N, 1, 28, 28], output [N, 10] logits. The sizes on the way: conv1 (3x3, no padding)
    [N, 32, 26, 26], pooling by 2 [N, 32, 13, 13], flat [N, 5408].
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.fc = nn.Linear(32 * 13 * 13, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28]."""
        x = nn.conv_relu_max_pool(self.conv1, x, 2)  # max_pool2d(relu(conv1(x)), 2), in one kernel
        return self.fc(torch.flatten(x, 1))
