"""Fused models where something else runs, copies, saves or traces them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fuse_models import CASES, Basic, Bottleneck, InvertedResidual, Yolo, blocks, fill, images
from torch import Tensor, nn

import gdfast
from gdfast import models, ops
from gdfast.errors import FallbackWarning
from gdfast.nn import norm as norm_module

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


def two(build: Any = blocks) -> tuple[nn.Module, nn.Module]:
    native = fill(build())
    return gdfast.swap(native, fuse=True), native


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


def operators(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "gdfast" in str(node.target)]


def test_pickles_in_a_fresh_process(tmp_path: Path) -> None:
    ours, native = two()
    batch = images(torch.float32)
    torch.save((ours, batch, native.eval()(batch)), tmp_path / "model.pt")
    script = """
import sys, torch
model, batch, expected = torch.load(sys.argv[1], weights_only=False)
assert type(vars(model[0])["forward"]).__name__ == "FusedForward"
assert vars(model[0])["forward"]._is_current
called = []
from gdfast import ops
from gdfast.nn import norm as norm_module
run = ops.batch_norm_act
ops.batch_norm_act = lambda *a, **k: (called.append(k["activation"]), run(*a, **k))[1]
torch.testing.assert_close(model.eval()(batch), expected, rtol=1e-4, atol=1e-4)
assert called.count("relu") == 6, called
"""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")], check=True,
        env={**os.environ, "PYTHONPATH": path}, timeout=120,
    )  # fmt: skip


def test_another_version_of_a_forward_is_noticed_at_loading(monkeypatch: Any) -> None:
    import io

    ours, native = two(Yolo)
    saved = io.BytesIO()
    torch.save(ours.eval(), saved)
    monkeypatch.setattr(Yolo, "forward", lambda self, x: self.norm(self.conv(x)))
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    batch = images(torch.float32)
    torch.testing.assert_close(loaded(batch), native.eval()(batch), rtol=1e-4, atol=1e-4)


def test_a_pickle_after_restore_needs_no_gdfast(tmp_path: Path) -> None:
    ours, _ = two()
    gdfast.restore_(ours)
    torch.save(ours, tmp_path / "native.pt")
    assert b"gdfast" not in (tmp_path / "native.pt").read_bytes()


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training: bool) -> None:
    torch.compiler.reset()
    found: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.extend(operators(graph.graph))
        return graph.forward

    ours, native = two(lambda: nn.Sequential(Basic(3, 4), InvertedResidual(4), nn.MaxPool2d(2)))
    ours.train(training), native.train(training)
    batch = images(torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for _ in range(2):
        mine, theirs = compiled(batch), native(batch)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    mine.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(gradients(ours), gradients(native), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        dict(ours.named_buffers()), dict(native.named_buffers()), rtol=1e-4, atol=1e-4
    )
    assert sum("batch_norm" in name for name in found) == 5
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict: bool) -> None:
    ours, native = two(lambda: nn.Sequential(Basic(3, 4), nn.MaxPool2d(2)))
    batch = images(torch.float32)
    program = torch.export.export(ours.eval(), (batch,), strict=strict)
    assert sum("batch_norm" in name for name in operators(program.graph)) == 3
    torch.testing.assert_close(program.module()(batch), native.eval()(batch), rtol=1e-4, atol=1e-4)


def test_symbolic_tracing_sees_the_class_s_own_forwards() -> None:
    ours, native = two()
    traced = torch.fx.symbolic_trace(ours)
    batch = images(torch.float32)
    torch.testing.assert_close(traced(batch), native(batch), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        dict(traced.named_buffers()), dict(native.named_buffers()), rtol=1e-4, atol=1e-4
    )


def test_graph_modules_keep_their_forwards() -> None:
    native = fill(Yolo()).eval()
    traced = torch.fx.symbolic_trace(native)
    report = gdfast.swap_(traced, fuse=True)
    assert [row.name for row in report.skipped if "torch.fx" in row.reason] == [""]
    batch = images(torch.float32)
    torch.testing.assert_close(copy.deepcopy(traced)(batch), traced(batch))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_tracing() -> None:
    ours, native = two()
    batch = images(torch.float32)
    with pytest.warns(FallbackWarning, match="a traced model"):
        traced = torch.jit.trace(ours.eval(), (batch,))
    torch.testing.assert_close(traced(batch), native.eval()(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_autocast_gives_what_the_unfused_gives(case: str) -> None:
    ours, native = two(CASES[case][0])
    batch = images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = ours(batch), native(batch)
    assert mine.dtype == theirs.dtype
    difference = (mine.float() - theirs.float()).norm() / theirs.float().norm()
    assert difference < 0.03
    mine.float().sum().backward()
    assert all(g is not None for g in gradients(ours)) or case == "basic blocks"


def test_functional_calls_and_transforms() -> None:
    ours, native = two(lambda: nn.Sequential(Yolo(), nn.Conv2d(4, 2, 1), nn.ReLU()))
    batch = images(torch.float32)

    def loss(model: nn.Module) -> Any:
        def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, (parameters, buffers), batch).square().mean()

        return call

    for model in (ours, native):
        model.eval()
    values = {name: value.detach() * 1.1 for name, value in native.named_parameters()}
    buffers = dict(native.named_buffers())
    torch.testing.assert_close(loss(ours)(values, buffers), loss(native)(values, buffers))
    with pytest.warns(FallbackWarning, match=r"torch\.func"):
        mine = torch.func.grad(loss(ours))(values, buffers)
    theirs = torch.func.grad(loss(native))(values, buffers)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        native = fill(blocks())
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(native))
        assert len(gdfast.swap_(parallel, fuse=True).fused) == 9
        batch = images(torch.float32)
        for model in (parallel, native):
            model(batch).square().mean().backward()
        torch.testing.assert_close(gradients(parallel), gradients(native), rtol=1e-3, atol=1e-3)
    finally:
        dist.destroy_process_group()


def test_a_shallow_copy_that_outlives_its_original_says_so() -> None:
    ours, _ = two(Yolo)
    shallow = copy.copy(ours)
    shallow(images(torch.float32))
    del ours
    with pytest.raises(RuntimeError, match=r"swap_: forward: expected the module it was made for"):
        shallow(images(torch.float32))


def test_checkpointed_blocks() -> None:
    ours, native = (model.double() for model in two(lambda: Bottleneck(3)))
    batch = images().requires_grad_()
    for model in (ours, native):
        output = torch.utils.checkpoint.checkpoint(model, batch, use_reentrant=False)
        output.square().sum().backward()
    torch.testing.assert_close(gradients(ours), gradients(native), rtol=1e-4, atol=1e-3)


# Activations and norms that are not followed by anything, in what gdfast.models has.
LEFT = {
    "resnet18": 3, "resnet50": 4, "resnet20": 2, "mobilenet_v2": 7, "yolo_lite_backbone": 0,
    "face_resnet": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_our_models_are_fused_to_the_last_norm(name: str, monkeypatch: Any) -> None:
    model = models.create(name, in_channels=3)
    report = gdfast.swap_(model, fuse=True)
    assert report.skipped == [row for row in report.skipped if row.reason == "it is ours already"]
    alone = [row for row in report.fused if row.op == "batch_norm_act"]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    groups = [row for row in report.fused if row.op.startswith("batch_norm_act(")]
    assert len(groups) == len(norms) - LEFT[name]
    assert len(alone) in (0, LEFT[name])
    ran: list[str] = []
    run = ops.batch_norm_act

    def spy(*args: Any, activation: str, **kwargs: Any) -> Tensor:
        ran.append(activation)
        return run(*args, activation=activation, **kwargs)

    monkeypatch.setattr(ops, "batch_norm_act", spy)
    monkeypatch.setattr(norm_module, "unit", lambda *_: None)  # which layers share
    activations: list[nn.Module] = []
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: activations.append(self))
    monkeypatch.setattr(nn.ReLU6, "forward", lambda self, x: activations.append(self))
    monkeypatch.setattr(nn.LeakyReLU, "forward", lambda self, x: activations.append(self))
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert activations == []
    assert len(ran) >= len(groups)


class _Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + y


def test_a_norm_added_to_itself() -> None:
    ours, native = two(_Doubled)
    batch = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(ours(batch), native(batch))


def test_a_fusing_that_fails_leaves_the_model_native(monkeypatch: pytest.MonkeyPatch) -> None:
    from gdfast.swap import fuse

    model = nn.Sequential(blocks(), blocks())
    installed = []

    def install(module: nn.Module, *arguments: Any) -> None:
        if installed:
            raise ArithmeticError("the second one")
        installed.append(module)
        run(module, *arguments)

    run = fuse.install
    monkeypatch.setattr(fuse, "install", install)
    with pytest.raises(ArithmeticError):
        gdfast.swap_(model, fuse=True)
    assert installed
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not type(module).__module__.startswith("gdfast")


def test_replicas_of_data_parallel_run_their_own_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    gdfast.swap_(model, fuse=True)
    assert "forward" in vars(model)
    batch = torch.randn(2, 3, 6, 6)
    for original in (model, copy.deepcopy(model)):
        replica = original._replicate_for_data_parallel()  # as torch.nn.parallel.replicate does
        for name, child in original.named_children():
            own = child._replicate_for_data_parallel()
            for key, parameter in child.named_parameters():
                setattr(own, key, torch.zeros_like(parameter))
            own._buffers = dict(child._buffers)
            replica._modules[name] = own
        assert not replica(batch).any()
        assert original(batch).any()
    gdfast.restore_(model)
    assert "_replicate_for_data_parallel" not in vars(model)
