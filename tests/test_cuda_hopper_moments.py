"""Moments of the output of Hopper's convolution, on such a GPU or in the simulator."""

from __future__ import annotations

import pytest
import torch
from test_cuda_conv2d import query_of
from test_cuda_hopper import DTYPES, tensors
from test_cuda_moments import joined
from torch import Tensor

from gdfast import native, ops
from gdfast.backends import cuda_conv2d
from gdfast.backends.cuda_hopper import HOPPER
from gdfast.backends.cuda_tiles import multiprocessors
from gdfast.bench.cases import Conv2dCase
from gdfast.geometry import dense_strides

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
]

CASES = [
    # Boxes that do not fill tiles, images that do not fill boxes, channels that fill no row.
    Conv2dCase("3x3", 2, 72, 9, 10, 72, 3, 3, padding=(1, 1)),
    # Blocks go on from tile to tile, and have the same channels: of one or two steps, and of more.
    Conv2dCase("one-step", 9, 64, 16, 16, 64, 1, 1),
    Conv2dCase("two-steps", 7, 128, 16, 16, 64, 1, 1),
    Conv2dCase("six-steps", 4, 16, 16, 16, 128, 2, 3, padding=(1, 1)),
    # Or other channels from one tile to the next.
    Conv2dCase("wide", 3, 24, 11, 9, 264, 3, 1, padding=(1, 0)),
    Conv2dCase("strided", 40, 64, 5, 5, 200, 1, 1, stride=(2, 2)),
]

TILES = [name for name in HOPPER if name != "hopper"]  # which is one of the others


def moments_of(
    case: Conv2dCase, dtype: torch.dtype, tile: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Output, with a mean of about 100, and moments."""
    values = tensors(case, dtype, device)
    input, weight, bias, _ = values.values()
    return cuda_conv2d.conv2d(query_of(case, values), tile).with_moments(input, weight, bias + 100)


@pytest.mark.parametrize("dtype, order", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_the_output(
    case: Conv2dCase, tile: str, dtype: torch.dtype, order: str, hopper: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
    output, moments = moments_of(case, dtype, tile, hopper)
    count, mean, variance = joined(moments)
    assert count == output[:, 0].numel()
    exact = torch.var_mean(output.double(), (0, 2, 3), correction=0)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(mean, exact[1], rtol=4 * eps, atol=0)
    torch.testing.assert_close(variance, exact[0], rtol=64 * eps, atol=0)


def test_the_output_is_that_of_a_pass_without(hopper: torch.device) -> None:
    values = tensors(CASES[0], torch.bfloat16, hopper)
    input, weight, bias, _ = values.values()
    for tile in HOPPER:
        kernel = cuda_conv2d.conv2d(query_of(CASES[0], values), tile)
        expected = kernel(input, weight, bias)
        assert torch.equal(kernel.with_moments(input, weight, bias)[0], expected)


@pytest.mark.parametrize("tile", TILES)
def test_of_many_tiles(tile: str, hopper: torch.device, thread_order: str) -> None:
    """Several for each block, on a GPU too; one consumer may have one more than the other."""
    blocks = multiprocessors(hopper) if hopper.type == "cuda" else 3
    case = Conv2dCase("", 5 * blocks * 128 // 144 + 1, 8, 12, 12, 64, 1, 1)
    output, moments = moments_of(case, torch.bfloat16, tile, hopper)
    exact = torch.var_mean(output.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(joined(moments)[1:], exact[::-1], rtol=1e-5, atol=1e-6)


def test_bits_are_those_of_every_order_and_every_run(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case in CASES[:1] + CASES[-1:]:
        for tile in ("hopper-64", "hopper-256"):
            results = []
            for order in ("ascending", "descending"):
                monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
                torch.manual_seed(0)
                results.append(moments_of(case, torch.bfloat16, tile, hopper)[1])
            assert torch.equal(*results)


def test_a_large_mean_costs_nothing(hopper: torch.device) -> None:
    """Mean 1000, deviation 1, where float16 steps by a half."""
    torch.manual_seed(0)
    case = Conv2dCase("", 4, 8, 40, 33, 8, 1, 1)
    values = tensors(case, torch.float16, hopper)
    input = torch.randn_like(values["input"])
    weight = torch.eye(8, dtype=torch.float16, device=hopper)[:, :, None, None]
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.full((8,), 1000.0, dtype=torch.float16, device=hopper)
    query = query_of(case, {**values, "input": input, "weight": weight})
    output, moments = cuda_conv2d.conv2d(query, "hopper-64").with_moments(input, weight, bias)
    exact = torch.var_mean(output.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(joined(moments)[1], exact[1], rtol=1e-7, atol=0)
    torch.testing.assert_close(joined(moments)[2], exact[0], rtol=1e-5, atol=0)


def test_what_is_not_finite_stays_in_its_channel(hopper: torch.device) -> None:
    case = Conv2dCase("", 1, 8, 12, 12, 16, 1, 1)
    values = tensors(case, torch.bfloat16, hopper)
    input, weight, _, _ = values.values()
    weight[3] = float("nan")
    weight[5] = 3e38
    moments = cuda_conv2d.conv2d(query_of(case, values), "hopper-64").with_moments(
        input, weight, None
    )[1]
    finite = joined(moments)[2].isfinite()
    assert not finite[3]
    assert not finite[5]
    assert finite.sum() == 14


def test_too_many_parts_are_none(hopper: torch.device) -> None:
    """Where blocks cannot all have the same channels, each tile has parts of its own."""
    blocks = multiprocessors(hopper) if hopper.type == "cuda" else 3

    def splits(K: int) -> int:
        case = Conv2dCase("", 256, 8, 56, 56, K, 1, 1)
        sizes = case.input_shape, case.weight_shape, case.output_shape
        problem = native.cuda.Conv2dProblem(
            (256, 8, 56, 56, K, 1, 1, 56, 56), (1, 1), (0, 0), (1, 1), 1, "bfloat16",
            *(dense_strides(size, True) for size in sizes),
        )  # fmt: skip
        return native.cuda.conv2d_hopper_moment_splits(problem, 128, 64, hopper.index or 0)

    assert splits(64 * (blocks + 1)) == 0
    assert splits(64) == 8 * blocks


def test_a_batch_normalisation_takes_them(hopper: torch.device) -> None:
    output, moments = moments_of(CASES[0], torch.bfloat16, "hopper", hopper)
    results = [
        ops.batch_norm_act(
            output, None, None, None, None, training=True, activation="relu", moments=given,
            backend="cuda",
        )
        for given in (moments, None)
    ]  # fmt: skip
    torch.testing.assert_close(*results)
