"""Measures of a classifier on labelled images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Classification:
    """What a classifier said about N images.

    `losses` [N] is each image's cross entropy, `predicted` [N] the class that it was given,
    `confidence` [N] the probability of that class, `labels` [N] the truth, `ranks` [N] the place of
    the true class among all, from 0, the likeliest first.
    """

    losses: Tensor
    predicted: Tensor
    confidence: Tensor
    labels: Tensor
    ranks: Tensor

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return self.losses.double().mean().item()

    @property
    def accuracy(self) -> float:
        """Share of the images whose predicted class is the true one."""
        return (self.predicted == self.labels).double().mean().item()

    @property
    def top5(self) -> float:
        """Share of the images whose true class is among the five likeliest."""
        return (self.ranks < 5).double().mean().item()

    def confusion(self, classes: int) -> Tensor:
        """Counts [classes, classes]: images of a class (rows) that were given a class (columns)."""
        pairs = self.labels * classes + self.predicted
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def mistakes(self) -> Tensor:
        """Indices of the misread images, highest loss first."""
        wrong = (self.predicted != self.labels).nonzero().flatten()
        return wrong[self.losses[wrong].argsort(descending=True, stable=True)]


def classification(logits: Tensor, labels: Tensor) -> Classification:
    """Measure logits [N, classes] against labels [N]."""
    confidence, predicted = torch.softmax(logits, dim=1).max(dim=1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    return Classification(losses, predicted, confidence, labels, ranks)
