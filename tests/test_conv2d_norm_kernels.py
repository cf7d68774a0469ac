"""A convolution and the norm behind it as one CPU kernel: exactly what the kernels of both give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gdfast import native, nn
from gdfast.backends import (
    cpu,
    cpu_algorithms,
    cpu_batch_norm,
    cpu_conv2d_norm,
    plans,
    tuning_fastest,
)
from gdfast.ops import batch_norm_dispatch, conv2d_dispatch
from gdfast.ops.conv2d_norm_act_plans import backward_plan, forward_plan

pytestmark = pytest.mark.usefixtures("fresh_registry", "compiled_cpu")


@dataclass(frozen=True)
class Case:
    """A convolution with "same" padding, unless told otherwise, and the norm behind it."""

    N: int
    C: int
    H: int
    W: int
    K: int
    kernel: int = 1
    stride: int = 1
    activation: str = "relu6"
    residual: bool = False
    bias: bool = False
    padding: tuple[int, int] | None = None

    @property
    def groups(self) -> int:
        return 1 if self.kernel == 1 else self.C

    @property
    def geometry(self) -> tuple[Any, ...]:
        rows, columns = self.padding or (self.kernel // 2,) * 2
        return (self.stride, self.stride), (rows, columns) * 2, (1, 1), self.groups


# Half a megabyte of output each: less is left apart.
CASES = [
    Case(2, 24, 21, 26, 144),
    Case(2, 9, 27, 31, 93, activation="silu", residual=True, bias=True),
    Case(1, 70, 31, 33, 290, activation="leaky_relu", residual=True),
    Case(3, 17, 34, 33, 45, activation="none", residual=True),
    Case(2, 93, 27, 33, 93, kernel=3, bias=True),
    Case(2, 96, 53, 55, 96, kernel=3, stride=2),
    Case(3, 93, 55, 46, 93, kernel=3, stride=2, activation="relu", residual=True, bias=True),
    Case(3, 61, 27, 29, 61, kernel=5, activation="none"),
    # Pieces begin at the last pixel of a line, which sees one column of the image.
    Case(8, 64, 50, 9, 64, kernel=3, activation="none", padding=(1, 2)),
    Case(9, 40, 46, 40, 40, kernel=5, stride=2, activation="leaky_relu"),
    Case(5, 40, 25, 29, 40, kernel=7, activation="silu"),
]
FORWARD_ONLY = [Case(4, 50, 61, 60, 11), Case(2, 300, 27, 33, 90, activation="none")]


class Both:
    """The kernels of a case by themselves and in plans, on tensors of their own."""

    def __init__(self, case: Case) -> None:
        def image(*size: int) -> Tensor:
            return torch.randn(size).contiguous(memory_format=torch.channels_last)

        self.case = case
        self.input = image(case.N, case.C, case.H, case.W)
        self.weight = image(case.K, case.C // case.groups, case.kernel, case.kernel)
        self.bias = torch.randn(case.K) if case.bias else None
        self.query = query = conv2d_dispatch.conv2d_query(
            "conv2d", self.input, self.weight, self.bias, *case.geometry
        )
        size = query.geometry.output_size
        self.params = torch.rand(case.K) + 0.5, torch.randn(case.K)
        self.residual = image(*size) if case.residual else None
        self.grad = image(*size)
        settings: Any = True, 1e-5, case.activation, 0.1
        self.source = batch_norm_dispatch.pre_activation(case.activation, 0.1, self.residual)
        self.conv = cpu.conv2d(query, cpu_algorithms.DIRECT)
        self.norm = cpu_batch_norm.forward(
            batch_norm_dispatch.backward_query(self.grad, *self.params, *settings, self.source)
        )
        self.norm_backward = cpu_batch_norm.backward(
            batch_norm_dispatch.backward_query(self.grad, *self.params, *settings, self.source)
        )
        self.conv_input = cpu.conv2d_grad_input(query, cpu_algorithms.DIRECT)
        self.conv_weight = cpu.conv2d_grad_weight(query, cpu_algorithms.DIRECT)

    def running(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.case.K), torch.ones(self.case.K)

    def apart(self) -> tuple[Tensor, ...]:
        """Forward: the convolution's output; output, mean, invstd; the running statistics."""
        running = self.running()
        between = self.conv(self.input, self.weight, self.bias)
        results = self.norm(between, *self.params, *running, self.residual, 0.1)
        return between, *results, *running

    def as_one(self) -> tuple[Tensor, ...]:
        running, batches = self.running(), torch.tensor(3)
        tensors = (
            self.input, self.weight, self.bias, *self.params, *running, self.residual, batches
        )  # fmt: skip
        plan = forward_plan(
            self.conv, self.norm, tensors, self.grad,
            training=True, has_moments=False, wants_mask=False,
        )  # fmt: skip
        assert plan is not None
        results: Any = plan(tensors, 0.1, torch.get_num_threads(), 0)
        output, between, mean, invstd, mask, cast = results
        assert mask is None and cast is None
        assert batches == 4
        return between, output, mean, invstd, *running

    def gradients(self) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Apart and as one: those of input, weight, bias; the norm's weight and bias; residual."""
        between, output, mean, invstd, *_ = self.apart()
        other = {"input": None, "residual": self.residual, "output": output}[self.source]
        of_norm = between, *self.params, other, mean, invstd
        wanted = self.case.bias, True, True, self.case.residual
        grad, *rest = self.norm_backward(self.grad, *of_norm, (True, *wanted[1:]))
        assert grad is not None
        apart = (
            self.conv_input(grad, self.weight),
            *self.conv_weight(grad, self.input, self.case.bias),
            *rest,
        )
        needs = True, True, *wanted[:3], False, False, wanted[3]
        saved = self.input, self.weight, *of_norm
        kernels = self.norm_backward, self.conv_input, self.conv_weight
        plan = backward_plan(*kernels, self.grad, saved, needs)
        assert plan is not None
        results = plan((self.grad, *saved), 0.0, torch.get_num_threads(), 0)
        assert results is not None
        return apart, results


