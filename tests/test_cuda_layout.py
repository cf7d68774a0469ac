"""Dense images from one layout to the other by the CUDA kernel, on a GPU or in the simulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_batch_norm import strides
from test_cuda_conv2d import by_tile, check, query_of, tensors_of

from gdfast import native
from gdfast.backends import (
    cuda_candidates,
    cuda_conv2d,
    cuda_depthwise,
    cuda_hopper,
    cuda_layout,
    cuda_problem,
    cuda_tiles,
)
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
]
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
# Packs of 16 bytes both ways, of 8 bytes one way, and none; blocks that the image does not fill and
# several of them both ways.
SIZES = [
    (2, 8, 2, 4), (3, 72, 5, 8), (1, 16, 24, 24), (2, 600, 4, 4), (2, 24, 2, 6), (2, 12, 8, 1),
    (3, 17, 7, 7), (2, 65, 9, 15), (5, 8, 1, 3),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_ways(
    size: tuple[int, ...], dtype: torch.dtype, cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    images = torch.randn(size).to(cuda_device, dtype)
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
        turned = cuda_layout.channels_last(images)
        expected = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(turned, expected) and strides(turned) == strides(expected)
        back = cuda_layout.contiguous(turned)
        assert torch.equal(back, images) and strides(back) == strides(images)


def test_addresses_that_16_does_not_divide(cuda_device: torch.device) -> None:
    images = torch.randn(2 * 16 * 8 * 8 + 1, device=cuda_device)[1:].view(2, 16, 8, 8)
    turned = cuda_layout.channels_last(images)
    assert torch.equal(turned, images) and turned.stride(1) == 1


def test_no_images(cuda_device: torch.device) -> None:
    turned = cuda_layout.channels_last(torch.randn(0, 8, 2, 3, device=cuda_device))
    assert turned.shape == cuda_layout.contiguous(turned).shape == (0, 8, 2, 3)


def test_what_is_not_dense(cuda_device: torch.device) -> None:
    images = torch.randn(2, 16, 6, 8, device=cuda_device)[:, :, ::2]
    assert cuda_layout.channels_last(images).stride(1) == 1
    assert torch.equal(cuda_layout.channels_last(images), images)
    assert torch.equal(cuda_layout.contiguous(images), images)
    assert cuda_layout.contiguous(images).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution_in_channels_last(dtype: torch.dtype, cuda_device: torch.device) -> None:
    case = Conv2dCase("nchw", 2, 24, 6, 5, 40, 3, 3, (2, 1), (1, 1), (1, 1), 1)
    values = tensors_of(case, dtype, False, cuda_device)
    turned = cuda_tiles.SMALLEST + cuda_problem.TURNED
    query, (input, weight, bias, grad) = query_of(case, values), values.values()
    kernel = cuda_conv2d.conv2d(query, turned)
    assert isinstance(kernel, cuda_conv2d.Kernel)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        output = kernel(input, weight, bias)
        grad_input = cuda_conv2d.conv2d_grad_input(query, turned)(grad, weight)
        others = by_tile(case, values, cuda_tiles.SMALLEST)[2:]
        check(case, values, (output, grad_input, *others))
        again, moments = kernel.with_moments(input, weight, bias)
    assert torch.equal(again, output) and moments is not None
    torch.testing.assert_close(
        moments[:, 0].sum(0), torch.full_like(moments[0, 0], output[:, 0].numel())
    )


@pytest.mark.parametrize(
    ("dtype", "way"),
    [(torch.float32, "depthwise"), (torch.bfloat16, "depthwise"),
     (torch.bfloat16, "depthwise-tensor")], ids=str,
)  # fmt: skip
def test_depthwise_in_channels_last(
    dtype: torch.dtype, way: str, cuda_device: torch.device
) -> None:
    case = Conv2dCase("nchw", 2, 24, 6, 5, 24, 3, 3, (1, 1), (1, 1), (1, 1), 24)
    values = tensors_of(case, dtype, False, cuda_device)
    turned = way + cuda_problem.TURNED
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check(case, values, by_tile(case, values, turned))


def test_candidates_of_nchw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tiles, "multiprocessors", lambda device: 132)
    case = Conv2dCase("nchw", 2, 64, 8, 8, 64, 3, 3, (1, 1), (1, 1), (1, 1), 1)

    def candidates(op: str, channels_last: bool, few: bool = False) -> tuple[str, ...]:
        sizes = replace(case, C=8 if few else case.C)
        query = query_of(
            sizes, tensors_of(sizes, torch.bfloat16, channels_last, torch.device("cpu"))
        )
        return cuda_candidates.candidates(op, replace(query, device=torch.device("cuda")))

    for op in ("conv2d", "conv2d_act", "conv2d_grad_input"):
        tiles = candidates(op, True)
        *turned, direct = candidates(op, False)
        assert turned == [tile + cuda_problem.TURNED for tile in tiles]
        assert direct in cuda_tiles.TILES
        assert not any(name.endswith(cuda_problem.TURNED) for name in candidates(op, False, True))
    assert candidates("conv2d_grad_weight", False) == candidates("conv2d_grad_weight", True)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("op", ["conv2d", "conv2d_grad_input", "conv2d_grad_weight"])
def test_candidates_of_depthwise_nchw(op: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_hopper, "missing", lambda device: "")
    in_place = (cuda_depthwise.NAME,)
    others = {3: (cuda_depthwise.TOEPLITZ,), 5: (cuda_depthwise.ROWS, cuda_depthwise.BOXES)}[size]
    ways = tuple(by for by in cuda_depthwise.WAYS if by not in others)
    if native.cuda is None:
        ways = in_place
    turned = tuple(name + cuda_problem.TURNED for name in ways)
    for batch, channels_last, expected in (
        (64, False, turned + in_place), (1, False, in_place + turned),
        (64, True, ways),
    ):  # fmt: skip
        padding = size // 2, size // 2
        case = Conv2dCase("", batch, 32, 24, 24, 32, size, size, (1, 1), padding, (1, 1), 32)
        values = tensors_of(case, torch.bfloat16, channels_last, torch.device("cpu"))
        query = replace(query_of(case, values), device=torch.device("cuda"))
        assert cuda_candidates.candidates(op, query) == expected
