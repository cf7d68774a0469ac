"""What fusing leaves alone, that it stays as it was, and the reasons that the report gives."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_models import Article, Basic, Yolo, fill, images
from test_swap_fuse import (  # noqa: F401  (a fixture)
    Calls,
    assert_same,
    calls,
    pair,
    reasons,
    rows,
)
from torch import Tensor, nn

import gdfast

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


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


def test_layers_of_a_forward_that_stays_are_still_ours(calls: Calls) -> None:  # noqa: F811
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


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_inner_hooks_at_the_swap(kind: str, calls: Calls) -> None:  # noqa: F811
    native = fill(Yolo()).double()
    getattr(native.act, f"register_{kind}_hook")(lambda *_: None)
    ours = copy.deepcopy(native)
    report = gdfast.swap_(ours, fuse=True)
    assert reasons(report) == {"": "its forward stays: act carries hooks"}
    assert rows(report) == [("", ["norm"], "batch_norm_act")]
    assert_same(ours, native, images())


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
