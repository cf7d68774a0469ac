"""Cross entropy: within twice native's error of float64, its gradients, and what goes to native."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast.backends import cross_entropy as kernels
from gdfast.losses import cross_entropy

pytestmark = pytest.mark.usefixtures("compiled_cpu")

SETTINGS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"reduction": "sum", "label_smoothing": 1.0},
    {"ignore_index": 2},
    {"ignore_index": 2, "label_smoothing": 0.3},
]


def both(N: int = 33, C: int = 7, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    return scale * torch.randn(N, C), torch.randint(C, (N,))


def results(function: Any, logits: Tensor, target: Tensor, **settings: Any) -> list[Tensor]:
    logits = logits.detach().requires_grad_()
    loss = function(logits, target, **settings)
    (gradient,) = torch.autograd.grad(1.7 * loss, logits)
    return [loss.detach(), gradient]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (33, 7), (64, 10), (8, 1000)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_it_is_as_exact_as_native(
    size: tuple[int, int], scale: float, settings: dict[str, Any]
) -> None:
    logits, target = both(*size, scale)
    target[0] = min(1, size[1] - 1)  # one that counts
    assert kernels.fits(logits, target)
    expected = results(F.cross_entropy, logits.double(), target, **settings)
    native = results(F.cross_entropy, logits, target, **settings)
    ours = results(cross_entropy, logits, target, **settings)
    for value, other, exact in zip(ours, native, expected, strict=True):
        assert value.dtype == torch.float32 and value.shape == exact.shape
        error, allowed = ((x.double() - exact).norm() for x in (value, other))
        eps = torch.finfo(torch.float32).eps
        assert error <= 2 * allowed + 2 * eps * exact.norm() + 1e-7 * eps


def test_rows_with_gaps() -> None:
    logits, target = both(9, 12)
    rows = logits[:, 2:9]
    assert kernels.fits(rows, target)
    for value, other in zip(
        results(cross_entropy, rows, target % 7), results(F.cross_entropy, rows, target % 7),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(value, other)


def test_values_that_are_not_finite() -> None:
    logits, target = both(6, 4)
    target[:] = torch.tensor([0, 1, 2, 3, 0, 1])
    logits[0, 1] = float("nan")
    logits[1, 0] = float("-inf")
    logits[2, 2] = float("-inf")
    logits[3, 3] = float("inf")
    logits[4] = float("-inf")
    for settings in ({"reduction": "sum"}, {}):
        for row in range(6):
            given = logits[row : row + 1], target[row : row + 1]
            ours, native = (
                results(f, *given, **settings) for f in (cross_entropy, F.cross_entropy)
            )
            for value, other in zip(ours, native, strict=True):
                torch.testing.assert_close(value, other, equal_nan=True)


def test_where_every_row_is_ignored() -> None:
    logits, target = both(3, 4)
    target[:] = -100
    for value, other in zip(
        results(cross_entropy, logits, target), results(F.cross_entropy, logits, target),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(value, other, equal_nan=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_of_gradients(settings: dict[str, Any]) -> None:
    logits, target = both(5, 4)
    found = []
    for function in (cross_entropy, F.cross_entropy):
        x = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, target, **settings), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        found.append((gradient, second))
    for value, other in zip(*found, strict=True):
        torch.testing.assert_close(value, other)


def test_a_class_that_there_is_not() -> None:
    logits, target = both(5, 4)
    for wrong in (4, -1):
        target[3] = wrong
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            cross_entropy(logits, target)


def test_it_can_be_used_twice_and_without_a_graph() -> None:
    logits, target = both()
    x = logits.clone().requires_grad_()
    loss = cross_entropy(x, target)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)
    with torch.no_grad():
        assert torch.equal(cross_entropy(x, target), loss)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss = cross_entropy(x * 1, target)
        target.add_(0)
        loss.backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: ((x.double(), y), {}),
        lambda x, y: ((x, y), {"reduction": "none"}),
        lambda x, y: ((x, y), {"weight": torch.rand(7)}),
        lambda x, y: ((x, x.softmax(1)), {}),
        lambda x, y: ((x[0], y[0]), {}),
        lambda x, y: ((x.T[None], y[None]), {}),
        lambda x, y: ((x[:0], y[:0]), {}),
        lambda x, y: ((torch.randn(300, 33), torch.randint(33, (300,))), {}),
        lambda x, y: ((x.t().contiguous().t(), y), {}),
    ],
)
def test_other_calls_are_native(change: Any) -> None:
    given, settings = change(*both())
    value, expected = cross_entropy(*given, **settings), F.cross_entropy(*given, **settings)
    assert torch.equal(value, expected) or (value.isnan() and expected.isnan())


def test_errors_are_those_of_native() -> None:
    logits, target = both()
    for error, call in (
        (ValueError, lambda f: f(logits, target, reduction="most")),
        (ValueError, lambda f: f(logits, target[:3])),
        (RuntimeError, lambda f: f(logits, target, label_smoothing=2.0)),
    ):
        messages = []
        for function in (cross_entropy, F.cross_entropy):
            with pytest.raises(error) as caught:
                call(function)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_transforms_and_compiled_code() -> None:
    logits, target = both()
    gradient = torch.func.grad(cross_entropy)(logits, target)
    torch.testing.assert_close(gradient, torch.func.grad(F.cross_entropy)(logits, target))
    compiled = torch.compile(cross_entropy, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), F.cross_entropy(logits, target))
