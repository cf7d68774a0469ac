"""The optimizer of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn, optim

from gdfast.train.recipe import Recipe


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """A model's parameters: those that decay, and biases and norms, which do not.

    A bias or a norm's scale has one dimension. To draw these to zero would not make the function
    simpler, only shifted.
    """
    parameters = [each for each in model.parameters() if each.requires_grad]
    if not weight_decay:
        return [{"params": parameters}]
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": weight_decay},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create(
    make: Callable[..., optim.Optimizer], model: nn.Module, recipe: Recipe
) -> optim.Optimizer:
    """SGD of the class `make` (ours, or PyTorch's own) as the recipe wants it."""
    return make(
        parameter_groups(model, recipe.weight_decay),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
    )
