"""Fusing convolutions with the activations behind them: where, and what stays as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_models import Vgg, images
from test_swap_fuse import (  # noqa: F401  (a fixture)
    ACTIVATIONS,
    Calls,
    assert_same,
    calls,
    pair,
    reasons,
    rows,
    run,
)
from torch import Tensor, nn

import gdfast

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": lambda: nn.ReLU6(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.3, inplace=True),
    "silu": nn.SiLU,
}


class Written(nn.Module):
    """A convolution, what `function` makes of its result, and another convolution."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, (3, 2), (2, 1), 1), nn.Conv2d(4, 2, 1)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.last(self.function(self.conv(x)))


@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_spellings_of_activations(spelling: str, calls: Calls) -> None:  # noqa: F811
    function, name = ACTIVATIONS[spelling]
    ours, native, report = pair(lambda: Written(function))
    assert rows(report)[0][1:] == (rows(report)[0][1], f"conv2d_act({name})")
    assert len(report.fused) == 1 and rows(report)[0][1][0] == "conv"
    assert_same(ours, native, images())
    assert calls == [("conv2d_act", name, False)]


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, calls: Calls) -> None:  # noqa: F811
    ours, native, report = pair(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), MODULES[name]()))
    assert rows(report) == [("", ["0", "1"], f"conv2d_act({name})")]
    assert_same(ours, native, images())
    assert calls == [("conv2d_act", name, False)]


UNFUSED: dict[str, Callable[[Tensor], Any]] = {
    "the convolution has another user": lambda y: torch.relu(y) + y,
    "something between": lambda y: torch.relu(y * 2),
    "another activation": torch.tanh,
    "a threshold": lambda y: F.threshold(y, 0.1, 0),
}


@pytest.mark.parametrize("what", UNFUSED)
def test_nothing_is_fused_where(what: str, calls: Calls) -> None:  # noqa: F811
    ours, native, report = pair(lambda: Written(UNFUSED[what]))
    assert report.fused == []
    assert_same(ours, native, images())
    assert calls == []


def test_filter_fn_and_subclasses(calls: Calls) -> None:  # noqa: F811
    class MyConv(nn.Conv2d):
        pass

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(), MyConv(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.SiLU()
        )

    ours, native, report = pair(build, filter_fn=lambda module, name: name != "0")
    assert rows(report) == [("", ["4", "5"], "conv2d_act(silu)")]
    assert set(reasons(report)) == {"0", "2"}
    assert_same(ours, native, images())


def test_pooling_has_its_own_and_norms_take_their_activation(calls: Calls) -> None:  # noqa: F811
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4),
            nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.SiLU(),
        )  # fmt: skip

    ours, native, report = pair(build)
    assert rows(report) == [
        ("", ["0", "1", "2"], "conv2d_relu_max_pool2d"),
        ("", ["4", "5"], "batch_norm_act(relu)"),
        ("", ["6", "7"], "conv2d_act(relu)"),
        ("", ["8", "9"], "batch_norm_act(silu)"),
    ]
    assert_same(ours, native, images())
    assert len(calls) == 4


def test_batch_norm_is_not_folded_in_evaluation() -> None:
    ours, native, report = pair(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    )
    assert rows(report) == [("", ["1", "2"], "batch_norm_act(relu)")]
    for model in (ours, native):
        model[1].running_mean.add_(1)
    assert_same(ours, native, images())


# Native's leaky_relu keeps its argument, and lets its result be written to before backward.
WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda y: y.add_(1),
    "+=": lambda y: y.__iadd__(y * 2),
    "an item": lambda y: y.__setitem__(0, 1) or y,
    "F.relu by place": lambda y: F.relu(y, True),
    "a view": lambda y: y.flatten(1).add_(1).view_as(y),
    "a part": lambda y: (y[:, :1].mul_(2), y)[1],
    "dropout": lambda y: F.elu_(F.dropout(y, 0.0)),
}


@pytest.mark.parametrize("activation", ["leaky_relu", "relu6"])
@pytest.mark.parametrize("how", WRITERS)
def test_a_result_that_is_written_to(how: str, activation: str, calls: Calls) -> None:  # noqa: F811
    function = getattr(F, activation)
    ours, native, report = pair(lambda: Written(lambda y: WRITERS[how](function(y))))
    assert [row.op for row in report.fused] == [f"conv2d_act({activation}, without gradients)"]
    assert_same(ours, native, images())
    assert calls == []
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), native(images()))
    assert calls == [("conv2d_act", activation, False)]


def test_a_module_that_writes_to_a_view_of_the_result() -> None:
    def model() -> nn.Module:
        last = nn.Flatten(), nn.Dropout(0.0, inplace=True), nn.LazyLinear(20)
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), *last)
        layers.double()(images())
        return layers

    ours, native, report = pair(model)
    # Where there are CUDA kernels, the last layer is one that these take too.
    fused = [row.op for row in report.fused if row.op != "linear"]
    assert fused == ["conv2d_act(leaky_relu, without gradients)"]
    assert_same(ours, native, images())


def test_a_block_s_result_that_is_written_to_outside() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.LeakyReLU(0.2), nn.Conv2d(3, 3, 1))
            self.second = nn.Sequential(nn.Conv2d(3, 3, 1), nn.LeakyReLU(0.2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.first(x))
            y += x
            return y

    ours, native, report = pair(Residual)
    assert [row.op for row in report.fused] == [
        "conv2d_act(leaky_relu)", "conv2d_act(leaky_relu, without gradients)",
    ]  # fmt: skip
    assert_same(ours, native, images())


def test_slopes_and_settings_changed_later(calls: Calls) -> None:  # noqa: F811
    ours, native, _ = pair(Vgg)
    for model in (ours, native):
        model.features[6].negative_slope = -0.5
        model.features[0].padding = (0, 2)
        model.last.bias = None
    assert_same(ours, native, images())
    assert [call[1] for call in calls] == ["relu", None, "leaky_relu", "relu", "silu"]


@pytest.mark.parametrize("where", ["conv", "last", "features.0", "features.6"])
def test_hooks_added_later_run(where: str) -> None:
    ours, native, _ = pair(Vgg)
    fired: list[Any] = []
    handle = ours.get_submodule(where).register_forward_hook(lambda *_: fired.append(where))
    assert_same(ours, native, images())
    handle.remove()
    assert fired == [where]
    assert_same(ours, native, images())


def test_restored_copied_and_pickled() -> None:
    ours, native, _ = pair(Vgg)
    twin = copy.deepcopy(ours)
    loaded = pickle.loads(pickle.dumps(ours))
    for model in (twin, loaded):
        assert_same(model, native, images())
    gdfast.restore_(ours)
    assert not any("forward" in vars(module) for module in ours.modules())
    assert {type(module) for module in ours.modules()} == {type(m) for m in native.modules()}
    assert all(map(torch.equal, run(ours, images()), run(native, images())))


def test_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    ours, native, _ = pair(Vgg)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(compiled, native, images())
    torch.compiler.reset()


def test_verify_finds_the_errors_of_each() -> None:
    model = Vgg()
    report = gdfast.swap_(model, fuse=True, verify=images(torch.float32))
    assert len(report.fused) == 6
    for row in report.fused:
        assert {"grad_weight"} <= set(row.errors), row
        assert all(0 <= error < 1e-5 for error in row.errors.values()), row
