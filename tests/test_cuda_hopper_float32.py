"""Float32 by Hopper's tensor cores without TF32, on such a GPU or in the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_cuda_conv2d import query_of, tensors_of
from test_cuda_hopper import ACTIVATIONS, window
from test_cuda_in_backward import run_in
from torch import Tensor

import gdfast
from gdfast import native, optim
from gdfast.backends import (
    cuda_candidates,
    cuda_conv2d,
    cuda_hopper,
    cuda_hopper_float32,
    cuda_problem,
)
from gdfast.backends.cuda_hopper_float32 import BLOCKS, TILES
from gdfast.backends.registry import Conv2dActQuery, Conv2dQuery
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "float32_as_it_is"),
]

CASES = [
    # Parts of tiles in every axis; more tiles than the simulator has blocks; two steps of channels.
    Conv2dCase("3x3", 2, 40, 6, 7, 24, 3, 3, padding=(1, 1)),
    Conv2dCase("1x1", 5, 8, 12, 12, 72, 1, 1),
    # Four tiles for three blocks: the last one in tiles of 64 channels.
    Conv2dCase("a-rest", 4, 8, 8, 16, 72, 1, 1),
    Conv2dCase("wide", 1, 72, 5, 4, 136, 1, 2, padding=(0, 1)),
    Conv2dCase("dilated", 1, 8, 9, 12, 16, 3, 2, stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    # Pixels that no window meets.
    Conv2dCase("1x1/2", 2, 16, 7, 8, 24, 1, 1, stride=(2, 2)),
    Conv2dCase("3x3/2", 2, 16, 9, 8, 24, 3, 3, stride=(2, 2), padding=(1, 1)),
]


@pytest.fixture
def float32_as_it_is() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def random(case: Conv2dCase, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return tensors_of(case, torch.float32, True, device)


def by_definition(op: str, case: Conv2dCase, values: dict[str, Tensor]) -> Tensor:
    """In the dtype of the values, without a bias."""
    input, weight, grad = values["input"], values["weight"], values["grad"]
    if op == "conv2d":
        return F.conv2d(input, weight, **window(case))
    if op == "conv2d_grad_input":
        return torch.nn.grad.conv2d_input(input.shape, weight, grad, **window(case))
    return torch.nn.grad.conv2d_weight(input, weight.shape, grad, **window(case))


def by_kernel(op: str, case: Conv2dCase, values: dict[str, Tensor], name: str) -> Tensor:
    query = query_of(case, values)
    assert cuda_candidates.hopper_float32_why_not(op, query) == ""
    input, weight, grad = values["input"], values["weight"], values["grad"]
    if op == "conv2d":
        return cuda_conv2d.conv2d(query, name)(input, weight, None)
    if op == "conv2d_grad_input":
        return cuda_conv2d.conv2d_grad_input(query, name)(grad, weight)
    return cuda_conv2d.conv2d_grad_weight(query, name)(grad, input, False)[0]


WAYS = [
    *((op, name) for op in ("conv2d", "conv2d_grad_input") for name in TILES),
    *(("conv2d_grad_weight", name) for name in BLOCKS),
]


def terms(op: str, case: Conv2dCase) -> int:
    """How many products an element of the result sums, at most."""
    if op == "conv2d_grad_weight":
        return case.N * case.output_shape[2] * case.output_shape[3]
    return (case.C if op == "conv2d" else case.K) * case.R * case.S


def check(op: str, case: Conv2dCase, values: dict[str, Tensor], name: str) -> None:
    result = by_kernel(op, case, values, name)
    double = {key: value.double() for key, value in values.items()}
    exact = by_definition(op, case, double)
    magnitudes = by_definition(op, case, {key: value.abs() for key, value in double.items()})
    bound = (2.0**-20 + terms(op, case) * 2.0**-30) * magnitudes + 2.0**-149
    assert ((result - exact).abs() <= bound).all()
    # Most are far better than the bound.
    assert (result - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("op, name", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_exact_to_the_bound(
    case: Conv2dCase, op: str, name: str, hopper: torch.device
) -> None:
    check(op, case, random(case, hopper), name)


@pytest.mark.parametrize("op, name", WAYS)
def test_the_order_of_threads_does_not_matter(
    op: str, name: str, hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, results = CASES[3], []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
        results.append(by_kernel(op, case, random(case, hopper), name))
    assert torch.equal(*results)


@pytest.mark.skipif(native.cuda_is_simulated, reason="needs a GPU: the simulator takes minutes")
@pytest.mark.parametrize("op, name", WAYS)
@pytest.mark.parametrize("size", [(64, 56), (128, 28), (256, 14), (512, 7)], ids=str)
def test_long_sums_are_too(size: tuple[int, int], op: str, name: str, hopper: torch.device) -> None:
    channels, side = size
    case = Conv2dCase("3x3", 16, channels, side, side, channels, 3, 3, padding=(1, 1))
    check(op, case, random(case, hopper), name)
    # Of one sign, where what is cut off would add up.
    check(op, case, {key: value.abs() for key, value in random(case, hopper).items()}, name)


READ = {
    "conv2d": ("input", "weight"), "conv2d_grad_input": ("grad", "weight"),
    "conv2d_grad_weight": ("input", "grad"),
}  # fmt: skip
ENDS = [
    (3.4028234e38, 1.0), (-3.4e38, 0.9999), (2.0**127, 1.9999998), (1.1754944e-38, 1.0),
    (1e-30, 1e-9), (1e30, 1e-30), (1.4e-45, 2.0**100), (0.0, 3e38),
]  # fmt: skip


@pytest.mark.parametrize("op, name", WAYS)
def test_from_the_smallest_number_to_the_largest(op: str, name: str, hopper: torch.device) -> None:
    case = Conv2dCase("1x1", 2, 8, 1, 1, 8, 1, 1)
    for first, second in (READ[op], READ[op][::-1]):
        for number, other in ENDS:
            values = random(case, hopper)
            values[first].zero_()[0, 3] = number
            values[second].fill_(other)
            exact = by_definition(op, case, {key: v.double() for key, v in values.items()})
            result = by_kernel(op, case, values, name)
            assert result.isfinite().all()
            # What is below 2^-110 counts to 2^-134.
            bound = 2.0**-20 * exact.abs() + 2.0**-134 * max(other, 1.0)
            assert ((result - exact).abs() <= bound).all()


@pytest.mark.parametrize("number", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("op, name", WAYS)
def test_what_is_not_finite_comes_out_as_it_does_natively(
    op: str, name: str, number: float, hopper: torch.device
) -> None:
    # No pass multiplies by what lies outside of an image.
    window = (1, 1) if op == "conv2d_grad_input" else (3, 2)
    case = Conv2dCase("unpadded", 2, 24, 6, 5, 16, *window)
    for operand in READ[op]:
        values = random(case, hopper)
        for value in values.values():
            # Without a rest beyond the first part: infinity times that is none.
            value.mul_(4).round_()[value == 0] = 1
        values[operand][1, 3, -1, -1] = number
        values[operand][0, 5, 0, 0] = 3.4e38  # twice this is too large
        exact = by_definition(op, case, {key: v.double() for key, v in values.items()})
        result = by_kernel(op, case, values, name)
        # float32 overflows where float64 does not.
        exact = exact.float()
        assert not exact.isfinite().all() and exact.isfinite().any()
        torch.testing.assert_close(result, exact, rtol=1e-5, atol=0.05, equal_nan=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_no_window_meets_is_not_multiplied(name: str, hopper: torch.device) -> None:
    # Its last column is the one that the first column of a filter would meet next, in the rest of
    # two boxes of 50 columns.
    case = Conv2dCase("1x3", 1, 8, 1, 99, 8, 1, 3, padding=(0, 1))
    values = random(case, hopper)
    values["input"][:, :, :, -1] = float("inf")
    exact = by_definition(
        "conv2d_grad_weight", case, {key: value.double() for key, value in values.items()}
    )
    grad_weight = by_kernel("conv2d_grad_weight", case, values, name)
    assert grad_weight[..., 0].isfinite().all()
    assert torch.equal(grad_weight.isfinite(), exact.isfinite())


def test_outputs_that_no_box_divides_are_left_to_others(hopper: torch.device) -> None:
    for images, words in ((1, "outputs that boxes of about 64 pixels divide"), (64, "")):
        case = Conv2dCase("prime", images, 8, 67, 67, 8, 3, 3, padding=(1, 1))
        query = query_of(case, random(case, hopper))
        reason = cuda_candidates.hopper_float32_why_not("conv2d_grad_weight", query)
        assert reason == (words and f"it takes {words}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_activations(activation: str, with_bias: bool, hopper: torch.device) -> None:
    case = CASES[0]
    values = random(case, hopper)
    added = values["bias"] if with_bias else None
    exact = F.conv2d(
        values["input"].double(), values["weight"].double(),
        None if added is None else added.double(), **window(case),
    )  # fmt: skip
    plainly = {f.name: getattr(query_of(case, values), f.name) for f in fields(Conv2dQuery)}
    query = Conv2dActQuery(**plainly, activation=activation, negative_slope=0.125)
    output = cuda_conv2d.conv2d(query, "hopper-64-bf16x6")(values["input"], values["weight"], added)
    expected = ACTIVATIONS[activation](exact).float()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_tensors_at_any_address_and_in_any_layout(hopper: torch.device) -> None:
    case = Conv2dCase("layouts", 2, 16, 6, 5, 16, 3, 3, padding=(1, 1))
    values = random(case, hopper)
    odd = torch.empty(values["input"].numel() + 1, device=hopper)[1:]
    odd = odd.as_strided(values["input"].shape, values["input"].stride(), 1)
    values["input"] = odd.copy_(values["input"])
    values["weight"], nchw = values["weight"].contiguous(), values["grad"].contiguous()
    for op, name in WAYS:
        # What is written has to be channels_last.
        check(op, case, values if op == "conv2d" else {**values, "grad": nchw}, name)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("splits", [3, 40])
def test_gradients_of_weights_in_any_splits(
    splits: int, name: str, hopper: torch.device, thread_order: str
) -> None:
    case = Conv2dCase("few-boxes", 3, 72, 5, 5, 136, 1, 2)
    values = random(case, hopper)
    kernel = cuda_conv2d.conv2d_grad_weight(query_of(case, values), name)
    kernel.parts = splits
    kernel._bytes = {False: native.cuda.conv2d_grad_weight_workspace(kernel.problem, splits, False)}
    grad_weight, _ = kernel(values["grad"], values["input"], False)
    exact = by_definition(
        "conv2d_grad_weight", case, {key: value.double() for key, value in values.items()}
    )
    assert (grad_weight - exact).norm() <= 1e-6 * exact.norm()


def test_the_gradient_of_a_bias_too(hopper: torch.device) -> None:
    values = random(CASES[1], hopper)
    kernel = cuda_conv2d.conv2d_grad_weight(query_of(CASES[1], values), "hopper-64x192-bf16x6")
    _, grad_bias = kernel(values["grad"], values["input"], True)
    exact = values["grad"].double().sum((0, 2, 3))
    torch.testing.assert_close(grad_bias, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("by_cuda_alone")
def test_weights_are_updated_from_its_parts(
    updates: list[Any], hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"conv2d_grad_weight": "hopper-64x192-bf16x6"}
    run_in(lambda op, query: names.get(op, "hopper-64-bf16x6"), monkeypatch)
    results = []
    for fused in (False, True):
        torch.manual_seed(2)
        layer = gdfast.nn.Conv2d(24, 40, 3, padding=1, bias=False).to(hopper)
        layer.to(memory_format=torch.channels_last)
        optimizer = optim.SGD(layer.parameters(), lr=2.0**-3, momentum=0.5, in_backward=fused)
        for _ in range(2):
            images = torch.randn(2, 24, 7, 6, device=hopper)
            layer(images.to(memory_format=torch.channels_last)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(layer.weight.detach())
    assert len(updates) == 2 and torch.equal(*results)


def test_tf32_may_be_allowed_between_calls(hopper: torch.device) -> None:
    case = CASES[0]
    values = random(case, hopper)
    query = query_of(case, values)
    kernels = [
        lambda: cuda_conv2d.conv2d(query, "hopper-64-bf16x6")(
            values["input"], values["weight"], None
        ),
        lambda: cuda_conv2d.conv2d_grad_input(query, "hopper-64-bf16x6")(
            values["grad"], values["weight"]
        ),
        lambda: cuda_conv2d.conv2d_grad_weight(query, "hopper-64x192-bf16x6")(
            values["grad"], values["input"], False
        )[0],
    ]
    for kernel in kernels:
        before = kernel()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            during = kernel()
        assert 1e-5 < (during - before).norm() / before.norm() < 1e-3
        assert torch.equal(kernel(), before)


REFUSED = {
    "strides of 1 and 2": Conv2dCase("stride", 1, 16, 16, 16, 16, 3, 3, stride=(3, 1)),
    "one group": Conv2dCase("groups", 1, 16, 8, 8, 16, 3, 3, groups=2),
    "input: channels in eights": Conv2dCase("C", 1, 12, 8, 8, 16, 3, 3),
    "output: channels in eights": Conv2dCase("K", 1, 16, 8, 8, 12, 3, 3),
    "at least one image": Conv2dCase("N", 0, 16, 8, 8, 16, 3, 3),
}


@pytest.mark.parametrize("op", READ)
@pytest.mark.parametrize("words", REFUSED)
def test_what_it_does_not_take_has_a_reason(words: str, op: str, hopper: torch.device) -> None:
    query = query_of(REFUSED[words], random(REFUSED[words], hopper))
    assert cuda_candidates.hopper_float32_why_not(op, query) == f"it takes {words}"


@pytest.mark.parametrize("op", READ)
def test_it_takes_float32_alone(op: str, hopper: torch.device) -> None:
    values = tensors_of(CASES[0], torch.bfloat16, True, hopper)
    query = query_of(CASES[0], values)
    assert cuda_candidates.hopper_float32_why_not(op, query) == "it takes float32"


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("channels", [5, 6, 13])
def test_gradients_of_odd_channels_are_padded(
    channels: int, layout: torch.memory_format, hopper: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    case = Conv2dCase("odd", 2, channels, 6, 7, 16, 3, 3, padding=(1, 1))
    values = random(case, hopper)
    values["input"] = values["input"].contiguous(memory_format=layout)
    query = query_of(case, values)
    monkeypatch.setattr(cuda_hopper, "missing", lambda device: "")
    on_gpu = replace(query, device=torch.device("cuda"))
    names = cuda_candidates.candidates("conv2d_grad_input", on_gpu)
    of_parts = [name for name in names if "bf16x6" in name]
    assert of_parts and all(name.endswith("-padded") for name in of_parts)
    input, weight, grad = values["input"], values["weight"], values["grad"]
    exact = torch.nn.grad.conv2d_input(input.shape, weight.double(), grad.double(), **window(case))
    for name in of_parts:
        result = cuda_conv2d.conv2d_grad_input(query, name)(grad, weight)
        assert result.stride() == input.stride()
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


def test_tiles_and_blocks_have_to_be_ones_that_there_are(hopper: torch.device) -> None:
    values = random(CASES[0], hopper)
    problem, _ = cuda_problem.problem_of(query_of(CASES[0], values), "input", "output")
    with pytest.raises(ValueError, match=r"conv2d_hopper_float32: tile: expected .*, got 64 x"):
        native.cuda.conv2d_hopper_float32(problem, 64, 64, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"grad_weight_hopper_float32: block: expected .*, got 64"):
        native.cuda.conv2d_grad_weight_hopper_float32_splits(problem, 64, 64, 1)


@pytest.mark.parametrize("op", READ)
@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "TF32"])
@pytest.mark.parametrize("precision", ["fast", "strict"])
def test_it_is_a_candidate_where_tf32_is_not_allowed(
    precision: str, tf32: bool, op: str, hopper: torch.device
) -> None:
    query = query_of(CASES[0], random(CASES[0], hopper))
    with (
        gdfast.precision(precision),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32),
    ):
        found = [name for name in cuda_candidates.candidates(op, query) if "bf16x6" in name]
    # The simulator's times tell nothing.
    assert bool(found) == (not tf32 and hopper.type == "cuda")


def test_candidates_have_something_to_do(hopper: torch.device) -> None:
    def of(op: str, C: int, K: int) -> tuple[str, ...]:
        case = Conv2dCase("", 1, C, 8, 8, K, 3, 3)
        return cuda_hopper_float32.candidates(op, query_of(case, random(case, hopper)))

    assert of("conv2d", 8, 72)[0] == "hopper-128-bf16x6" == of("conv2d_grad_input", 72, 8)[0]
    assert "hopper-128-bf16x6" not in of("conv2d", 72, 64)
    assert of("conv2d_grad_weight", 64, 64)[0] == "hopper-64x192-bf16x6"
    assert of("conv2d_grad_weight", 64, 72)[0] == "hopper-128x128-bf16x6"
    assert "hopper-128x128-bf16x6" not in of("conv2d_grad_weight", 72, 64)
