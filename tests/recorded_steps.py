"""What tests of recorded steps need: small models, their training, and its comparison."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdfast
from gdfast import GraphedStep, models, optim

Batch = tuple[Tensor, ...]
SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
sgd = partial(optim.SGD, **SETTINGS)


@pytest.fixture(autouse=True)
def refusals_fail() -> Any:
    """A step that is not recorded, where a test doesn't expect it, fails."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GraphedStep: the step cannot be recorded")
        yield


def ordinary(model: nn.Module, criterion: Any, optimizer: Any, batch: Batch, amp: Any) -> Tensor:
    images, *targets = batch
    optimizer.zero_grad()
    with torch.autocast("cpu", amp, enabled=amp is not None, cache_enabled=False):
        loss = criterion(model(images), *targets)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    graphed: bool, model: nn.Module, given: list[Batch], *, criterion: Any = F.cross_entropy,
    make: Callable[..., Any] = sgd, change: Callable[..., None] = lambda *_: None, amp: Any = None,
) -> tuple[list[float], list[Tensor], Any]:  # fmt: skip
    """Losses, everything that training changes, and the GraphedStep."""
    model = copy.deepcopy(model)
    optimizer = make(model.parameters())
    step = GraphedStep(model, criterion, optimizer, warmup=2, autocast=amp)
    given = copy.deepcopy(given)
    torch.manual_seed(1)
    losses = []
    for index, batch in enumerate(given):
        change(index, model, optimizer)
        if graphed:
            losses.append(step(*batch).item())
        else:
            losses.append(ordinary(model, criterion, optimizer, batch, amp).item())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    state = [x for each in optimizer.state.values() for x in each.values()]
    tensors = [*model.state_dict().values(), *grads, *filter(torch.is_tensor, state)]
    return losses, [torch.rand(1), *tensors], step


def assert_bitwise(
    model: nn.Module, given: list[Batch], graphs: int = 1, **how: Any
) -> GraphedStep:
    """Trains by ordinary steps and by recorded ones: all bits are the same."""
    expected, state, _ = train(False, model, given, **how)
    losses, recorded_state, step = train(True, model, given, **how)
    assert losses == expected
    assert len(state) == len(recorded_state)
    for value, other in zip(recorded_state, state, strict=True):
        assert torch.equal(value, other)
    assert step.graphs == graphs
    return step


def batches(count: int, *size: int, classes: int = 10, layout: Any = None) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(size, generator=generator) for _ in range(count)]
    if layout is not None:
        images = [x.to(memory_format=layout) for x in images]
    labels = torch.randint(classes, (count, size[0]), generator=generator)
    return list(zip(images, labels, strict=True))


def small_resnet() -> nn.Module:
    return models.create("resnet20", num_classes=10, in_channels=3)


def small_model(*between: nn.Module) -> nn.Module:
    return nn.Sequential(
        gdfast.nn.Conv2d(3, 8, 3, padding=1), gdfast.nn.BatchNorm2d(8), nn.ReLU(), *between,
        gdfast.nn.MaxPool2d(2), nn.Flatten(), gdfast.nn.Linear(8 * 4 * 4, 10),
    )  # fmt: skip


SMALL = (4, 3, 8, 8)


def first_loss(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores, labels)
