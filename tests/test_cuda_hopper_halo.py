"""The convolution for Hopper whose taps share boxes, on such a GPU or in the simulator."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from test_cuda_conv2d import query_of
from test_cuda_hopper import ACTIVATIONS, DTYPES, tensors, window
from test_cuda_moments import joined

from gdfast.backends import cuda_candidates, cuda_conv2d, cuda_hopper_halo
from gdfast.backends.cuda_hopper_halo import HALO
from gdfast.backends.cuda_tiles import multiprocessors
from gdfast.backends.registry import Conv2dActQuery, Conv2dQuery
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
]

CASES = [
    # Parts of tiles in every axis, channels that fill neither a box nor a tile.
    Conv2dCase("3x3", 2, 72, 9, 10, 72, 3, 3, padding=(1, 1)),
    # Several images a tile, the last with one that is not there; more tiles than blocks.
    Conv2dCase("7x7-images", 17, 64, 7, 7, 64, 3, 3, padding=(1, 1)),
    # A part of an image a tile, the last of them in part; weights stay.
    Conv2dCase("wide", 2, 64, 6, 56, 64, 3, 3, padding=(1, 1)),
    # Without padding, with all that a window has, and with some on one side alone.
    Conv2dCase("no-padding", 5, 16, 6, 9, 24, 3, 3),
    Conv2dCase("full-padding", 4, 16, 5, 6, 24, 3, 3, padding=(2, 2)),
    Conv2dCase("asymmetric", 3, 24, 7, 12, 16, 2, 5, padding=(1, 3)),
    Conv2dCase("dilated", 3, 16, 9, 8, 72, 3, 2, padding=(2, 1), dilation=(2, 3)),
    Conv2dCase("one-column", 2, 16, 20, 17, 8, 3, 1, padding=(1, 0)),
    Conv2dCase("one-row", 2, 16, 6, 30, 8, 1, 5, padding=(0, 2)),
    # More steps than weights have stages.
    Conv2dCase("many-steps", 1, 136, 14, 14, 136, 3, 3, padding=(1, 1)),
]


def check(case: Conv2dCase, dtype: torch.dtype, name: str, device: torch.device) -> None:
    values = tensors(case, dtype, device)
    input, weight, bias, grad = values.values()
    query = query_of(case, values)
    for op in ("conv2d", "conv2d_grad_input"):
        assert cuda_candidates.halo_why_not(op, query, name) == ""
    output = cuda_conv2d.conv2d(query, name)(input, weight, bias)
    exact = F.conv2d(input.double(), weight.double(), bias.double(), **window(case))
    assert torch.equal(output, exact.to(dtype))
    grad_input = cuda_conv2d.conv2d_grad_input(query, name)(grad, weight)
    exact = torch.nn.grad.conv2d_input(input.shape, weight.double(), grad.double(), **window(case))
    assert torch.equal(grad_input, exact.to(dtype))


@pytest.mark.parametrize(
    "name, dtype, order",
    [(name, *kind) for name, kind in zip(HALO, DTYPES, strict=True)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_native_does(
    case: Conv2dCase, name: str, dtype: torch.dtype, order: str, hopper: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
    check(case, dtype, name, hopper)


@pytest.mark.parametrize("name", HALO)
@pytest.mark.parametrize(
    "case",
    [
        # Both with more tiles than blocks, an odd number for each of them; weights stay, or not.
        Conv2dCase("few-steps", 1, 16, 8, 22, 64, 3, 2, padding=(1, 0)),
        Conv2dCase("many-steps", 1, 72, 5, 20, 136, 2, 2, padding=(1, 1)),
    ],
    ids=str,
)
def test_blocks_go_on_from_tile_to_tile(
    case: Conv2dCase, name: str, hopper: torch.device, thread_order: str
) -> None:
    # The simulator has three multiprocessors.
    blocks = multiprocessors(hopper) if hopper.type == "cuda" else 3
    check(replace(case, N=3 * blocks + 1), torch.bfloat16, name, hopper)


@pytest.mark.parametrize("images, rows, columns", [(1, 7, 28), (1, 4, 56), (4, 7, 7)])
def test_every_width_of_a_product_does(
    images: int, rows: int, columns: int, hopper: torch.device
) -> None:
    """208, 232 and 248: whole tiles of images of 28, 56 and 7 columns."""
    case = Conv2dCase("", images, 8, rows, columns, 8, 3, 3, padding=(1, 1))
    for name in HALO:
        check(case, torch.bfloat16, name, hopper)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_activations(activation: str, with_bias: bool, hopper: torch.device) -> None:
    case = Conv2dCase("3x1", 2, 72, 9, 10, 72, 3, 1, padding=(1, 0))
    values = tensors(case, torch.bfloat16, hopper)
    input, weight, bias, _ = values.values()
    values["input"][1, 0, 0, 0] = float("nan")
    added = bias if with_bias else None
    exact = F.conv2d(
        input.double(), weight.double(), None if added is None else added.double(), **window(case)
    )
    expected = ACTIVATIONS[activation](exact).to(torch.bfloat16)
    plainly = {f.name: getattr(query_of(case, values), f.name) for f in fields(Conv2dQuery)}
    query = Conv2dActQuery(**plainly, activation=activation, negative_slope=0.125)
    for name in HALO:
        output = cuda_conv2d.conv2d(query, name)(input, weight, added)
        # Where float32 and float64 lie on either side of the middle between two bfloat16.
        bound = 2**-8 if activation == "silu" else 0
        torch.testing.assert_close(output, expected, rtol=bound, atol=1e-30, equal_nan=True)


REFUSED = {
    "strides of 1": Conv2dCase("stride", 1, 16, 8, 8, 16, 3, 3, stride=(2, 1)),
    "windows of several taps": Conv2dCase("1x1", 1, 16, 8, 8, 16, 1, 1),
    "padding narrower than the window": Conv2dCase("wide", 1, 16, 8, 8, 16, 3, 3, padding=(3, 1)),
    "images of fewer columns": Conv2dCase("panorama", 1, 16, 2, 249, 16, 3, 3, padding=(1, 1)),
    "one group": Conv2dCase("groups", 1, 16, 8, 8, 16, 3, 3, groups=2),
    "input: channels in eights": Conv2dCase("C", 1, 12, 8, 8, 16, 3, 3),
    "at least one image": Conv2dCase("N", 0, 16, 8, 8, 16, 3, 3),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_it_does_not_take_has_a_reason(words: str, hopper: torch.device) -> None:
    query = query_of(REFUSED[words], tensors(REFUSED[words], torch.bfloat16, hopper))
    for op in ("conv2d", "conv2d_grad_input"):
        assert cuda_candidates.halo_why_not(op, query, "hopper-halo-64") == f"it takes {words}"


@pytest.mark.parametrize(
    "channels, name", [(8, "64"), (64, "64"), (72, "128"), (128, "128"), (192, "64"), (256, "128")]
)
def test_one_tile_is_a_candidate(channels: int, name: str, hopper: torch.device) -> None:
    case = Conv2dCase("3x3", 1, 64, 8, 8, channels, 3, 3, padding=(1, 1))
    query = query_of(case, tensors(case, torch.bfloat16, hopper))
    found = [found for found in cuda_candidates.candidates("conv2d", query) if found in HALO]
    # The simulator's times tell nothing.
    assert found == ([f"hopper-halo-{name}"] if hopper.type == "cuda" else [])
    assert cuda_hopper_halo.candidates(channels) == (f"hopper-halo-{name}",)


@pytest.mark.parametrize("name", HALO)
@pytest.mark.parametrize(
    "case",
    [
        # The last image or the last rows are not there; blocks have tiles of several channels, or
        # of the same, and some consumers have none.
        Conv2dCase("images", 5, 24, 7, 7, 200, 3, 3, padding=(1, 1)),
        Conv2dCase("rows", 2, 16, 11, 44, 64, 3, 2, padding=(0, 1)),
        Conv2dCase("one-tile", 1, 16, 6, 9, 8, 3, 3),
    ],
    ids=str,
)
def test_moments_of_the_output(
    case: Conv2dCase, name: str, hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
        torch.manual_seed(0)
        values = tensors(case, torch.bfloat16, hopper)
        input, weight, bias, _ = values.values()
        kernel = cuda_conv2d.conv2d(query_of(case, values), name)
        output, moments = kernel.with_moments(input, weight, bias + 100)
        results.append(moments)
    assert torch.equal(output, kernel(input, weight, bias + 100))
    count, mean, variance = joined(moments)
    assert count == output[:, 0].numel()
    exact = torch.var_mean(output.double(), (0, 2, 3), correction=0)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(mean, exact[1], rtol=4 * eps, atol=0)
    torch.testing.assert_close(variance, exact[0], rtol=64 * eps, atol=0)
    assert torch.equal(*results)


def test_moments_of_what_is_not_finite_stay_in_their_channel(hopper: torch.device) -> None:
    case = Conv2dCase("3x1", 2, 72, 9, 10, 72, 3, 1, padding=(1, 0))
    values = tensors(case, torch.float16, hopper)
    input, weight, _, _ = values.values()
    weight[3, 5] = float("nan")
    kernel = cuda_conv2d.conv2d(query_of(case, values), "hopper-halo-64")
    moments = kernel.with_moments(input, weight, None)[1]
    assert joined(moments)[2].isnan().nonzero().tolist() == [[3]]


def test_there_are_no_moments_of_an_activation(hopper: torch.device) -> None:
    values = tensors(CASES[0], torch.float16, hopper)
    plainly = {f.name: getattr(query_of(CASES[0], values), f.name) for f in fields(Conv2dQuery)}
    query = Conv2dActQuery(**plainly, activation="relu", negative_slope=0.0)
    kernel = cuda_conv2d.conv2d(query, "hopper-halo-64")
    output, moments = kernel.with_moments(values["input"], values["weight"], None)
    assert moments is None and (output >= 0).all()
