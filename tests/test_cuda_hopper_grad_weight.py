"""The gradient in the weight for Hopper, on a GPU or simulated: exact sums of small integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cuda_conv2d import query_of
from test_cuda_hopper import DTYPES, tensors, window
from test_cuda_in_backward import run_in
from torch import Tensor

import gdfast
from gdfast import native, optim
from gdfast.backends import cuda_candidates, cuda_conv2d, cuda_hopper_grad_weight, cuda_problem
from gdfast.backends.cuda_hopper_grad_weight import BLOCKS
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
]

CASES = [
    # Parts of tiles in every axis, channels that fill neither a box nor a tile.
    Conv2dCase("3x3", 2, 72, 9, 10, 72, 3, 3, padding=(1, 1)),
    Conv2dCase("asymmetric", 1, 8, 13, 20, 64, 3, 2, padding=(1, 0), dilation=(2, 1)),
    Conv2dCase("wide-padding", 1, 16, 3, 5, 8, 2, 2, padding=(3, 4)),
    # All pixels are one row; without padding they are not once the output is smaller.
    Conv2dCase("1x1", 3, 72, 7, 7, 136, 1, 1),
    Conv2dCase("1x1-padding", 2, 16, 5, 6, 24, 1, 1, padding=(1, 0)),
    # Boxes of fewer pixels than products sum.
    Conv2dCase("few-pixels", 1, 16, 3, 3, 24, 3, 3),
    Conv2dCase("stride-2", 3, 24, 12, 11, 40, 3, 3, stride=(2, 2), padding=(1, 1)),
    Conv2dCase("1x1-stride", 2, 40, 9, 8, 16, 1, 1, stride=(2, 2)),
    Conv2dCase("stride-2-1", 2, 8, 17, 9, 16, 3, 2, stride=(2, 1), padding=(2, 1), dilation=(1, 3)),
    Conv2dCase("stride-1-2", 2, 8, 6, 10, 16, 2, 3, stride=(1, 2), padding=(0, 3), dilation=(3, 2)),
    Conv2dCase("one-pixel", 5, 16, 1, 1, 8, 1, 1),
]


def exact_gradient(case: Conv2dCase, values: dict[str, Tensor]) -> Tensor:
    return torch.nn.grad.conv2d_weight(
        values["input"].double(), case.weight_shape, values["grad"].double(), **window(case)
    )  # fmt: skip


def check(case: Conv2dCase, dtype: torch.dtype, name: str, device: torch.device) -> None:
    values = tensors(case, dtype, device)
    query = query_of(case, values)
    assert cuda_candidates.hopper_why_not("conv2d_grad_weight", query) == ""
    kernel = cuda_conv2d.conv2d_grad_weight(query, name)
    grad_weight, grad_bias = kernel(values["grad"], values["input"], False)
    assert grad_bias is None
    assert torch.equal(grad_weight, exact_gradient(case, values).to(dtype))


@pytest.mark.parametrize("dtype, order", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_native_does(
    case: Conv2dCase, dtype: torch.dtype, order: str, hopper: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
    check(case, dtype, "hopper-64x576" if order == "ascending" else "hopper-128x192", hopper)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "case, splits",
    [
        # More boxes than stages; more tiles than the simulator has blocks; a part of a tile.
        (Conv2dCase("3x3", 3, 72, 8, 16, 136, 3, 3, padding=(1, 1)), 1),
        # Splits of several lengths.
        (Conv2dCase("1x1", 5, 72, 16, 16, 136, 1, 1), 7),
        # Some of them empty, and so many that several threads sum those of an element.
        (Conv2dCase("few-boxes", 3, 264, 5, 5, 264, 1, 1), 40),
    ],
    ids=str,
)
def test_every_block_and_any_splits(
    case: Conv2dCase, splits: int, name: str, hopper: torch.device, thread_order: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    values = tensors(case, torch.bfloat16, hopper)
    kernel = cuda_conv2d.conv2d_grad_weight(query_of(case, values), name)
    kernel.parts = splits
    kernel._bytes = {False: native.cuda.conv2d_grad_weight_workspace(kernel.problem, splits, False)}
    grad_weight, _ = kernel(values["grad"], values["input"], False)
    assert torch.equal(grad_weight, exact_gradient(case, values).bfloat16())


def test_tensors_at_any_address_and_in_any_layout(hopper: torch.device) -> None:
    case = Conv2dCase("layouts", 2, 16, 6, 5, 16, 3, 3, padding=(1, 1))
    values = tensors(case, torch.float16, hopper)
    exact = exact_gradient(case, values).half()
    odd = torch.empty(values["input"].numel() + 1, dtype=torch.float16, device=hopper)[1:]
    odd = odd.as_strided(values["input"].shape, values["input"].stride(), 1)
    values["input"] = odd.copy_(values["input"])
    values["grad"], values["weight"] = values["grad"].contiguous(), values["weight"].contiguous()
    query = query_of(case, values)
    assert cuda_candidates.hopper_why_not("conv2d_grad_weight", query) == ""
    kernel = cuda_conv2d.conv2d_grad_weight(query, "hopper-128x128")
    grad_weight, _ = kernel(values["grad"], values["input"], False)
    assert grad_weight.stride() == values["weight"].stride() and torch.equal(grad_weight, exact)


def test_the_gradient_of_a_bias_too(hopper: torch.device) -> None:
    case = CASES[0]
    values = tensors(case, torch.bfloat16, hopper)
    kernel = cuda_conv2d.conv2d_grad_weight(query_of(case, values), "hopper-128x128")
    grad_weight, grad_bias = kernel(values["grad"], values["input"], True)
    assert torch.equal(grad_weight, exact_gradient(case, values).bfloat16())
    assert torch.equal(grad_bias, values["grad"].double().sum((0, 2, 3)).bfloat16())


@pytest.mark.usefixtures("by_cuda_alone")
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_weights_are_updated_from_its_parts(
    parts: int, updates: list[Any], hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        native.cuda, "conv2d_grad_weight_hopper_splits", lambda *_: parts, raising=True
    )
    run_in(
        lambda op, query: "hopper-128x192" if op == "conv2d_grad_weight" else "64x64", monkeypatch
    )
    results = []
    for fused in (False, True):
        torch.manual_seed(2)
        layer = gdfast.nn.Conv2d(24, 40, 3, padding=1, bias=False).to(hopper, torch.bfloat16)
        layer.to(memory_format=torch.channels_last)
        optimizer = optim.SGD(layer.parameters(), lr=2.0**-3, momentum=0.5, in_backward=fused)
        for _ in range(2):
            # Gradients are exact in bfloat16 too, so that nothing is rounded there.
            images = torch.randint(-2, 3, (2, 24, 7, 6), device=hopper).bfloat16()
            images = images.to(memory_format=torch.channels_last)
            (layer(images) * torch.randint(-1, 2, (40, 1, 1), device=hopper)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(layer.weight.detach())
    assert len(updates) == 2 and torch.equal(*results)


REFUSED = {
    "strides of 1 and 2": Conv2dCase("stride", 1, 16, 16, 16, 16, 3, 3, stride=(3, 1)),
    "one group": Conv2dCase("groups", 1, 16, 8, 8, 16, 3, 3, groups=2),
    "input: channels in eights": Conv2dCase("C", 1, 12, 8, 8, 16, 3, 3),
    "output: channels in eights": Conv2dCase("K", 1, 16, 8, 8, 12, 3, 3),
    "at least one image": Conv2dCase("N", 0, 16, 8, 8, 16, 3, 3),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_it_does_not_take_has_a_reason(words: str, hopper: torch.device) -> None:
    query = query_of(REFUSED[words], tensors(REFUSED[words], torch.bfloat16, hopper))
    assert cuda_candidates.hopper_why_not("conv2d_grad_weight", query) == f"it takes {words}"


def test_it_takes_half_types_alone(hopper: torch.device) -> None:
    query = query_of(CASES[0], tensors(CASES[0], torch.float32, hopper))
    assert cuda_candidates.hopper_why_not("conv2d_grad_weight", query) == "it takes half types"


def test_a_block_has_to_be_one_that_there_is(hopper: torch.device) -> None:
    values = tensors(CASES[0], torch.bfloat16, hopper)
    problem = cuda_conv2d.conv2d_grad_weight(query_of(CASES[0], values), "hopper-128x128").problem
    with pytest.raises(
        ValueError, match=r"conv2d_grad_weight_hopper: block: expected .*, got 64 x"
    ):
        native.cuda.conv2d_grad_weight_hopper_splits(problem, 64, 64, 1)


@pytest.mark.parametrize(
    "case, multiprocessors, splits",
    [
        # Tiles times splits fill all multiprocessors about evenly.
        (Conv2dCase("3x3 64", 256, 64, 56, 56, 64, 3, 3, padding=(1, 1)), 132, 132),
        (Conv2dCase("few pixels", 1, 64, 4, 4, 64, 3, 3, padding=(1, 1)), 132, 1),
    ],
    ids=str,
)
def test_splits(
    case: Conv2dCase, multiprocessors: int, splits: int, cuda_device: torch.device
) -> None:
    query = query_of(case, tensors_without_memory(case))
    problem, _ = cuda_problem.problem_of(query, "input", "output")
    guess = native.cuda.conv2d_grad_weight_hopper_splits(problem, 64, 576, multiprocessors)
    assert guess == splits


def tensors_without_memory(case: Conv2dCase) -> dict[str, Tensor]:
    def empty(*size: int) -> Tensor:
        each = torch.empty(size, device="meta", dtype=torch.bfloat16)
        return each.to(memory_format=torch.channels_last) if size else each

    return {
        "input": empty(*case.input_shape), "weight": empty(*case.weight_shape), "bias": empty(),
        "grad": empty(*case.output_shape),
    }  # fmt: skip


def test_candidates_have_something_to_do() -> None:
    def of(*sizes: int) -> set[str]:
        N, C, size, K, window = sizes
        case = Conv2dCase("", N, C, size, size, K, window, window, padding=(window // 2,) * 2)
        return set(cuda_hopper_grad_weight.candidates(query_of(case, tensors_without_memory(case))))

    assert of(256, 64, 56, 64, 1) == {"hopper-128x128"}
    assert "hopper-64x576" in of(256, 64, 56, 64, 3) and "hopper-128x192" in of(9, 64, 9, 128, 3)
    assert of(256, 512, 7, 2048, 1) == {"hopper-128x256", "hopper-256x128"}
