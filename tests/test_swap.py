"""Swapping layers in and out: what changes, what stays valid, and what the report says."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import prune

import gdfast
from gdfast import nn
from gdfast.swap.report import Replaced, Report, Skipped

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


class ConvNormActivation(torch.nn.Sequential):
    """As torchvision builds its models: a Sequential that makes torch.nn.Conv2d itself."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, **arguments: Any) -> None:
        convolution = torch.nn.Conv2d(
            inputs, outputs, kernel, padding=kernel // 2, bias=False, **arguments
        )
        norm = torch.nn.BatchNorm2d(outputs)
        super().__init__(convolution, norm, torch.nn.ReLU(inplace=True))


class Residual(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNormActivation(channels, channels)
        self.conv2 = ConvNormActivation(channels, channels, groups=channels)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.conv2(self.conv1(input))


def make_model() -> torch.nn.Module:
    layers = OrderedDict(
        stem=ConvNormActivation(3, 8, stride=2),
        block=Residual(8),
        drop=torch.nn.Dropout(0.5),
        head=torch.nn.Conv2d(8, 5, 1),
        pool=torch.nn.AdaptiveAvgPool2d(1),
    )
    return torch.nn.Sequential(layers)


NAMES = ["stem.0", "block.conv1.0", "block.conv2.0", "head"]
BATCH = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(5))


def classes(model: torch.nn.Module) -> list[type]:
    return [type(m) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    torch.manual_seed(7)
    optimizer.zero_grad()
    loss = model(BATCH).square().sum()
    loss.backward()
    optimizer.step()
    return loss.item()


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


def test_fuse_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"swap_: fuse: expected False, got True\. This version"):
        gdfast.swap_(model, fuse=True)
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
        }  # fmt: skip

    def test_names_the_backend_that_runs(self) -> None:
        with gdfast.backend("native"):
            assert {row.backend for row in gdfast.swap_(make_model()).replaced} == {"reference"}
        report = gdfast.swap_(make_model().to(torch.complex64))
        assert {row.backend for row in report.replaced} == {"reference"}


