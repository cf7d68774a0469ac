"""The CUDA kernels of depthwise convolution, in their simulator or on a GPU, against native PyTorch
and float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from test_cuda_conv2d import check, passes, query_of, tensors_of

import gdfast
from gdfast.backends import cuda_candidates, cuda_depthwise, cuda_problem
from gdfast.backends.activation import ACTIVATIONS, activate
from gdfast.backends.registry import Conv2dQuery
from gdfast.bench.cases import ODD, Conv2dCase
from gdfast.geometry import Conv2dGeometry, dense_strides

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "float32_as_it_is"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def depthwise(
    name: str, N: int, C: int, H: int, W: int, size: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int] = (1, 1), multiplier: int = 1,
) -> Conv2dCase:  # fmt: skip
    return Conv2dCase(name, N, C, H, W, C * multiplier, *size, stride, padding, dilation, C)


CASES = [
    # Filters with kernels of their own: strips and blocks that the image does not fill.
    depthwise("3x3", 3, 8, 9, 11, (3, 3), (1, 1), (1, 1)),
    depthwise("3x3-stride-2", 2, 20, 13, 10, (3, 3), (2, 2), (1, 1)),
    depthwise("3x3-unpadded", 2, 8, 6, 7, (3, 3), (1, 1), (0, 0)),
    depthwise("3x3-many-channels", 1, 136, 5, 6, (3, 3), (1, 1), (1, 1)),
    depthwise("5x5", 2, 12, 9, 8, (5, 5), (1, 1), (2, 2)),
    depthwise("5x5-stride-2", 2, 8, 11, 9, (5, 5), (2, 2), (2, 2)),
    depthwise("7x7", 1, 12, 9, 10, (7, 7), (1, 1), (3, 3)),
    depthwise("tall-images", 1, 64, 33, 49, (3, 3), (1, 1), (1, 1)),
    depthwise("tiny-images", 40, 8, 2, 3, (3, 3), (1, 1), (1, 1)),
    depthwise("wide-padding", 1, 8, 5, 4, (3, 3), (1, 1), (4, 3)),
    # Any shape, with vectors and without.
    depthwise("dilated", 2, 8, 9, 10, (3, 3), (1, 1), (2, 2), (2, 2)),
    depthwise("asymmetric", 2, 8, 9, 10, (3, 2), (2, 1), (1, 0), (2, 1)),
    depthwise("11x3", 1, 4, 13, 6, (11, 3), (1, 1), (5, 1)),
    depthwise("odd-channels", 2, 7, 9, 10, (3, 3), (1, 1), (1, 1)),
    depthwise("multiplier-3", 2, 4, 7, 6, (3, 3), (2, 1), (1, 1), multiplier=3),
    depthwise("stride-over-filter", 2, 8, 9, 10, (2, 2), (3, 3), (0, 0)),
    depthwise("batch-0", 0, 8, 5, 5, (3, 3), (1, 1), (1, 1)),
    *(case for case in ODD if "depthwise" in case.name),
]


@pytest.fixture
def float32_as_it_is() -> Iterator[None]:
    """Native multiplies float32 in full."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pass(case: Conv2dCase, channels_last: bool, cuda_device: torch.device) -> None:
    values = tensors_of(case, torch.float32, channels_last, cuda_device)
    query = query_of(case, values)
    names = {
        name.removesuffix(cuda_problem.TURNED)
        for name in cuda_candidates.candidates("conv2d", query)
    }
    assert names == {cuda_depthwise.NAME}
    check(case, values, passes(case, values, "cuda"))


def test_more_columns_than_threads(cuda_device: torch.device) -> None:
    """Those of a block sum a weight over several, and one of the blocks has channels left over."""
    case = depthwise("several-columns", 26, 1028, 3, 5, (7, 7), (1, 1), (3, 3))
    values = tensors_of(case, torch.float32, True, cuda_device)
    check(case, values, passes(case, values, "cuda"))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [*CASES[:2], CASES[4], CASES[7], CASES[11]], ids=str)
def test_dtypes(
    case: Conv2dCase, dtype: torch.dtype, channels_last: bool, cuda_device: torch.device
) -> None:
    values = tensors_of(case, dtype, channels_last, cuda_device)
    check(case, values, passes(case, values, "cuda"))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_the_same_bits_in_every_order(
    case: Conv2dCase, channels_last: bool, cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    case = replace(case, N=9)
    values = tensors_of(case, torch.float32, channels_last, cuda_device)
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
        results.append(passes(case, values, "cuda"))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, cuda_device: torch.device) -> None:
    for case in (CASES[0], CASES[10]):
        values = tensors_of(case, torch.float32, True, cuda_device)
        input, weight, bias, _ = values.values()
        expected = activate(passes(case, values, "reference")[0], activation, 0.2)
        result = gdfast.ops.conv2d_act(
            input, weight, bias, case.stride, case.padding, case.dilation, case.groups,
            activation=activation, negative_slope=0.2, backend="cuda",
        )  # fmt: skip
        torch.testing.assert_close(result, expected)


def test_any_strides(cuda_device: torch.device) -> None:
    case = CASES[0]
    values = tensors_of(case, torch.float32, False, cuda_device)
    wide = torch.randn(case.N, case.C, case.H, 2 * case.W, device=cuda_device)
    values["input"] = wide[..., ::2]
    values["grad"] = torch.randn(case.K, 1, 1, device=cuda_device).expand(case.output_shape)
    values["weight"] = values["weight"].transpose(2, 3)
    input, weight, bias, grad = values.values()
    arguments = case.stride, case.padding * 2, case.dilation, case.groups
    results = []
    for backend in ("cuda", "reference"):
        back = (False, *arguments, backend)
        results.append((
            torch.ops.gdfast.conv2d(input, weight, bias, *arguments, backend),
            torch.ops.gdfast.conv2d_grad_input(grad, weight, input.shape, *back),
            *torch.ops.gdfast.conv2d_grad_weight(
                grad, input, weight.shape, False, True, *arguments, backend
            ),
        ))  # fmt: skip
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "K", "fits"),
    [
        ((2, 8, 5, 5), 16, True),
        ((2, 1, 5, 5), 4, False),  # a filter for one channel sees all there are
        ((1, 2**16 - 1, 2**8, 2**8), 2**16 - 1, False),
        ((2**21, 2, 2**5, 2**5), 2, False),
    ],
    ids=str,
)
def test_what_fits(size: tuple[int, ...], K: int, fits: bool) -> None:
    weight = K, 1, 3, 3
    geometry = Conv2dGeometry.of("conv2d", size, weight, (1, 1), (1,) * 4, (1, 1), size[1])
    strides = tuple(dense_strides(each, True) for each in (size, weight, geometry.output_size))
    query = Conv2dQuery(torch.device("cuda"), torch.float32, geometry=geometry, strides=strides)
    assert cuda_depthwise.depthwise_fits(query) == fits
