"""Residual blocks as one node of autograd's graph: they give what their layers give one by one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gdfast
from gdfast.backends import cpu, plans
from gdfast.models.resnet import BasicBlock, Bottleneck, stage
from gdfast.nn import residual
from gdfast.ops import conv2d_dispatch

pytestmark = pytest.mark.usefixtures("fresh_registry", "compiled_cpu")


@pytest.fixture(autouse=True)
def our_kernels() -> Iterator[None]:
    with gdfast.autotune("off"):
        yield


class Inverted(torch.nn.Module):
    """As MobileNetV2's: it widens, convolves channel by channel, and narrows."""

    def __init__(self, channels: int, width: int, activation: torch.nn.Module) -> None:
        super().__init__()
        conv = partial(torch.nn.Conv2d, bias=False)
        self.convs = torch.nn.ModuleList(
            [
                conv(channels, width, 1),
                conv(width, width, 3, padding=1, groups=width),
                conv(width, channels, 1),
            ]
        )
        self.norms = torch.nn.ModuleList(
            torch.nn.BatchNorm2d(size) for size in (width, width, channels)
        )
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norms[0](self.convs[0](x)))
        y = self.act(self.norms[1](self.convs[1](y)))
        return x + self.norms[2](self.convs[2](y))


class Acted(Inverted):
    """The same with the activation behind the sum."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


BLOCKS: dict[str, Callable[[], torch.nn.Module]] = {
    "bottleneck": lambda: Bottleneck(64, 16),
    "bottleneck, stride": lambda: stage(Bottleneck, 24, 12, 1, 2)[0],
    "wide": lambda: Bottleneck(48, 12),
    "basic": lambda: BasicBlock(17, 17),
    "basic, stride": lambda: stage(BasicBlock, 9, 20, 1, 2)[0],
    "inverted": lambda: Inverted(19, 50, torch.nn.ReLU6()),
    "leaky": lambda: Acted(32, 24, torch.nn.LeakyReLU(0.1)),
    "silu": lambda: Acted(32, 48, torch.nn.SiLU()),
}
CHANNELS = {"bottleneck": 64, "bottleneck, stride": 24, "wide": 48, "basic": 17,
            "basic, stride": 9, "inverted": 19, "leaky": 32, "silu": 32}  # fmt: skip
ODD = (3, 13, 11)


@contextmanager
def by_layers() -> Iterator[None]:
    """Lets no block run as one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual, "_learn", lambda *_: None)
        patch.setattr(residual, "_known", {})
        yield


