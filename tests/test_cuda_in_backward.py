"""`SGD(in_backward=True)` on CUDA kernels: weights updated in the last pass of their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optim import LR, every_setting
from torch import Tensor, nn

import gdfast
from gdfast import native, optim
from gdfast.backends import cuda, cuda_conv2d, cuda_grad_weight

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "by_cuda_alone"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

HALF_TYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def no_gradient_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("memory for a gradient was asked for")

    monkeypatch.setattr(cuda_grad_weight.GradWeight, "empty_weight", refuse)


def run_in(tile: Callable[[str, Any], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chooses the tile of each operation and query."""
    monkeypatch.setattr(cuda, "algorithm", tile)
    monkeypatch.setattr(cuda, "candidates", lambda op, query: (tile(op, query),))


def split_in(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_conv2d, "splits", lambda query, tile: parts)


def network(device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With and without bias, groups, an activation in the kernel; images of few channels."""
    torch.manual_seed(1)
    conv = gdfast.nn.Conv2d
    model = nn.Sequential(
        conv(3, 8, 3, padding=1, bias=False), nn.ReLU(), conv(8, 12, 3, (2, 1), groups=2),
        gdfast.nn.ConvAct(12, 9, (1, 2)), conv(9, 5, 2, bias=False), nn.Flatten(),
        nn.Linear(20, 4),
    )  # fmt: skip
    return model.to(device, dtype)


CONVOLUTIONS = [(5, 9, 2, 2), (9, 12, 1, 2), (12, 4, 3, 3), (8, 3, 3, 3)]  # in backward's order


def batch(number: int, like: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    images = torch.randn(5, 3, 7, 6, generator=generator).to(like.device, like.dtype)
    return images, torch.randint(4, (5,), generator=generator).to(like.device)


def backward(model: nn.Module, number: int, **options: Any) -> None:
    images, labels = batch(number, next(model.parameters()))
    nn.functional.cross_entropy(model(images), labels).backward(**options)


def train(model: nn.Module, steps: int = 3, **settings: Any) -> list[Tensor]:
    """The parameters and all that the optimizer keeps, after some steps."""
    optimizer = optim.SGD(model.parameters(), **{"lr": LR, **settings})
    for number in range(steps):
        optimizer.zero_grad()
        backward(model, number)
        if settings.get("in_backward"):
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    state = [optimizer.state[p][name] for p in model.parameters() for name in optimizer.state[p]]
    return [*(p.detach() for p in model.parameters()), *state]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for mine, right in zip(ours, expected, strict=True):
        assert mine.stride() == right.stride() and torch.equal(mine, right)


@pytest.mark.parametrize("parts", [1, 2])
@every_setting
def test_weights_are_bitwise_those_of_the_ordinary_optimizer(
    settings: dict[str, Any], parts: int, updates: list[Any], cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    split_in(parts, monkeypatch)
    expected = train(network(cuda_device), **settings)
    assert not updates
    assert_equal(train(network(cuda_device), in_backward=True, **settings), expected)
    assert updates == CONVOLUTIONS * 3


def test_no_gradient_is_stored(no_gradient_of_a_weight: None, cuda_device: torch.device) -> None:
    train(network(cuda_device), 2, in_backward=True, momentum=0.9)
    with pytest.raises(AssertionError, match="memory for a gradient"):
        train(network(cuda_device), 1)


def test_float64_and_channels_last(updates: list[Any], cuda_device: torch.device) -> None:
    for dtype, layout in (
        (torch.float64, torch.contiguous_format),
        (torch.float64, torch.channels_last),
        (torch.float32, torch.channels_last),
    ):
        models = [network(cuda_device, dtype).to(memory_format=layout) for _ in range(2)]
        expected = train(models[0], momentum=0.9, dampening=0.5)
        del updates[:]
        assert_equal(train(models[1], in_backward=True, momentum=0.9, dampening=0.5), expected)
        assert updates == CONVOLUTIONS * 3


@pytest.mark.parametrize("tile", ["128x128", "128x64", "64x64"])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_tile(
    tile: str, parts: int, updates: list[Any], thread_order: str, cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whole tiles and the edges of more, read 16 bytes at a time."""
    split_in(parts, monkeypatch)
    run_in(lambda op, query: tile, monkeypatch)
    results = []
    for fused in (False, True):
        torch.manual_seed(2)
        layer = gdfast.nn.Conv2d(32, 136, 3, groups=2, bias=False).to(cuda_device, torch.bfloat16)
        layer.to(memory_format=torch.channels_last)
        optimizer = optim.SGD(layer.parameters(), lr=2.0**-3, momentum=0.5, in_backward=fused)
        for _ in range(2):
            # Small integers: gradients are exact in bfloat16 too, so that nothing is rounded there.
            images = torch.randint(-2, 3, (2, 32, 7, 6), device=cuda_device).bfloat16()
            images = images.to(memory_format=torch.channels_last)
            (layer(images) * torch.randint(-1, 2, (136, 1, 1), device=cuda_device)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([layer.weight.detach(), optimizer.state[layer.weight]["momentum_buffer"]])
    assert_equal(*results)
    assert updates == [(136, 16, 3, 3)] * 2


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_half_types_are_updated_by_gradients_that_were_not_rounded(
    dtype: torch.dtype, autocast: bool, parts: int, updates: list[Any], cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of half types with float32 copies, and of float32 under autocast."""
    split_in(parts, monkeypatch)
    errors, results = [], []
    for fused in (False, True):
        torch.manual_seed(2)
        layer = gdfast.nn.Conv2d(8, 16, 3, bias=False)
        layer = layer.to(cuda_device, torch.float32 if autocast else dtype)
        images = torch.randn(3, 8, 7, 6, device=cuda_device).to(dtype)
        optimizer = optim.SGD(
            layer.parameters(), lr=1.0, momentum=0.9, master_weights=not autocast,
            in_backward=fused,
        )  # fmt: skip
        start = layer.weight.detach().double().requires_grad_()
        exact = nn.functional.conv2d(images.double(), start).sum()
        (gradient,) = torch.autograd.grad(exact, [start])
        with torch.autocast(cuda_device.type, dtype, enabled=autocast):
            output = layer(images)
        output.sum().backward()
        optimizer.step()
        kept = layer.weight if autocast else optimizer.state[layer.weight]["master_weight"]
        assert kept.dtype == torch.float32 and torch.equal(
            layer.weight, kept.to(layer.weight.dtype)
        )
        error = (kept.double() - (start - gradient)).abs().max() / gradient.abs().max()
        errors.append(error.item())
        results.append(kept.double())
    ordinary, ours = errors
    # What the gradient's rounding to the half type makes, and that of two sums in float32.
    half, single = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps
    allowed = half * gradient.abs() + 8 * single * gradient.abs().max()
    assert ((results[0] - results[1]).abs() <= allowed).all()
    assert ours < 8 * torch.finfo(torch.float32).eps
    assert torch.finfo(dtype).eps / 8 < ordinary < torch.finfo(dtype).eps
    assert updates == [(16, 8, 3, 3)]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("master_weights", [False, True])
def test_half_types_stay_near_the_ordinary_optimizer(
    dtype: torch.dtype, master_weights: bool, updates: list[Any], cuda_device: torch.device
) -> None:
    settings = {"momentum": 0.9, "weight_decay": 0.01, "master_weights": master_weights}
    expected = train(network(cuda_device, dtype), **settings)
    ours = train(network(cuda_device, dtype), in_backward=True, **settings)
    assert updates == CONVOLUTIONS * 3
    for mine, right in zip(ours, expected, strict=True):
        assert mine.dtype == right.dtype
        atol = 4 * torch.finfo(dtype).eps * right.abs().max().item()
        torch.testing.assert_close(mine, right, rtol=0, atol=atol)


def test_a_learning_rate_on_the_device(updates: list[Any], cuda_device: torch.device) -> None:
    lr = torch.tensor(LR, device=cuda_device)
    expected = train(network(cuda_device), lr=lr, momentum=0.9)
    assert_equal(train(network(cuda_device), lr=lr, momentum=0.9, in_backward=True), expected)
    assert updates == CONVOLUTIONS * 3


def test_the_gradient_of_the_input_comes_first(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(compiled, name)

    compiled, results = native.cuda, []
    for fused in (False, True):
        torch.manual_seed(1)
        layer = gdfast.nn.ConvAct(4, 6, 3).to(cuda_device)
        optimizer = optim.SGD(layer.parameters(), lr=100.0, in_backward=fused)
        images = torch.randn(2, 4, 5, 5, device=cuda_device, requires_grad=True)
        loss = layer(images).square().sum()
        monkeypatch.setattr(native, "cuda", Spy())
        loss.backward()
        monkeypatch.setattr(native, "cuda", compiled)
        optimizer.step()
        results.append([images.grad, *(p.detach() for p in layer.parameters())])
    assert_equal(*results)
    done = [name for name in calls if name.startswith("conv2d_grad") or name == "sgd"]
    assert done.index("conv2d_grad_input") < done.index("conv2d_grad_weight_sgd")
