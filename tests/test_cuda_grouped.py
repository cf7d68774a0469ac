"""The CUDA kernels for groups of few channels, in the simulator or on a GPU, against native."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cuda_conv2d import by_tile, check, passes, query_of, tensors_of
from torch import Tensor

from gdfast import native
from gdfast.backends import Conv2dActQuery, cuda_conv2d
from gdfast.backends.activation import activate
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

SAME = {"padding": (1, 1)}
# Parts of slabs and of tiles, with all sizes of groups; what is in one tile, and in many.
CASES = [
    Conv2dCase("4s", 2, 72, 9, 19, 72, 3, 3, groups=18, **SAME),
    Conv2dCase("8s", 2, 40, 7, 7, 40, 3, 3, groups=5, **SAME),
    Conv2dCase("16s", 1, 80, 17, 10, 80, 3, 3, groups=5, **SAME),
    Conv2dCase("32s", 2, 96, 12, 9, 96, 3, 3, groups=3, **SAME),
    Conv2dCase("2s", 1, 16, 10, 30, 16, 3, 3, groups=8),
    Conv2dCase("4s-wide-padding", 1, 8, 5, 4, 8, 3, 3, padding=(3, 4), groups=2),
    Conv2dCase("8s-stride-2", 2, 64, 15, 18, 64, 3, 3, (2, 2), (1, 1), groups=8),
    Conv2dCase("32s-stride-2", 1, 64, 9, 21, 64, 3, 3, (2, 2), (1, 1), groups=2),
    Conv2dCase("4s-asymmetric", 2, 24, 11, 20, 24, 3, 2, (1, 2), (0, 1), groups=6),
    Conv2dCase("16s-5x4", 1, 32, 9, 12, 32, 5, 4, (2, 1), (2, 1), groups=2),
    Conv2dCase("8s-7x7", 1, 16, 9, 10, 16, 7, 7, padding=(3, 3), groups=2),
    Conv2dCase("16s-1x1", 3, 32, 5, 9, 32, 1, 1, groups=2),
    Conv2dCase("4s-1x3-over-image", 2, 8, 3, 20, 8, 1, 3, (5, 3), groups=2),
]
OFTEN = [CASES[0], CASES[3], CASES[6], CASES[8]]
OPS = ("conv2d", "conv2d_grad_input", "conv2d_grad_weight")


def small_integers(case: Conv2dCase, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """What makes every sum exact."""
    values = tensors_of(case, torch.float32, True, device)
    limits = {"input": 3, "weight": 2, "bias": 8, "grad": 2}
    return {
        name: (tensor * limits[name]).round().clamp(-limits[name], limits[name]).to(dtype)
        for name, tensor in values.items()
    }


def ours(case: Conv2dCase, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """All three passes, the gradient of the input by tiles where the stride is not 1."""
    input, weight, bias, grad = values.values()
    query = query_of(case, values)
    by = {op: "" if cuda_conv2d.grouped_why_not(op, query) else "grouped" for op in OPS}
    assert by["conv2d"] and by["conv2d_grad_weight"]
    steps = query.geometry.stride if max(case.output_shape[2:]) > 1 else (1, 1)
    assert bool(by["conv2d_grad_input"]) == (steps == (1, 1)) or case.name.endswith("over-image")
    return (
        cuda_conv2d.conv2d(query, by["conv2d"])(input, weight, bias),
        cuda_conv2d.conv2d_grad_input(query, by["conv2d_grad_input"])(grad, weight),
        *cuda_conv2d.conv2d_grad_weight(query, by["conv2d_grad_weight"])(grad, input, True),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_integers(case: Conv2dCase, cuda_device: torch.device) -> None:
    values = small_integers(case, torch.float16, cuda_device)
    exact = passes(case, {name: t.double() for name, t in values.items()}, "reference")
    for our, expected in zip(ours(case, values), exact, strict=True):
        assert expected.abs().max() <= 2048
        assert torch.equal(our.double(), expected)


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_bfloat16(case: Conv2dCase, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    check(case, values, ours(case, values))
