"""Weights on CUDA kernels that something else uses too, or watches, and what takes no update."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_cuda_in_backward import CONVOLUTIONS, assert_equal, backward, batch, network, run_in
from test_optim import LR
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gdfast
from gdfast import ops, optim
from gdfast.backends import cuda
from gdfast.ops import in_backward

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "by_cuda_alone"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


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
    ops.sgd_(before[0], expected[0], lr=LR)  # with the roundings of a step
    assert_equal([p.detach() for p in params], before)
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


class Halved(torch.autograd.Function):
    """What quantisation does: a function of the user's own between a weight and its layer."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.variable = weight  # a name that autograd's own nodes have too
        ctx.set_materialize_grads(False)
        return weight / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad / 2


def test_a_function_between_weight_and_layer(updates: list[Any], cuda_device: torch.device) -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        weight = torch.randn(4, 4, 3, 3, device=cuda_device, requires_grad=True)
        optimizer = optim.SGD([weight], lr=LR, in_backward=fused)
        images = torch.randn(2, 4, 5, 4, device=cuda_device)
        gdfast.ops.conv2d(images, Halved.apply(weight)).square().sum().backward()
        optimizer.step()
        results.append([weight.detach()])
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
