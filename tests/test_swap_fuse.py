"""Fusing neighbours in forwards: what is found, and that it computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_models import CASES, Basic, Yolo, blocks, fill, images
from torch import Tensor, nn

import gdfast
from gdfast import ops
from gdfast.nn import norm, pool

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

Calls = list[tuple[str, str | None, bool]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The operations that were called, with activation and whether there was a residual."""
    seen: Calls = []

    def spy(name: str) -> Callable[..., Any]:
        operation = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            has_residual = name == "batch_norm_act" and args[5] is not None
            seen.append((name, kwargs.get("activation"), has_residual))
            return operation(*args, **kwargs)

        return call

    for name in ("batch_norm_act", "conv2d_act", "max_pool2d", "conv2d_relu_max_pool2d"):
        monkeypatch.setattr(ops, name, spy(name))
    known = norm.unit

    def spy_unit(tensors: Any, geometry: Any, settings: Any, takes_moments: bool) -> Any:
        found = known(tensors, geometry, settings, takes_moments)
        if found is not None:
            seen.append(("batch_norm_act", settings[2], tensors[-1] is not None))
        return found

    monkeypatch.setattr(norm, "unit", spy_unit)

    def spy_planned(name: str, find: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found = find(*args)
            if found is not None:
                seen.append((name, None, False))
            return found

        return call

    for finder, name in (
        ("planned_conv_pool", "conv2d_relu_max_pool2d"), ("planned_max_pool2d", "max_pool2d"),
    ):  # fmt: skip
        monkeypatch.setattr(pool, finder, spy_planned(name, getattr(pool, finder)))
    return seen


def run(model: nn.Module, batch: Tensor) -> list[Any]:
    """Output, gradients of batch and parameters, and buffers after a pass both ways."""
    batch = batch.clone().requires_grad_()
    output = model(batch)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(
        (output.double() * weights).sum(), [batch, *model.parameters()], allow_unused=True
    )
    return [output, *gradients, *(buffer.clone() for buffer in model.buffers())]


def assert_same(ours: nn.Module, native: nn.Module, batch: Tensor) -> None:
    tolerance = 1e-4 if batch.dtype == torch.float32 else 1e-9
    for mine, theirs in zip(run(ours, batch), run(native, batch), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def pair(build: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    native = fill(build()).double()
    ours = copy.deepcopy(native)
    return ours, native, gdfast.swap_(ours, fuse=True, **options)


def rows(report: Any) -> list[tuple[str, list[str], str]]:
    return [(row.name, row.parts, row.op) for row in report.fused]


def reasons(report: Any) -> dict[str, str]:
    return {row.name: row.reason for row in report.skipped}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_fuses_and_computes_the_same(case: str, training: bool, calls: Calls) -> None:
    build, expected = CASES[case]
    ours, native, report = pair(build)
    assert rows(report) == expected
    assert report.skipped == []
    for model in (ours, native):
        model.train(training)
    assert_same(ours, native, images())
    fused = [op for _, _, op in expected if op != "linear"]
    assert len(calls) == sum("without gradients" not in op for op in fused)
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), native(images()))
    assert len(calls) == len(fused)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "torch.relu": (torch.relu, "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "F.relu": (F.relu, "relu"),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), "relu"),
    "F.relu_": (F.relu_, "relu"),
    "relu": (lambda x: x.relu(), "relu"),
    "relu_": (lambda x: x.relu_(), "relu"),
    "F.relu6": (lambda x: F.relu6(x, True), "relu6"),
    "F.leaky_relu": (F.leaky_relu, "leaky_relu"),
    "F.leaky_relu by place": (lambda x: F.leaky_relu(x, 0.25, True), "leaky_relu"),
    "F.leaky_relu_": (lambda x: F.leaky_relu_(x, negative_slope=0.5), "leaky_relu"),
    "F.silu": (lambda x: F.silu(x, inplace=True), "silu"),
}
ADDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda a, b: a + b,
    "+ turned": lambda a, b: b + a,
    "+=": lambda a, b: a.__iadd__(b),
    "torch.add": torch.add,
    "torch.add with alpha": lambda a, b: torch.add(b, a, alpha=1),
    "add": lambda a, b: a.add(b),
    "add_": lambda a, b: a.add_(b),
}


