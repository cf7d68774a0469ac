"""The compiled convolution kernels, against float64 and native PyTorch's own error.

Every case of the table in every dtype and layout, on every instruction set of this machine, with
one thread and with two. The three passes are called without autograd, and in strict precision:
algorithms that trade error for speed have bounds of their own.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gdfast import native
from gdfast.bench.cases import ODD, Conv2dCase
from gdfast.geometry import is_channels_last
from gdfast.ops import conv2d_dispatch

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.usefixtures("nan_filled_memory", "threads", "strict"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "mixed", "sliced", "expanded")


@dataclass(frozen=True)
class Problem:
    """The tensors of one case, what float64 makes of them, and native's own errors."""

    case: Conv2dCase
    input: Tensor
    weight: Tensor
    bias: Tensor
    grad_output: Tensor
    exact: dict[str, np.ndarray]
    allowed: dict[str, float]

    @property
    def arguments(self) -> tuple[Any, ...]:
        case = self.case
        return case.stride, case.padding * 2, case.dilation, case.groups, "cpu"


@cache
def problem_of(case: Conv2dCase, dtype: torch.dtype, expanded: bool) -> Problem:
    generator = torch.Generator().manual_seed(1)
    shapes = case.input_shape, case.weight_shape, (case.K,), case.output_shape
    input, weight, bias, grad_output = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    if expanded:  # as y.mean().backward() gives it: a number whose sums are rounded
        grad_output = torch.tensor(0.7, dtype=dtype).expand(case.output_shape)
    tensors = input, weight, bias, grad_output
    exact = exact_passes(case, *(tensor.double().numpy() for tensor in tensors))
    magnitude = exact_passes(case, *(tensor.double().abs().numpy() for tensor in tensors))
    return Problem(case, *tensors, exact, allowed_errors(case, tensors, exact, magnitude))


def allowed_errors(
    case: Conv2dCase, tensors: Any, exact: dict[str, Any], magnitude: dict[str, Any]
) -> dict[str, float]:
    """2 x native's error + eps.

    eps is one rounding of the result and one of the sum of the terms' absolute values, in the type
    that they are added up in: where there are few results, native's may be right by chance.
    """
    dtype = tensors[0].dtype
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    native = native_passes(case, *tensors)
    return {
        name: 2 * largest_error(native[name], values)
        + torch.finfo(dtype).eps * float(np.abs(values).max(initial=0))
        + torch.finfo(accumulator).eps * float(magnitude[name].max(initial=0))
        for name, values in exact.items()
    }


def exact_passes(case: Conv2dCase, input: Any, weight: Any, bias: Any, grad: Any) -> dict[str, Any]:
    """The definition, tap by tap, in the widest type of this machine: better than float64."""
    input, weight, bias, grad = (a.astype(np.longdouble) for a in (input, weight, bias, grad))
    N, C, H, W = case.input_shape
    K, C_group, R, S = case.weight_shape
    G, K_group, P, Q = case.groups, case.K // case.groups, case.P, case.Q
    rows, columns = (size + 2 * pad for size, pad in zip((H, W), case.padding, strict=True))
    padded = np.zeros((N, C, rows, columns), np.longdouble)
    inside = np.s_[
        :, :, case.padding[0] : case.padding[0] + H, case.padding[1] : case.padding[1] + W
    ]
    padded[inside] = input
    grad_padded, grad_weight = np.zeros_like(padded), np.zeros_like(weight)
    output = np.zeros((N, G, K_group, P, Q), np.longdouble)
    grad = grad.reshape(N, G, K_group, P, Q)
    for r in range(R):
        for s in range(S):
            first = r * case.dilation[0], s * case.dilation[1]
            seen = np.s_[
                :, :,
                first[0] : first[0] + (P - 1) * case.stride[0] + 1 : case.stride[0],
                first[1] : first[1] + (Q - 1) * case.stride[1] + 1 : case.stride[1],
            ]  # fmt: skip
            pixels = padded[seen].reshape(N, G, C_group, P, Q)
            tap = weight[:, :, r, s].reshape(G, K_group, C_group)
            output += np.einsum("ngcpq,gkc->ngkpq", pixels, tap)
            grad_padded[seen] += np.einsum("ngkpq,gkc->ngcpq", grad, tap).reshape(N, C, P, Q)
            grad_weight[:, :, r, s] = np.einsum("ngkpq,ngcpq->gkc", grad, pixels).reshape(
                K, C_group
            )
    return {
        "output": output.reshape(N, K, P, Q) + bias[:, None, None],
        "grad_input": grad_padded[inside],
        "grad_weight": grad_weight,
        "grad_bias": grad.sum((0, 3, 4)).reshape(K),
    }


