"""A running mean of a model's weights, which generalises better than the last step's."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A second model whose weights follow those of the first, `decay` of the old at each step.

    At first the mean is shorter, so that it forgets the weights drawn at random: step n keeps
    min(decay, (1 + n) / (10 + n)). Running statistics follow like weights; counters are copied.
    After Polyak and Juditsky (1992).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.eval()
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take a step of `model` into the mean."""
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        means: list[Tensor] = []
        values: list[Tensor] = []
        theirs = model.state_dict()
        for name, mean in self.model.state_dict().items():
            if mean.is_floating_point():
                means.append(mean)
                values.append(theirs[name])
            else:
                mean.copy_(theirs[name])
        torch._foreach_lerp_(means, values, 1 - keep)

    def state_dict(self) -> dict[str, object]:
        """Tensors and plain values, for a checkpoint."""
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a checkpoint.

        Raises:
            KeyError, TypeError, RuntimeError: a state that is not of such a model.
        """
        steps, weights = state["steps"], state["model"]
        if not isinstance(steps, int) or not isinstance(weights, dict):
            raise TypeError("no mean of weights")
        self.steps = steps
        self.model.load_state_dict(weights)
