"""A residual network that turns a face into a point of a sphere: near for one person, far for two.

Faces as ORL's, 92 x 112 grey, train on a few CPU cores; widths and depths grow for more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gdfast import nn
from gdfast.models import register
from gdfast.models.resnet import BasicBlock, initialise, stage

_GRID = (4, 3)  # height and width: a face is taller than wide
_EPS = 1e-3  # of the standard deviation: an image of one grey stays finite, and dark


@register("face_resnet")
class FaceResNet(nn.Module):
    """3x3 stem, four stages of residual blocks, pooling to a 4x3 grid, one linear layer.

    Input [N, in_channels, H, W] of values 0 to 1, made for 56 x 46 to 112 x 92; output
    [N, features] of length 1. Each image is first brought to mean 0 and deviation 1, so that the
    light's strength does not matter. The grid keeps where a feature was, which global pooling
    forgets. `width` is the first stage's channels, doubled by each stage that follows; `depth` the
    blocks of a stage.
    He et al., "Deep residual learning for image recognition", 2015; the embedding's dropout,
    linear layer and norm are those of Deng et al., "ArcFace", 2018 (their option E).
    """

    def __init__(
        self,
        *,
        depth: int = 1,
        width: int = 32,
        in_channels: int = 1,
        features: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.features = features
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(BasicBlock, width, width, depth, stride=1)
        self.layer2 = stage(BasicBlock, width, 2 * width, depth, stride=2)
        self.layer3 = stage(BasicBlock, 2 * width, 4 * width, depth, stride=2)
        self.layer4 = stage(BasicBlock, 4 * width, 8 * width, depth, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(_GRID)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8 * width * _GRID[0] * _GRID[1], features, bias=False)
        self.norm = nn.BatchNorm1d(features)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [N, features] of length 1, of images [N, in_channels, H, W]."""
        deviation, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / (deviation + _EPS)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.norm(self.fc(self.dropout(self.pool(x).flatten(1))))
        return F.normalize(x)