class TestVerify:
    def state(self, model: torch.nn.Module) -> Any:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        randomness = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        return buffers, *randomness, [p.grad for p in model.parameters()], model.training

    def same(self, before: Any, after: Any) -> None:
        torch.testing.assert_close(before[0], after[0], rtol=0, atol=0)
        assert torch.equal(before[1], after[1])
        assert before[2:4] == after[2:4]
        assert all(a is b for a, b in zip(before[4], after[4], strict=True))
        assert before[5] == after[5]

    @pytest.mark.parametrize("training", [True, False])
    def test_reports_errors_and_leaves_no_trace(self, training: bool) -> None:
        model = make_model().train(training)
        model(BATCH).sum().backward()
        before = self.state(model)
        buffers = list(model.buffers())
        report = gdfast.swap_(model, verify=BATCH)
        self.same(before, self.state(model))
        assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
        assert not any(m._forward_hooks for m in model.modules())
        kinds = [set(row.errors) for row in report.replaced]
        assert kinds[0] == {"output", "grad_weight"}  # nobody asks for the gradient of the batch
        assert kinds[1] == {"output", "grad_input", "grad_weight"}
        assert kinds[3] == {"output", "grad_input", "grad_weight", "grad_bias"}
        errors = [error for row in report.replaced for error in row.errors.values()]
        assert all(0 <= error < 1e-5 for error in errors)
        assert any(error > 0 for error in errors)
        assert "grad_weight" in str(report).splitlines()[0]

    def test_finds_a_wrong_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = nn.Conv2d._conv_forward

        def wrong(self: Any, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
            output = right(self, input, weight, bias)
            return output + 0.01 * output.detach() if self.groups > 1 else output

        monkeypatch.setattr(nn.Conv2d, "_conv_forward", wrong)
        report = gdfast.swap_(make_model().eval(), verify=BATCH)
        errors = {row.name: row.errors["output"] for row in report.replaced}
        assert errors["block.conv1.0"] < 1e-5
        assert errors["block.conv2.0"] == pytest.approx(0.01, rel=0.01)

    def test_finds_a_wrong_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = nn.Conv2d._conv_forward

        def wrong(self: Any, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
            half = weight * 0.5 + weight.detach() * 0.5
            return right(self, input, half, bias)

        monkeypatch.setattr(nn.Conv2d, "_conv_forward", wrong)
        report = gdfast.swap_(make_model().eval(), verify=BATCH)
        for row in report.replaced:
            assert row.errors["output"] < 1e-5
            assert row.errors["grad_weight"] == pytest.approx(0.5, rel=0.01)

    def test_a_bias_before_batch_norm_has_no_size_of_its_own(self) -> None:
        # Its gradient is 0 but for rounding; relative to itself the error would be about 1.
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        report = gdfast.swap_(model, verify=BATCH)
        assert report.replaced[0].errors["grad_bias"] < 1e-6

    def test_batches_of_several_arguments(self) -> None:
        class Two(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = torch.nn.Conv2d(3, 4, 3)

            def forward(self, left: Tensor, right: Tensor | None = None) -> dict[str, Any]:
                return {"sum": self.conv(left) + self.conv(right), "label": "text"}

        for batch in ((BATCH, BATCH), [BATCH, BATCH], {"left": BATCH, "right": BATCH}):
            report = gdfast.swap_(Two(), verify=batch)
            assert report.replaced[0].errors["grad_weight"] < 1e-5

    def test_frozen_layers(self) -> None:
        model = make_model()
        model.get_submodule("stem").requires_grad_(False)
        report = gdfast.swap_(model, verify=BATCH)
        assert set(report.replaced[0].errors) == {"output"}
        assert set(report.replaced[1].errors) == {"output", "grad_weight"}

    def test_a_batch_that_fails_leaves_the_model_native(self, monkeypatch: Any) -> None:
        model = make_model()
        with pytest.raises(RuntimeError, match="channels"):
            gdfast.swap_(model, verify=BATCH[:, :2])
        assert classes(model) == [torch.nn.Conv2d] * 4

        def fails(*_: Any) -> Tensor:
            raise KeyError("ours")

        monkeypatch.setattr(nn.Conv2d, "_conv_forward", fails)
        before = self.state(model)
        with pytest.raises(KeyError, match="ours"):
            gdfast.swap_(model, verify=BATCH)
        assert classes(model) == [torch.nn.Conv2d] * 4
        self.same(before, self.state(model))

    def test_a_model_without_gradients_is_an_error(self) -> None:
        class Detached(torch.nn.Conv2d):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input).detach()

        model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), Detached(3, 3, 1))
        with pytest.raises(ValueError, match=r"swap_: verify: expected a batch for which"):
            gdfast.swap_(model, verify=BATCH)
        assert classes(model)[0] is torch.nn.Conv2d

    def test_works_for_swap_and_swapped(self) -> None:
        assert classes(gdfast.swap(make_model(), verify=BATCH)) == [nn.Conv2d] * 4
        with gdfast.swapped(make_model(), verify=BATCH) as report:
            assert all(row.errors for row in report.replaced)


