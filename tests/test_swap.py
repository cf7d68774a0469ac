"""Swapping layers in and out: what changes, what is skipped, and what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from swap_models import BATCH, NAMES, classes, make_model, step
from torch import Tensor

import gdfast
from gdfast import nn
from gdfast.swap.report import Replaced, Report, Skipped

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


def test_replaces_in_place_and_reports() -> None:
    model = make_model()
    parameters = list(model.parameters())
    keys = list(model.state_dict())
    report = gdfast.swap_(model)
    assert [row.name for row in report.replaced] == NAMES
    assert report.skipped == []
    assert classes(model) == [nn.Conv2d] * 4
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    row = report.replaced[0]
    assert (row.old, row.new, row.backend) == ("torch.nn.Conv2d", "gdfast.nn.Conv2d", "cpu")


def test_trains_as_before_with_an_optimizer_made_before() -> None:
    models = make_model(), make_model()
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)  # momentum from before the swap has to stay
    gdfast.swap_(models[0])
    for _ in range(3):
        ours, native = (step(*pair) for pair in zip(models, optimizers, strict=True))
        assert ours == pytest.approx(native, rel=1e-5)


def test_the_model_itself_may_be_the_layer() -> None:
    model = torch.nn.Conv2d(3, 4, 3)
    report = gdfast.swap_(model)
    assert type(model) is nn.Conv2d
    assert [row.name for row in report.replaced] == [""]
    assert "(the model)" in str(report)
    gdfast.restore_(model)
    assert type(model) is torch.nn.Conv2d


def test_swap_works_on_a_copy() -> None:
    model = make_model().eval()
    twin = gdfast.swap(model)
    assert classes(model) == [torch.nn.Conv2d] * 4
    assert classes(twin) == [nn.Conv2d] * 4
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    torch.testing.assert_close(twin(BATCH), model(BATCH))


def test_restore_undoes() -> None:
    model = make_model()
    gdfast.swap_(model)
    gdfast.restore_(model)
    assert classes(model) == [torch.nn.Conv2d] * 4
    assert str(model) == str(make_model())


def test_swapped_undoes_at_its_end_and_after_an_error() -> None:
    model = make_model()
    with gdfast.swapped(model) as report:
        assert len(report.replaced) == 4
        assert classes(model) == [nn.Conv2d] * 4
    assert classes(model) == [torch.nn.Conv2d] * 4
    with pytest.raises(KeyError), gdfast.swapped(model):
        raise KeyError
    assert classes(model) == [torch.nn.Conv2d] * 4


def test_swapped_leaves_what_was_ours_before() -> None:
    model = torch.nn.Sequential(nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3))
    with gdfast.swapped(model) as report:
        assert [row.reason for row in report.skipped] == ["it is ours already"]
    assert classes(model) == [nn.Conv2d, torch.nn.Conv2d]


def test_filter_fn_sees_module_and_name() -> None:
    model = make_model()
    seen = []

    def filter_fn(module: torch.nn.Module, name: str) -> bool:
        seen.append((module, name))
        return module.groups == 1 and name != "head"

    report = gdfast.swap_(model, filter_fn)
    assert seen == [(model.get_submodule(name), name) for name in NAMES]
    assert [row.name for row in report.replaced] == ["stem.0", "block.conv1.0"]
    assert {row.name: row.reason for row in report.skipped} == {
        "block.conv2.0": "filter_fn is false for it", "head": "filter_fn is false for it",
    }  # fmt: skip


class MyConv2d(torch.nn.Conv2d):
    """Somebody's own: weights are standardized before use."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


