"""ops.batch_norm_act against native PyTorch and float64, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast import native, ops
from gdfast.backends.activation import ACTIVATIONS, activate
from gdfast.bench.workload import allowed_error, relative_error

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SLOPE = 0.2
# Channels that fill vectors, and such that do not; planes of less than a vector, of some, of many.
SIZES = [
    (2, 3, 1, 2), (3, 5, 4, 3), (1, 16, 7, 7), (33, 1, 3, 5), (4, 24, 5, 9), (2, 64, 12, 11),
    (5, 67, 7, 7), (2, 513, 3, 3), (8, 256, 7, 7), (1, 2, 90, 101), (3, 40, 32, 33),
]  # fmt: skip


def native_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, residual: Any = None, *,
    training: bool = True, momentum: float = 0.1, eps: float = 1e-5, activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:  # fmt: skip
    output = F.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
    output = output if residual is None else output + residual
    return activate(output, activation, negative_slope)


def randoms(
    size: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "NCHW"
) -> dict[str, Tensor]:
    """Operands of one call; each channel has a mean and a spread of its own."""
    channels = size[1]
    scale, shift = torch.rand(channels, 1, 1) * 3 + 0.3, torch.randn(channels, 1, 1) * 2
    param_dtype = dtype if dtype == torch.float64 else torch.float32
    images = {
        "input": torch.randn(size) * scale + shift,
        "residual": torch.randn(size),
        "grad": torch.randn(size),
    }
    params = {
        "weight": torch.rand(channels) + 0.5,
        "bias": torch.randn(channels),
        "mean": torch.randn(channels),
        "var": torch.rand(channels) + 0.5,
    }
    return {
        name: tensor.to(dtype).to(memory_format=LAYOUTS[layout], copy=True)
        for name, tensor in images.items()
    } | {name: tensor.to(param_dtype) for name, tensor in params.items()}


def run(
    function: Callable[..., Tensor], values: dict[str, Tensor], residual: bool = False,
    dtype: torch.dtype | None = None, **settings: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Everything that a forward and a backward pass write, by name."""
    v = {name: t.to(dtype) if dtype else t.clone() for name, t in values.items()}
    leaves = {name: v[name].requires_grad_() for name in ("input", "weight", "bias")}
    if residual:
        leaves["residual"] = v["residual"].requires_grad_()
    output = function(
        v["input"], v["weight"], v["bias"], v["mean"], v["var"],
        v["residual"] if residual else None, **settings,
    )  # fmt: skip
    grads = torch.autograd.grad(output, list(leaves.values()), v["grad"])
    results = {"output": output.detach(), "running_mean": v["mean"], "running_var": v["var"]}
    return results | {f"grad of {name}": g for name, g in zip(leaves, grads, strict=True)}


