"""The depthwise kernels for Hopper, by whole rows, in boxes and by bands, in the simulator or on
such a GPU, against native."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_cuda_conv2d import check, check_bias_and_activation, query_of, tensors_of
from test_cuda_depthwise_tensor import (
    depthwise,
    exactly,
    small_integers,
    with_one,
    without_padding,
)
from torch import Tensor

from gdfast.backends import cuda_candidates, cuda_conv2d, cuda_depthwise
from gdfast.backends.activation import ACTIVATIONS
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "hopper"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
ROWS, BOXES, BANDS = cuda_depthwise.ROWS, cuda_depthwise.BOXES, cuda_depthwise.TOEPLITZ

OF_ROWS = [
    # The last strip of columns has some, all or one.
    depthwise("some", 7, 24, 9, 11, 3, (1, 1)),
    depthwise("all", 3, 8, 10, 28, 3, (1, 1)),
    depthwise("one-more", 2, 16, 6, 29, 3, (1, 1)),
    # A block has several pieces, more than it has stages for.
    depthwise("many", 700, 8, 3, 4, 3, (1, 1)),
    depthwise("tall", 2, 16, 50, 5, 3, (1, 1)),
    depthwise("many-channels", 2, 568, 5, 7, 3, (1, 1)),
    # Rows of filters that see nothing of the image.
    depthwise("low", 2, 16, 1, 9, 3, (1, 1)),
    # Padding that is not half of the filter.
    depthwise("unpadded", 2, 8, 8, 12, 3, (0, 0)),
    depthwise("wide-padding", 2, 16, 5, 4, 3, (2, 2)),
    depthwise("asymmetric-padding", 2, 16, 8, 7, 3, (0, 2)),
    depthwise("one-column", 30, 8, 4, 1, 3, (1, 1)),
]
OF_BOXES = [
    # Two images side by side, the last one alone; channels of more boxes than one.
    depthwise("short-rows", 3, 72, 9, 14, 3, (1, 1)),
    depthwise("one-tile", 5, 40, 7, 16, 3, (1, 1)),
    # One image, and rows that are made in strips.
    depthwise("two-tiles", 2, 16, 9, 28, 3, (1, 1)),
    depthwise("strips", 2, 16, 6, 70, 3, (1, 1)),
    depthwise("strips-of-one-tile", 3, 24, 9, 33, 3, (1, 1)),
    # A block has several pieces, and more rows than places for them.
    depthwise("many", 1100, 8, 3, 2, 3, (1, 1)),
    depthwise("tall", 2, 16, 60, 5, 3, (1, 1)),
    # Rows of filters that see nothing of the image.
    depthwise("low", 2, 16, 1, 9, 3, (1, 1)),
    # Padding that is not half of the filter, which grad_input has less of than none.
    depthwise("unpadded", 2, 8, 8, 12, 3, (0, 0)),
    depthwise("wide-padding", 2, 16, 5, 4, 3, (4, 3)),
    depthwise("asymmetric-padding", 2, 16, 8, 7, 3, (0, 2)),
    depthwise("one-column", 30, 8, 4, 1, 3, (1, 1)),
]


OF_BANDS = [
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
    # Lines of 64 channels, the last ones of fewer.
    depthwise("5x5-wide-lines", 5, 104, 9, 28, 5, (2, 2)),
]
CASES = {ROWS: OF_ROWS, BOXES: OF_BOXES, BANDS: OF_BANDS}


def by_each(**places: Sequence[int]) -> pytest.MarkDecorator:
    """Runs a test with `by` and `case`, for the cases at these places of rows, boxes and bands."""
    pairs = [
        (by, CASES[by][place])
        for by, of_kind in zip(CASES, places.values(), strict=True)
        for place in of_kind
    ]
    return pytest.mark.parametrize(("by", "case"), pairs, ids=str)


EVERY = by_each(rows=range(len(OF_ROWS)), boxes=range(len(OF_BOXES)), bands=range(len(OF_BANDS)))
OFTEN = by_each(rows=(0, 1), boxes=(0, 1), bands=(0, 1, 2))


def ours(by: str, case: Conv2dCase, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    input, weight, bias, grad = values.values()
    query = query_of(case, values)
    assert not cuda_candidates.depthwise_hopper_why_not(query, by)
    return (
        cuda_conv2d.conv2d(query, by)(input, weight, bias),
        cuda_conv2d.conv2d(query, by)(input, weight, None) + bias[:, None, None],
        cuda_conv2d.conv2d_grad_input(query, by)(grad, weight),
        *cuda_conv2d.conv2d_grad_weight(query, by)(grad, input, True),
        cuda_conv2d.conv2d_grad_weight(query, by)(grad, input, False)[0],
    )


def every(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output, grad_input, grad_weight and grad_bias in the places of ours."""
    output, grad_input, grad_weight, grad_bias = results
    return output, output, grad_input, grad_weight, grad_bias, grad_weight


@EVERY
def test_small_integers(by: str, case: Conv2dCase, cuda_device: torch.device) -> None:
    values = small_integers(case, torch.float16, cuda_device)
    expected = exactly(case, values)
    for our, exact in zip(ours(by, case, values), every(expected), strict=True):
        assert exact.abs().max() <= 2048
        assert torch.equal(our.double(), exact)


