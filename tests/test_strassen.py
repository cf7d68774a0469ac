"""Strassen's algorithm for 1x1 layers: within the error that it states, and switched off."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gdfast
from gdfast.backends import cpu, cpu_algorithms, cpu_batch_norm, cpu_conv2d_norm, plans
from gdfast.backends.registry import Conv2dActQuery, Conv2dQuery
from gdfast.bench.cases import Conv2dCase
from gdfast.ops import batch_norm_dispatch, conv2d_dispatch
from gdfast.ops.conv2d_norm_act_plans import backward_plan, forward_plan

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("nan_filled_memory", "threads")]

STATED_ERROR = cpu_algorithms.STATED_ERROR["strassen"]

CASES = (
    Conv2dCase("one-square", 1, 128, 3, 4, 128, 1, 1),
    Conv2dCase("one-pixel", 1, 256, 1, 1, 128, 1, 1),
    Conv2dCase("less-than-a-tile-more", 1, 128, 5, 7, 256, 1, 1),
    Conv2dCase("odd-halves", 2, 384, 9, 10, 128, 1, 1),
    Conv2dCase("several-parts", 3, 512, 7, 7, 256, 1, 1),
    Conv2dCase("many-pixels", 5, 128, 29, 31, 128, 1, 1),
    Conv2dCase("many-channels", 1, 1024, 14, 13, 640, 1, 1),
    Conv2dCase("strides", 3, 256, 15, 12, 128, 1, 1, (2, 3)),
)
KINDS = {
    "normal": torch.randn,
    "rectified": lambda size: torch.randn(size).relu(),
    "uniform": torch.rand,
    "shifted": lambda size: torch.randn(size) + 3,
}


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


class Layer:
    """The tensors of a case, and both passes over its pixels by an algorithm."""

    def __init__(self, case: Conv2dCase, kind: str = "normal") -> None:
        self.case = case
        self.input = channels_last(KINDS[kind](case.input_shape))
        self.grad_output = channels_last(KINDS[kind](case.output_shape))
        self.weight = torch.randn(case.weight_shape)
        self.bias = torch.randn(case.K)

    def query(self) -> Conv2dQuery:
        case = self.case
        geometry = case.stride, case.padding * 2, case.dilation, case.groups
        return conv2d_dispatch.conv2d_query("conv2d", self.input, self.weight, self.bias, *geometry)

    def passes(self, algorithm: str) -> tuple[Tensor, Tensor]:
        query = self.query()
        forward = cpu.conv2d(query, algorithm)
        return (
            forward(self.input, self.weight, self.bias),
            cpu.conv2d_grad_input(query, algorithm)(self.grad_output, self.weight),
        )

    def exact(self) -> tuple[Tensor, Tensor]:
        input, weight, bias = self.input.double(), self.weight.double(), self.bias.double()
        stride = self.case.stride
        grads = torch.ops.aten.convolution_backward(
            self.grad_output.double(), input, weight, [self.case.K], stride, (0, 0), (1, 1),
            False, (0, 0), 1, [True, False, False],
        )  # fmt: skip
        return torch.nn.functional.conv2d(input, weight, bias, stride), grads[0]


def error(tensor: Tensor, exact: Tensor) -> float:
    return ((tensor - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_stated_error_holds(case: Conv2dCase, kind: str, isa: str) -> None:
    layer = Layer(case, kind)
    exact = layer.exact()
    direct = layer.passes("direct")
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for result, other, expected in zip(layer.passes("strassen"), direct, exact, strict=True):
            assert error(result, expected) <= STATED_ERROR
            # It is this algorithm that ran: the direct one rounds otherwise.
            assert not torch.equal(result, other)
            assert result.stride() == other.stride()


@pytest.mark.parametrize(("case", "adds"), [(CASES[5], True), (CASES[0], True), (CASES[6], False)])
def test_gradients_added_to_what_is_there(case: Conv2dCase, adds: bool, isa: str) -> None:
    layer = Layer(case)
    kernel: Any = cpu.conv2d_grad_input(layer.query(), "strassen")
    assert kernel.adds == adds
    if not adds:
        return
    onto = torch.randn_like(layer.input)
    expected = kernel(layer.grad_output, layer.weight) + onto
    draft = plans.Draft(3)
    kernel.draft(draft, 0, 1, 2)
    draft.plan([])((layer.grad_output, layer.weight, onto), 0.0, torch.get_num_threads(), 0)
    assert torch.equal(onto, expected)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu"])
def test_activations(activation: str, isa: str) -> None:
    layer = Layer(CASES[4])
    plain = layer.query()
    query = Conv2dActQuery(
        plain.device, plain.dtype, plain.layout, geometry=plain.geometry, strides=plain.strides,
        activation=activation, negative_slope=0.1,
    )  # fmt: skip
    tensors = layer.input, layer.weight, layer.bias
    result, other = (cpu.conv2d(query, name)(*tensors) for name in ("strassen", "direct"))
    torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-4)
    assert not torch.equal(result, other)


def test_bitwise_repeatable(isa: str) -> None:
    for case in CASES:
        layer = Layer(case)
        torch.set_num_threads(2)
        for first, second in zip(layer.passes("strassen"), layer.passes("strassen"), strict=True):
            assert torch.equal(first, second)


def test_nothing_is_left_from_another_shape(isa: str) -> None:
    large, small = Layer(CASES[6]), Layer(CASES[2])
    expected = small.passes("strassen")
    large.input.fill_(math.nan)
    large.grad_output.fill_(math.nan)
    large.weight.fill_(math.nan)
    large.passes("strassen")
    for first, second in zip(expected, small.passes("strassen"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_within_twelve_pixels(value: float, isa: str) -> None:
    layer = Layer(CASES[2])
    layer.input[0, 5, 2, 1] = value  # of 5 x 7 pixels the 15th: in the second pair of tiles
    torch.set_num_threads(1)
    finite = layer.passes("strassen")[0].isfinite().all(1).flatten()
    assert not finite[15]
    assert finite[:12].all() and finite[24:].all()


def test_what_it_does_not_fit_is_done_directly(compiled_cpu: None) -> None:
    for sizes in ((2, 96, 8, 8, 128, 1, 1), (2, 128, 8, 8, 120, 1, 1), (2, 128, 8, 8, 128, 3, 3)):
        layer = Layer(Conv2dCase("", *sizes))
        result, other = (cpu.conv2d(layer.query(), name) for name in ("strassen", "direct"))
        tensors = layer.input, layer.weight, layer.bias
        assert torch.equal(result(*tensors), other(*tensors))


class TestCandidates:
    def names(self, op: str, case: Conv2dCase, tensor: Any = None) -> tuple[str, ...]:
        layer = Layer(case)
        if tensor is not None:
            layer.input = tensor(layer.input)
            layer.weight, layer.bias = (t.to(layer.input.dtype) for t in (layer.weight, layer.bias))
        return cpu.candidates(op, layer.query())

    def test_large_products(self, compiled_cpu: None) -> None:
        case = CASES[5]
        for op in ("conv2d", "conv2d_grad_input"):
            assert self.names(op, case) == ("direct", "strassen")
            with gdfast.precision("strict"):
                assert self.names(op, case) == ("direct",)
        assert self.names("conv2d_grad_weight", case) == ("direct",)
        assert self.names("conv2d", case, Tensor.contiguous) == ("direct",)
        assert self.names("conv2d", case, Tensor.double) == ("direct",)

    @pytest.mark.parametrize(
        "case",
        [
            Conv2dCase("few-pixels", 1, 128, 31, 33, 128, 1, 1),
            Conv2dCase("few-channels", 8, 64, 15, 15, 128, 1, 1),
            Conv2dCase("odd-channels", 8, 128, 15, 15, 200, 1, 1),
            Conv2dCase("padding", 8, 128, 15, 15, 128, 1, 1, padding=(1, 0)),
            Conv2dCase("groups", 8, 256, 15, 15, 256, 1, 1, groups=2),
        ],
        ids=str,
    )
    def test_others(self, case: Conv2dCase, compiled_cpu: None) -> None:
        assert self.names("conv2d", case) == ("direct",)


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_a_norm_joins_it(count: int, activation: str, isa: str) -> None:
    torch.set_num_threads(count)
    layer = Layer(Conv2dCase("norm", 3, 128, 25, 27, 256, 1, 1))
    query, params = layer.query(), (torch.rand(256) + 0.5, torch.randn(256))
    settings: Any = True, 1e-5, activation, 0.1, "input"
    of_norm = batch_norm_dispatch.backward_query(layer.grad_output, *params, *settings)
    norm, norm_backward = cpu_batch_norm.forward(of_norm), cpu_batch_norm.backward(of_norm)
    conv = cpu.conv2d(query, "strassen")
    conv_input = cpu.conv2d_grad_input(query, "strassen")
    conv_weight = cpu.conv2d_grad_weight(query, "direct")
    assert cpu_conv2d_norm.forward_launch(conv, norm) is not None
    assert cpu_conv2d_norm.backward_launch(norm_backward, conv_input, conv_weight) is not None

    running = torch.zeros(256), torch.ones(256)
    tensors = (layer.input, layer.weight, None, *params, *running, None, torch.tensor(0))
    plan = forward_plan(
        conv, norm, tensors, layer.grad_output, training=True, has_moments=False, wants_mask=False
    )
    assert plan is not None
    results: Any = plan(tensors, 0.1, count, 0)
    output, between, mean, invstd, *_ = results
    exact = torch.nn.functional.conv2d(layer.input.double(), layer.weight.double())
    assert error(between, exact) <= STATED_ERROR
    # Which pixels are a pair depends on where a piece begins: not the same bits as apart.
    assert error(between, conv(layer.input, layer.weight, None)) <= 2 * STATED_ERROR
    running = torch.zeros(256), torch.ones(256)
    expected: Any = norm(between, *params, *running, None, 0.1)
    for result, other in zip((output, mean, invstd), expected, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=0)

    saved = layer.input, layer.weight, between, *params, None, mean, invstd
    backward = backward_plan(
        norm_backward, conv_input, conv_weight, layer.grad_output, saved,
        (True, True, False, True, True, False, False, False),
    )  # fmt: skip
    assert backward is not None
    grads: Any = backward((layer.grad_output, *saved), 0.0, count, 0)
    grad, *_ = norm_backward(
        layer.grad_output, between, *params, None, mean, invstd, (True, True, True, False)
    )
    assert grad is not None
    layer.grad_output = grad
    assert error(grads[0], layer.exact()[1]) <= STATED_ERROR
    torch.testing.assert_close(grads[1], conv_weight(grad, layer.input, False)[0], rtol=0, atol=0)
