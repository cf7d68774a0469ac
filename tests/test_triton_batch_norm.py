"""The kernels of batch normalisation in Triton's interpreter, against native and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_batch_norm import LAYOUTS, check_empty, native_norm, randoms, run, strides
from torch import Tensor
from triton_here import IN_INTERPRETER, INTERPRETED

from gdfast import ops
from gdfast.backends.activation import ACTIVATIONS
from gdfast.bench.workload import allowed_error, relative_error

if INTERPRETED:
    from gdfast.backends.triton import bind_batch_norm, launch

pytestmark = [
    *IN_INTERPRETER,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
SIZES = [(3, 5, 4, 3), (33, 1, 3, 5), (2, 67, 7, 7), (4, 24, 5, 9), (1, 3, 40, 41)]


def check(values: dict[str, Tensor], residual: bool, **settings: Any) -> dict[str, Tensor]:
    settings = {"training": True, **settings}
    ours = run(ops.batch_norm_act, values, residual, backend="triton", **settings)
    natives = run(native_norm, values, residual, **settings)
    exact = run(native_norm, values, residual, torch.float64, **settings)
    for name, expected in exact.items():
        our, native = ours[name], natives[name]
        assert our.dtype == native.dtype, name
        assert strides(our) == strides(native), name
        allowed = allowed_error(relative_error(native, expected), our.dtype, 1)
        # Sums over a channel, of which native's are in double.
        rows = exact["output"][:, 0].numel()
        allowed = max(allowed, torch.finfo(torch.float32).eps * rows**0.5)
        error = relative_error(our, expected)
        assert error <= allowed, f"{name}: {error} > {allowed}"
    return ours


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, ...], layout: str, training: bool) -> None:
    check(randoms(size, layout=layout), False, training=training)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_residuals(activation: str, residual: bool) -> None:
    values = randoms((3, 20, 5, 4), layout="channels_last")
    check(values, residual, activation=activation, negative_slope=0.2, momentum=0.3, eps=1e-3)


def test_a_negative_slope_makes_backward_read_the_residual() -> None:
    values = randoms((3, 20, 5, 4))
    check(values, True, activation="leaky_relu", negative_slope=-0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_half_types(dtype: torch.dtype, residual: bool) -> None:
    check(randoms((4, 24, 5, 9), dtype, "channels_last"), residual)


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids=str)
def test_parameters_that_are_not_there(missing: tuple[str, ...]) -> None:
    input = torch.randn(3, 6, 5, 4, requires_grad=True)
    params = {"weight": torch.rand(6) + 0.5, "bias": torch.randn(6)}
    given = [None if name in missing else params[name] for name in params]
    results = []
    for function, options in ((ops.batch_norm_act, {"backend": "triton"}), (native_norm, {})):
        output = function(input, *given, None, None, training=True, **options)
        (grad,) = torch.autograd.grad(output.square().sum(), input)
        results.append((output, grad))
    torch.testing.assert_close(*results)


def test_many_splits_lose_nothing_to_a_large_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "gpu", lambda device: launch.H100)
    monkeypatch.setattr(bind_batch_norm.Problem, "tile", lambda problem: (16, 8))
    values = randoms((4, 8, 12, 11), layout="channels_last")
    values["input"] += 1000
    ours = check(values, False)
    again = check(values, False)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_running_statistics_that_are_not_packed_are_moved() -> None:
    values = randoms((3, 6, 5, 4))
    wide = torch.stack([values["mean"], values["var"]], 1)
    expected = [values["mean"].clone(), values["var"].clone()]
    before = wide._version
    ops.batch_norm_act(
        values["input"], None, None, wide[:, 0], wide[:, 1], training=True, backend="triton"
    )
    native_norm(values["input"], None, None, *expected)
    torch.testing.assert_close(wide, torch.stack(expected, 1))
    assert wide._version > before


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_input(training: bool) -> None:
    check_empty((0, 3, 4, 5), training, "triton")