def assert_as_close_as_native(
    ours: dict[str, Tensor], natives: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Each relative error against float64 at most twice native's, plus one rounding."""
    for name, expected in exact.items():
        assert ours[name].dtype == natives[name].dtype, name
        dtype, terms = ours[name].dtype, exact["output"].numel()
        allowed = allowed_error(relative_error(natives[name], expected), dtype, terms)
        error = relative_error(ours[name], expected)
        assert error <= allowed, f"{name}: {error} > {allowed}"


def strides(tensor: Tensor) -> list[int]:
    """Without those of axes of length 1, which mean nothing."""
    return [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


def check(
    values: dict[str, Tensor], residual: bool, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return check_all([values], residual, **settings)


def check_all(
    draws: list[dict[str, Tensor]], residual: bool, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Checks the errors of all draws together, and gives the results of the last one."""
    runs = []
    for values in draws:
        ours = run(ops.batch_norm_act, values, residual, backend="cpu", **settings)
        natives = run(native_norm, values, residual, **settings)
        exact = run(native_norm, values, residual, torch.float64, **settings)
        runs.append((ours, natives, exact))
    assert_as_close_as_native(
        *({name: torch.cat([r[side][name].flatten() for r in runs]) for name in runs[0][side]}
          for side in range(3))
    )  # fmt: skip
    return runs[-1][:2]


# Draws to judge so many channels by: the error of one sum that cancels is a matter of luck, for
# native as for us, so that the bound holds for the sums of some dozens of channels.
def draws_for(size: tuple[int, ...], layout: str) -> list[dict[str, Tensor]]:
    return [randoms(size, layout=layout) for _ in range(max(1, 64 // size[1]))]


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size: tuple[int, ...], layout: str, isa: str, nan_filled_memory: None) -> None:
    for training in (True, False):
        for residual in (True, False):
            draws = draws_for(size, layout)
            ours, natives = check_all(draws, residual, training=training)
            for name in ("output", "grad of input"):
                assert strides(ours[name]) == strides(natives[name])


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_so_large_that_they_pass_the_caches_by(layout: str, isa: str) -> None:
    # 16 MB, of which none is near a cache; in NCHW so where planes are whole cache lines.
    check(randoms((4, 64, 128, 128), layout=layout), True, training=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_dtypes(activation: str, dtype: torch.dtype, isa: str) -> None:
    settings = {"activation": activation, "negative_slope": SLOPE, "eps": 1e-3, "momentum": 0.3}
    for layout in LAYOUTS:
        # Half types: the mask of a value near 0 depends on how that was rounded.
        values = randoms((3, 20, 6, 9), dtype, layout)
        for training in (True, False):
            for residual in (True, False):
                check(values, residual, training=training, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters(dtype: torch.dtype, layout: str, isa: str) -> None:
    values = randoms((3, 20, 6, 9), dtype, layout)
    values |= {name: values[name].to(dtype) for name in ("weight", "bias", "mean", "var")}
    ours = run(ops.batch_norm_act, values, backend="cpu", training=True)
    exact = run(native_norm, values, dtype=torch.float64, training=True)
    for name, expected in exact.items():
        assert ours[name].dtype == dtype
        error = (ours[name].double() - expected).abs().max()
        assert error <= torch.finfo(dtype).eps * 2 * max(1.0, expected.abs().max().item()), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_far_from_zero(layout: str, isa: str) -> None:
    values = randoms((8, 20, 14, 14), layout=layout)
    values["input"] = (torch.randn(8, 20, 14, 14) + 1e4).to(memory_format=LAYOUTS[layout])
    for training in (True, False):
        # A mask would hang on the last bit of the mean.
        check(values, True, training=training, activation="none")
    # The first value of each channel, which sums might be taken about, is far from the others.
    for first in (1e4, 0.0):
        values["input"][0, :, 0, 0] = first
        ours = run(ops.batch_norm_act, values, training=True)
        var = (ours["running_var"] - 0.9 * values["var"]) / 0.1
        exact = values["input"].double().var((0, 2, 3))
        torch.testing.assert_close(var.double(), exact, rtol=1e-5, atol=0)


def test_negative_slopes_of_leaky_relu(isa: str) -> None:
    for slope in (-0.5, 0.0):
        for residual in (True, False):
            check(
                randoms((3, 20, 6, 9)), residual, training=True, activation="leaky_relu",
                negative_slope=slope,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_silu_of_extremes(dtype: torch.dtype, isa: str) -> None:
    inf = math.inf
    row = torch.tensor([-inf, -1e4, -800, -100, -89, -1, -0.0, 0, 1e-30, 1, 90, 1e4, inf, math.nan])
    input = row.to(dtype).view(1, -1, 1, 1).expand(2, -1, 3, 3).contiguous().requires_grad_()
    eps = 2.0**-16  # with which the variance is 1, exactly
    zeros = torch.zeros(row.numel(), dtype=dtype)
    arguments = input, None, None, zeros, zeros + (1 - eps)
    settings = {"training": False, "eps": eps, "activation": "silu"}
    ours = ops.batch_norm_act(*arguments, **settings)
    natives = native_norm(*arguments, **settings)
    torch.testing.assert_close(ours, natives, equal_nan=True)
    grads = [torch.autograd.grad(y.sum(), input)[0] for y in (ours, natives)]
    torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_go_through_as_in_native(activation: str, layout: str, isa: str) -> None:
    values = randoms((2, 5, 4, 6), layout=layout)
    for channel, value in enumerate((math.nan, math.inf, -math.inf)):
        values["input"][0, channel, 1, 2] = value
    for training in (True, False):
        ours, natives = (
            run(f, values, training=training, activation=activation)
            for f in (ops.batch_norm_act, native_norm)
        )
        for name, expected in natives.items():
            assert torch.equal(ours[name].isnan(), expected.isnan()), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeatable_for_any_number_of_threads(layout: str, threads: None, isa: str) -> None:
    values = randoms((6, 48, 40, 33), layout=layout)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        first, *others = (run(ops.batch_norm_act, values, True, training=True) for _ in range(4))
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_strides(layout: str) -> None:
    wide = torch.randn(4, 6, 9, 14).to(memory_format=LAYOUTS[layout])
    weight, bias = torch.rand(12)[::2], torch.randn(6)
    for input in (wide[:, :, ::2, 1:-1], wide.transpose(2, 3), wide[:1].expand(3, -1, -1, -1)):
        residual = torch.randn(input.shape).transpose(0, 1).contiguous().transpose(0, 1)
        grads = torch.randn(()).expand(input.shape), torch.randn(input.shape).transpose(1, 2)
        for grad in (grads[0], grads[1].contiguous().transpose(1, 2)):
            results = []
            for function in (ops.batch_norm_act, native_norm):
                leaves = [t.detach().requires_grad_() for t in (input, weight, bias, residual)]
                output = function(*leaves[:3], None, None, leaves[3], training=True)
                results.append([output, *torch.autograd.grad(output, leaves, grad)])
            assert strides(results[0][0]) == strides(results[1][0])
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_without_parameters_and_running_statistics() -> None:
    input = torch.randn(3, 4, 5, 6, requires_grad=True)
    for training in (True, False):
        stats = (None, None) if training else (torch.randn(4), torch.rand(4) + 0.5)
        for weight, bias in ((None, None), (torch.rand(4), None), (None, torch.rand(4))):
            ours, expected = (
                f(input, weight, bias, *stats, training=training, activation="silu")
                for f in (ops.batch_norm_act, native_norm)
            )
            torch.testing.assert_close(ours, expected)
            grad = torch.randn(ours.shape)
            torch.testing.assert_close(
                *(torch.autograd.grad(y, input, grad)[0] for y in (ours, expected))
            )


@pytest.mark.kernels
def test_statistics_from_elsewhere(isa: str) -> None:
    values = randoms((3, 20, 6, 9))
    input = values["input"]
    shift = torch.randn(20, dtype=torch.float64)
    moved = input.double() - shift.view(-1, 1, 1)
    sums, squares = moved.sum((0, 2, 3)), moved.square().sum((0, 2, 3))
    output, mean, invstd = torch.empty_like(input), torch.empty(20), torch.empty(20)
    running = values["mean"].clone(), values["var"].clone()
    problem = native.cpu.BatchNormProblem(
        3, 20, 54, False, "float32", "float32", "leaky_relu", 0.1, 1e-5
    )
    native.cpu.batch_norm(
        problem, input.data_ptr(), values["weight"].data_ptr(), values["bias"].data_ptr(),
        running[0].data_ptr(), running[1].data_ptr(), 0, output.data_ptr(), mean.data_ptr(),
        invstd.data_ptr(), True, 0.1, 2, shift.data_ptr(), sums.data_ptr(), squares.data_ptr(),
    )  # fmt: skip
    expected = native_norm(
        input, values["weight"], values["bias"], values["mean"], values["var"],
        activation="leaky_relu", negative_slope=0.1,
    )  # fmt: skip
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(running, (values["mean"], values["var"]))
    torch.testing.assert_close(mean, input.mean((0, 2, 3)))


def check_empty(size: tuple[int, ...], training: bool, backend: str, device: str = "cpu") -> None:
    """Whoever is asked to normalise nothing gives what native gives."""
    results = []
    for norm, options in ((ops.batch_norm_act, {"backend": backend}), (native_norm, {})):
        values = {name: t.to(device) for name, t in randoms(size).items()}
        leaves = [values[name].requires_grad_() for name in ("input", "weight", "bias")]
        running = torch.full((size[1],), 3.0, device=device), torch.ones(size[1], device=device)
        output = norm(*leaves, *running, values["residual"], training=training, **options)
        results.append((output, *running, *torch.autograd.grad(output.sum(), leaves)))
    for ours, natives in zip(*results, strict=True):
        torch.testing.assert_close(ours, natives)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_an_empty_input(backend: str, size: tuple[int, ...], training: bool) -> None:
    check_empty(size, training, backend)


def test_subclasses_that_override_functions() -> None:
    class Logged(Tensor):
        calls: list[Any] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            cls.calls.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    v = randoms((2, 3, 4, 5))
    ops.batch_norm_act(v["input"].as_subclass(Logged), v["weight"], None, None, None, training=True)
    assert Logged.calls[0] is ops.batch_norm_act
