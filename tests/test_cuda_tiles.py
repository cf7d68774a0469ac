"""What the CUDA convolution kernels take, and their tiles, for a GPU that need not be here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from gdfast.backends import cuda_candidates, cuda_tiles
from gdfast.backends.registry import Conv2dQuery
from gdfast.bench.cases import Conv2dCase
from gdfast.geometry import Conv2dGeometry, dense_strides


@pytest.fixture(autouse=True)
def float32_as_it_is() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def on_a_gpu(case: Conv2dCase, dtype: torch.dtype = torch.bfloat16) -> Conv2dQuery:
    """The query of tensors in channels_last."""
    geometry = Conv2dGeometry.of(
        "conv2d", case.input_shape, case.weight_shape, case.stride, case.padding * 2,
        case.dilation, case.groups,
    )  # fmt: skip
    input, weight, output = (
        dense_strides(size, True)
        for size in (geometry.input_size, geometry.weight_size, geometry.output_size)
    )
    device = torch.device("cuda", 0)
    return Conv2dQuery(device, dtype, geometry=geometry, strides=(input, weight, output))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tiles, "multiprocessors", lambda device: 132)


def test_candidates_on_a_gpu(h100: None) -> None:
    large = Conv2dCase("", 256, 256, 28, 28, 256, 3, 3, padding=(1, 1))
    assert cuda_tiles.candidates("conv2d", on_a_gpu(large))[0] == "128x128"
    assert "128x128" not in cuda_tiles.candidates("conv2d", on_a_gpu(replace(large, K=56)))
    assert set(cuda_tiles.candidates("conv2d", on_a_gpu(large))) == set(cuda_tiles.TILES)
    small = replace(large, N=1, H=7, W=7)
    assert cuda_tiles.candidates("conv2d", on_a_gpu(small))[0] == "64x64"
    assert cuda_tiles.candidates("conv2d", on_a_gpu(replace(large, C=2))) == ("64x64",)
    stem = on_a_gpu(Conv2dCase("", 256, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3)))
    for op in ("conv2d", "conv2d_grad_weight"):
        names = cuda_tiles.candidates(op, stem)
        assert names[0].endswith("-padded") and names[-1] == "64x64", op
    assert cuda_tiles.candidates("conv2d_grad_input", stem) == ("64x64",)
    for op in ("conv2d", "conv2d_grad_input", "conv2d_grad_weight"):
        three = cuda_tiles.candidates(op, on_a_gpu(large, torch.float32))
        assert set(three) == {"128x64", "64x64"}, op
        assert cuda_tiles.candidates(op, on_a_gpu(large, torch.float64)) == ("64x64",)


def test_splits_fill_a_gpu(h100: None) -> None:
    stem = on_a_gpu(Conv2dCase("", 256, 64, 56, 56, 64, 1, 1))
    assert cuda_tiles.splits(stem, "64x64") == 256
    wide = on_a_gpu(Conv2dCase("", 256, 512, 7, 7, 512, 3, 3, padding=(1, 1)))
    assert cuda_tiles.splits(wide, "128x128") == 1  # 144 blocks without
    single = on_a_gpu(Conv2dCase("", 1, 64, 7, 7, 64, 1, 1))
    assert cuda_tiles.splits(single, "64x64") == 1


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Conv2dCase("", 1, 1, 1, 4, 1, 1, 1, padding=(2**29, 0)), "2^29 rows"),
        (Conv2dCase("", 1, 1, 2**15, 2**15, 1, 1, 1), "2^30 pixels"),
        (Conv2dCase("", 1, 65536, 1, 1, 65536, 1, 1, groups=65536), "65535 groups"),
        (Conv2dCase("", 1, 1, 600, 600, 1, 1, 1, stride=(300, 300)), "65535 groups and phases"),
        (Conv2dCase("", 2**30, 1, 16, 16, 1, 1, 1), "fewer images"),
    ],
)
def test_what_the_kernels_do_not_count(case: Conv2dCase, reason: str) -> None:
    assert reason in cuda_candidates.why_not(on_a_gpu(case))
