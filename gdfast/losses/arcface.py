"""Heads that turn embeddings of faces into logits of the people trained on, for cross entropy.

They hold one weight vector per person and are not needed to tell people apart afterwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The least squared sine that counts: at an angle of 0 or pi the root's slope would be infinite.
_LEAST = 1e-6


class SoftmaxHead(nn.Module):
    """scale * cos(angle between embedding and person's weight): the normalised softmax.

    With `cosine` False the weights keep their lengths and have a bias: a plain linear layer on the
    embedding times `scale`. Embeddings [N, features] in, logits [N, people] in float32 out, under
    autocast too.
    """

    def __init__(
        self, features: int, people: int, *, scale: float = 30.0, cosine: bool = True
    ) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(people, features))
        self.bias = None if cosine else nn.Parameter(torch.zeros(people))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Logits [N, people]; the labels [N] are there for heads with a margin."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = _at_least_float32(embeddings)
            if self.bias is not None:
                return F.linear(self.scale * embeddings, self.weight, self.bias)
            return self.scale * cosines(embeddings, self.weight)

    def extra_repr(self) -> str:
        """The sizes and the scale."""
        people, features = self.weight.shape
        return f"{features}, {people}, scale={self.scale}, cosine={self.bias is None}"


class ArcFaceHead(nn.Module):
    """scale * cos(angle + margin) for the person shown, scale * cos(angle) for all others.

    `margin` is in radians, 0 to pi/2. Past the angle pi - margin, where cos(angle + margin) would
    rise again, cos(angle) - margin * sin(margin) takes over; with `easy` the margin counts
    only for angles below pi/2. The margin grows linearly from 0 over the first `warmup` training
    batches: at once, it can keep small networks from learning anything. Embeddings [N, features]
    in, logits [N, people] in float32 out, under autocast too; no gradient is ever infinite.
    Deng et al., "ArcFace: additive angular margin loss for deep face recognition", 2018.

    Raises:
        ValueError: a margin out of range.
    """

    batches: Tensor

    def __init__(
        self,
        features: int,
        people: int,
        *,
        scale: float = 30.0,
        margin: float = 0.3,
        easy: bool = False,
        warmup: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= margin <= math.pi / 2:
            raise ValueError(f"ArcFaceHead: margin: expected 0 to pi/2 radians, got {margin}")
        self.scale = scale
        self.margin = margin
        self.easy = easy
        self.warmup = warmup
        self.weight = nn.Parameter(torch.empty(people, features))
        # Of the state, so that a run that goes on keeps its margin.
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Logits [N, people]; `labels` [N] say who is shown."""
        margin = self.margin
        if self.training and self.warmup:
            self.batches += 1
            margin *= min(1.0, int(self.batches) / self.warmup)
        with torch.autocast(embeddings.device.type, enabled=False):
            cos = cosines(_at_least_float32(embeddings), self.weight)
            own = cos.gather(1, labels[:, None])
            shifted = add_margin(own, margin, self.easy)
            return self.scale * cos.scatter(1, labels[:, None], shifted)

    def extra_repr(self) -> str:
        """The sizes, the scale and the margin."""
        people, features = self.weight.shape
        return f"{features}, {people}, scale={self.scale}, margin={self.margin}, easy={self.easy}"


def cosines(embeddings: Tensor, weights: Tensor) -> Tensor:
    """Cosine [N, people] of the angle between each row of [N, features] and of [people, features].

    Rounding never takes it out of -1 to 1.
    """
    cos = F.normalize(embeddings) @ F.normalize(weights).t()
    return cos.clamp(-1.0, 1.0)


def add_margin(cos: Tensor, margin: float, easy: bool = False) -> Tensor:
    """cos(angle + margin) from cos(angle), falling in the angle all the way from 0 to pi."""
    sin = (1.0 - cos * cos).clamp_min(_LEAST).sqrt()
    shifted = cos * math.cos(margin) - sin * math.sin(margin)
    if easy:
        return torch.where(cos > 0, shifted, cos)
    beyond = cos - margin * math.sin(margin)
    return torch.where(cos > -math.cos(margin), shifted, beyond)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
