"""gdfast.nn: torch.nn with our layers, which have no state of their own."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

import gdfast
from gdfast import nn, ops

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

LAYERS: tuple[dict[str, Any], ...] = (
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 3, "dilation": (1, 2), "groups": 2},
    {"kernel_size": 3, "groups": 2, "bias": False},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "dtype": torch.float64},
    *(
        {"kernel_size": (3, 2), "padding": padding, "padding_mode": mode}
        for mode in ("reflect", "replicate", "circular")
        for padding in ((2, 1), "same")
    ),
)


def pair_of(arguments: dict[str, Any]) -> tuple[nn.Conv2d, torch.nn.Conv2d]:
    ours, native = nn.Conv2d(4, 6, **arguments), torch.nn.Conv2d(4, 6, **arguments)
    native.load_state_dict(ours.state_dict())
    return ours, native


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # native's
@pytest.mark.parametrize("arguments", LAYERS, ids=str)
def test_trains_as_natively(arguments: dict[str, Any]) -> None:
    ours, native = pair_of(arguments)
    input = torch.randn(2, 4, 9, 8, dtype=ours.weight.dtype)
    results = []
    for layer in (ours, native):
        leaf = input.clone().requires_grad_()
        output = layer(leaf)
        output.square().sum().backward()
        results.append((output, leaf.grad, *(p.grad for p in layer.parameters())))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    assert results[0][0].stride() == results[1][0].stride()


def test_has_native_s_constructor_and_looks() -> None:
    assert inspect.signature(nn.Conv2d) == inspect.signature(torch.nn.Conv2d)
    for arguments in LAYERS:
        ours, native = pair_of(arguments)
        assert repr(ours) == repr(native)
        assert isinstance(ours, torch.nn.Conv2d)
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        nn.Conv2d(3, 4, 1, groups=2)


def test_starts_from_native_s_values() -> None:
    weights = []
    for cls in (nn.Conv2d, torch.nn.Conv2d):
        torch.manual_seed(3)
        weights.append(cls(4, 6, 3).state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_has_no_state_of_its_own() -> None:
    ours, native = pair_of(LAYERS[1])
    assert set(vars(ours)) == set(vars(native))
    assert list(ours.state_dict()) == list(native.state_dict())
    ours.load_state_dict(native.state_dict())


def test_copies_and_pickles() -> None:
    layer, input = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is nn.Conv2d
        assert torch.equal(twin(input), layer(input))
        assert twin.weight.data_ptr() != layer.weight.data_ptr()


def test_wears_its_layout() -> None:
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    output = layer(torch.randn(2, 4, 9, 8))
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_follows_the_switch() -> None:
    layer, input = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 8)
    name = F.conv2d(input, layer.weight, layer.bias).grad_fn.name()
    assert layer(input).grad_fn.name() != name
    with gdfast.backend("native"):
        assert layer(input).grad_fn.name() == name


def test_parametrized_and_pruned() -> None:
    input = torch.randn(2, 4, 9, 8)
    for change in (
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ):
        ours, native = pair_of(LAYERS[0])
        for layer in (ours, native):
            torch.manual_seed(1)
            change(layer)
        torch.testing.assert_close(ours(input), native(input))


def test_other_names_are_torch_s() -> None:
    assert nn.Bilinear is torch.nn.Bilinear
    assert nn.Module is torch.nn.Module
    assert nn.init is torch.nn.init
    assert nn.functional.relu is F.relu
    assert nn.functional.conv2d is ops.conv2d
    assert nn.Conv2d is not torch.nn.Conv2d
    assert {"Conv2d", "Linear", "functional", "init"} <= set(dir(nn))
    for package in (nn, nn.functional):
        words = f"module '{package.__name__}' has no attribute 'Linier'"
        with pytest.raises(AttributeError, match=words):
            package.Linier  # noqa: B018


def test_ways_to_import() -> None:
    functional = importlib.import_module("gdfast.nn.functional")
    assert functional is nn.functional
    names: dict[str, Any] = {}
    exec("from gdfast.nn import *", names)
    assert names["Conv2d"] is nn.Conv2d
    assert names["BatchNorm2d"] is nn.BatchNorm2d
    assert names["BatchNorm1d"] is torch.nn.BatchNorm1d
    exec("from gdfast.nn.functional import *", names)
    assert names["conv2d"] is ops.conv2d
    assert names["avg_pool2d"] is F.avg_pool2d


@pytest.mark.parametrize("package", ["nn", "nn.functional", "optim"])
def test_a_star_imports_what_torch_s_does(package: str) -> None:
    ours: dict[str, Any] = {}
    native: dict[str, Any] = {}
    exec(f"from gdfast.{package} import *", ours)
    exec(f"from torch.{package} import *", native)
    assert set(ours) == set(native)


@pytest.mark.parametrize(
    "name",
    ["nn.init", "nn.parameter", "nn.utils.rnn", "nn.attention.flex_attention", "nn.modules.conv",
     "optim.lr_scheduler", "optim.swa_utils", "optim.adam"],
)  # fmt: skip
def test_submodules_of_torch_go_by_our_names(name: str) -> None:
    ours = importlib.import_module(f"gdfast.{name}")
    native = importlib.import_module(f"torch.{name}")
    assert ours is native
    assert native.__name__ == native.__spec__.name == f"torch.{name}"


def test_submodules_of_our_own_stay_ours() -> None:
    for package in (nn, gdfast.optim):
        for path in Path(package.__path__[0]).glob("[a-z]*.py"):
            assert importlib.import_module(f"{package.__name__}.{path.stem}").__file__ == str(path)
    for name in ("nn.nothing", "nn.utils.nothing", "nn._reduction", "optim.nothing"):
        with pytest.raises(ModuleNotFoundError, match=f"gdfast.{name}"):
            importlib.import_module(f"gdfast.{name}")


def test_nothing_of_torch_is_patched() -> None:
    assert torch.nn.Conv2d.__module__ == "torch.nn.modules.conv"
    assert torch.nn.functional is F
    assert "gdfast" not in repr(F.conv2d)
