"""What ops.conv2d knows of a layer that has run before: the same results, and no other case's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import gdfast
from gdfast import backends, ops
from gdfast.ops import conv2d_dispatch, conv2d_planned

pytestmark = pytest.mark.usefixtures("fresh_registry", "compiled_cpu")

KNOWN = "PlannedFunctionBackward"
SETTINGS = {"stride": (2, 1), "padding": (1, 0)}


@pytest.fixture(autouse=True)
def unknown() -> None:
    conv2d_dispatch.forget_kernels()


def tensors(
    needs: tuple[bool, ...] = (True, True, True), channels_last: bool = False
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 8, 9, 7), (6, 8, 3, 2), (6,)
    made = [torch.randn(size, generator=generator) for size in sizes]
    if channels_last:
        made[:2] = [each.to(memory_format=torch.channels_last) for each in made[:2]]
    return [each.requires_grad_(need) for each, need in zip(made, needs, strict=True)]


def conv(*arguments: Tensor, backend: str = "cpu") -> Tensor:
    return ops.conv2d(*arguments, **SETTINGS, backend=backend)


def step(arguments: list[Tensor], convolve: Callable[..., Tensor] = conv) -> list[Tensor]:
    output = convolve(*arguments)
    wanted = [each for each in arguments if each.requires_grad]
    return [output, *torch.autograd.grad(output.sin().sum(), wanted)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("needs", [n for n in product([True, False], repeat=3) if any(n)])
def test_the_same_as_at_first_by_less(
    needs: tuple[bool, ...], channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = tensors(needs, channels_last)
    first = step(arguments)
    second = step(arguments)
    assert second[0].grad_fn.name() == KNOWN

    def forgotten(*_: Any) -> Any:
        raise AssertionError("these kernels are known")

    if needs[1] or not needs[2]:  # else the bias's gradient is a sum, by no kernel of ours
        monkeypatch.setattr(conv2d_planned, "conv_gradients", forgotten)
    assert equal(second, first) and equal(step(arguments), first)
    with torch.no_grad():
        assert torch.equal(conv(*arguments), first[0])


def test_another_layer_is_another() -> None:
    arguments = tensors()
    for _ in range(3):
        step(arguments)
    native = step(arguments, lambda *each: F.conv2d(*each, padding=1, stride=2))
    ours = step(arguments, lambda *each: ops.conv2d(*each, padding=1, stride=2, backend="cpu"))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, native, strict=True))
    assert ours[0].shape == native[0].shape
    for wrong in ({"stride": (2.0, 1.0)}, {"padding": "1"}, {"groups": 3}):
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            ops.conv2d(*arguments, **{**SETTINGS, **wrong}, backend="cpu")


def test_gradients_in_another_layout_find_their_own_kernels() -> None:
    arguments = tensors()
    for _ in range(2):
        output = conv(*arguments)
        for layout in (torch.contiguous_format, torch.channels_last):
            grad = output.detach().cos().contiguous(memory_format=layout)
            ours = torch.autograd.grad(output, arguments, grad, retain_graph=True)
            native = torch.autograd.grad(F.conv2d(*arguments, **SETTINGS), arguments, grad)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, native, strict=True))
        ours = torch.autograd.grad(output.sum(), arguments)  # strides of 0
        native = torch.autograd.grad(F.conv2d(*arguments, **SETTINGS).sum(), arguments)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, native, strict=True))


def test_gradients_of_gradients_and_graphs_of_their_own() -> None:
    arguments = [each.detach().double().requires_grad_() for each in tensors()]
    for _ in range(3):
        step(arguments)

    def second_order(convolve: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(convolve(*arguments).pow(3).sum(), arguments, create_graph=True)
        return torch.autograd.grad(sum(grad.sin().sum() for grad in grads), arguments)

    native = second_order(lambda *each: F.conv2d(*each, **SETTINGS))
    for ours, theirs in zip(second_order(conv), native, strict=True):
        assert torch.allclose(ours, theirs)


def test_errors_are_natively_those_of_autograd() -> None:
    arguments = tensors()
    for _ in range(3):
        step(arguments)
    output = conv(*arguments)
    with torch.no_grad():
        arguments[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output = conv(*arguments)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


@pytest.mark.filterwarnings("ignore:conv2d. running on native:gdfast.errors.FallbackWarning")
def test_what_looks_at_operations_sees_them() -> None:
    arguments = tensors()
    for _ in range(3):
        step(arguments)
    with FlopCounterMode(display=False) as counter:
        step(arguments)
    with FlopCounterMode(display=False) as natively:
        step(arguments, lambda *each: F.conv2d(*each, **SETTINGS))
    assert counter.get_total_flops() == natively.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(*arguments).dtype == torch.bfloat16
    auto = {**SETTINGS, "backend": "auto"}
    ops.conv2d(*arguments, **auto)
    batched = torch.func.vmap(lambda image: ops.conv2d(image[None], *arguments[1:], **auto)[0])
    assert torch.allclose(batched(arguments[0]), conv(*arguments), atol=1e-5)


def test_packed_tensors_may_come_back_in_another_layout() -> None:
    arguments = tensors()
    first = step(arguments)
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each: each, lambda each: each.detach().to(memory_format=torch.channels_last)
        ):
            again = step(arguments)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(again, first, strict=True))


def test_the_situation_decides_anew() -> None:
    wide = [torch.randn(2, 16, 20, 20), torch.randn(16, 16, 3, 3)]
    wide = [each.requires_grad_() for each in wide]

    def run(*each: Tensor) -> Tensor:
        return ops.conv2d(*each, padding=1, backend="cpu")

    with gdfast.precision("strict"):
        strict = step(wide, run)
    with gdfast.autotune("off"):
        fast = [step(wide, run) for _ in range(3)]
        assert not equal(strict, fast[0]) and all(equal(each, fast[0]) for each in fast)
        with gdfast.precision("strict"):
            assert equal(step(wide, run), strict)


def test_the_backend_of_the_backward_is_the_process_s() -> None:
    arguments = tensors()
    auto = lambda *each: conv(*each, backend="auto")  # noqa: E731
    for _ in range(3):
        step(arguments, auto)
    output = auto(*arguments)
    with backends.backend("reference"):
        ours = torch.autograd.grad(output.sum(), arguments)
        native = torch.autograd.grad(F.conv2d(*arguments, **SETTINGS).sum(), arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, native, strict=True))


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv2d_dispatch, "KERNELS_LIMIT", 4)
    weight = torch.randn(2, 2, 3, 3)
    for size in range(5, 20):
        ops.conv2d(torch.randn(1, 2, size, size), weight, backend="cpu")
        assert 0 < len(conv2d_dispatch.units) <= 4
    conv2d_dispatch.forget_kernels()
    assert not conv2d_dispatch.units