def native_passes(
    case: Conv2dCase, input: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> Any:
    geometry = case.stride, case.padding, case.dilation
    rest = False, (0, 0), case.groups
    output = torch.ops.aten.convolution(input, weight, bias, *geometry, *rest)
    grads = torch.ops.aten.convolution_backward(
        grad, input, weight, [case.K], *geometry, *rest, [True] * 3
    )
    return dict(
        zip(("output", "grad_input", "grad_weight", "grad_bias"), (output, *grads), strict=True)
    )


def largest_error(tensor: Tensor, exact: np.ndarray) -> float:
    assert tuple(tensor.shape) == exact.shape
    if exact.size == 0:
        return 0.0
    difference = np.abs(tensor.double().numpy().astype(np.longdouble) - exact)
    return float(difference.max()) if not np.isnan(difference).any() else math.nan


def check(name: str, tensor: Tensor, problem: Problem) -> None:
    error, allowed = largest_error(tensor, problem.exact[name]), problem.allowed[name]
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def lay_out(tensor: Tensor, layout: str, is_weight: bool = False) -> Tensor:
    if layout == "channels_last" or (layout == "mixed" and not is_weight):
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        # Every stride is off its usual value, and the first element off any alignment.
        n, c, h, w = tensor.shape
        whole = torch.full((n, c + 1, h + 2, 2 * w + 1), math.nan, dtype=tensor.dtype)
        view = whole[:, 1:, 1 : h + 1, 1::2]
        return view.copy_(tensor)
    return tensor


def run_passes(
    problem: Problem, input: Tensor, weight: Tensor, grad_output: Tensor
) -> dict[str, Tensor]:
    last = is_channels_last(input.shape, input.stride())
    output = conv2d_dispatch.conv2d(input, weight, problem.bias, *problem.arguments)
    grad_input = conv2d_dispatch.conv2d_grad_input(
        grad_output, weight, input.shape, last, *problem.arguments
    )
    grad_weight, grad_bias = conv2d_dispatch.conv2d_grad_weight(
        grad_output, input, weight.shape, last, True, *problem.arguments
    )
    return {
        "output": output, "grad_input": grad_input, "grad_weight": grad_weight,
        "grad_bias": grad_bias,
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_three_passes(case: Conv2dCase, dtype: torch.dtype, layout: str, isa: str) -> None:
    problem = problem_of(case, dtype, layout == "expanded")
    input = lay_out(problem.input, layout)
    weight = lay_out(problem.weight, layout, is_weight=True)
    grad_output = lay_out(problem.grad_output, layout)
    for count in (1, 2):
        torch.set_num_threads(count)
        for name, tensor in run_passes(problem, input, weight, grad_output).items():
            check(name, tensor, problem)


# The passes at sizes with several blocks of everything; ODD has small ones only.
BLOCKS = (
    Conv2dCase("blocks-3x3", 3, 70, 14, 17, 132, 3, 3, padding=(1, 1)),
    Conv2dCase("blocks-1x1", 5, 300, 7, 9, 260, 1, 1),
    Conv2dCase("own-panels", 2, 300, 7, 5, 1000, 1, 1),
    Conv2dCase("own-panels-stride-2", 3, 513, 9, 8, 1024, 1, 1, stride=(2, 2)),
    Conv2dCase("blocks-1x1-pixels", 4, 24, 19, 17, 40, 1, 1),
    Conv2dCase("blocks-1x1-stride-2", 3, 530, 21, 17, 47, 1, 1, stride=(2, 1)),
    Conv2dCase("blocks-stem", 2, 3, 37, 71, 64, 7, 7, stride=(2, 2), padding=(3, 3)),
    # Few channels: the taps of a line are read as one, and windows hang over every edge.
    Conv2dCase("blocks-lines", 2, 3, 9, 11, 32, 3, 5, stride=(1, 2), padding=(2, 4)),
    Conv2dCase("blocks-one-channel", 3, 1, 21, 5, 40, 5, 7, padding=(4, 6)),
    Conv2dCase(
        "blocks-depthwise", 3, 96, 29, 31, 96, 3, 3, stride=(1, 2), padding=(1, 1), groups=96
    ),
    Conv2dCase("blocks-depthwise-padding", 2, 40, 13, 9, 40, 3, 3, padding=(1, 2), groups=40),
    # More than a core's caches hold.
    Conv2dCase("blocks-depthwise-large", 2, 64, 70, 67, 64, 3, 3, padding=(1, 1), groups=64),
    Conv2dCase("blocks-few-large", 2, 3, 93, 91, 32, 3, 3, padding=(1, 1)),
    Conv2dCase("blocks-depthwise-5x5", 2, 40, 23, 26, 40, 5, 5, padding=(2, 2), groups=40),
)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_bitwise_repeatable_and_finite(
    case: Conv2dCase, dtype: torch.dtype, channels_last: bool, isa: str
) -> None:
    generator = torch.Generator().manual_seed(2)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    input, weight, grad_output = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
        for shape in (case.input_shape, case.weight_shape, case.output_shape)
    )
    problem = Problem(case, input, weight, torch.randn(case.K).to(dtype), grad_output, {}, {})
    torch.set_num_threads(2)
    first = run_passes(problem, input, weight, grad_output)
    for _ in range(2):
        again = run_passes(problem, input, weight, grad_output)
        for name, tensor in first.items():
            assert tensor.isfinite().all(), name
            assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_large_problems_against_float64(case: Conv2dCase, isa: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = case.input_shape, case.weight_shape, (case.K,), case.output_shape
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    exact, magnitude = (
        {n: t.numpy().astype(np.longdouble) for n, t in native_passes(case, *doubles).items()}
        for doubles in ([t.double() for t in tensors], [t.double().abs() for t in tensors])
    )
    problem = Problem(case, *tensors, exact, allowed_errors(case, tensors, exact, magnitude))
    torch.set_num_threads(2)
    for layout in ("contiguous", "channels_last"):
        input, weight, grad = (
            lay_out(t, layout) for t in (problem.input, problem.weight, problem.grad_output)
        )
        for name, tensor in run_passes(problem, input, weight, grad).items():
            check(name, tensor, problem)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Conv2dCase("dense", 2, 5, 9, 8, 6, 3, 3, (1, 1), (1, 1)),
        Conv2dCase("depthwise", 2, 19, 9, 9, 19, 3, 3, (1, 1), (1, 1), groups=19),
    ],
    ids=str,
)
def test_what_is_not_finite_goes_where_native_has_it(
    case: Conv2dCase, value: float, channels_last: bool, isa: str
) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    input, weight, grad_output = (
        torch.randn(shape).contiguous(memory_format=memory_format)
        for shape in (case.input_shape, case.weight_shape, case.output_shape)
    )
    input[0, 1, 0, 3] = value
    if channels_last:  # in planes a depthwise kernel multiplies the last column by zeros
        input[1, 0, 4, -1] = value
    weight[2, -1, 1, 1] = value
    # Inside, so that no tap falls on padding: 0 x Inf there is NaN in some of native's algorithms
    # and nothing in others.
    grad_output[1, 4, 5, 3] = value
    problem = Problem(case, input, weight, torch.randn(case.K), grad_output, {}, {})
    expected = native_passes(case, input, weight, problem.bias, grad_output)
    for name, tensor in run_passes(problem, input, weight, grad_output).items():
        assert torch.equal(tensor.isnan(), expected[name].isnan()), name
        assert torch.equal(tensor.isposinf(), expected[name].isposinf()), name
        assert torch.equal(tensor.isneginf(), expected[name].isneginf()), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    "case",
    [
        Conv2dCase("steps", 2, 3, 9, 13, 3, 5, 5, (2, 1), (0, 1), (2, 2), groups=3),
        Conv2dCase("wide", 1, 20, 5, 70, 20, 3, 3, padding=(1, 1), groups=20),
    ],
    ids=str,
)
def test_depthwise_weights_that_are_not_finite_spare_the_borders(
    case: Conv2dCase, layout: str, dtype: torch.dtype, value: float, isa: str
) -> None:
    input, weight, grad_output = (
        torch.rand(shape, dtype=dtype) + 1
        for shape in (case.input_shape, case.weight_shape, case.output_shape)
    )
    weight[1, 0, 0, -1] = value
    # A pixel is what the tap is if the tap alone, as a 1 among zeros, gives it anything.
    tap = torch.zeros(case.weight_shape)
    tap[1, 0, 0, -1] = 1
    bias = torch.zeros(case.K)
    seen = native_passes(case, input.float(), tap, bias, grad_output.float())
    problem = Problem(case, input, weight, bias.to(dtype), grad_output, {}, {})
    results = run_passes(problem, *(lay_out(t, layout) for t in (input, weight, grad_output)))
    for name in ("output", "grad_input"):
        assert (seen[name] > 0).any() and (seen[name][:, 1] == 0).any()
        expected = torch.where(seen[name] > 0, value, results[name].float().nan_to_num(-1, -1, -1))
        torch.testing.assert_close(results[name].float(), expected, rtol=0, atol=0, equal_nan=True)


