"""Fusing neighbours in forwards: what is found, and that everything else stays as it was."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_models import (
    CASES,
    Article,
    Basic,
    Bottleneck,
    InvertedResidual,
    Yolo,
    blocks,
    fill,
    images,
)
from torch import Tensor, nn

import gdfast
from gdfast import ops
from gdfast.nn import norm

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


# Left alone.


class ReadsTraining(Article):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        return self.fc(F.dropout(torch.flatten(x, 1), 0.5, self.training))


class Decides(Article):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        return x if x.mean() > 0 else super().forward(x)


class Counts(Article):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(self.conv1(x))


class Appends(Article):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        self.seen.append(x)
        return x


class Draws(Article):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv1(x + torch.rand(1)))


class NoGrad(Article):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv1(x)
        return torch.relu(x)


class Checkpoints(Article):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            lambda x: torch.relu(self.conv1(x)), x, use_reentrant=False
        )


class AsksForGrad(Article):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        return x * 2 if torch.is_grad_enabled() else x


class ManyArguments(Article):
    def forward(self, *args: Tensor) -> Tensor:
        return torch.relu(self.conv1(args[0]))


class Prints(Article):
    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        return torch.relu(self.conv1(x))


class ReadsParameters(Article):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv1(x.to(next(self.parameters()).dtype)))


class AsksForTypes(Article):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        return x if type(self.fc) is nn.Linear else x * 2


ALONE: dict[type[nn.Module], str] = {
    ReadsTraining: "it reads self.training",
    Decides: "it decides by its data",
    Counts: "it sets self.calls",
    Appends: "it changes attributes",
    Draws: "it uses a tensor that is no parameter and no buffer",
    NoGrad: "it changes the gradient mode, autocast",
    Checkpoints: "it changes the gradient mode, autocast or how tensors are saved",
    AsksForGrad: "it depends on the gradient mode or on autocast",
    ManyArguments: "it takes *args",
    Prints: "it prints",
    AsksForTypes: "it asks for types",
    ReadsParameters: "it reads self._parameters",
}


@pytest.mark.parametrize("cls", ALONE)
def test_left_alone(cls: type[nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    model = cls().double()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    numbers = torch.get_rng_state()
    report = gdfast.swap_(model, lambda layer, _: type(layer) is not nn.Linear, fuse=True)
    assert report.fused == []
    assert reasons(report)[""].startswith(f"its forward stays: {ALONE[cls]}")
    for path, module in model.named_modules():
        assert vars(module) == before[path]
        assert type(module).__module__ != "gdfast.swap.trace"
    assert type(model) is cls
    assert torch.equal(torch.get_rng_state(), numbers)
    assert capsys.readouterr().out == ""
    if cls is Appends:
        assert model.seen == []


def test_layers_of_a_forward_that_stays_are_still_ours(calls: Calls) -> None:
    class Trains(Basic):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if self.training else 2)

    ours, native, report = pair(lambda: Trains(3, 3))
    assert rows(report) == [("", ["bn1"], "batch_norm_act"), ("", ["bn2"], "batch_norm_act")]
    assert_same(ours, native, images())
    assert len(calls) == 2


def test_layers_that_are_left_alone() -> None:
    class MyNorm(nn.BatchNorm2d):
        pass

    model = nn.Sequential(
        MyNorm(3), nn.ReLU(), nn.LazyBatchNorm2d(), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None), nn.BatchNorm2d(3),
        nn.MaxPool2d(2, return_indices=True),
    )  # fmt: skip
    model[4].forward = lambda x: x
    with pytest.warns(UserWarning, match="no layer was replaced"):
        report = gdfast.swap_(model, lambda module, name: name != "7", fuse=True)
    assert report.fused == []
    assert {name: reason.split(":")[0] for name, reason in reasons(report).items()} == {
        "0": "subclass of torch.nn.BatchNorm2d",
        "2": "lazy",
        "4": "its forward was replaced on the instance",
        "6": "parametrized",
        "7": "filter_fn is false for it",
        "8": "it returns indices",
    }


def test_a_norm_that_is_called_twice() -> None:
    class Twice(Basic):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn1(self.conv1(x)) + self.bn1(self.conv1(x * 2)))

    ours, native, report = pair(lambda: Twice(3, 3))
    assert [row.parts for row in report.fused] == [["bn1"], ["bn2"]]
    assert_same(ours, native, images())


def test_a_layer_under_two_names() -> None:
    def build() -> nn.Module:
        act = nn.ReLU(inplace=True)
        return nn.Sequential(nn.BatchNorm2d(3), act, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), act)

    ours, native, report = pair(build)
    assert [row.parts for row in report.fused] == [["0", "1"], ["3", "1"]]
    assert_same(ours, native, images())
    ours[4] = native[4] = nn.Tanh()
    assert_same(ours, native, images())


# Hooks.


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_inner_hooks_at_the_swap(kind: str, calls: Calls) -> None:
    native = fill(Yolo()).double()
    getattr(native.act, f"register_{kind}_hook")(lambda *_: None)
    ours = copy.deepcopy(native)
    report = gdfast.swap_(ours, fuse=True)
    assert reasons(report) == {"": "its forward stays: act carries hooks"}
    assert rows(report) == [("", ["norm"], "batch_norm_act")]
    assert_same(ours, native, images())


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("where", ["norm", "act", "global"])
def test_hooks_added_later_run(kind: str, where: str, calls: Calls) -> None:
    ours, native, _ = pair(Yolo)
    ours.eval(), native.eval()
    fired: list[nn.Module] = []

    def hook(module: nn.Module, *_: Any) -> None:
        fired.append(module)

    if where == "global":
        handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(hook)
    else:
        handle = getattr(getattr(ours, where), f"register_{kind}_hook")(hook)
    try:
        run(ours, images())
    finally:
        handle.remove()
    expected = [getattr(ours, where)] if where != "global" else list(ours.modules())
    assert set(fired) == set(expected)
    assert calls == [("batch_norm_act", "none", False)]
    calls.clear()
    assert_same(ours, native, images())
    assert calls == [("batch_norm_act", "leaky_relu", False)]


def test_hooks_on_what_is_called_as_before(calls: Calls) -> None:
    ours, _, _ = pair(blocks)
    fired = []
    ours[0].register_forward_hook(lambda *_: fired.append("block"))
    ours[0].conv1.register_forward_hook(lambda *_: fired.append("conv"))
    ours(images())
    assert fired == ["conv", "block"]
    assert len(calls) == 9


# What may be done with a model after the swap.


def test_copies_are_fused_and_their_own(calls: Calls) -> None:
    ours, native, report = pair(blocks)
    twin = copy.deepcopy(ours)
    del ours
    assert_same(twin, native, images())
    assert len(calls) == len(report.fused)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in native.parameters()}


def test_averaged_models(calls: Calls) -> None:
    ours, native, report = pair(blocks)
    average = torch.optim.swa_utils.AveragedModel(ours)
    expected = torch.optim.swa_utils.AveragedModel(native)
    for model, mean in ((ours, average), (native, expected)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        mean.update_parameters(model)
    assert_same(average, expected, images())
    assert len(calls) == len(report.fused)


def test_everything_but_forwards_stays() -> None:
    native = fill(blocks()).double()
    ours = copy.deepcopy(native)
    parameters, buffers = list(ours.parameters()), list(ours.buffers())
    types, texts = [type(module) for module in ours.modules()], str(ours)
    before = [dict(vars(module)) for module in ours.modules()]
    gdfast.swap_(ours, fuse=True)
    assert list(ours.state_dict()) == list(native.state_dict())
    assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
    assert all(a is b for a, b in zip(buffers, ours.buffers(), strict=True))
    assert [m.__class__.__name__ for m in ours.modules()] == [t.__name__ for t in types]
    assert str(ours) == texts
    assert inspect.signature(ours[0].forward) == inspect.signature(native[0].forward)
    gdfast.restore_(ours)
    assert [type(module) for module in ours.modules()] == types
    assert [dict(vars(module)) for module in ours.modules()] == before


def test_swapped_undoes_and_leaves_what_was_fused_before() -> None:
    model = blocks()
    gdfast.swap_(model[0], fuse=True)
    with gdfast.swapped(model, fuse=True) as report:
        assert len(report.fused) == 6
        assert reasons(report)["0"].endswith("it is fused already")
        assert "forward" in vars(model[1])
    assert "forward" in vars(model[0]) and "forward" not in vars(model[1])


def test_swap_works_on_a_copy() -> None:
    model = blocks()
    twin = gdfast.swap(model, fuse=True)
    assert "forward" in vars(twin[0]) and "forward" not in vars(model[0])


def test_freed_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        model = Yolo()
        gdfast.swap_(model, fuse=True)
        model(images(torch.float32))
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_modules_replaced_later(calls: Calls) -> None:
    ours, native, _ = pair(lambda: Bottleneck(3))
    for model in (ours, native):
        model.bn2 = nn.InstanceNorm2d(4).double()
    assert_same(ours, native, images())
    assert [call[1] for call in calls] == ["none"] * 2  # bn1 and bn3, in the class's own forward
    ours, native, _ = pair(CASES["sequential"][0])
    for model in (ours, native):
        torch.manual_seed(3)
        model[7] = nn.Conv2d(4, 6, 1).double()
        model.append(nn.Tanh())
    assert_same(ours, native, images())


def test_attributes_changed_later() -> None:
    ours, native, _ = pair(lambda: nn.Sequential(InvertedResidual(3), CASES["loop"][0]()))
    for change in (
        lambda m: setattr(m[0], "use_res_connect", False),
        lambda m: setattr(m[1], "scale", 2.0),
        lambda m: m[1].slopes.insert(0, 0.7),
        lambda m: setattr(m[1].layers[1], "eps", 0.1),
    ):
        change(ours)
        change(native)
        assert_same(ours, native, images())
    ours, native, _ = pair(lambda: Basic(3, 4))
    ours.downsample = native.downsample = None
    with pytest.raises(RuntimeError, match="size of tensor"):
        ours(images())


def test_a_class_changed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, native, _ = pair(Yolo)
    monkeypatch.setattr(Yolo, "forward", lambda self, x: self.norm(self.conv(x)))
    assert_same(ours, native, images())
    assert ours(images()).min() < -1


def test_norms_frozen_within_a_training_model(calls: Calls) -> None:
    ours, native, _ = pair(blocks)
    for model in (ours, native):
        model[0].bn1.eval()
        model[1].bn2.eval()
    assert_same(ours, native, images())


def test_norms_without_statistics_weights_or_momentum() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(3, momentum=None), nn.ReLU(), nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU6(), nn.Conv2d(4, 3, 1),
            nn.BatchNorm2d(3, affine=False), nn.SiLU(),
        ).double()  # fmt: skip

    ours, native = build(), build()
    native.load_state_dict(ours.state_dict())
    assert len(gdfast.swap_(ours, fuse=True).fused) == 3
    for training in (True, True, False):
        assert_same(ours.train(training), native.train(training), images())
    ours, native = build(), build()
    native.load_state_dict(ours.state_dict())
    gdfast.swap_(ours, fuse=True)
    for model in (ours, native):
        model[0].track_running_stats = False
    assert_same(ours, native, images())


def test_other_dtypes_later() -> None:
    ours, native, _ = pair(blocks)
    ours.float(), native.float()
    assert_same(ours, native, images(torch.float32))
    ours.bfloat16()
    assert ours(images(torch.bfloat16)).dtype == torch.bfloat16


def test_arguments_by_name_and_beyond_the_required() -> None:
    class Optional(Basic):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = super().forward(x)
            return x if mask is None else x * mask

    ours, native, report = pair(lambda: Optional(3, 3))
    assert len(report.fused) == 2
    mask = torch.rand(4, 3, 12, 12, dtype=torch.float64)
    for arguments in ({}, {"mask": mask}, {"mask": None}):
        got, expected = (m(x=images(), **arguments) for m in (ours, native))
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours(images(), mask), native(images(), mask))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        ours(mask=mask)
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(images()[0])


def test_the_report() -> None:
    model = nn.Sequential(Yolo(), nn.Conv2d(4, 4, 1), ReadsTraining())
    report = gdfast.swap_(model, fuse=True)
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert "0 norm, act batch_norm_act(leaky_relu)" in lines
    assert "in fused into" in lines
    assert lines[-1] == "3 replaced, 1 skipped, 2 fused"
    assert json.loads(json.dumps(report.to_dict()))["fused"] == [
        {
            "name": "0", "parts": ["norm", "act"], "op": "batch_norm_act(leaky_relu)",
            "errors": {},
        },
        {"name": "2", "parts": ["fc"], "op": "linear", "errors": {}},
    ]  # fmt: skip


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
