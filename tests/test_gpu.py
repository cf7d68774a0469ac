"""Both GPU backends on a GPU, which this needs: side streams, several GPUs, graphs after tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gdfast
from gdfast import backends, ops, optim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_registry", "no_tf32"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture
def no_tf32() -> Any:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Any:
    """Each of ours, asked for by name."""
    reason = {each.name: each.reason for each in backends.available()}[request.param]
    if reason:
        pytest.skip(f"needs the backend {request.param}: {reason}")
    with gdfast.backend(request.param), gdfast.autotune("off"):
        yield request.param


def layers(device: str = "cuda") -> torch.nn.Sequential:
    """Every operation with a backward: a convolution, a depthwise one, a norm, a pooling."""
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 32, 3, 2, 1, groups=32, bias=False),
        torch.nn.MaxPool2d(3, 2, 1),
    )
    gdfast.swap_(made, fuse=True)
    return made.to(device).to(memory_format=torch.channels_last)


def train_step(module: torch.nn.Module, images: Tensor, optimizer: Any) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = module(images).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def after_a_step(images: Callable[[], Tensor]) -> list[Tensor]:
    """The gradients of the image and of all parameters, and the parameters after an update."""
    module = layers()
    torch.cuda.synchronize()
    input = images().requires_grad_()
    train_step(module, input, optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
    params = list(module.parameters())
    return [input.grad, *(p.grad for p in params), *(p.detach() for p in params)]


def test_all_of_a_step_is_on_the_current_stream(backend: str) -> None:
    values = torch.randn(16, 16, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    expected = after_a_step(values.clone)  # which compiles what is to be compiled
    side = torch.cuda.Stream()
    torch.cuda.synchronize()

    def late() -> Tensor:
        image = torch.zeros_like(values)
        torch.cuda._sleep(100_000_000)
        return image.add_(values)

    with torch.cuda.stream(side):
        results = after_a_step(late)
    torch.cuda.synchronize()
    # A kernel on another stream would have read zeros, or what was not yet written.
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


def test_a_convolution_is_on_the_current_stream(backend: str) -> None:
    values = torch.randint(-2, 3, (16, 32, 64, 64), device="cuda").bfloat16()
    weight = torch.randint(-1, 2, (32, 32, 3, 3), device="cuda").bfloat16()
    expected = ops.conv2d(values, weight, padding=1)
    image = torch.zeros_like(values)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        image += values
        output = ops.conv2d(image, weight, padding=1)
    torch.cuda.synchronize()
    assert expected.any() and torch.equal(output, expected)


@NEEDS_TWO
def test_tensors_on_a_gpu_that_is_not_the_current_one(backend: str) -> None:
    assert torch.cuda.current_device() == 0
    images = torch.randn(8, 16, 32, 32)
    results = []
    for device in ("cuda:0", "cuda:1"):
        module = layers(device)
        optimizer = optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        losses = [train_step(module, images.to(device), optimizer) for _ in range(3)]
        assert {loss.device for loss in losses} == {torch.device(device)}
        results.append(
            [*(v.cpu() for v in losses), *(p.detach().cpu() for p in module.parameters())]
        )
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@NEEDS_TWO
def test_two_gpus_in_turns(backend: str) -> None:
    weight = torch.randint(-1, 2, (16, 16, 3, 3)).float()
    image = torch.randint(-2, 3, (2, 16, 9, 9)).float()
    outputs = [
        ops.conv2d(image.to(device), weight.to(device), padding=1).cpu()
        for device in ("cuda:1", "cuda:0", "cuda:1")
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_step_can_be_recorded_after_its_choices_were_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDFAST_CACHE_DIR", str(tmp_path))
    layer = gdfast.nn.Conv2d(64, 64, 3, padding=1, bias=False, dtype=torch.bfloat16).cuda()
    layer.to(memory_format=torch.channels_last)
    images = torch.randn(32, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
    images = images.to(memory_format=torch.channels_last).requires_grad_()
    optimizer = optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)
    choices: dict[str, Any] = {}
    with gdfast.autotune("auto"), backends.tuning.recorded(choices) as uses:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                train_step(layer, images, optimizer)
        torch.cuda.current_stream().wait_stream(side)
        timed = [use.op for use in uses if use.choice.seconds]
        assert sorted(timed) == ["conv2d", "conv2d_grad_input", "conv2d_grad_weight"]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = train_step(layer, images, optimizer)
        assert [use.op for use in uses if use.choice.seconds] == timed
        before = layer.weight.detach().clone()
        graph.replay()
        torch.cuda.synchronize()
    assert loss.isfinite() and not torch.equal(layer.weight, before)