class TestCompany:
    """What else holds on to a model's modules and parameters."""

    def test_shared_layers(self) -> None:
        layer = torch.nn.Conv2d(3, 3, 3, padding=1)
        model = torch.nn.Sequential(layer, torch.nn.ReLU(), layer)
        expected = model(BATCH)
        report = gdfast.swap_(model, verify=BATCH)
        assert [row.name for row in report.replaced] == ["0"]
        assert model[0] is model[2]
        torch.testing.assert_close(model(BATCH), expected)

    def test_shared_parameters(self) -> None:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.Conv2d(3, 3, 3))
        model[1].weight = model[0].weight
        gdfast.swap_(model)
        model(BATCH).sum().backward()
        assert model[0].weight is model[1].weight

    def test_hooks(self) -> None:
        model, calls = make_model(), []
        model.head.register_forward_pre_hook(lambda m, args: calls.append("pre"))
        model.head.register_forward_hook(lambda m, args, out: calls.append("post"))
        model.head.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
        gdfast.swap_(model)
        model(BATCH).sum().backward()
        assert calls == ["pre", "post", "backward"]

    def test_old_weight_norm_and_pruning(self) -> None:
        # They keep the class and make the weight in a hook.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = torch.nn.Sequential(
                torch.nn.utils.weight_norm(torch.nn.Conv2d(3, 4, 3)),
                prune.l1_unstructured(torch.nn.Conv2d(4, 4, 3), "weight", 0.5),
            )
        expected = model(BATCH)
        assert len(gdfast.swap_(model, verify=BATCH).replaced) == 2
        torch.testing.assert_close(model(BATCH), expected)

    def test_a_parametrization_added_later(self) -> None:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
        gdfast.swap_(model)
        torch.nn.utils.parametrizations.weight_norm(model[0])
        model(BATCH).sum().backward()
        torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        assert type(model[0]) is nn.Conv2d

    def test_averaged_models(self) -> None:
        model = make_model()
        average = torch.optim.swa_utils.AveragedModel(model)
        gdfast.swap_(model)
        gdfast.swap_(average)
        assert classes(average) == [nn.Conv2d] * 4
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        average.update_parameters(model)
        average.eval()
        gdfast.restore_(model.eval())
        torch.testing.assert_close(average(BATCH), model(BATCH))

    def test_copies_stay_swapped(self) -> None:
        model = make_model()
        gdfast.swap_(model)
        assert classes(copy.deepcopy(model)) == [nn.Conv2d] * 4

    def test_state_dicts_go_both_ways(self, tmp_path: Path) -> None:
        native, ours = make_model().eval(), make_model().eval()
        gdfast.swap_(ours)
        torch.save(native.state_dict(), tmp_path / "native.pt")
        ours.load_state_dict(torch.load(tmp_path / "native.pt", weights_only=True))
        torch.testing.assert_close(ours(BATCH), native(BATCH))
        native.load_state_dict(ours.state_dict())

    def test_a_pickle_after_restore_needs_no_gdfast(self, tmp_path: Path) -> None:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
        gdfast.swap_(model)
        torch.save(model, tmp_path / "ours.pt")
        assert b"gdfast" in (tmp_path / "ours.pt").read_bytes()
        gdfast.restore_(model)
        torch.save(model, tmp_path / "native.pt")
        assert b"gdfast" not in (tmp_path / "native.pt").read_bytes()

    @pytest.mark.parametrize("swap_first", [False, True])
    def test_compiled_models(self, swap_first: bool) -> None:
        targets: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            targets.extend(node.target for node in graph.graph.nodes)
            return graph.forward

        torch.compiler.reset()
        model = make_model().eval()
        expected = model(BATCH)
        if swap_first:
            gdfast.swap_(model)
        compiled = torch.compile(model, backend=backend)
        if not swap_first:
            compiled(BATCH)
            assert torch.ops.gdfast.conv2d.default not in targets
            report = gdfast.swap_(compiled)
            assert [row.name for row in report.replaced] == [f"_orig_mod.{n}" for n in NAMES]
        torch.testing.assert_close(compiled(BATCH), expected)
        assert targets.count(torch.ops.gdfast.conv2d.default) == 4
        torch.compiler.reset()

    def test_symbolically_traced_models(self) -> None:
        model = make_model().eval()
        traced = torch.fx.symbolic_trace(model)
        assert len(gdfast.swap_(traced).replaced) == 4
        torch.testing.assert_close(traced(BATCH), model(BATCH))

    @pytest.mark.parametrize("swap_first", [False, True])
    def test_distributed_data_parallel(self, swap_first: bool, tmp_path: Path) -> None:
        if not dist.is_available() or not dist.is_gloo_available():
            pytest.skip("needs torch.distributed with gloo")
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            model, native = make_model(), make_model()
            native.load_state_dict(model.state_dict())
            if swap_first:
                gdfast.swap_(model)
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            if not swap_first:
                assert len(gdfast.swap_(parallel).replaced) == 4
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (parallel, native)]
            for _ in range(2):
                losses = [step(m, o) for m, o in zip((parallel, native), optimizers, strict=True)]
                assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        finally:
            dist.destroy_process_group()
