"""1x1 convolutions in NCHW for Hopper, on a GPU or in the simulator: exact sums of integers."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from test_cuda_conv2d import query_of
from test_cuda_hopper import ACTIVATIONS, DTYPES, tensors
from torch import Tensor

from gdfast import native
from gdfast.backends import cuda_candidates, cuda_conv2d
from gdfast.backends.cuda_hopper_grad_weight import PLANES_BLOCKS
from gdfast.backends.cuda_hopper_planes import NAME
from gdfast.backends.cuda_tiles import multiprocessors
from gdfast.backends.registry import Conv2dActQuery, Conv2dQuery
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
]

CASES = [
    # Parts of tiles in every axis; filters need not come in eights.
    Conv2dCase("1x1", 2, 72, 12, 14, 75, 1, 1),
    Conv2dCase("few", 1, 8, 2, 4, 1, 1, 1),
    # Wider than one tile in every axis, with several steps.
    Conv2dCase("wide", 1, 136, 18, 20, 264, 1, 1),
]


def planes(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in values.items()}


def check(case: Conv2dCase, dtype: torch.dtype, device: torch.device) -> None:
    values = planes(tensors(case, dtype, device))
    input, weight, bias, grad = values.values()
    query = query_of(case, values)
    assert cuda_candidates.planes_why_not("conv2d", query) == ""
    output = cuda_conv2d.conv2d(query, NAME)(input, weight, bias)
    exact = F.conv2d(input.double(), weight.double(), bias.double())
    assert output.is_contiguous() and torch.equal(output, exact.to(dtype))
    assert cuda_candidates.planes_why_not("conv2d_grad_input", query) == ""
    grad_input = cuda_conv2d.conv2d_grad_input(query, NAME)(grad, weight)
    exact = torch.nn.grad.conv2d_input(input.shape, weight.double(), grad.double())
    assert grad_input.is_contiguous() and torch.equal(grad_input, exact.to(dtype))


@pytest.mark.parametrize("dtype, order", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_native_does(
    case: Conv2dCase, dtype: torch.dtype, order: str, hopper: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
    check(case, dtype, hopper)


@pytest.mark.parametrize(
    "case",
    [
        # Weights stay, and come with every step; an odd number of tiles for each block.
        Conv2dCase("one-step", 1, 64, 10, 16, 72, 1, 1),
        Conv2dCase("many-steps", 1, 392, 10, 12, 64, 1, 1),
    ],
    ids=str,
)
def test_blocks_go_on_from_tile_to_tile(
    case: Conv2dCase, hopper: torch.device, thread_order: str
) -> None:
    # The simulator has three multiprocessors.
    blocks = multiprocessors(hopper) if hopper.type == "cuda" else 3
    check(replace(case, N=3 * blocks + 1), torch.bfloat16, hopper)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_activations(activation: str, with_bias: bool, hopper: torch.device) -> None:
    case = Conv2dCase("1x1", 2, 72, 8, 10, 75, 1, 1)
    values = planes(tensors(case, torch.bfloat16, hopper))
    input, weight, bias, _ = values.values()
    values["input"][1, 0, 0, 0] = float("nan")
    added = bias if with_bias else None
    exact = F.conv2d(input.double(), weight.double(), None if added is None else added.double())
    expected = ACTIVATIONS[activation](exact).to(torch.bfloat16)
    plainly = {f.name: getattr(query_of(case, values), f.name) for f in fields(Conv2dQuery)}
    query = Conv2dActQuery(**plainly, activation=activation, negative_slope=0.125)
    output = cuda_conv2d.conv2d(query, NAME)(input, weight, added)
    # Where float32 and float64 lie on either side of the middle between two bfloat16.
    bound = 2**-8 if activation == "silu" else 0
    torch.testing.assert_close(output, expected, rtol=bound, atol=1e-30, equal_nan=True)


REFUSED = {
    "1x1 windows of stride 1 without padding": Conv2dCase("3x3", 1, 16, 8, 8, 16, 3, 3),
    "input: NCHW, with planes a multiple of 16 bytes apart": Conv2dCase("7", 1, 16, 7, 7, 16, 1, 1),
    "weight: channels in eights": Conv2dCase("C", 1, 12, 8, 8, 16, 1, 1),
    "at least one image": Conv2dCase("N", 0, 16, 8, 8, 16, 1, 1),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_it_does_not_take_has_a_reason(words: str, hopper: torch.device) -> None:
    case = REFUSED[words]
    query = query_of(case, planes(tensors(case, torch.bfloat16, hopper)))
    for op in ("conv2d", "conv2d_grad_input"):
        assert cuda_candidates.planes_why_not(op, query) == f"it takes {words}"


def test_it_takes_no_images_in_channels_last(hopper: torch.device) -> None:
    query = query_of(CASES[0], tensors(CASES[0], torch.bfloat16, hopper))
    assert cuda_candidates.planes_why_not("conv2d", query).startswith("it takes input: NCHW")


def test_it_is_a_candidate(hopper: torch.device) -> None:
    case = Conv2dCase("1x1", 2, 72, 12, 14, 136, 1, 1)
    for layout, is_one in ((torch.contiguous_format, True), (torch.channels_last, False)):
        values = tensors(case, torch.bfloat16, hopper)
        for name in ("input", "grad"):
            values[name] = values[name].contiguous(memory_format=layout)
        query = query_of(case, values)
        # The simulator's times tell nothing.
        expected = is_one and hopper.type == "cuda"
        for op in ("conv2d", "conv2d_grad_input"):
            assert (cuda_candidates.candidates(op, query)[0] == NAME) == expected
        found = set(cuda_candidates.candidates("conv2d_grad_weight", query)) & {*PLANES_BLOCKS}
        assert bool(found) == expected


@pytest.mark.parametrize("name", PLANES_BLOCKS)
@pytest.mark.parametrize(
    "case, splits",
    [
        # Parts of tiles in every axis.
        (Conv2dCase("1x1", 3, 72, 8, 10, 75, 1, 1), 1),
        # More boxes than stages, in splits of several lengths.
        (Conv2dCase("wide", 6, 136, 12, 14, 264, 1, 1), 4),
    ],
    ids=str,
)
def test_the_gradient_of_the_weight(
    case: Conv2dCase, splits: int, name: str, hopper: torch.device, thread_order: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    values = planes(tensors(case, torch.bfloat16, hopper))
    query = query_of(case, values)
    assert cuda_candidates.planes_why_not("conv2d_grad_weight", query) == ""
    kernel = cuda_conv2d.conv2d_grad_weight(query, name)
    kernel.parts = splits
    kernel._bytes = {False: native.cuda.conv2d_grad_weight_workspace(kernel.problem, splits, False)}
    grad_weight, _ = kernel(values["grad"], values["input"], False)
    exact = torch.nn.grad.conv2d_weight(
        values["input"].double(), case.weight_shape, values["grad"].double()
    )
    assert torch.equal(grad_weight, exact.bfloat16())


def test_the_gradient_of_the_weight_is_not_for_other_layouts(hopper: torch.device) -> None:
    op, values = "conv2d_grad_weight", tensors(CASES[1], torch.bfloat16, hopper)
    assert "NCHW" in cuda_candidates.planes_why_not(op, query_of(CASES[1], values))
    odd = Conv2dCase("C", 1, 12, 8, 8, 16, 1, 1)
    reason = cuda_candidates.planes_why_not(
        op, query_of(odd, planes(tensors(odd, torch.bfloat16, hopper)))
    )
    assert reason == "it takes input: channels in eights"