def test_without_bias(isa: str) -> None:
    case = next(case for case in ODD if case.name == "everything-asymmetric")
    problem = problem_of(case, torch.float64, False)
    output = conv2d_dispatch.conv2d(problem.input, problem.weight, None, *problem.arguments)
    exact = problem.exact["output"] - problem.bias.numpy()[:, None, None]
    assert largest_error(output, exact) < 1e-14
    grad_weight, grad_bias = conv2d_dispatch.conv2d_grad_weight(
        problem.grad_output, problem.input, case.weight_shape, False, False, *problem.arguments
    )
    assert grad_bias is None
    check("grad_weight", grad_weight, problem)


def test_a_weight_with_negative_strides(isa: str) -> None:
    # torch has no such tensors, but kernels take any strides.
    case = Conv2dCase("negative-strides", 2, 20, 9, 8, 24, 3, 3, (1, 1), (1, 1))
    problem = problem_of(case, torch.float32, False)
    input, grad_output = (lay_out(t, "channels_last") for t in (problem.input, problem.grad_output))
    mirrored = problem.weight.flip(2, 3).contiguous()
    last = mirrored.data_ptr() + 8 * mirrored.element_size()
    n, c, h, w = mirrored.stride()
    output, grad_input = torch.empty_like(grad_output), torch.empty_like(input)
    described = native.cpu.Conv2dProblem(
        (*case.input_shape, case.K, case.R, case.S, case.P, case.Q), case.stride, case.padding,
        case.dilation, case.groups, "float32", input.stride(), (n, c, -h, -w), output.stride(),
    )  # fmt: skip
    native.cpu.conv2d(
        described, input.data_ptr(), last, problem.bias.data_ptr(), output.data_ptr(), 1
    )
    native.cpu.conv2d_grad_input(described, grad_output.data_ptr(), last, grad_input.data_ptr(), 1)
    check("output", output, problem)
    check("grad_input", grad_input, problem)