class Written(nn.Module):
    """A norm and what `function` makes of it and of the input."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 1)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.norm(self.conv(x)), x)


@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_spellings_of_activations(spelling: str, calls: Calls) -> None:
    function, name = ACTIVATIONS[spelling]
    ours, native, report = pair(lambda: Written(lambda y, x: function(y)))
    assert [row.op for row in report.fused] == [f"batch_norm_act({name})"]
    assert_same(ours, native, images())
    assert calls == [("batch_norm_act", name, False)]


@pytest.mark.parametrize("spelling", ADDITIONS)
def test_spellings_of_addition(spelling: str, calls: Calls) -> None:
    function = ADDITIONS[spelling]
    ours, native, report = pair(lambda: Written(lambda y, x: function(y, x).relu()))
    assert [row.op for row in report.fused] == ["batch_norm_act(residual, relu)"]
    assert_same(ours, native, images())
    assert calls == [("batch_norm_act", "relu", True)]


UNFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "the norm has another user": lambda y, x: torch.relu(y) + y,
    "alpha": lambda y, x: torch.relu(torch.add(y, x, alpha=2)) * y.mean(),
    "twice the same": lambda y, x: (y + y) * y.mean(),
    "a number": lambda y, x: y + 1,
    "another activation": lambda y, x: torch.tanh(y),
    "added in place to another": lambda y, x: (x * 1).add_(y),
    "given back beside": lambda y, x: y.relu() * y.detach(),
}


@pytest.mark.parametrize("what", UNFUSED)
def test_only_the_norm_is_fused_where(what: str, calls: Calls) -> None:
    ours, native, report = pair(lambda: Written(UNFUSED[what]))
    assert rows(report) == [("", ["norm"], "batch_norm_act")]
    assert_same(ours, native, images())
    assert calls == [("batch_norm_act", "none", False)]


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 12), ()])
def test_a_residual_of_another_shape(shape: tuple[int, ...]) -> None:
    other = torch.randn(shape, dtype=torch.float64)

    class Broadcast(Written):
        def __init__(self) -> None:
            super().__init__(lambda y, x: torch.relu(y + self.other))
            self.register_buffer("other", other)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)) + self.other)

    ours, native, report = pair(Broadcast)
    assert [row.op for row in report.fused] == ["batch_norm_act(residual, relu)"]
    assert_same(ours, native, images())


def test_what_is_changed_in_between_is_seen() -> None:
    class Mutates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.norm(x)
            x.mul_(2)
            return torch.relu(y + x)

    ours, native, report = pair(Mutates)
    assert rows(report) == [("", ["norm"], "batch_norm_act")]
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), native(images()))


def test_what_a_forward_writes_to_its_argument_stays_written() -> None:
    class Adds(Basic):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.bn1(self.conv1(x)))
            x += y.mean()
            return y

    ours, native, report = pair(lambda: Adds(3, 3))
    assert len(report.fused) == 2  # bn1 with relu, bn2 alone
    batches = images(), images()
    with torch.no_grad():
        torch.testing.assert_close(ours(batches[0]), native(batches[1]))
    torch.testing.assert_close(batches[0], batches[1])
    assert not torch.equal(batches[0], images())


def test_a_model_without_convolutions_that_is_fused_is_no_warning() -> None:
    model = nn.BatchNorm2d(3)
    report = gdfast.swap_(model, fuse=True)
    assert rows(report) == [("", ["BatchNorm2d"], "batch_norm_act")]


class TestVerify:
    @pytest.mark.parametrize("case", CASES)
    def test_finds_errors_of_every_group(self, case: str) -> None:
        model = fill(CASES[case][0]())
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        report = gdfast.swap_(model, fuse=True, verify=images(torch.float32))
        torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
        assert not any(module._forward_hooks for module in model.modules())
        for row in report.fused:
            assert row.op.startswith("batch_norm") == ("running_var" in row.errors)
            assert "output" in row.errors or row.name.startswith("0.conv") or row.op == "max_pool2d"
            assert all(0 <= error < 1e-4 for error in row.errors.values()), row
        assert any(row.errors for row in report.fused)

    def test_finds_a_wrong_operation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = ops.batch_norm_act

        def wrong(*args: Any, activation: str, **kwargs: Any) -> Tensor:
            output = right(*args, activation=activation, **kwargs)
            return output * 1.01 if activation == "leaky_relu" else output

        monkeypatch.setattr(ops, "batch_norm_act", wrong)
        monkeypatch.setattr(norm, "unit", lambda *_: None)
        model = nn.Sequential(nn.BatchNorm2d(3), Yolo()).eval()
        report = gdfast.swap_(model, fuse=True, verify=images(torch.float32))
        errors = [row.errors["output"] for row in report.fused]
        assert errors[0] < 1e-5 and errors[1] == pytest.approx(0.01, rel=0.01)

    def test_a_failure_leaves_the_model_native(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: Any, **__: Any) -> Tensor:
            raise KeyError("ours")

        monkeypatch.setattr(ops, "batch_norm_act", fails)
        model = blocks()
        with pytest.raises(KeyError, match="ours"):
            gdfast.swap_(model, fuse=True, verify=images(torch.float32))
        assert not any("forward" in vars(module) for module in model.modules())
        assert type(model[0].conv1) is nn.Conv2d