def joins(both: Both) -> tuple[bool, bool]:
    """Whether the plans, forward and backward, have one kernel for all."""
    kernels = both.norm_backward, both.conv_input, both.conv_weight
    return (
        cpu_conv2d_norm.forward_launch(both.conv, both.norm) is not None,
        cpu_conv2d_norm.backward_launch(*kernels) is not None,
    )


def assert_same(one: tuple[Tensor | None, ...], other: tuple[Tensor | None, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", CASES + FORWARD_ONLY, ids=str)
@pytest.mark.usefixtures("nan_filled_memory", "threads")
def test_forward(case: Case, count: int, isa: str) -> None:
    torch.set_num_threads(count)
    both = Both(case)
    assert joins(both)[0]
    assert_same(both.apart(), both.as_one())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("nan_filled_memory", "threads")
def test_gradients(case: Case, count: int, isa: str) -> None:
    torch.set_num_threads(count)
    both = Both(case)
    assert joins(both)[1]
    assert_same(*both.gradients())


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=str)
@pytest.mark.parametrize("where", ["input", "grad", "weight"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite(case: Case, where: str, value: float) -> None:
    both = Both(case)
    tensor: Tensor = getattr(both, where)
    tensor[0, 0, 0, 0] = value
    assert_same(both.apart(), both.as_one())
    assert_same(*both.gradients())


class TestWhatIsLeftApart:
    def test_a_gradient_narrower_than_the_image(self) -> None:
        for case in FORWARD_ONLY:
            assert joins(Both(case)) == (True, False)

    @pytest.mark.parametrize(
        "case",
        [
            Case(1, 24, 20, 20, 144),  # small
            Case(2, 24, 42, 52, 144, stride=2),
            Case(2, 8, 57, 53, 93),
            Case(8, 300, 7, 7, 600, stride=2),
        ],
        ids=str,
    )
    def test_convolutions(self, case: Case) -> None:
        assert joins(Both(case)) == (False, False)

    @pytest.mark.usefixtures("threads")
    def test_gradients_whose_channels_threads_share_out(self) -> None:
        both = Both(Case(8, 300, 7, 7, 600))
        torch.set_num_threads(1)
        assert joins(both)[1]
        torch.set_num_threads(2)
        assert not joins(both)[1]

    def test_other_layouts_and_types(self) -> None:
        case = CASES[4]
        plain = torch.randn(case.N, case.C, case.H, case.W)
        double = plain.double()
        for input in (plain, double.contiguous(memory_format=torch.channels_last)):
            weight = torch.randn(93, 1, 3, 3, dtype=input.dtype)
            query = conv2d_dispatch.conv2d_query("conv2d", input, weight, None, *case.geometry)
            assert not cpu.joins_norm("conv2d_grad_input", query)

    def test_evaluation_and_kernels_of_others(self) -> None:
        both = Both(CASES[4])
        evaluation = cpu_batch_norm.forward(
            batch_norm_dispatch.backward_query(
                both.grad, *both.params, False, 1e-5, "relu6", 0.0, "input"
            )
        )
        assert cpu_conv2d_norm.forward_launch(both.conv, evaluation) is None
        assert cpu_conv2d_norm.forward_launch(lambda *_: None, both.norm) is None


def test_a_layer_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.ConvNormAct(24, 144, activation="relu6")
    batch = torch.randn(2, 24, 21, 26).contiguous(memory_format=torch.channels_last)

    def train() -> tuple[Tensor | None, ...]:
        conv2d_dispatch.forget_kernels()
        layer.norm.reset_running_stats()
        results: list[Tensor | None] = []
        for _ in range(4):
            image = batch.clone().requires_grad_()
            output = layer(image)
            output.sigmoid().sum().backward()
            results += [output.detach(), image.grad, *(p.grad for p in layer.parameters())]
            layer.zero_grad()
        running = layer.norm.running_mean, layer.norm.running_var
        return *results, *(each.clone() for each in running if each is not None)

    ran = []
    for way in ("forward_launch", "backward_launch"):
        found = getattr(cpu_conv2d_norm, way)

        def noted(*kernels: Any, found: Any = found) -> Any:
            ran.append(found(*kernels))
            return ran[-1]

        monkeypatch.setattr(cpu_conv2d_norm, way, noted)
    together = train()
    assert len(ran) == 2
    assert None not in ran
    with plans.disabled():
        assert_same(together, train())


def test_native_is_charged_for_what_a_norm_would_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_fastest.memory, "seconds_of_fresh_pages", lambda number: 0.0)
    both = Both(CASES[0])
    assert tuning_fastest.seconds_elsewhere("conv2d", both.query) == 0
    for op in ("conv2d_grad_input", "conv2d_grad_weight"):
        seconds = tuning_fastest.seconds_elsewhere(op, both.query)
        assert seconds == pytest.approx(both.grad.numel() * 4 / 40e9)


def test_numbers_of_threads_are_checked() -> None:
    assert native.cpu is not None
    (problem,) = plans.told(Both(CASES[0]).conv)
    with pytest.raises(ValueError, match="threads: expected >= 1, got 0"):
        native.cpu.conv2d_norm_fits(problem, False, 0)
