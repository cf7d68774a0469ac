"""Models whose forwards were fused: hooks, copies, changes of any kind, and back again."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch
from fuse_models import CASES, Basic, Bottleneck, InvertedResidual, Yolo, blocks, fill, images
from test_swap_fuse import (  # noqa: F401  (a fixture)
    Calls,
    assert_same,
    calls,
    pair,
    reasons,
    run,
)
from torch import Tensor, nn

import gdfast

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("where", ["norm", "act", "global"])
def test_hooks_added_later_run(kind: str, where: str, calls: Calls) -> None:  # noqa: F811
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


def test_hooks_on_what_is_called_as_before(calls: Calls) -> None:  # noqa: F811
    ours, _, _ = pair(blocks)
    fired = []
    ours[0].register_forward_hook(lambda *_: fired.append("block"))
    ours[0].conv1.register_forward_hook(lambda *_: fired.append("conv"))
    ours(images())
    assert fired == ["conv", "block"]
    assert len(calls) == 9


def test_copies_are_fused_and_their_own(calls: Calls) -> None:  # noqa: F811
    ours, native, report = pair(blocks)
    twin = copy.deepcopy(ours)
    del ours
    assert_same(twin, native, images())
    assert len(calls) == len(report.fused)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in native.parameters()}


def test_averaged_models(calls: Calls) -> None:  # noqa: F811
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


def test_modules_replaced_later(calls: Calls) -> None:  # noqa: F811
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


def test_norms_frozen_within_a_training_model(calls: Calls) -> None:  # noqa: F811
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