def made(name: str, size: tuple[int, int, int] = ODD, layout: Any = torch.channels_last) -> Any:
    """A block, one like it, both swapped, and a batch that needs a gradient."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    for norm in (each for each in block.modules() if isinstance(each, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    block = block.to(memory_format=layout)  # type: ignore[call-overload]
    N, H, W = size
    batch = torch.randn(N, CHANNELS[name], H, W).to(memory_format=layout).requires_grad_()
    twin = copy.deepcopy(block)
    gdfast.swap_(block, fuse=True)
    gdfast.swap_(twin, fuse=True)
    return block, twin, batch


def run(block: torch.nn.Module, batch: Tensor) -> list[Tensor]:
    """Output, gradients and statistics of a step."""
    output = block(batch)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
    weights = torch.empty_like(output).copy_(weights)
    grads = torch.autograd.grad(output, [batch, *block.parameters()], weights)
    return [output.detach(), *grads, *(each.clone() for each in block.buffers())]


def warmed(name: str, size: tuple[int, int, int] = ODD) -> Any:
    block, twin, batch = made(name, size)
    for _ in range(5):
        run(block, batch)
        with by_layers():
            run(twin, batch)
    assert is_one(block(batch))
    with by_layers():
        twin(batch)
    return block, twin, batch


def is_one(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_BlockFunctionBackward"


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert [each.stride() for each in ours] == [each.stride() for each in theirs]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("size", [ODD, (4, 34, 30)])
def test_gives_the_same_bits(name: str, size: tuple[int, int, int], layout: Any) -> None:
    block, twin, batch = made(name, size, layout)
    for _ in range(6):
        ours = run(block, batch)
        with by_layers():
            same(ours, run(twin, batch))
    assert is_one(block(batch))


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_against_float64(name: str) -> None:
    block, _, batch = warmed(name)
    exact = copy.deepcopy(block)
    gdfast.restore_(exact)
    exact.double()
    errors, expected = run(block, batch), run(exact, batch.detach().double().requires_grad_())
    for ours, theirs in zip(errors, expected, strict=True):
        error, size = (ours.double() - theirs).norm(), theirs.double().norm()
        assert error <= 2e-5 * size, (error, size)


@pytest.mark.parametrize("name", BLOCKS)
def test_float64(name: str) -> None:
    block, twin, batch = made(name)
    for each in (block, twin):
        each.double()
    gdfast.restore_(twin)
    batch = batch.detach().double().requires_grad_()
    for _ in range(5):
        torch.testing.assert_close(run(block, batch), run(twin, batch), rtol=1e-9, atol=1e-10)
    assert is_one(block(batch))


def test_a_gradient_in_another_layout() -> None:
    block, twin, batch = warmed("bottleneck")
    grads = torch.autograd.grad(block(batch).sum(), [batch, *block.parameters()])
    with by_layers():
        expected = torch.autograd.grad(twin(batch).sum(), [batch, *twin.parameters()])
    same(list(grads), list(expected))


@pytest.mark.parametrize("name", ["bottleneck, stride", "inverted"])
def test_gradients_of_gradients(name: str) -> None:
    block, twin, batch = warmed(name, (2, 5, 6))

    def second(module: torch.nn.Module) -> tuple[Tensor, ...]:
        parameters = [batch, *module.parameters()]
        output = module(batch)
        first = torch.autograd.grad(output.square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in first), batch.sum()), parameters)

    ours = second(block)
    with by_layers():
        theirs = second(twin)
    for one, other in zip(ours, theirs, strict=True):
        scale = float(other.abs().max()) + 1e-6
        torch.testing.assert_close(one / scale, other / scale, rtol=1e-3, atol=1e-3)


def test_some_gradients() -> None:
    block, twin, batch = warmed("bottleneck")
    for wanted in (lambda m: [m.conv2.weight], lambda m: [batch], lambda m: [m.bn1.bias, batch]):
        output = block(batch)
        ours = torch.autograd.grad(output, wanted(block), torch.ones_like(output))
        with by_layers():
            output = twin(batch)
            theirs = torch.autograd.grad(output, wanted(twin), torch.ones_like(output))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_graph_that_is_kept_and_batched_gradients() -> None:
    block, _, batch = warmed("basic")
    output = block(batch)
    first = torch.autograd.grad(output, [batch], torch.ones_like(output), retain_graph=True)
    again = torch.autograd.grad(output, [batch], torch.ones_like(output), retain_graph=True)
    same(list(first), list(again))
    many = torch.stack([torch.ones_like(output), torch.zeros_like(output)])
    (batched,) = torch.autograd.grad(output, [batch], many, is_grads_batched=True)
    torch.testing.assert_close(batched[0], first[0], rtol=1e-4, atol=1e-4)
    assert not batched[1].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    block, twin, batch = warmed("bottleneck")
    grads = []
    for module in (block, twin):
        output = checkpoint(module, batch, use_reentrant=reentrant)
        output.backward(torch.ones_like(output))
        grads.append([batch.grad, *(each.grad for each in module.parameters())])
        batch.grad = None
    same(*grads)


def test_other_ways_go_by_layers() -> None:
    block, _, batch = warmed("bottleneck")
    assert not is_one(block(batch.detach()))
    with torch.no_grad():
        assert block(batch).grad_fn is None
    block.eval()
    assert not is_one(block(batch))
    block.train()
    assert is_one(block(batch))
    with torch.autograd.graph.save_on_cpu():
        assert not is_one(block(batch))
    with plans.disabled():
        assert not is_one(block(batch))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_one(block(batch))
    block.conv2.weight.requires_grad_(False)
    assert not is_one(block(batch))
    block.conv2.weight.requires_grad_(True)
    for _ in range(4):
        run(block, batch)
    assert is_one(block(batch))
    seen = []
    handle = block.bn2.register_forward_hook(lambda *_: seen.append(1))
    assert not is_one(block(batch)) and seen
    handle.remove()
    assert is_one(block(batch))


def test_what_changed_is_noticed() -> None:
    block, twin, batch = warmed("bottleneck")
    for module in (block, twin):
        module.bn1.momentum = 0.3
        module.conv1.weight = torch.nn.Parameter(2 * module.conv1.weight.detach())
    for _ in range(4):
        ours = run(block, batch)
        with by_layers():
            same(ours, run(twin, batch))
    other = torch.randn(5, 64, 7, 9).to(memory_format=torch.channels_last).requires_grad_()
    for _ in range(5):
        for each in (other, batch):
            ours = run(block, each)
            with by_layers():
                same(ours, run(twin, each))


def test_an_input_that_is_written_to() -> None:
    block, _, batch = warmed("bottleneck")
    images = batch.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = block(images)
    assert is_one(output)
    with torch.no_grad():
        images.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(torch.ones_like(output))


def test_an_output_that_nobody_uses() -> None:
    block, _, batch = warmed("bottleneck")
    unused = torch.autograd.grad(batch.sum() + 0 * block(batch).detach().sum(), [batch])
    assert unused[0].eq(1).all()


def test_nothing_is_kept() -> None:
    block, twin, batch = warmed("bottleneck")
    before = len(residual._known)
    del block, twin, batch
    gc.collect()
    assert len(residual._known) < before


@pytest.mark.parametrize("sizes", [(33, 9, 11, 48, 16), (2, 40, 37, 64, 256), (1, 7, 5, 32, 9)])
def test_a_gradient_is_added(sizes: tuple[int, ...]) -> None:
    N, H, W, C, K = sizes

    def image(*size: int) -> Tensor:
        return torch.randn(size).to(memory_format=torch.channels_last)

    grad, weight, onto = image(N, K, H, W), image(K, C, 1, 1), image(N, C, H, W)
    kernel: Any = cpu.conv2d_grad_input(_query(onto, weight), "direct")
    assert kernel.adds
    draft = plans.Draft(3)
    number = kernel.draft(draft, 0, 1, 2)
    expected = kernel(grad, weight) + onto
    assert number == 2
    draft.plan([])((grad, weight, onto), 0.0, torch.get_num_threads(), 0)
    torch.testing.assert_close(onto, expected, rtol=0, atol=0)


@pytest.mark.parametrize("C, K", [(20, 32), (64, 257), (8, 64)])
def test_what_cannot_add(C: int, K: int) -> None:
    image, weight = torch.randn(2, C, 5, 5), torch.randn(K, C, 1, 1)
    query = _query(image.to(memory_format=torch.channels_last), weight)
    kernel: Any = cpu.conv2d_grad_input(query, "direct")
    assert C == 20 or not kernel.adds
    assert not cpu.conv2d_grad_input(_query(image, weight), "direct").adds  # type: ignore[attr-defined]


def _query(input: Tensor, weight: Tensor) -> Any:
    geometry = (1, 1), (0, 0, 0, 0), (1, 1), 1
    return conv2d_dispatch.conv2d_query("conv2d", input, weight, None, *geometry)
