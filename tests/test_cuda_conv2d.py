"""The CUDA convolution kernels, on a GPU or in the simulator, against native and float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_batch_norm import strides
from torch import Tensor

import gdfast
from gdfast import native, ops
from gdfast.backends import cuda_conv2d, cuda_problem, cuda_tiles
from gdfast.backends.activation import activate
from gdfast.bench.cases import ODD, Conv2dCase
from gdfast.bench.workload import allowed_error, relative_error
from gdfast.geometry import Conv2dGeometry

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "float32_as_it_is"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

BY_NAME = {case.name: case for case in ODD}
# One for each way through the kernels.
FEW = [
    # Strides over nothing, which kernels replace by 1.
    Conv2dCase("1x1-stride-over-image", 3, 20, 3, 2, 18, 1, 1, stride=(3, 2)),
    *(BY_NAME[name]
    for name in (
        "everything-asymmetric", "batch-0", "batch-33", "1x1-stride-2", "c17-k10", "3x3-stride-2",
        "stride-over-kernel", "groups-5-stride-2", "depthwise-multiplier-2",
    ))
]  # fmt: skip
# Read 16 bytes at a time in every dtype; more rows and columns than a tile, and parts of tiles.
WHOLE = Conv2dCase("whole-chunks", 2, 48, 13, 11, 144, 3, 2, (2, 1), (1, 1), (1, 2), groups=2)
PASSES = ("output", "grad_input", "grad_weight", "grad_bias")
# The largest relative error of products of TF32 numbers, of 11 significant bits.
TF32_ERROR = 2.0**-11


@pytest.fixture
def float32_as_it_is() -> Iterator[None]:
    """Native and ours multiply float32 in full."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def tensors_of(
    case: Conv2dCase, dtype: torch.dtype, channels_last: bool, device: torch.device
) -> dict[str, Tensor]:
    sizes = {
        "input": case.input_shape, "weight": case.weight_shape, "bias": (case.K,),
        "grad": case.output_shape,
    }  # fmt: skip
    format = torch.channels_last if channels_last else torch.contiguous_format
    values = {name: torch.randn(size).to(device, dtype) for name, size in sizes.items()}
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


def query_of(case: Conv2dCase, values: dict[str, Tensor]) -> gdfast.backends.Conv2dQuery:
    geometry = Conv2dGeometry.of(
        "conv2d", case.input_shape, case.weight_shape, case.stride, case.padding * 2,
        case.dilation, case.groups,
    )  # fmt: skip
    input, weight, _, grad = values.values()
    layout = input.stride(), weight.stride(), grad.stride()
    return gdfast.backends.Conv2dQuery(input.device, input.dtype, geometry=geometry, strides=layout)


def with_activation(
    query: gdfast.backends.Conv2dQuery, activation: str, slope: float
) -> gdfast.backends.Conv2dActQuery:
    return gdfast.backends.Conv2dActQuery(
        query.device, query.dtype, geometry=query.geometry, strides=query.strides,
        activation=activation, negative_slope=slope,
    )  # fmt: skip


def check_bias_and_activation(
    case: Conv2dCase, values: dict[str, Tensor], by: str, activation: str, exact: Tensor
) -> None:
    """A candidate's forward pass in float16, with a bias and without; `exact` has the bias."""
    input, weight, bias, _ = values.values()
    query = with_activation(query_of(case, values), activation, 0.25)
    kernel = cuda_conv2d.conv2d(query, by)
    for given, sums in ((bias, exact), (None, exact - bias.double()[:, None, None])):
        expected = activate(sums, activation, 0.25).half()
        torch.testing.assert_close(kernel(input, weight, given), expected, rtol=2e-3, atol=2e-3)


def by_tile(case: Conv2dCase, values: dict[str, Tensor], tile: str) -> tuple[Tensor, ...]:
    input, weight, bias, grad = values.values()
    query = query_of(case, values)
    return (
        cuda_conv2d.conv2d(query, tile)(input, weight, bias),
        cuda_conv2d.conv2d_grad_input(query, tile)(grad, weight),
        *cuda_conv2d.conv2d_grad_weight(query, tile)(grad, input, True),
    )