@pytest.mark.parametrize("count", [0, -1])
def test_without_threads_nothing_is_computed(count: int, compiled_cpu: None) -> None:
    ones = (1,) * 4
    problem = native.cpu.Conv2dProblem(
        (1,) * 9, (1, 1), (0, 0), (1, 1), 1, "float32", ones, ones, ones
    )
    tensor = torch.ones(1)
    address = tensor.data_ptr()
    calls = (
        lambda: native.cpu.conv2d(problem, address, address, 0, address, count),
        lambda: native.cpu.conv2d_grad_input(problem, address, address, address, count),
        lambda: native.cpu.conv2d_grad_weight(problem, address, address, address, 0, count),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"conv2d: threads: expected >= 1, got {count}"):
            call()


def test_called_from_several_threads_at_once(isa: str) -> None:
    # Python threads that each run kernels, as data-parallel training does.
    problems = [problem_of(case, torch.float32, False) for case in ODD if case.N]

    def work(problem: Problem) -> dict[str, Tensor]:
        return run_passes(problem, problem.input, problem.weight, problem.grad_output)

    torch.set_num_threads(1)
    alone = [work(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, problems * 3))
    for index, passes in enumerate(together):
        for name, tensor in passes.items():
            assert torch.equal(tensor, alone[index % len(problems)][name]), name
