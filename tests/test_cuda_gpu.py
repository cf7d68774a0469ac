"""The CUDA kernels together on a GPU, which this needs: models, streams, graphs, repeated bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_training import check_training
from test_cuda_conv2d import check, passes, tensors_of
from test_models import TRAINED
from torch import Tensor

import gdfast
from gdfast import native, ops, optim
from gdfast.bench.cases import RESNET50, Conv2dCase
from gdfast.ops.ordinary import are_ordinary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        native.cuda is None or native.cuda_is_simulated,
        reason=f"needs gdfast._cuda: {native.failure('cuda') or 'simulated'}",
    ),
    pytest.mark.usefixtures("fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


@pytest.fixture(autouse=True)
def no_tf32() -> Any:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield


def test_ordinary_tensors_spare_the_dispatcher() -> None:
    tensor = torch.randn(2, 2, device="cuda")
    assert are_ordinary(tensor, None, torch.nn.Parameter(tensor), tensor.t())
    assert not are_ordinary(torch.view_as_complex(tensor).conj().imag)  # negated


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_models_under_auto(name: str) -> None:
    torch.manual_seed(0)
    model = gdfast.models.create(name, num_classes=10)
    size = (64, 1, 28, 28) if name == "cnn" else (8, 3, 32, 32)
    images, labels = torch.randn(size, device="cuda"), torch.arange(size[0], device="cuda") % 10
    natives = copy.deepcopy(model).cuda()
    gdfast.restore_(natives)
    gdfast.swap_(model.cuda(), fuse=True)
    results = []
    for each in (model, natives):
        loss = F.cross_entropy(each(images), labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(each.parameters()))[-2:]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_gradients_of_an_activation_stay_on_the_gpu(activation: str) -> None:
    input, weight = (torch.randn(4, 4, size, size, device="cuda") for size in (8, 3))
    results = []
    for backend in ("cuda", "reference"):
        leaves = [x.detach().requires_grad_() for x in (input, weight)]
        output = ops.conv2d_act(*leaves, activation=activation, backend=backend)
        results.append(torch.autograd.grad(output.square().sum(), leaves))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", RESNET50, ids=str)
def test_layers_of_resnet50(case: Conv2dCase) -> None:
    case = case.with_batch(2)
    values = tensors_of(case, torch.bfloat16, True, torch.device("cuda"))
    check(case, values, passes(case, values, "cuda"))


@pytest.mark.parametrize("name", TRAINED)
def test_models_train_as_natively(name: str) -> None:
    check_training(name, "cuda", ("NCHW", "channels_last"))


def layers() -> torch.nn.Sequential:
    """A block of MobileNet's and a pooling: every kernel that is bound by memory."""
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        torch.nn.Conv2d(32, 32, 3, 2, 1, groups=32, bias=False),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(32, 32, 5, 1, 2, groups=32),
        torch.nn.MaxPool2d(3, 2, 1),
    )
    gdfast.swap_(made, fuse=True)
    return made.cuda().to(memory_format=torch.channels_last)


def gradients(module: torch.nn.Module, images: Tensor) -> list[Tensor]:
    loss = module(images).float().square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))]


def test_the_same_bits_in_every_run() -> None:
    module, images = layers(), torch.randn(16, 32, 56, 56, device="cuda")
    images = images.to(memory_format=torch.channels_last)
    with gdfast.backend("cuda"):
        first = gradients(module, images)
        for _ in range(5):
            again = gradients(module, images)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_the_current_stream_is_used() -> None:
    torch.manual_seed(0)
    values = torch.randn(64, 32, 64, 64, device="cuda")
    weight = torch.randn(32, 32, 3, 3, device="cuda")
    image = torch.zeros_like(values)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        image += values
        pooled = ops.max_pool2d(image, 2, backend="cuda")
        normalised = ops.batch_norm_act(
            image, None, None, None, None, training=True, activation="none", backend="cuda"
        )
        convolved = ops.conv2d(image, weight, padding=1, backend="cuda")
    torch.cuda.synchronize()
    assert torch.equal(pooled, F.max_pool2d(values, 2))
    torch.testing.assert_close(normalised, F.batch_norm(values, None, None, training=True))
    exact = F.conv2d(values.double(), weight.double(), padding=1)
    torch.testing.assert_close(convolved.double(), exact, rtol=1e-2, atol=1e-1)


def test_a_step_can_be_recorded_as_a_graph() -> None:
    module, images = layers(), torch.randn(4, 32, 20, 20, device="cuda")
    with gdfast.backend("cuda"), gdfast.autotune("off"):
        optimizer = optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = module(images).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        losses = []
        for _ in range(3):
            graph.replay()
            losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("recorded", [False, True])
def test_updates_in_backward_follow_streams_and_graphs(recorded: bool) -> None:
    """Weights in the last pass of their gradient, by a learning rate that changes on the GPU."""
    weights = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        conv = gdfast.nn.Conv2d
        module = torch.nn.Sequential(conv(16, 32, 3, bias=False), conv(32, 32, 3))
        module = module.cuda().to(memory_format=torch.channels_last)
        images, lr = torch.randn(4, 16, 20, 20, device="cuda"), torch.tensor(0.1, device="cuda")
        settings = {"lr": lr, "momentum": 0.9, "in_backward": in_backward}
        optimizer = optim.SGD(module.parameters(), **settings)

        def step(module: Any = module, images: Tensor = images, optimizer: Any = optimizer) -> None:
            module(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with gdfast.backend("cuda"), gdfast.autotune("off"):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000_000)  # what runs elsewhere comes too early
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            run = step
            if recorded:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                run = graph.replay
            for _ in range(3):
                lr.mul_(0.5)
                run()
        weights.append([p.detach() for p in module.parameters()])
    for ours, expected in zip(*weights, strict=True):
        assert torch.equal(ours, expected)