def check(
    case: Conv2dCase, values: dict[str, Tensor], ours: tuple[Tensor, ...], least: float = 0.0
) -> None:
    natives = passes(case, values, "reference")
    exact = passes(case, {name: t.double() for name, t in values.items()}, "reference")
    for name, our, native_one, expected in zip(PASSES, ours, natives, exact, strict=True):
        assert our.dtype == native_one.dtype, name
        assert strides(our) == strides(native_one) or not case.N, name
        # Sums of this many numbers; with a handful of results chance may make native's error tiny.
        terms = {"output": case.C // case.groups * case.R * case.S, "grad_input": case.K}
        count = terms.get(name, max(1, case.N * case.P * case.Q))
        type = torch.float64 if our.dtype == torch.float64 else torch.float32
        allowed = max(
            allowed_error(relative_error(native_one, expected), our.dtype, count),
            torch.finfo(type).eps * count**0.5,
            least,
        )
        error = relative_error(our, expected)
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("case", ODD, ids=str)
def test_channels_last(case: Conv2dCase, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.float32, True, cuda_device)
    check(case, values, passes(case, values, "cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_dtypes_and_layouts(
    case: Conv2dCase, channels_last: bool, dtype: torch.dtype, cuda_device: torch.device
) -> None:
    values = tensors_of(case, dtype, channels_last, cuda_device)
    check(case, values, passes(case, values, "cuda"))


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize("case", [BY_NAME["c17-k10"], BY_NAME["same-3x3"]], ids=str)
def test_precisions_of_float32(case: Conv2dCase, precision: str, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.float32, True, cuda_device)
    with gdfast.precision("strict" if precision == "ieee" else "fast"):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32"):
            ours = passes(case, values, "cuda")
            kernel = cuda_conv2d.conv2d(query_of(case, values))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            plain = kernel(values["input"], values["weight"], values["bias"])
    check(case, values, ours, TF32_ERROR if precision == "tf32" else 0.0)
    # What is allowed holds at each call, not when a kernel is made.
    assert torch.equal(plain, ours[0]) == (precision != "tf32")


@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True),
     (torch.float32, False)],
    ids=["bfloat16", "float16", "tf32", "tf32x3"],
)  # fmt: skip
@pytest.mark.parametrize("tile", cuda_tiles.TILES)
def test_every_tile(tile: str, dtype: torch.dtype, tf32: bool, cuda_device: torch.device) -> None:
    values = tensors_of(WHOLE, dtype, True, cuda_device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        ours = by_tile(WHOLE, values, tile)
    check(WHOLE, values, ours, TF32_ERROR if tf32 else 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_numbers_one_by_one_give_the_bits_of_16_bytes_at_a_time(
    dtype: torch.dtype, cuda_device: torch.device
) -> None:
    values = tensors_of(WHOLE, dtype, True, cuda_device)
    shifted = {
        name: torch.empty(t.numel() + 1, dtype=dtype, device=cuda_device)[1:]
        .as_strided(t.shape, t.stride())
        .copy_(t)
        for name, t in values.items()
    }
    assert shifted["input"].data_ptr() % 16 != 0
    for chunks, one_by_one in zip(
        by_tile(WHOLE, values, "64x64"), by_tile(WHOLE, shifted, "64x64"), strict=True
    ):
        assert torch.equal(chunks, one_by_one)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_few_channels_with_zeros_beside_them(
    dtype: torch.dtype, channels_last: bool, cuda_device: torch.device
) -> None:
    case = Conv2dCase("stem", 2, 3, 11, 9, 24, 5, 3, (2, 1), (2, 1))
    values = tensors_of(case, dtype, channels_last, cuda_device)
    input, weight, bias, grad = values.values()
    query, tile = query_of(case, values), "64x64" + cuda_tiles.PADDED
    _, grad_input, *_ = passes(case, values, "cuda")
    output = cuda_conv2d.conv2d(query, tile)(input, weight, bias)
    grads = cuda_conv2d.conv2d_grad_weight(query, tile)(grad, input, True)
    check(case, values, (output, grad_input, *grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_of_4608_products(dtype: torch.dtype, cuda_device: torch.device) -> None:
    case = Conv2dCase("long-sums", 1, 512, 3, 4, 24, 3, 3, padding=(1, 1))
    values = tensors_of(case, dtype, True, cuda_device)
    check(case, values, passes(case, values, "cuda"))


def test_any_strides(cuda_device: torch.device) -> None:
    case = BY_NAME["same-3x3"]
    values = tensors_of(case, torch.float32, False, cuda_device)
    wide = torch.randn(case.N, case.C, case.H, 2 * case.W, device=cuda_device)
    values["input"] = wide[..., ::2]
    # Strides of 0, as y.sum().backward() gives them.
    values["grad"] = torch.randn(case.K, 1, 1, device=cuda_device).expand(case.output_shape)
    values["weight"] = values["weight"].transpose(2, 3)
    arguments = case.stride, case.padding * 2, case.dilation, case.groups
    input, weight, bias, grad = values.values()
    results = []
    for backend in ("cuda", "reference"):
        output = torch.ops.gdfast.conv2d(input, weight, bias, *arguments, backend)
        back = (False, *arguments, backend)
        grad_input = torch.ops.gdfast.conv2d_grad_input(grad, weight, input.shape, *back)
        grads = torch.ops.gdfast.conv2d_grad_weight(
            grad, input, weight.shape, False, True, *arguments, backend
        )
        results.append((output, grad_input, *grads))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


def test_images_more_than_31_bits_apart(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Memory that nobody touches costs nothing.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    case = Conv2dCase("far", 2, 8, 5, 4, 16, 3, 3, padding=(1, 1))
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    apart = 2**31 + 16
    memory = torch.empty(apart + 5 * 4 * 16, dtype=torch.bfloat16, device=cuda_device)
    far, near_query = dict(values), query_of(case, values)
    for name, channels in (("input", 8), ("grad", 16)):
        far[name] = memory.as_strided(
            values[name].shape, (apart, 1, case.W * channels, channels)
        ).copy_(values[name])
        query = query_of(case, far)
        input, weight, bias, grad = far.values()
        if name == "input":
            ours = cuda_conv2d.conv2d(replace_output(query, values))(input, weight, bias)
            near = cuda_conv2d.conv2d(near_query)(*list(values.values())[:3])
        else:
            ours = cuda_conv2d.conv2d_grad_input(query)(grad, weight)[1]
            near = cuda_conv2d.conv2d_grad_input(near_query)(values["grad"], weight)[1]
        assert torch.equal(ours, near)
        both = [
            cuda_conv2d.conv2d_grad_weight(each)(tensors["grad"], tensors["input"], True)
            for each, tensors in ((query, far), (near_query, values))
        ]
        for one, other in zip(*both, strict=True):
            assert torch.equal(one, other)
        far[name] = values[name]


def replace_output(query: Any, values: dict[str, Tensor]) -> Any:
    return replace(query, strides=(*query.strides[:2], values["grad"].stride()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_split_sums_have_the_same_bits_in_every_run(
    dtype: torch.dtype, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(BY_NAME["same-3x3"], N=9)
    values = tensors_of(case, dtype, True, cuda_device)
    whole = by_tile(case, values, "64x64")[2:]
    monkeypatch.setattr(cuda_conv2d, "splits", lambda query, tile: 5)
    one, other = by_tile(case, values, "64x64"), by_tile(case, values, "64x64")
    check(case, values, one)
    for a, b, unsplit in zip(one[2:], other[2:], whole, strict=True):
        assert torch.equal(a, b)
        if dtype == torch.float32:
            assert not torch.equal(a, unsplit)  # split, it rounds otherwise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(
    dtype: torch.dtype, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.cuda_is_simulated:
        pytest.skip("needs `make cuda-simulator`")
    for case in (WHOLE, BY_NAME["everything-asymmetric"]):
        values = tensors_of(case, dtype, True, cuda_device)
        results = []
        for order in ("ascending", "descending"):
            monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
            results.append(passes(case, values, "cuda"))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "leaky_relu", "silu"])
def test_activations(activation: str, dtype: torch.dtype, cuda_device: torch.device) -> None:
    for case in (BY_NAME["c17-k10"], replace(WHOLE, N=1)):
        values = tensors_of(case, dtype, True, cuda_device)
        input, weight, bias, _ = values.values()
        input[0, 0, 0, 0] = torch.nan
        plain = torch.ops.gdfast.conv2d(
            input.double(), weight.double(), bias.double(), case.stride, case.padding * 2,
            case.dilation, case.groups, "reference",
        )  # fmt: skip
        expected = activate(plain, activation, 0.2).to(dtype)
        result = gdfast.ops.conv2d_act(
            input, weight, bias, case.stride, case.padding, case.dilation, case.groups,
            activation=activation, negative_slope=0.2, backend="cuda",
        )  # fmt: skip
        close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-4}
        torch.testing.assert_close(result, expected, equal_nan=True, **close)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("dtype", "precision", "tf32"),
    [(torch.bfloat16, "fast", False), (torch.float64, "fast", False),
     (torch.float32, "fast", True), (torch.float32, "fast", False),
     (torch.float32, "strict", False)],
    ids=["bfloat16", "float64", "tf32", "tf32x3", "ieee"],
)  # fmt: skip
def test_what_is_not_finite_goes_where_native_has_it(
    dtype: torch.dtype, precision: str, tf32: bool, value: float, cuda_device: torch.device
) -> None:
    case = Conv2dCase("not-finite", 2, 8, 9, 8, 8, 3, 3, (1, 1), (1, 1))
    values = tensors_of(case, dtype, True, cuda_device)
    # Beside numbers that TF32 holds as they are, beside others, and beside one another.
    values["weight"][5:] = 1.0
    values["input"][0, 1, 0, 3] = values["input"][1, 3, 4, 4] = values["weight"][2, 3, 1, 1] = value
    values["grad"][1, 4, 5, 3] = values["grad"][1, 2, 5, 3] = value
    with (
        gdfast.precision(precision),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32),
    ):
        ours = passes(case, values, "cuda")
    # In float64 native uses none of the algorithms that spread what is not finite.
    expected = passes(case, {name: t.double() for name, t in values.items()}, "reference")
    for name, our, exact in zip(PASSES, ours, expected, strict=True):
        assert torch.equal(our.isnan(), exact.isnan()), name
        assert torch.equal(our.isposinf(), exact.isposinf()), name
        assert torch.equal(our.isneginf(), exact.isneginf()), name


@pytest.mark.parametrize("sign", [False, True])
def test_three_products_of_tf32_keep_to_their_bound(sign: bool, cuda_device: torch.device) -> None:
    # As many products as the deepest layer of ResNet-50 has; errors of one sign add up.
    case = Conv2dCase("deep", 1, 512, 3, 3, 8, 3, 3)
    values = {
        name: t.abs() for name, t in tensors_of(case, torch.float32, True, cuda_device).items()
    }
    if sign:
        values["input"][:, ::2] *= -1
    query = query_of(case, values)
    ours = cuda_conv2d.conv2d(query)(values["input"], values["weight"], None)
    input, weight = values["input"].double(), values["weight"].double()
    magnitudes = torch.nn.functional.conv2d(input.abs(), weight)
    error = (ours - torch.nn.functional.conv2d(input, weight)).abs()
    assert ((2.0**-17 + 4608 * 2.0**-27) * magnitudes > error).all()


@pytest.mark.parametrize("name", ["everything-asymmetric", "3x3-stride-2", "same-3x3"])
def test_nothing_is_written_beside_the_outputs(name: str, cuda_device: torch.device) -> None:
    case = BY_NAME[name]
    values = tensors_of(case, torch.float32, True, cuda_device)
    for place in range(3):
        shape = (case.input_shape, case.weight_shape, case.output_shape)[place]
        whole, view = with_gaps(shape, cuda_device)
        layout = [values[n].stride() for n in ("input", "weight", "grad")]
        layout[place] = view.stride()
        problem, _ = cuda_problem.problem_of(replace(query_of(case, values), strides=tuple(layout)))
        way = native.cuda.Conv2dWay("tf32x3", "64x64")
        input, weight, bias, grad = (tensor.data_ptr() for tensor in values.values())
        workspace = torch.empty(3 * 4 * (case.K + weight_numel(case)), dtype=torch.uint8).to(
            cuda_device
        )
        grad_bias = torch.empty(case.K + 2, device=cuda_device).fill_(7.0)
        stream = gdfast.backends.cuda_stream.current(cuda_device)
        if place == 2:
            native.cuda.conv2d(problem, way, input, weight, bias, view.data_ptr(), 0, 0, *stream)
        elif place == 0:
            native.cuda.conv2d_grad_input(problem, way, grad, weight, view.data_ptr(), *stream)
        else:
            native.cuda.conv2d_grad_weight(
                problem, way, grad, input, view.data_ptr(), grad_bias[1:].data_ptr(),
                workspace.data_ptr(), 3, *stream,
            )  # fmt: skip
        expected = passes(case, values, "reference")[(1, 2, 0)[place]]
        torch.testing.assert_close(view, expected, rtol=1e-5, atol=1e-4)
        view.fill_(7.0)
        assert (whole == 7.0).all()
        assert grad_bias[0] == grad_bias[-1] == 7.0


def weight_numel(case: Conv2dCase) -> int:
    return math.prod(case.weight_shape)


def with_gaps(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    n, c, h, w = shape
    whole = torch.empty((n + 2, c + 2, h + 2, 2 * w + 1), device=device).fill_(7.0)
    view = whole[1:-1, 1:-1, 1:-1, 1:-1:2]
    return whole, view.fill_(math.nan)


def test_gradients_through_autograd_and_of_gradients(cuda_device: torch.device) -> None:
    values = [torch.randn(size, device=cuda_device) for size in ((2, 4, 7, 6), (6, 2, 3, 2), (6,))]
    results = []
    for backend, dtype in (("cuda", torch.float32), ("reference", torch.float64)):
        leaves = [value.to(dtype).requires_grad_() for value in values]
        output = ops.conv2d(*leaves, (2, 1), 1, 1, 2, backend=backend)
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        results.append((output, *grads, *second))
    for ours, exact in zip(*results, strict=True):
        # Numbers of a tensor differ by so much that small ones have the large ones' errors.
        assert relative_error(ours, exact) < 1e-5


def test_what_bindings_refuse(cuda_device: torch.device) -> None:
    with pytest.raises(ValueError, match="precision: expected tf32, tf32x3 or ieee, got fp8"):
        native.cuda.Conv2dWay("fp8", "64x64")
    with pytest.raises(ValueError, match="tile: expected 128x128, 128x64 or 64x64, got 8x8"):
        native.cuda.Conv2dWay("tf32", "8x8")
    case = BY_NAME["same-3x3"]
    query = query_of(case, tensors_of(case, torch.float32, True, cuda_device))
    problem, _ = cuda_problem.problem_of(query)
    way = native.cuda.Conv2dWay("tf32", "64x64")
    with pytest.raises(ValueError, match="splits: expected 1 to 65535, got 0"):
        native.cuda.conv2d_grad_weight(problem, way, 0, 0, 0, 0, 0, 0, 0, 0)
