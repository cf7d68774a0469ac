"""The convolution kernels in Triton's interpreter, against native PyTorch and float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_batch_norm import strides
from torch import Tensor
from triton_here import IN_INTERPRETER, INTERPRETED

import gdfast
from gdfast import ops
from gdfast.bench.cases import ODD, Conv2dCase
from gdfast.bench.workload import allowed_error, relative_error

if INTERPRETED:
    from gdfast import windows
    from gdfast.backends.triton import bind_conv2d, launch
    from gdfast.backends.triton.bind_conv2d import Problem
    from gdfast.backends.triton.tiles import Tile

pytestmark = [
    *IN_INTERPRETER,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
BY_NAME = {case.name: case for case in ODD}
# One for each way through the kernels.
FEW = [
    # Strides over nothing, which kernels replace by 1.
    Conv2dCase("1x1-stride-over-image", 3, 20, 3, 2, 18, 1, 1, stride=(3, 2)),
    *(BY_NAME[name]
    for name in (
        "everything-asymmetric", "batch-33", "1x1-stride-2", "c17-k10", "groups-5-stride-2",
        "depthwise-stride-2", "depthwise-multiplier-2",
    ))
]  # fmt: skip
PASSES = ("output", "grad_input", "grad_weight", "grad_bias")


def tensors_of(case: Conv2dCase, dtype: torch.dtype, channels_last: bool) -> dict[str, Tensor]:
    sizes = {
        "input": case.input_shape, "weight": case.weight_shape, "bias": (case.K,),
        "grad": case.output_shape,
    }  # fmt: skip
    format = torch.channels_last if channels_last else torch.contiguous_format
    values = {name: torch.randn(size).to(dtype) for name, size in sizes.items()}
    return {n: t.to(memory_format=format) if t.dim() == 4 else t for n, t in values.items()}


def passes(case: Conv2dCase, values: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    """All three passes by the dispatcher's operations."""
    input, weight, bias, grad = values.values()
    arguments = case.stride, case.padding * 2, case.dilation, case.groups, backend
    last = not input.is_contiguous()
    return (
        torch.ops.gdfast.conv2d(input, weight, bias, *arguments),
        torch.ops.gdfast.conv2d_grad_input(grad, weight, input.shape, last, *arguments),
        *torch.ops.gdfast.conv2d_grad_weight(grad, input, weight.shape, last, True, *arguments),
    )


