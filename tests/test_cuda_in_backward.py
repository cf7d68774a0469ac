"""`SGD(in_backward=True)` on CUDA kernels: weights updated in the last pass of their gradient."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_optim import LR, every_setting
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gdfast
from gdfast import native, ops, optim
from gdfast.backends import cuda, cuda_conv2d, cuda_grad_weight
from gdfast.ops import in_backward

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "on_cuda"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

HALF_TYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def on_cuda(cuda_device: torch.device) -> Iterator[None]:
    with gdfast.backend("cuda"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    gc.collect()
    assert not in_backward.targets  # optimizers are gone, and with them what they asked for


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of weights that are updated in the last pass of their gradient."""
    shapes: list[tuple[int, ...]] = []
    update = cuda_grad_weight.BegunGradWeight.update

    def noted(begun: Any, tensors: Any, hyper: Any) -> None:
        shapes.append(tuple(tensors.params[0].shape))
        update(begun, tensors, hyper)

    monkeypatch.setattr(cuda_grad_weight.BegunGradWeight, "update", noted)
    return shapes


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
    errors = []
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
    ordinary, ours = errors
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


def twice(layer: nn.Module, images: Tensor) -> Tensor:
    return layer(layer(images).relu()).square().mean()


def regularised(layer: nn.Module, images: Tensor) -> Tensor:
    return layer(images).square().mean() + 0.1 * layer.weight.square().sum()


def in_three_ways(layer: nn.Module, images: Tensor) -> Tensor:
    seen = ops.conv2d(layer(images).relu(), layer.weight.transpose(0, 1), padding=1)
    return layer(seen).square().mean() + layer.weight.abs().sum()


