"""Swapping where something else holds on to the model's modules and parameters."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from swap_models import BATCH, NAMES, classes, make_model, step
from torch.nn.utils import prune

import gdfast
from gdfast import nn

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


def test_shared_layers() -> None:
    layer = torch.nn.Conv2d(3, 3, 3, padding=1)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), layer)
    expected = model(BATCH)
    report = gdfast.swap_(model, verify=BATCH)
    assert [row.name for row in report.replaced] == ["0"]
    assert model[0] is model[2]
    torch.testing.assert_close(model(BATCH), expected)


def test_shared_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    gdfast.swap_(model)
    model(BATCH).sum().backward()
    assert model[0].weight is model[1].weight


def test_hooks() -> None:
    model, calls = make_model(), []
    model.head.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    model.head.register_forward_hook(lambda m, args, out: calls.append("post"))
    model.head.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    gdfast.swap_(model)
    model(BATCH).sum().backward()
    assert calls == ["pre", "post", "backward"]


def test_old_weight_norm_and_pruning() -> None:
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


def test_a_parametrization_added_later() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    gdfast.swap_(model)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    model(BATCH).sum().backward()
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Conv2d


def test_averaged_models() -> None:
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


def test_copies_stay_swapped() -> None:
    model = make_model()
    gdfast.swap_(model)
    assert classes(copy.deepcopy(model)) == [nn.Conv2d] * 4


def test_state_dicts_go_both_ways(tmp_path: Path) -> None:
    native, ours = make_model().eval(), make_model().eval()
    gdfast.swap_(ours)
    torch.save(native.state_dict(), tmp_path / "native.pt")
    ours.load_state_dict(torch.load(tmp_path / "native.pt", weights_only=True))
    torch.testing.assert_close(ours(BATCH), native(BATCH))
    native.load_state_dict(ours.state_dict())


def test_a_pickle_after_restore_needs_no_gdfast(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    gdfast.swap_(model)
    torch.save(model, tmp_path / "ours.pt")
    assert b"gdfast" in (tmp_path / "ours.pt").read_bytes()
    gdfast.restore_(model)
    torch.save(model, tmp_path / "native.pt")
    assert b"gdfast" not in (tmp_path / "native.pt").read_bytes()


@pytest.mark.parametrize("swap_first", [False, True])
def test_compiled_models(swap_first: bool) -> None:
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


def test_symbolically_traced_models() -> None:
    model = make_model().eval()
    traced = torch.fx.symbolic_trace(model)
    assert len(gdfast.swap_(traced).replaced) == 4
    torch.testing.assert_close(traced(BATCH), model(BATCH))


@pytest.mark.parametrize("swap_first", [False, True])
def test_distributed_data_parallel(swap_first: bool, tmp_path: Path) -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, native = make_model(), make_model()
        native.load_state_dict(model.state_dict())
        if swap_first:
            gdfast.swap_(model)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        if not swap_first:
            assert len(gdfast.swap_(parallel, verify=BATCH).replaced) == 4
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (parallel, native)]
        for _ in range(2):
            losses = [step(m, o) for m, o in zip((parallel, native), optimizers, strict=True)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    finally:
        dist.destroy_process_group()
