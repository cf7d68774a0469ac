"""The depthwise kernels by bands, in the simulator or on a GPU of Hopper's, against native."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cuda_conv2d import check, check_bias_and_activation, query_of, tensors_of
from test_cuda_depthwise_hopper import every, ours
from test_cuda_depthwise_tensor import (
    depthwise,
    exactly,
    small_integers,
    with_one,
    without_padding,
)

from gdfast.backends import cuda_candidates, cuda_depthwise
from gdfast.backends.activation import ACTIVATIONS
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "hopper"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
BY = cuda_depthwise.TOEPLITZ

CASES = [
    # Images of one, two and four tiles side by side, the last images beyond the batch; channels of
    # more boxes than one.
    depthwise("7x7-one-tile", 18, 40, 9, 7, 7, (3, 3)),
    depthwise("5x5-two-tiles", 10, 72, 9, 14, 5, (2, 2)),
    depthwise("7x7-four-tiles", 6, 16, 9, 28, 7, (3, 3)),
    depthwise("5x5-three-images", 4, 8, 6, 40, 5, (2, 2)),
    depthwise("7x7-half-a-tile", 9, 8, 9, 12, 7, (3, 3)),
    # One image wide, and rows that are made in strips.
    depthwise("7x7-long-rows", 1, 8, 8, 128, 7, (3, 3)),
    depthwise("5x5-strips", 2, 16, 6, 150, 5, (2, 2)),
    depthwise("7x7-strips-of-two-images", 2, 8, 8, 97, 7, (3, 3)),
    # A block has several pieces, and more rows than places for them.
    depthwise("5x5-many", 2500, 8, 3, 2, 5, (2, 2)),
    depthwise("7x7-tall", 2, 16, 60, 5, 7, (3, 3)),
    # Rows of filters that see nothing of the image.
    depthwise("7x7-low", 2, 16, 2, 9, 7, (3, 3)),
    # Padding that is not half of the filter, which grad_input has less of than none.
    depthwise("7x7-unpadded", 2, 8, 9, 12, 7, (0, 0)),
    depthwise("5x5-wide-padding", 2, 16, 5, 4, 5, (6, 5)),
    depthwise("5x5-asymmetric-padding", 2, 16, 8, 7, 5, (0, 4)),
    depthwise("5x5-one-column", 30, 8, 4, 1, 5, (2, 2)),
]
OFTEN = CASES[:3]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_integers(case: Conv2dCase, cuda_device: torch.device) -> None:
    values = small_integers(case, torch.float16, cuda_device)
    expected = exactly(case, values)
    for our, exact in zip(ours(BY, case, values), every(expected), strict=True):
        assert exact.abs().max() <= 2048
        assert torch.equal(our.double(), exact)


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_bfloat16(case: Conv2dCase, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    output, _, grad_input, grad_weight, grad_bias, _ = ours(BY, case, values)
    check(case, values, (output, grad_input, grad_weight, grad_bias))


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_thread_orders(case: Conv2dCase, cuda_device: torch.device, thread_order: str) -> None:
    values = small_integers(case, torch.bfloat16, cuda_device)
    for our, exact in zip(ours(BY, case, values), every(exactly(case, values)), strict=True):
        torch.testing.assert_close(our, exact.to(our.dtype), rtol=0.01, atol=0)


def test_the_same_bits_in_every_order(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tensors_of(CASES[1], torch.bfloat16, True, cuda_device)
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
        results.append(ours(BY, CASES[1], values))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_bias_and_activation(case: Conv2dCase, activation: str, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.float16, True, cuda_device)
    check_bias_and_activation(case, values, BY, activation, exactly(case, values)[0])


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_weights_and_addresses(case: Conv2dCase, cuda_device: torch.device) -> None:
    """Weights of any strides; images that 16 does not divide the addresses of."""
    values = small_integers(case, torch.float16, cuda_device)
    expected = ours(BY, case, values)
    values["weight"] = values["weight"].transpose(2, 3).contiguous().transpose(2, 3)
    assert all(map(torch.equal, ours(BY, case, values), expected))
    for name in ("input", "grad"):
        whole = torch.zeros(values[name].numel() + 1, dtype=torch.float16, device=cuda_device)
        moved = whole[1:].as_strided(values[name].shape, values[name].stride())
        values[name] = moved.copy_(values[name])
    assert all(map(torch.equal, ours(BY, case, values), expected))


@pytest.mark.parametrize("name", ["input", "weight", "bias", "grad"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 3, 7, 13)], ids=str)
def test_what_is_not_finite_stays_in_its_channel(
    case: Conv2dCase, value: float, name: str, cuda_device: torch.device
) -> None:
    """Nor do the zeros of a band, or around an image, make NaN of it: they multiply nothing."""
    values = with_one(case, name, value, cuda_device)
    exact = without_padding(case, values)
    assert not all(result.isfinite().all() for result in exact)
    for our, expected in zip(ours(BY, case, values), every(exact), strict=True):
        torch.testing.assert_close(our.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("case", "dtype", "channels_last", "reason"),
    [
        (CASES[1], torch.float32, True, "bfloat16"),
        (CASES[1], torch.float16, False, "channels_last"),
        (replace(CASES[1], R=3, S=3, padding=(1, 1)), torch.float16, True, "5x5 and 7x7"),
        (replace(CASES[1], stride=(2, 2)), torch.float16, True, "stride"),
    ],
)
def test_what_it_does_not_take(
    case: Conv2dCase, dtype: torch.dtype, channels_last: bool, reason: str,
    cuda_device: torch.device,
) -> None:  # fmt: skip
    query = query_of(case, tensors_of(case, dtype, channels_last, cuda_device))
    assert reason in cuda_candidates.depthwise_hopper_why_not(query, BY)
    assert BY not in cuda_candidates.candidates("conv2d", query)


def test_images_in_larger_ones(cuda_device: torch.device) -> None:
    case = CASES[1]
    values = small_integers(case, torch.float16, cuda_device)
    expected = ours(BY, case, values)
    for name in ("input", "grad"):
        n, c, h, w = values[name].shape
        whole = torch.full((n, h + 1, w + 2, c + 16), torch.nan, dtype=torch.float16)
        part = whole.to(cuda_device)[:, 1:, 1:-1, 8:-8].permute(0, 3, 1, 2)
        values[name] = part.copy_(values[name])
    for result, right in zip(ours(BY, case, values), expected, strict=True):
        assert torch.equal(result, right)