def check(case: Conv2dCase, values: dict[str, Tensor], ours: tuple[Tensor, ...]) -> None:
    natives = passes(case, values, "reference")
    exact = passes(case, {name: t.double() for name, t in values.items()}, "reference")
    for name, our, native, expected in zip(PASSES, ours, natives, exact, strict=True):
        assert our.dtype == native.dtype, name
        assert strides(our) == strides(native) or not case.N, name
        allowed = allowed_error(relative_error(native, expected), our.dtype, 1)
        if name == "grad_bias":
            # A sum of this many numbers in float32; with a handful of filters chance may make
            # native's own error tiny.
            terms = case.N * case.P * case.Q
            allowed = max(allowed, torch.finfo(torch.float32).eps * terms**0.5)
        error = relative_error(our, expected)
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("case", ODD, ids=str)
def test_channels_last(case: Conv2dCase) -> None:
    values = tensors_of(case, torch.float32, True)
    check(case, values, passes(case, values, "triton"))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_nchw(case: Conv2dCase) -> None:
    values = tensors_of(case, torch.float32, False)
    check(case, values, passes(case, values, "triton"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_half_types(case: Conv2dCase, dtype: torch.dtype) -> None:
    values = tensors_of(case, dtype, True)
    check(case, values, passes(case, values, "triton"))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_goes_where_native_has_it(value: float) -> None:
    case = Conv2dCase("not-finite", 2, 16, 9, 8, 16, 3, 3, (1, 1), (1, 1))
    values = tensors_of(case, torch.float32, True)
    # Beside one another too.
    values["input"][0, 1, 0, 3] = values["input"][1, 3, 4, 4] = values["weight"][2, 3, 1, 1] = value
    values["grad"][1, 4, 5, 3] = values["grad"][1, 2, 5, 3] = value
    ours = passes(case, values, "triton")
    # In float64 native uses none of the algorithms that spread what is not finite.
    expected = passes(case, {name: t.double() for name, t in values.items()}, "reference")
    for name, our, exact in zip(PASSES, ours, expected, strict=True):
        assert torch.equal(our.isnan(), exact.isnan()), name
        assert torch.equal(our.isposinf(), exact.isposinf()), name
        assert torch.equal(our.isneginf(), exact.isneginf()), name


def test_any_strides() -> None:
    case = BY_NAME["same-3x3"]
    values = tensors_of(case, torch.float32, False)
    wide = torch.randn(case.N, case.C, case.H, 2 * case.W)
    values["input"] = wide[..., ::2]
    values["grad"] = torch.randn(case.K, 1, 1).expand(case.output_shape)  # strides of 0
    values["weight"] = values["weight"].transpose(2, 3)
    arguments = case.stride, case.padding * 2, case.dilation, case.groups
    input, weight, bias, grad = values.values()
    results = []
    for backend in ("triton", "reference"):
        output = torch.ops.gdfast.conv2d(input, weight, bias, *arguments, backend)
        back = (False, *arguments, backend)
        grad_input = torch.ops.gdfast.conv2d_grad_input(grad, weight, input.shape, *back)
        grads = torch.ops.gdfast.conv2d_grad_weight(
            grad, input, weight.shape, False, True, *arguments, backend
        )
        results.append((output, grad_input, *grads))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


def problem_of(case: Conv2dCase, dtype: torch.dtype = torch.float32) -> Problem:
    geometry = gdfast.geometry.Conv2dGeometry.of(
        "conv2d", case.input_shape, case.weight_shape, case.stride, case.padding * 2,
        case.dilation, case.groups,
    )  # fmt: skip
    strides = tuple(
        gdfast.geometry.dense_strides(size, True)
        for size in (case.input_shape, case.weight_shape, case.output_shape)
    )
    return Problem(geometry, strides, dtype, torch.device("cpu"), "tf32")


def by_tile(case: Conv2dCase, values: dict[str, Tensor], tile: Tile | None) -> tuple[Tensor, ...]:
    input, weight, bias, grad = values.values()
    problem = problem_of(case, input.dtype)
    return (
        bind_conv2d.bind_forward(problem, tile)(input, weight, bias),
        bind_conv2d.bind_grad_input(problem, tile)(grad, weight),
        *bind_conv2d.bind_grad_weight(problem, tile)(grad, input, True),
    )


@pytest.mark.parametrize("k", [16, 64])
@pytest.mark.parametrize(("m", "n"), [(16, 16), (32, 128), (128, 32)])
def test_any_tile(m: int, n: int, k: int) -> None:
    case = Conv2dCase("", 1, 32, 5, 5, 40, 2, 1, (2, 1), (1, 1))
    values = tensors_of(case, torch.float32, True)
    check(case, values, by_tile(case, values, Tile(m, n, k, 4, 2)))


@pytest.mark.parametrize("name", ["1x1-stride-2", "depthwise", "batch-33"])
def test_split_sums_have_the_same_bits_in_every_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_NAME[name]
    values = tensors_of(replace(case, N=33), torch.float32, True)
    tile = None if name == "depthwise" else Tile(64, 64, 16, 4, 2)

    def grads() -> tuple[Tensor, Tensor]:
        problem = problem_of(replace(case, N=33))
        return bind_conv2d.bind_grad_weight(problem, tile)(values["grad"], values["input"], True)

    whole = grads()
    monkeypatch.setattr(launch, "gpu", lambda device: launch.H100._replace(multiprocessors=3))
    one, other = grads(), grads()
    for a, b, unsplit in zip(one, other, whole, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, unsplit)  # split, it rounds otherwise
        torch.testing.assert_close(a, unsplit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["everything-asymmetric", "depthwise-multiplier-2"])
def test_batches_past_32_bits_run_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(BY_NAME[name], N=5)
    values = tensors_of(case, torch.float32, True)
    # Two images at a time, as if offsets were that short.
    padded = case.C * (case.H + 2 * case.padding[0]) * (case.W + 2 * case.padding[1])
    monkeypatch.setattr(windows, "MOST", 2 * max(padded, case.K * case.P * case.Q))
    parts = [part.geometry.N for _, part in problem_of(case).parts()]
    assert len(parts) > 1 and sum(parts) == 5
    tile = None if name.startswith("depthwise") else Tile(64, 16, 16, 4, 2)
    check(case, values, by_tile(case, values, tile))


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu"])
@pytest.mark.parametrize("name", ["c17-k10", "depthwise"])
def test_activations(name: str, activation: str) -> None:
    case = BY_NAME[name]
    values = tensors_of(case, torch.float32, True)
    input, weight, bias, _ = values.values()
    input[0, 0, 0, 0] = torch.nan
    problem = problem_of(case)
    tile = None if problem.is_depthwise else Tile(64, 16, 16, 4, 2)
    kernel = bind_conv2d.bind_forward(problem, tile, activation, 0.2)
    plain = torch.ops.gdfast.conv2d(
        input, weight, bias, case.stride, case.padding * 2, case.dilation, case.groups, "reference"
    )
    expected = gdfast.backends.activation.activate(plain, activation, 0.2)
    torch.testing.assert_close(kernel(input, weight, bias), expected, equal_nan=True)


def test_gradients_through_autograd_and_of_gradients() -> None:
    input = torch.randn(2, 4, 7, 6, requires_grad=True)
    weight = torch.randn(6, 2, 3, 2, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    results = []
    for backend in ("triton", "reference"):
        output = ops.conv2d(input, weight, bias, (2, 1), 1, 1, 2, backend=backend)
        leaves = input, weight, bias
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        results.append((output, *grads, *second))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_compiled_graphs_see_the_kernels() -> None:
    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = gdfast.nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu()

    layers = Layers()
    input = torch.randn(2, 3, 6, 6)
    expected = layers(input)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with gdfast.backend("triton"):
        compiled = torch.compile(layers, fullgraph=True, backend=backend)
        output = compiled(input)
    assert len(graphs) == 1
    torch.testing.assert_close(output, expected)
