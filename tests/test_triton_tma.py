"""The convolution kernel that loads boxes by descriptors, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor
from triton_here import IN_INTERPRETER, INTERPRETED

from gdfast.backends import batch_norm
from gdfast.bench.cases import ODD, Conv2dCase

if INTERPRETED:
    from test_triton_conv2d import problem_of, tensors_of

    from gdfast.backends.triton import bind_conv2d, bind_conv2d_tma, launch
    from gdfast.backends.triton.tiles import Tile

    NEEDS_DESCRIPTORS = pytest.mark.skipif(
        launch.TensorDescriptor is None, reason="needs a Triton with TensorDescriptor"
    )
else:
    NEEDS_DESCRIPTORS = pytest.mark.skip  # for want of the interpreter, as the others say

pytestmark = [*IN_INTERPRETER, NEEDS_DESCRIPTORS, pytest.mark.usefixtures("nan_filled_memory")]


def of_eights(channels: int) -> int:
    """The next channel count of which pixels begin at 16 bytes."""
    return max(16, -(-channels // 8) * 8)


CASES = [
    replace(case, C=of_eights(case.C), K=of_eights(case.K))
    for case in ODD
    if case.stride == (1, 1) and case.groups == 1
]
BY_NAME = {case.name: case for case in CASES}


def whole(case: Conv2dCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of whole numbers, whose sums have no rounding errors."""
    values = tensors_of(case, torch.float32, True)
    return {name: tensor.clamp(-2, 2).round().to(dtype) for name, tensor in values.items()}


def exact(case: Conv2dCase, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and grad_input in float64."""
    input, weight, bias, grad = (tensor.double() for tensor in values.values())
    arguments = case.stride, case.padding * 2, case.dilation, case.groups, "reference"
    return (
        torch.ops.gdfast.conv2d(input, weight, bias, *arguments),
        torch.ops.gdfast.conv2d_grad_input(grad, weight, input.shape, True, *arguments),
    )


def check(case: Conv2dCase, values: dict[str, Tensor], tile: Tile) -> None:
    input, weight, bias, grad = values.values()
    problem = problem_of(case, input.dtype)
    for op in ("conv2d", "conv2d_grad_input"):
        assert bind_conv2d_tma.takes(problem, op)
    output = bind_conv2d.bind_forward(problem, tile)(input, weight, bias)
    grad_input = bind_conv2d.bind_grad_input(problem, tile)(grad, weight)
    for ours, expected in zip((output, grad_input), exact(case, values), strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours, expected.to(input.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_borders_padding_and_channels(case: Conv2dCase) -> None:
    check(case, whole(case, torch.bfloat16), Tile(512, 64, 64, 4, 2, (4, 8, 16)))


@pytest.mark.parametrize("box", [(1, 2, 16), (4, 8, 1), (16, 1, 2)], ids=str)
def test_any_box(box: tuple[int, int, int]) -> None:
    case = Conv2dCase("", 3, 24, 3, 4, 24, 2, 2, padding=(2, 1), dilation=(2, 3))
    check(case, whole(case, torch.float16), Tile(prod(box), 32, 16, 4, 2, box))


TILE = Tile(128, 32, 32, 4, 2, (2, 8, 8)) if INTERPRETED else None


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu"])
def test_bias_and_activation(activation: str) -> None:
    case = BY_NAME["c17-k10"]
    values = whole(case, torch.float16)
    input, weight, bias, _ = values.values()
    kernel = bind_conv2d.bind_forward(problem_of(case, torch.float16), TILE, activation, 0.2)
    for some in (bias, None):
        plain, _ = exact(case, {**values, "bias": bias if some is not None else 0 * bias})
        expected = batch_norm.activate(plain, activation, 0.2).to(torch.float16)
        torch.testing.assert_close(kernel(input, weight, some), expected)


def test_tf32() -> None:
    case = BY_NAME["same-3x3"]
    values = whole(case, torch.float32)
    problem = problem_of(case)
    assert bind_conv2d_tma.takes(problem, "conv2d")
    kernel = bind_conv2d.bind_forward(problem, TILE)
    output = kernel(values["input"], values["weight"], values["bias"])
    assert torch.equal(output, exact(case, values)[0].float())


def test_what_is_laid_out_otherwise_is_copied() -> None:
    case = BY_NAME["same-3x3"]
    values = whole(case, torch.float16)
    shifted = torch.empty(values["input"].numel() + 1, dtype=torch.float16)[1:]
    input = shifted.as_strided(values["input"].shape, values["input"].stride())
    input.copy_(values["input"])
    assert input.data_ptr() % 16
    check(case, {**values, "input": input}, TILE)
    problem = problem_of(case, torch.float16)
    nchw = values["input"].contiguous(), values["weight"].contiguous()
    strides = nchw[0].stride(), nchw[1].stride(), problem.strides[2]
    problem = replace(problem, strides=strides)
    assert bind_conv2d_tma.takes(problem, "conv2d")
    output = bind_conv2d.bind_forward(problem, TILE)(*nchw, values["bias"])
    assert torch.equal(output, exact(case, values)[0].half())
