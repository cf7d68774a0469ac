"""Training steps as CUDA graphs, which take ordinary steps where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gdfast
from gdfast import GraphedStep, optim

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FUSED = partial(torch.optim.SGD, fused=True)
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def small_model(device: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 4 * 4, 10),
    )  # fmt: skip
    model = model.to(device).to(memory_format=torch.channels_last)
    gdfast.swap_(model, fuse=True)
    return model


def batches(count: int, device: str, N: int = 4) -> list[tuple[Tensor, Tensor]]:
    images = torch.randn(count, N, 8, 8, 8, device=device)
    return list(zip(images, torch.randint(10, (count, N), device=device), strict=True))


def ordinary(model: nn.Module, optimizer: Any, images: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def trained(
    device: str, graphed: bool, make: Callable[..., Any],
    given: list[tuple[Tensor, Tensor]], change: Callable[[Any, nn.Module, int], None],
) -> tuple[list[float], dict[str, Tensor]]:  # fmt: skip
    model = small_model(device)
    optimizer = make(model.parameters(), **SETTINGS)
    step = GraphedStep(model, F.cross_entropy, optimizer, warmup=2) if graphed else None
    losses = []
    for index, (images, labels) in enumerate(given):
        change(optimizer, model, index)
        loss = step(images, labels) if step else ordinary(model, optimizer, images, labels)
        losses.append(loss.item())
    if step and device == "cuda":
        assert step.graphs > 0
    return losses, model.state_dict()


def unchanged(optimizer: Any, model: nn.Module, index: int) -> None:
    pass


def smaller_steps(optimizer: Any, model: nn.Module, index: int) -> None:
    if index % 3 == 2:
        optimizer.param_groups[0]["lr"] = 0.1 / index


def less_momentum(optimizer: Any, model: nn.Module, index: int) -> None:
    if index == 5:
        optimizer.param_groups[0]["momentum"] = 0.5


def frozen_statistics(optimizer: Any, model: nn.Module, index: int) -> None:
    if index == 5:
        model.eval()


@pytest.mark.parametrize("change", [unchanged, smaller_steps, less_momentum, frozen_statistics])
@pytest.mark.parametrize(
    "make", [optim.SGD, partial(torch.optim.SGD, fused=True)], ids=["ours", "native"]
)
@pytest.mark.parametrize("device", DEVICES)
def test_it_trains_as_ordinary_steps_do(device: str, make: Any, change: Any) -> None:
    given = batches(10, device)
    losses, state = trained(device, True, make, given, change)
    expected, expected_state = trained(device, False, make, given, change)
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, value in state.items():
        torch.testing.assert_close(value, expected_state[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_of_several_kinds(device: str) -> None:
    given = [batch for pair in zip(batches(6, device), batches(6, device, N=3), strict=True)
             for batch in pair]  # fmt: skip
    losses, _ = trained(device, True, optim.SGD, given, unchanged)
    expected, _ = trained(device, False, optim.SGD, given, unchanged)
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_schedulers_reach_the_step(device: str) -> None:
    model = small_model(device)
    optimizer = optim.SGD(model.parameters(), **SETTINGS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.0)
    step = GraphedStep(model, F.cross_entropy, optimizer, warmup=1)
    for index, batch in enumerate(batches(8, device)):
        before = model[-1].weight.detach().clone()
        step(*batch)
        # Momentum and all: with a rate of 0 nothing moves.
        assert torch.equal(before, model[-1].weight) == (index >= 4)
        scheduler.step()


@pytest.mark.gpu
def test_gradients_are_those_of_the_last_call() -> None:
    model = small_model("cuda")
    step = GraphedStep(model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.0), warmup=1)
    given = [*batches(3, "cuda"), *batches(3, "cuda", N=2)]
    for images, labels in [*given, *given]:
        step(images, labels)
        (expected,) = torch.autograd.grad(F.cross_entropy(model(images), labels), [model[-1].bias])
        torch.testing.assert_close(model[-1].bias.grad, expected, rtol=1e-3, atol=1e-5)
        model.zero_grad()
    assert step.graphs == 2


WAITS = """
import torch
from test_graphs import F, GraphedStep, batches, optim, small_model

def criterion(scores, labels):
    loss = F.cross_entropy(scores, labels)
    assert loss.item() > 0
    return loss

model = small_model("cuda")
step = GraphedStep(model, criterion, optim.SGD(model.parameters(), lr=0.1), warmup=1)
first, second = batches(2, "cuda")
step(*first)
try:
    step(*second)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_told_of() -> None:
    # In a process of its own: after it, CUDA's random numbers are broken.
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", WAITS], capture_output=True, text=True, cwd=folder, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)])},
    )  # fmt: skip
    assert "the step cannot be recorded as a CUDA graph" in result.stdout, result.stderr


def test_what_it_does_not_take() -> None:
    with pytest.raises(ValueError, match="parameters of one device, got cpu, meta"):
        params = [nn.Parameter(torch.zeros(1, device=device)) for device in ("cpu", "meta")]
        GraphedStep(nn.ReLU(), F.cross_entropy, torch.optim.SGD(params, lr=0.1))