def test_what_is_skipped_and_why() -> None:
    model = torch.nn.ModuleDict(
        {
            "subclass": MyConv2d(3, 4, 3),
            "parametrized": torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 4, 3)),
            "lazy": torch.nn.LazyConv2d(4, 3),
            "quantized": torch.ao.nn.qat.Conv2d(
                3, 4, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig()
            ),
            "transposed": torch.nn.ConvTranspose2d(3, 4, 3),
            "one": torch.nn.Conv1d(3, 4, 3),
            "own": nn.Conv2d(3, 4, 3),
            "patched": torch.nn.Conv2d(3, 4, 3),
            "plain": torch.nn.Conv2d(3, 4, 3),
            "linear": torch.nn.Linear(3, 4),
        }
    )
    model["patched"]._conv_forward = lambda input, weight, bias: input
    before = {name: type(module) for name, module in model.items()}
    report = gdfast.swap_(model)
    assert [row.name for row in report.replaced] == ["plain"]
    reasons = {row.name: row.reason.split(":")[0] for row in report.skipped}
    assert reasons == {
        "subclass": "subclass of torch.nn.Conv2d",
        "parametrized": "parametrized",
        "lazy": "lazy",
        "quantized": "subclass of torch.nn.Conv2d",
        "transposed": "gdfast has no such layer",
        "one": "gdfast has no such layer",
        "own": "it is ours already",
        "patched": "its _conv_forward was replaced on the instance",
    }
    for name, cls in before.items():
        assert type(model[name]) is (nn.Conv2d if name == "plain" else cls)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_layers_are_skipped() -> None:
    model = torch.nn.Sequential(
        torch.jit.script(torch.nn.Conv2d(3, 4, 3)), torch.nn.Conv2d(4, 4, 3)
    )
    report = gdfast.swap_(model)
    assert [row.name for row in report.replaced] == ["1"]
    assert [row.reason.split(":")[0] for row in report.skipped] == ["scripted"]


def test_a_lazy_layer_swaps_after_its_first_batch() -> None:
    model = torch.nn.Sequential(torch.nn.LazyConv2d(4, 3))
    model(BATCH)
    assert [row.name for row in gdfast.swap_(model).replaced] == ["0"]


def test_nothing_replaced_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="no layer was replaced .*no convolution"):
        report = gdfast.swap_(torch.nn.Linear(2, 2))
    assert report.replaced == []
    with pytest.warns(UserWarning, match="no layer was replaced .*0: subclass of torch.nn.Conv2d"):
        gdfast.swap_(torch.nn.Sequential(MyConv2d(1, 1, 1)))


@pytest.mark.parametrize("call", [gdfast.swap_, gdfast.swap, gdfast.restore_])
def test_what_is_no_model(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        call({})


def test_filter_fn_that_is_no_function() -> None:
    model = make_model()
    with pytest.raises(TypeError, match="swap_: filter_fn: expected a function or None, got 3"):
        gdfast.swap_(model, 3)  # type: ignore[arg-type]
    assert classes(model) == [torch.nn.Conv2d] * 4


class TestReport:
    report = Report(
        [Replaced("a", "torch.nn.Conv2d", "gdfast.nn.Conv2d", "cpu", {"output": 1.25e-7})],
        [Skipped("", "mine.Conv", "subclass")],
    )

    def test_prints_a_table(self) -> None:
        lines = str(self.report).splitlines()
        assert [" ".join(line.split()) for line in lines] == [
            "layer old new backend or reason output",
            lines[1].replace("  ", " "),
            "a torch.nn.Conv2d gdfast.nn.Conv2d cpu 1.2e-07",
            "(the model) mine.Conv subclass",
            "1 replaced, 1 skipped",
        ]
        assert set(lines[1]) == {"-", " "}
        assert lines[0].index("backend") == lines[2].index("cpu") == lines[3].index("subclass")

    def test_is_ready_for_json(self) -> None:
        assert json.loads(json.dumps(self.report.to_dict())) == {
            "replaced": [
                {
                    "name": "a", "old": "torch.nn.Conv2d", "new": "gdfast.nn.Conv2d",
                    "backend": "cpu", "errors": {"output": 1.25e-7},
                }
            ],
            "skipped": [{"name": "", "old": "mine.Conv", "reason": "subclass"}],
            "fused": [],
        }  # fmt: skip

    @pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
    def test_names_the_backend_that_runs(self) -> None:
        with gdfast.backend("native"):
            assert {row.backend for row in gdfast.swap_(make_model()).replaced} == {"reference"}
        report = gdfast.swap_(make_model().to(torch.complex64))
        assert {row.backend for row in report.replaced} == {"reference"}