def cast_twice(layer: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        return twice(layer, images).float()


def cast_by_hand(layer: nn.Module, images: Tensor) -> Tensor:
    weight = layer.weight.bfloat16()
    weight.register_hook(lambda grad: grad.clamp(max=0))
    return ops.conv2d(images.bfloat16(), weight).float().square().mean()


@pytest.mark.parametrize("loss", [twice, regularised, in_three_ways, cast_twice, cast_by_hand])
def test_a_weight_that_something_else_uses_or_sees(
    loss: Callable[..., Tensor], updates: list[Any], cuda_device: torch.device
) -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        layer = gdfast.nn.Conv2d(4, 4, 3, padding=1).to(cuda_device)
        optimizer = optim.SGD(layer.parameters(), lr=LR, momentum=0.9, in_backward=fused)
        for _ in range(3):
            optimizer.zero_grad()
            loss(layer, torch.randn(2, 4, 5, 4, device=cuda_device)).backward()
            optimizer.step()
        results.append([p.detach() for p in layer.parameters()])
    assert not updates
    if loss is in_three_ways:  # sums of three come in another order
        torch.testing.assert_close(*results)
    else:
        assert_equal(*results)


def test_a_weight_of_two_layers(updates: list[Any], cuda_device: torch.device) -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        first, second = (gdfast.nn.Conv2d(4, 4, 3, padding=1).to(cuda_device) for _ in range(2))
        second.weight = first.weight
        model = nn.Sequential(first, nn.ReLU(), second)
        optimizer = optim.SGD(model.parameters(), lr=LR, in_backward=fused)
        for _ in range(2):
            model(torch.randn(2, 4, 5, 4, device=cuda_device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    assert_equal(*results)
    assert not updates


def test_other_forward_passes_do_not_count(updates: list[Any], cuda_device: torch.device) -> None:
    results = []
    for fused in (False, True):
        model = network(cuda_device)
        optimizer = optim.SGD(model.parameters(), lr=LR, in_backward=fused)
        images, labels = batch(0, next(model.parameters()))
        with torch.no_grad():
            model(images)
        model(images)  # a graph that is thrown away
        kept = model(images)  # and one that is not used
        part = checkpoint(model, images, use_reentrant=False)
        nn.functional.cross_entropy(part, labels).backward()
        optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(*results)
    assert updates[:4] == CONVOLUTIONS


def test_a_graph_that_is_kept(updates: list[Any], cuda_device: torch.device) -> None:
    model = network(cuda_device)
    optimizer = optim.SGD(model.parameters(), lr=LR, in_backward=True)
    images, labels = batch(0, next(model.parameters()))
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_that_are_asked_for(updates: list[Any], cuda_device: torch.device) -> None:
    model = network(cuda_device)
    params = list(model.parameters())
    images, labels = batch(0, params[0])
    images.requires_grad_()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    expected = torch.autograd.grad(loss(), params)
    before = [p.detach().clone() for p in params]
    optimizer = optim.SGD(params, lr=LR, in_backward=True)
    assert_equal(list(torch.autograd.grad(loss(), params)), list(expected))
    loss().backward(inputs=[images])
    assert_equal([p.detach() for p in params], before)
    assert not updates
    loss().backward(inputs=params[:1])
    assert updates == [(8, 3, 3, 3)]
    assert torch.equal(params[0], before[0] - LR * expected[0])
    assert_equal([p.detach() for p in params[1:]], before[1:])
    optimizer.step()


def test_hooks_and_gradients_from_before(updates: list[Any], cuda_device: torch.device) -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        layers = [gdfast.nn.Conv2d(4, 4, 3, padding=1).to(cuda_device) for _ in range(2)]
        model, seen = nn.Sequential(*layers), []
        optimizer = optim.SGD(model.parameters(), lr=LR, in_backward=fused)
        layers[0].weight.register_hook(
            lambda grad, seen=seen: seen.append(grad) or grad.clamp(max=0)
        )
        layers[1].weight.grad = torch.ones_like(layers[1].weight)
        model(torch.randn(2, 4, 5, 4, device=cuda_device)).square().mean().backward()
        optimizer.step()
        assert len(seen) == 1
        results.append([p.detach() for p in model.parameters()])
    assert_equal(*results)
    assert not updates


def test_what_the_kernel_does_not_take(
    updates: list[Any], cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depthwise layers, padded channels, a momentum buffer in another layout."""
    results = []
    padded, plain = "64x64-padded", cuda.algorithm
    stem = ("conv2d", "conv2d_grad_weight")
    run_in(
        lambda op, query: padded if query.geometry.C == 3 and op in stem else plain(op, query),
        monkeypatch,
    )
    for fused in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(
            gdfast.nn.Conv2d(3, 8, 3, bias=False), gdfast.nn.Conv2d(8, 8, 3, groups=8),
            gdfast.nn.Conv2d(8, 4, 2),
        ).to(cuda_device)  # fmt: skip
        optimizer = optim.SGD(model.parameters(), lr=LR, momentum=0.9, in_backward=fused)
        last = model[2].weight
        buffer = torch.zeros_like(last, memory_format=torch.channels_last)
        optimizer.state[last]["momentum_buffer"] = buffer
        for _ in range(2):
            model(torch.randn(2, 3, 7, 6, device=cuda_device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([*(p.detach() for p in model.parameters()), buffer])
    assert_equal(*results)
    assert not updates


def test_an_empty_batch(updates: list[Any], cuda_device: torch.device) -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        layer = gdfast.nn.Conv2d(4, 4, 3, bias=False).to(cuda_device)
        optimizer = optim.SGD(layer.parameters(), lr=LR, weight_decay=0.5, in_backward=fused)
        layer(torch.randn(0, 4, 5, 4, device=cuda_device)).sum().backward()
        optimizer.step()
        results.append([layer.weight.detach()])
    assert_equal(*results)
    assert updates == [(4, 4, 3, 3)]


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("on purpose")


def test_a_backward_pass_that_fails_leaves_nothing(
    updates: list[Any], cuda_device: torch.device
) -> None:
    layer = gdfast.nn.Conv2d(4, 4, 3, padding=1).to(cuda_device)
    before = layer.weight.detach().clone()
    optimizer = optim.SGD(layer.parameters(), lr=LR, in_backward=True)
    images = torch.randn(2, 4, 5, 4, device=cuda_device)
    loss = layer(Failing.apply(layer(images))).sum()
    for _ in range(2):  # the second one finds what the first one has begun at the graph's nodes
        with pytest.raises(ValueError, match="on purpose"):
            loss.backward(retain_graph=True)
    assert torch.equal(layer.weight, before) and len(in_backward._waiting) > 0
    del loss
    gc.collect()
    assert len(in_backward._waiting) == 0
    layer(images).sum().backward()
    assert updates == [(4, 4, 3, 3)] and not torch.equal(layer.weight, before)
    optimizer.step()


def test_refusals_are_those_of_the_hooks(updates: list[Any], cuda_device: torch.device) -> None:
    model = network(cuda_device)
    optimizer = optim.SGD(model.parameters(), lr=LR, in_backward=True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="create_graph"), pytest.raises(RuntimeError) as error:
        backward(model, 0, create_graph=True)
    assert "expected create_graph=False" in str(error.value)
    handle = model[4].weight.register_post_accumulate_grad_hook(lambda _: None)
    model[6].requires_grad_(False)
    with pytest.raises(RuntimeError, match="without other post-accumulate-grad hooks"):
        backward(model, 0)
    handle.remove()
    assert_equal([p.detach() for p in model.parameters()], before)
    assert not updates
    model.zero_grad()
    optimizer.step()

    backward(model, 0)
    after = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"expected one backward before each step\(\)"):
        backward(model, 1)
    assert_equal([p.detach() for p in model.parameters()], after)
    with pytest.raises(RuntimeError, match="expected step"):
        optimizer.zero_grad()
    optimizer.grad_scale = torch.ones(())
    with pytest.raises(RuntimeError, match="expected gradients without a scale"):
        optimizer.step()


@pytest.fixture
def process_group() -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("needs torch.distributed")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_is_refused(
    process_group: None, cuda_device: torch.device
) -> None:
    layer = gdfast.nn.Conv2d(4, 4, 3, bias=False).to(cuda_device)
    parallel = nn.parallel.DistributedDataParallel(layer)
    optimizer = optim.SGD(parallel.parameters(), lr=LR, in_backward=True)
    parallel(torch.randn(2, 4, 5, 4, device=cuda_device)).sum().backward()
    with pytest.raises(RuntimeError, match="as DistributedDataParallel puts it there"):
        optimizer.step()


def test_who_watches_operators_sees_the_gradient(
    updates: list[Any], cuda_device: torch.device
) -> None:
    """As torch.compile does."""
    layer = gdfast.nn.Conv2d(4, 4, 3, bias=False).to(cuda_device)
    optimizer = optim.SGD(layer.parameters(), lr=LR, in_backward=True)
    images = torch.randn(2, 4, 5, 4, device=cuda_device)
    with FlopCounterMode(display=False) as counter:
        layer(images).sum().backward()
    optimizer.step()
    one_pass = 2 * layer.weight.numel() * 2 * 3 * 2
    assert counter.get_total_flops() == 2 * one_pass
    assert not updates


def test_an_optimizer_that_is_gone_updates_nothing(cuda_device: torch.device) -> None:
    layer = gdfast.nn.Conv2d(4, 4, 3, bias=False).to(cuda_device)
    before = layer.weight.detach().clone()
    optimizer = optim.SGD(layer.parameters(), lr=LR, in_backward=True)
    assert in_backward.targets
    del optimizer
    gc.collect()
    assert not in_backward.targets
    layer(torch.randn(2, 4, 5, 4, device=cuda_device)).sum().backward()
    assert torch.equal(layer.weight, before) and layer.weight.grad is not None