@OFTEN
def test_bfloat16(by: str, case: Conv2dCase, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    output, _, grad_input, grad_weight, grad_bias, _ = ours(by, case, values)
    check(case, values, (output, grad_input, grad_weight, grad_bias))


@OFTEN
def test_thread_orders(
    by: str, case: Conv2dCase, cuda_device: torch.device, thread_order: str
) -> None:
    values = small_integers(case, torch.bfloat16, cuda_device)
    for our, exact in zip(ours(by, case, values), every(exactly(case, values)), strict=True):
        torch.testing.assert_close(our, exact.to(our.dtype), rtol=0.01, atol=0)


@by_each(rows=[3], boxes=[5], bands=[1])
def test_the_same_bits_in_every_order(
    by: str, case: Conv2dCase, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
        results.append(ours(by, case, values))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@by_each(rows=(0, 1), boxes=(0, 1), bands=(1, 2))
def test_bias_and_activation(
    by: str, case: Conv2dCase, activation: str, cuda_device: torch.device
) -> None:
    values = tensors_of(case, torch.float16, True, cuda_device)
    check_bias_and_activation(case, values, by, activation, exactly(case, values)[0])


@by_each(rows=[0], boxes=[0], bands=(0, 1))
def test_weights_and_addresses(by: str, case: Conv2dCase, cuda_device: torch.device) -> None:
    """Weights of any strides; images that 16 does not divide the addresses of."""
    values = small_integers(case, torch.float16, cuda_device)
    expected = ours(by, case, values)
    values["weight"] = values["weight"].transpose(2, 3).contiguous().transpose(2, 3)
    assert all(map(torch.equal, ours(by, case, values), expected))
    for name in ("input", "grad"):
        whole = torch.zeros(values[name].numel() + 1, dtype=torch.float16, device=cuda_device)
        moved = whole[1:].as_strided(values[name].shape, values[name].stride())
        values[name] = moved.copy_(values[name])
    assert all(map(torch.equal, ours(by, case, values), expected))


@pytest.mark.parametrize("name", ["input", "weight", "bias", "grad"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@by_each(rows=(0, 2, 8), boxes=(0, 2, 4, 9), bands=(0, 2, 3, 7, 13))
def test_what_is_not_finite_stays_in_its_channel(
    by: str, case: Conv2dCase, value: float, name: str, cuda_device: torch.device
) -> None:
    """Nor do zeros of a band, around an image or beyond a row make NaN of it: they multiply
    nothing."""
    values = with_one(case, name, value, cuda_device)
    exact = without_padding(case, values)
    assert not all(result.isfinite().all() for result in exact)
    for our, expected in zip(ours(by, case, values), every(exact), strict=True):
        torch.testing.assert_close(our.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("by", CASES)
@pytest.mark.parametrize(
    ("change", "dtype", "channels_last", "reason"),
    [
        ({}, torch.float32, True, "bfloat16"),
        ({}, torch.float16, False, "channels_last"),
        ({"stride": (2, 2)}, torch.float16, True, "stride"),
        ("size", torch.float16, True, "it takes filters of "),
    ],
)
def test_what_none_takes(
    by: str, change: Any, dtype: torch.dtype, channels_last: bool, reason: str,
    cuda_device: torch.device,
) -> None:  # fmt: skip
    if change == "size":
        size, taken = (3, "5x5 and 7x7") if by == BANDS else (5, "3x3")
        reason += taken
        change = {"R": size, "S": size, "padding": (size // 2, size // 2)}
    case = replace(CASES[by][1], **change)
    query = query_of(case, tensors_of(case, dtype, channels_last, cuda_device))
    assert reason in cuda_candidates.depthwise_hopper_why_not(query, by)
    assert by not in cuda_candidates.candidates("conv2d", query)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (replace(OF_BOXES[0], padding=(1, 3)), "padding"),
        (replace(OF_BOXES[0], C=1160, K=1160, groups=1160), "fewer"),
        (replace(OF_BOXES[0], N=1, H=1, W=2**20), "fewer"),
    ],
)
def test_what_does_not_go_by_rows(case: Conv2dCase, reason: str, cuda_device: torch.device) -> None:
    query = query_of(case, tensors_of(case, torch.float16, True, cuda_device))
    assert reason in cuda_candidates.depthwise_hopper_why_not(query, ROWS)
    assert ROWS not in cuda_candidates.candidates("conv2d", query)


def test_parts_of_rows_are_not_taken(cuda_device: torch.device) -> None:
    case = OF_ROWS[0]
    values = small_integers(case, torch.float16, cuda_device)
    n, c, h, w = values["input"].shape
    whole = torch.zeros((n, h, w + 1, c), dtype=torch.float16, device=cuda_device)
    values["input"] = whole[:, :, 1:].permute(0, 3, 1, 2)
    assert "whole rows" in cuda_candidates.depthwise_hopper_why_not(query_of(case, values), ROWS)


@by_each(rows=[], boxes=[0], bands=[1])
def test_boxes_of_larger_images(by: str, case: Conv2dCase, cuda_device: torch.device) -> None:
    values = small_integers(case, torch.float16, cuda_device)
    expected = ours(by, case, values)
    for name in ("input", "grad"):
        n, c, h, w = values[name].shape
        whole = torch.full((n, h + 1, w + 2, c + 16), torch.nan, dtype=torch.float16)
        part = whole.to(cuda_device)[:, 1:, 1:-1, 8:-8].permute(0, 3, 1, 2)
        values[name] = part.copy_(values[name])
    for result, right in zip(ours(by, case, values), expected, strict=True):
        assert torch.equal(result, right)
