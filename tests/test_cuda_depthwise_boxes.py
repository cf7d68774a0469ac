"""The depthwise kernels in boxes, in the simulator or on a GPU of Hopper's, against native."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cuda_conv2d import check, query_of, tensors_of
from test_cuda_depthwise_tensor import depthwise, exactly, small_integers, without_padding
from torch import Tensor

from gdfast.backends import Conv2dActQuery, cuda_candidates, cuda_conv2d, cuda_depthwise
from gdfast.backends.activation import ACTIVATIONS, activate
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "hopper"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
BOXES = cuda_depthwise.BOXES

CASES = [
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
OFTEN = CASES[:2]


def ours(case: Conv2dCase, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    input, weight, bias, grad = values.values()
    query = query_of(case, values)
    assert not cuda_candidates.depthwise_hopper_why_not(query, BOXES)
    return (
        cuda_conv2d.conv2d(query, BOXES)(input, weight, bias),
        cuda_conv2d.conv2d(query, BOXES)(input, weight, None) + bias[:, None, None],
        cuda_conv2d.conv2d_grad_input(query, BOXES)(grad, weight),
        *cuda_conv2d.conv2d_grad_weight(query, BOXES)(grad, input, True),
        cuda_conv2d.conv2d_grad_weight(query, BOXES)(grad, input, False)[0],
    )


def every(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output, grad_input, grad_weight and grad_bias in the places of ours."""
    output, grad_input, grad_weight, grad_bias = results
    return output, output, grad_input, grad_weight, grad_bias, grad_weight


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_integers(case: Conv2dCase, cuda_device: torch.device) -> None:
    values = small_integers(case, torch.float16, cuda_device)
    expected = exactly(case, values)
    for our, exact in zip(ours(case, values), every(expected), strict=True):
        assert exact.abs().max() <= 2048
        assert torch.equal(our.double(), exact)


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_bfloat16(case: Conv2dCase, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    output, _, grad_input, grad_weight, grad_bias, _ = ours(case, values)
    check(case, values, (output, grad_input, grad_weight, grad_bias))


@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_thread_orders(case: Conv2dCase, cuda_device: torch.device, thread_order: str) -> None:
    values = small_integers(case, torch.bfloat16, cuda_device)
    for our, exact in zip(ours(case, values), every(exactly(case, values)), strict=True):
        torch.testing.assert_close(our, exact.to(our.dtype), rtol=0.01, atol=0)


def test_the_same_bits_in_every_order(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tensors_of(CASES[5], torch.bfloat16, True, cuda_device)
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
        results.append(ours(CASES[5], values))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_bias_and_activation(case: Conv2dCase, activation: str, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.float16, True, cuda_device)
    input, weight, bias, _ = values.values()
    query = query_of(case, values)
    query = Conv2dActQuery(
        query.device, query.dtype, geometry=query.geometry, strides=query.strides,
        activation=activation, negative_slope=0.25,
    )  # fmt: skip
    exact = exactly(case, values)[0]
    kernel = cuda_conv2d.conv2d(query, BOXES)
    for with_bias, sums in ((bias, exact), (None, exact - bias.double()[:, None, None])):
        expected = activate(sums, activation, 0.25).half()
        torch.testing.assert_close(kernel(input, weight, with_bias), expected, rtol=2e-3, atol=2e-3)


def test_weights_and_addresses(cuda_device: torch.device) -> None:
    """Weights of any strides; images that 16 does not divide the addresses of."""
    case = CASES[0]
    values = small_integers(case, torch.float16, cuda_device)
    expected = ours(case, values)
    values["weight"] = values["weight"].transpose(2, 3).contiguous().transpose(2, 3)
    assert all(map(torch.equal, ours(case, values), expected))
    for name in ("input", "grad"):
        whole = torch.zeros(values[name].numel() + 1, dtype=torch.float16, device=cuda_device)
        moved = whole[1:].as_strided(values[name].shape, values[name].stride())
        values[name] = moved.copy_(values[name])
    assert all(map(torch.equal, ours(case, values), expected))


@pytest.mark.parametrize("name", ["input", "weight", "bias", "grad"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4], CASES[9]], ids=str)
def test_what_is_not_finite_stays_in_its_channel(
    case: Conv2dCase, value: float, name: str, cuda_device: torch.device
) -> None:
    """Nor do zeros around an image or beyond a row make NaN of it: they multiply nothing."""
    values = small_integers(case, torch.float16, cuda_device)
    values["weight"] = torch.where(values["weight"] == 0, 1, values["weight"])
    values["input"] = torch.where(values["input"] == 0, 1, values["input"])
    tensor = values[name]
    if tensor.ndim == 1:
        tensor[2] = value
    elif name == "weight":
        tensor[5, 0, -1, 0] = value
    else:
        tensor[:, 3] = value
        tensor[0, 6, 0, 0] = value
        tensor[-1, 6, -1, -1] = value
    exact = without_padding(case, values)
    assert not all(result.isfinite().all() for result in exact)
    for our, expected in zip(ours(case, values), every(exact), strict=True):
        torch.testing.assert_close(our.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("case", "dtype", "channels_last", "reason"),
    [
        (CASES[0], torch.float32, True, "bfloat16"),
        (CASES[0], torch.float16, False, "channels_last"),
        (replace(CASES[0], R=5, S=5, padding=(2, 2)), torch.float16, True, "3x3"),
        (replace(CASES[0], stride=(2, 2)), torch.float16, True, "stride"),
    ],
)
def test_what_it_does_not_take(
    case: Conv2dCase, dtype: torch.dtype, channels_last: bool, reason: str,
    cuda_device: torch.device,
) -> None:  # fmt: skip
    query = query_of(case, tensors_of(case, dtype, channels_last, cuda_device))
    assert reason in cuda_candidates.depthwise_hopper_why_not(query, BOXES)
    assert BOXES not in cuda_candidates.candidates("conv2d", query)


def test_images_in_larger_ones(cuda_device: torch.device) -> None:
    case = CASES[0]
    values = small_integers(case, torch.float16, cuda_device)
    expected = ours(case, values)
    for name in ("input", "grad"):
        n, c, h, w = values[name].shape
        whole = torch.full((n, h + 1, w + 2, c + 16), torch.nan, dtype=torch.float16)
        part = whole.to(cuda_device)[:, 1:, 1:-1, 8:-8].permute(0, 3, 1, 2)
        values[name] = part.copy_(values[name])
    for result, right in zip(ours(case, values), expected, strict=True):
        assert torch.equal(result, right)
