"""Convolutions that multiply bfloat16 as it is: the kernels for AVX512_BF16.

Where the processor lacks it, its one instruction is emulated. The rest is tested as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_conv2d_kernels import (
    LAYOUTS,
    Problem,
    check,
    exact_passes,
    lay_out,
    native_passes,
    problem_of,
    run_passes,
)
from test_conv2d_memory import with_gaps
from test_tuning import Stopwatch, stopwatch  # noqa: F401  (a fixture)
from torch import Tensor

import gdfast
from gdfast import native, ops
from gdfast.backends import cpu, cpu_algorithms, tuning
from gdfast.bench import explain
from gdfast.bench.cases import ODD, Conv2dCase
from gdfast.errors import FallbackWarning

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("compiled_cpu", "threads")]

BF16 = torch.bfloat16
SUPPORTED = native.cpu.supported_isas() if native.cpu is not None else []


@pytest.fixture(params=["emulated_bf16", *[isa for isa in SUPPORTED if isa == "avx512_bf16"]])
def pairs(
    request: pytest.FixtureRequest, compiled_cpu: None, fresh_registry: None
) -> Iterator[str]:
    """The kernels of pairs, emulated and, where the processor has them, its own."""
    before = native.cpu.isa()
    assert native.cpu.select_isa(request.param)
    yield request.param
    native.cpu.select_isa(before)


# More than one of everything: parts of the reduction, panels and groups of panels, blocks of
# pixels, chunks of columns and of pairs of lines; and an odd one at the end.
LARGE = (
    Conv2dCase("parts", 1, 279, 3, 4, 37, 3, 3, padding=(1, 1)),
    Conv2dCase("panels", 1, 18, 3, 3, 530, 1, 1),
    Conv2dCase("blocks", 3, 17, 15, 14, 33, 3, 3, padding=(1, 1)),
    Conv2dCase("columns", 1, 16, 3, 203, 16, 3, 3, padding=(1, 1)),
    Conv2dCase("lines", 5, 20, 7, 7, 24, 3, 3, padding=(1, 1)),
    Conv2dCase("rows", 2, 130, 4, 5, 20, 3, 3, padding=(1, 1)),
    Conv2dCase("few-parts", 1, 15, 9, 10, 18, 7, 7, (2, 2), (3, 3)),
    Conv2dCase("groups-of-17-and-20", 2, 51, 6, 7, 60, 3, 3, (2, 1), (1, 1), groups=3),
    Conv2dCase("groups-of-32", 2, 64, 7, 5, 64, 3, 3, padding=(1, 1), groups=2),
    Conv2dCase("no-tap", 2, 20, 9, 10, 17, 1, 2, stride=(3, 4)),
)


@pytest.mark.parametrize("case", [*ODD, *LARGE], ids=str)
@pytest.mark.usefixtures("nan_filled_memory")
def test_three_passes(case: Conv2dCase, pairs: str) -> None:
    for layout, count in zip(LAYOUTS, itertools.cycle((1, 3))):
        problem = problem_of(case, BF16, layout == "expanded")
        input, grad_output = (lay_out(t, layout) for t in (problem.input, problem.grad_output))
        weight = lay_out(problem.weight, layout, is_weight=True)
        torch.set_num_threads(count)
        for name, tensor in run_passes(problem, input, weight, grad_output).items():
            check(name, tensor, problem)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.usefixtures("nan_filled_memory")
def test_whole_numbers_are_summed_exactly_and_rounded_once(
    case: Conv2dCase, channels_last: bool, pairs: str
) -> None:
    shapes = case.input_shape, case.weight_shape, (case.K,), case.output_shape
    tensors = [torch.randint(-9, 10, shape).to(BF16) for shape in shapes]
    exact = exact_passes(case, *(tensor.double().numpy() for tensor in tensors))
    problem = Problem(case, *tensors, exact, {})
    input, weight, grad_output = (
        lay_out(t, "channels_last" if channels_last else "contiguous")
        for t in (problem.input, problem.weight, problem.grad_output)
    )
    torch.set_num_threads(2)
    for _ in range(2):
        for name, tensor in run_passes(problem, input, weight, grad_output).items():
            expected = torch.from_numpy(exact[name].astype("float32")).to(BF16)
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_bitwise_repeatable(case: Conv2dCase, pairs: str) -> None:
    problem = problem_of(case, BF16, False)
    tensors = [
        lay_out(t, "channels_last") for t in (problem.input, problem.weight, problem.grad_output)
    ]
    torch.set_num_threads(2)
    first, again = run_passes(problem, *tensors), run_passes(problem, *tensors)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [5, 17])
def test_what_is_not_finite_goes_where_it_belongs(
    value: float, channels: int, channels_last: bool, pairs: str
) -> None:
    case = Conv2dCase("not-finite", 1, channels, 9, 8, 18, 3, 3, (1, 1), (1, 1))
    layout = "channels_last" if channels_last else "contiguous"
    input, weight, grad_output = (
        lay_out(torch.randn(shape).to(BF16), layout)
        for shape in (case.input_shape, case.weight_shape, case.output_shape)
    )
    # The last channel, and the last of 9 lines: what stands beside them in a pair is nothing.
    input[0, -1, 8, 3] = value
    weight[2, -1, 1, 1] = value
    grad_output[0, 4, 5, 3] = value
    problem = Problem(case, input, weight, torch.randn(case.K).to(BF16), grad_output, {}, {})
    wide = (t.float() for t in (input, weight, problem.bias, grad_output))
    expected = native_passes(case, *wide)
    for name, tensor in run_passes(problem, input, weight, grad_output).items():
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(tensor), kind(expected[name])), name


def test_rounds_to_nearest_even_and_takes_subnormal_numbers_for_zeros(pairs: str) -> None:
    most = torch.finfo(BF16).max
    sums = {  # below, at and above half of bfloat16's last place, and that of an odd number
        (1, 2**-9): 1, (1, 2**-8): 1, (1, 2**-8 + 2**-15): 1 + 2**-7, (1 + 2**-7, 2**-8): 1 + 2**-6,
        (most, 2.0**118): most, (most, 2.0**119): math.inf, (-most, -most): -math.inf,
        (2.0**-126, 0): 2.0**-126, (2.0**-126, 2.0**-127): 2.0**-126, (-(2.0**-127), 0): 0,
        (2.0**-125, -(2.0**-126 + 2.0**-132)): 0,
    }  # fmt: skip
    input = torch.tensor(list(sums)).to(BF16).t().reshape(1, 2, 1, -1)
    output = ops.conv2d(input, torch.ones(1, 2, 1, 1, dtype=BF16), backend="cpu").flatten()
    assert output.tolist() == list(sums.values())


@pytest.mark.parametrize("name", ["c17-k10", "c70-k130", "3x3-stride-2", "groups-of-17-and-20"])
def test_nothing_is_written_beside_the_outputs(name: str, pairs: str) -> None:
    case = next(case for case in (*ODD, *LARGE) if case.name == name)
    problem = problem_of(case, BF16, False)
    sizes = *case.input_shape, *(case.K, case.R, case.S, case.P, case.Q)
    plain = problem.input.stride(), problem.weight.stride(), problem.grad_output.stride()
    shapes = case.input_shape, case.weight_shape, case.output_shape

    def with_room(place: int) -> tuple[Any, Tensor, Tensor]:
        whole, view = (t.to(BF16) for t in with_gaps(shapes[place]))
        view = whole[1:-1, 1:-1, 1:-1, 1:-1:2]
        strides = [*plain[:place], view.stride(), *plain[place + 1 :]]
        problem = native.cpu.Conv2dProblem(
            sizes, case.stride, case.padding, case.dilation, case.groups, "bfloat16", *strides,
            "bf16",
        )  # fmt: skip
        return problem, whole, view

    at = [t.data_ptr() for t in (problem.input, problem.weight, problem.bias, problem.grad_output)]
    bias = torch.full((case.K + 2,), 7.0, dtype=BF16)
    passes = {
        "output": (2, lambda p, out: native.cpu.conv2d(p, *at[:3], out, 2)),
        "grad_input": (0, lambda p, out: native.cpu.conv2d_grad_input(p, at[3], at[1], out, 2)),
        "grad_weight": (
            1,
            lambda p, out: native.cpu.conv2d_grad_weight(
                p, at[3], at[0], out, bias[1:].data_ptr(), 2
            ),
        ),
    }
    for result, (place, run) in passes.items():
        described, whole, view = with_room(place)
        run(described, view.data_ptr())
        check(result, view, problem)
        view.fill_(7.0)
        assert (whole == 7.0).all(), result
    check("grad_bias", bias[1:-1], problem)
    assert bias[0] == bias[-1] == 7.0


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_what_they_do_not_take_is_left_to_the_kernels_beside(
    dtype: torch.dtype, pairs: str
) -> None:
    cases = ODD[:4] if dtype == torch.float32 else [c for c in ODD if c.groups == c.C > 1]
    results = []
    for isa in (pairs, "baseline" if pairs == "emulated_bf16" else "avx512"):
        assert native.cpu.select_isa(isa)
        problems = [problem_of(case, dtype, False) for case in cases]
        results.append([run_passes(p, p.input, p.weight, p.grad_output) for p in problems])
    for ours, beside in zip(*results, strict=True):
        assert all(torch.equal(tensor, beside[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu"])
def test_an_activation_is_applied_before_the_rounding(activation: str, pairs: str) -> None:
    input, weight, bias = torch.randn(2, 18, 7, 9), torch.randn(35, 18, 3, 3), torch.randn(35)
    tensors = [t.to(BF16) for t in (input, weight, bias)]
    output = ops.conv2d_act(*tensors, padding=1, activation=activation, backend="cpu")
    exact = getattr(F, activation)(F.conv2d(*(t.double() for t in tensors), padding=1))
    # Sums are exact but for 1e-5 or so: all but a few are the one number nearest.
    torch.testing.assert_close(output, exact.to(BF16), rtol=2**-7, atol=1e-4)
    assert (output == exact.to(BF16)).double().mean() > 0.99


class TestAutocast:
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_runs_them_and_gives_float32_its_gradients(
        self, channels_last: bool, pairs: str
    ) -> None:
        layout = "channels_last" if channels_last else "contiguous"
        tensors = [torch.randn(2, 20, 9, 8), torch.randn(24, 20, 3, 3), torch.randn(24)]
        tensors[:2] = [lay_out(t, layout) for t in tensors[:2]]
        tensors = [t.requires_grad_() for t in tensors]
        with tuning.recorded({}) as uses, torch.autocast("cpu", BF16):
            output = ops.conv2d(*tensors, padding=1, stride=2, backend="cpu")
        assert output.dtype == BF16
        grad = torch.randn(output.shape).to(BF16)
        with tuning.recorded({}) as more:
            grads = torch.autograd.grad(output, tensors, grad)
        assert [use.choice.name for use in (*uses, *more)] == ["bf16"] * 3
        assert [g.dtype for g in grads] == [torch.float32] * 3
        # Of what autocast makes of them, in float64.
        exact = [t.detach().to(BF16).double().requires_grad_() for t in tensors]
        expected = F.conv2d(*exact, padding=1, stride=2)
        pairs_of = zip(
            (output, *grads),
            (expected, *torch.autograd.grad(expected, exact, grad.double())),
            strict=True,
        )
        for ours, theirs in pairs_of:
            torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-3)

    def test_empty_batch(self, pairs: str) -> None:
        input, weight = torch.randn(0, 20, 9, 8), torch.randn(24, 20, 3, 3, requires_grad=True)
        with torch.autocast("cpu", BF16):
            output = ops.conv2d(input, weight, backend="cpu")
        assert output.dtype == BF16 and output.shape == (0, 24, 7, 6)
        output.sum().backward()
        assert not weight.grad.any()


def convolve(channels: int = 32, backend: str = "auto", **options: Any) -> list[Any]:
    """What each pass was run by."""
    input = torch.randn(4, channels, 30, 30).to(BF16).requires_grad_()
    weight = torch.randn(32, channels // options.get("groups", 1), 3, 3).to(BF16).requires_grad_()
    with tuning.recorded({}) as uses:
        output = ops.conv2d(input, weight, backend=backend, **options)
        output.backward(torch.ones_like(output))
    return uses


class TestChoice:
    def test_candidates(self, pairs: str) -> None:
        for use in convolve():
            assert use.candidates == ("direct", "winograd", "bf16", "native")
        with gdfast.precision("strict"):  # subnormal numbers count for 0 in pairs
            for use in convolve():
                assert use.candidates == ("direct", "native")
        for use in convolve(groups=2):
            assert use.candidates == ("direct", "winograd", "bf16", "native")
        for use in convolve(stride=2):
            assert use.candidates == ("direct", "bf16", "native")
        for use in convolve(groups=4):
            assert use.candidates == ("direct", "winograd", "native")

    def test_without_times_it_is_native_s_unless_asked_for_by_name(self, pairs: str) -> None:
        assert [use.choice.name for use in convolve()] == ["native"] * 3
        assert [use.choice.name for use in convolve(backend="cpu", stride=2)] == ["bf16"] * 3

    @pytest.mark.parametrize("fastest", ["direct", "winograd", "bf16", "native"])
    def test_the_fastest_runs(
        self,
        fastest: str,
        pairs: str,
        stopwatch: Stopwatch,  # noqa: F811
    ) -> None:
        seconds = {"direct": 3.0, "winograd": 3.5, "bf16": 2.0, "native": 4.0}
        stopwatch.seconds = seconds | {fastest: 1.0}
        assert [use.choice.name for use in convolve()] == [fastest] * 3
        assert stopwatch.timed == [tuple(seconds)] * 3

    def test_what_is_wrong_is_not_timed(
        self,
        pairs: str,
        stopwatch: Stopwatch,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def conv2d(query: Any, by: str = "") -> Any:
            kernel = run(query, by)
            return lambda *tensors: kernel(*tensors) * (1.1 if by == "bf16" else 1)

        run = cpu.BACKEND.operations["conv2d"]
        monkeypatch.setitem(cpu.BACKEND.operations, "conv2d", conv2d)
        stopwatch.seconds = {"direct": 3.0, "winograd": 5.0, "bf16": 0.1, "native": 4.0}
        with pytest.warns(FallbackWarning, match="conv2d: bf16: expected the right result"):
            uses = convolve()
        assert [use.choice.name for use in uses] == ["direct", "bf16", "bf16"]
        assert stopwatch.timed[0] == ("direct", "winograd", "native")


@pytest.mark.usefixtures("fresh_registry")
class TestWithoutThem:
    @pytest.fixture(autouse=True)
    def without(self, compiled_cpu: None) -> Iterator[None]:
        before = native.cpu.isa()
        assert native.cpu.select_isa("baseline")
        yield
        native.cpu.select_isa(before)

    def test_bfloat16_is_widened_or_native_s(self) -> None:
        for use in convolve():
            assert use.candidates == ("direct", "winograd", "native")
        for use in convolve(stride=2):
            assert use.candidates == ("direct", "native")
        assert {use.choice.name for use in convolve(backend="cpu", stride=2)} == {"direct"}
        # Whoever asks for the algorithm all the same gets the result.
        case = next(case for case in ODD if case.name == "c70-k130")
        problem = problem_of(case, BF16, False)
        input, weight, bias = problem.input, problem.weight, problem.bias
        query = convolve()[0].query
        assert not cpu_algorithms.bf16_applies("conv2d", query)
        strides = input.stride(), weight.stride(), problem.grad_output.stride()
        described = native.cpu.Conv2dProblem(
            (*case.input_shape, case.K, case.R, case.S, case.P, case.Q), case.stride, case.padding,
            case.dilation, case.groups, "bfloat16", *strides, "bf16",
        )  # fmt: skip
        output = torch.empty(case.output_shape, dtype=BF16)
        addresses = (t.data_ptr() for t in (input, weight, bias, output))
        native.cpu.conv2d(described, *addresses, 1)
        check("output", output, problem)

    def test_the_reason_is_told(self) -> None:
        reason = cpu_algorithms.why_no_bf16()
        if "avx512_bf16" in SUPPORTED:
            assert reason == "the kernels in force are those for baseline"
        else:
            assert reason.endswith("has no AVX512_BF16")
        rows = [explain.Row("", use) for use in convolve()]
        machine = {"cpu": "", "threads": 1, "cpus": 1, "isa": "baseline", "torch": ""}
        told = f"direct widens bfloat16 to float32; there is no bf16: {reason}."
        assert told in explain.table(rows, machine)
        assert native.cpu.select_isa("emulated_bf16")
        assert cpu_algorithms.why_no_bf16() == ""
        assert "there is no bf16" not in explain.table(rows, machine)
