"""The CUDA kernels for few input channels, in the simulator or on a GPU, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_cuda_conv2d import TF32_ERROR, check, passes, query_of, tensors_of, with_activation
from test_cuda_moments import joined
from test_cuda_tiles import on_a_gpu
from torch import Tensor

import gdfast
from gdfast import native, nn
from gdfast.backends import cuda_candidates, cuda_conv2d, cuda_problem, cuda_stem, cuda_tiles
from gdfast.backends.activation import activate
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "float32_as_it_is"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

RESNET = Conv2dCase("7x7x3-stride-2", 2, 3, 35, 38, 72, 7, 7, (2, 2), (3, 3))
CASES = [
    RESNET,
    Conv2dCase("7x7x1", 2, 1, 19, 40, 10, 7, 7, (1, 1), (3, 3)),
    Conv2dCase("3x3x3", 3, 3, 9, 21, 16, 3, 3, (1, 1), (1, 1)),
    Conv2dCase("3x3x3-stride-2", 1, 3, 33, 20, 65, 3, 3, (2, 2), (1, 1)),
    Conv2dCase("3x3x1", 2, 1, 28, 28, 9, 3, 3),
    Conv2dCase("3x3x1-stride-2", 2, 1, 17, 5, 130, 3, 3, (2, 2), (1, 1)),
    Conv2dCase("5x3x2-everything-asymmetric", 2, 2, 23, 14, 7, 5, 3, (3, 1), (0, 2)),
    Conv2dCase("2x4x3-even", 2, 3, 12, 19, 24, 2, 4, (1, 3), (1, 0)),
    Conv2dCase("1x1x3", 2, 3, 9, 17, 12, 1, 1),
    Conv2dCase("1x1x1-stride-over-image", 5, 1, 3, 2, 3, 1, 1, (4, 4)),
    Conv2dCase("11x11x3-stride-4", 1, 3, 43, 39, 8, 11, 11, (4, 4), (2, 2)),
    Conv2dCase("4-channels", 2, 4, 10, 11, 64, 3, 3, (1, 1), (1, 1)),
]
# The filters of 11x11x3 take more shared memory than every GPU has; of 4 channels tiles are whole.
NOT_FLOAT32 = CASES[-2:]
OFTEN = [RESNET, CASES[2], CASES[5], CASES[6]]
PRECISIONS = {
    "bfloat16": (torch.bfloat16, False), "float16": (torch.float16, False),
    "tf32": (torch.float32, True), "tf32x3": (torch.float32, False),
}  # fmt: skip


@pytest.fixture
def float32_as_it_is() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def by_stem(case: Conv2dCase, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """All three passes, the gradient of the input by native."""
    input, weight, bias, grad = values.values()
    query = query_of(case, values)
    assert cuda_stem.fits("conv2d", query)
    assert cuda_stem.fits("conv2d_grad_weight", query)
    assert not cuda_stem.fits("conv2d_grad_input", query)
    return (
        cuda_conv2d.conv2d(query, "stem")(input, weight, bias),
        passes(case, values, "reference")[1],
        *cuda_conv2d.conv2d_grad_weight(query, "stem")(grad, input, True),
    )


@pytest.mark.parametrize("precision", ["bfloat16", "tf32x3"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case: Conv2dCase, precision: str, cuda_device: torch.device) -> None:
    if precision == "tf32x3" and case in NOT_FLOAT32:
        query = query_of(case, tensors_of(case, torch.float32, True, cuda_device))
        assert not cuda_stem.fits("conv2d", query)
        return
    values = tensors_of(case, PRECISIONS[precision][0], True, cuda_device)
    check(case, values, by_stem(case, values))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_precisions_and_layouts(
    case: Conv2dCase, precision: str, channels_last: bool, cuda_device: torch.device
) -> None:
    dtype, tf32 = PRECISIONS[precision]
    values = tensors_of(case, dtype, channels_last, cuda_device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        ours = by_stem(case, values)
    check(case, values, ours, TF32_ERROR if tf32 else 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_strides(dtype: torch.dtype, cuda_device: torch.device) -> None:
    case = CASES[2]
    values = tensors_of(case, dtype, False, cuda_device)
    dense = by_stem(case, values)
    wide = torch.randn(case.N, case.C, case.H, 2 * case.W, device=cuda_device).to(dtype)
    wide[..., ::2] = values["input"]
    values["input"] = wide[..., ::2]
    turned = values["weight"].transpose(2, 3).contiguous().transpose(2, 3)
    values["weight"] = turned
    input, weight, bias, grad = values.values()
    query = query_of(case, {**values, "grad": grad})
    assert torch.equal(cuda_conv2d.conv2d(query, "stem")(input, weight, bias), dense[0])
    # Strides of 0, as y.sum().backward() gives them.
    grad = torch.randn(case.K, 1, 1, device=cuda_device).to(dtype).expand(case.output_shape)
    values["grad"] = grad
    results = cuda_conv2d.conv2d_grad_weight(query_of(case, values), "stem")(grad, input, True)
    expected = passes(case, {n: t.double() for n, t in values.items()}, "reference")[2:]
    close = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, **close)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_images(precision: str, cuda_device: torch.device) -> None:
    case = replace(CASES[2], N=0)
    values = tensors_of(case, PRECISIONS[precision][0], True, cuda_device)
    output, _, grad_weight, grad_bias = by_stem(case, values)
    assert output.shape == case.output_shape
    assert not grad_weight.any()
    assert not grad_bias.any()


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_bias_and_activation(activation: str, cuda_device: torch.device) -> None:
    values = tensors_of(RESNET, torch.float32, True, cuda_device)
    input, weight, bias, _ = values.values()
    query = with_activation(query_of(RESNET, values), activation, 0.0)
    result = cuda_conv2d.conv2d(query, "stem")(input, weight, bias)
    exact = passes(RESNET, {n: t.double() for n, t in values.items()}, "reference")[0]
    expected = activate(exact, activation, 0.0).float()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)
    without = cuda_conv2d.conv2d(query, "stem")(input, weight, None)
    exact = exact - values["bias"].double()[:, None, None]
    expected = activate(exact, activation, 0.0).float()
    torch.testing.assert_close(without, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("precision", ["float16", "tf32"])
@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_what_is_infinite_stays_in_its_windows(
    case: Conv2dCase, precision: str, value: float, cuda_device: torch.device
) -> None:
    dtype, tf32 = PRECISIONS[precision]
    values = tensors_of(case, dtype, True, cuda_device)
    input = values["input"]
    input[0, 0, 0, 0] = input[0, -1, -1, -1] = input[-1, 0, case.H // 2, case.W // 2] = value
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        ours = by_stem(case, values)
    natives = passes(case, {n: t.double() for n, t in values.items()}, "reference")
    for i in (0, 2, 3):
        assert torch.equal(ours[i].isfinite(), natives[i].isfinite()), i


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_tiles_of_a_block_and_splits(
    precision: str, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASES[2], N=5)
    dtype, tf32 = PRECISIONS[precision]
    values = tensors_of(case, dtype, True, cuda_device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        one = by_stem(case, values)
        monkeypatch.setattr(cuda_stem, "tiles_of_block", lambda query: 3)
        monkeypatch.setattr(cuda_stem, "splits", lambda query: 7)
        other, again = by_stem(case, values), by_stem(case, values)
        # More than there are tiles.
        monkeypatch.setattr(cuda_stem, "splits", lambda query: 64)
        most = by_stem(case, values)
    assert torch.equal(one[0], other[0])
    for a, b in zip(other[2:], again[2:], strict=True):
        assert torch.equal(a, b)
    for ours in (other, most):
        check(case, values, ours, TF32_ERROR if tf32 else 0.0)


def test_a_large_grid(cuda_device: torch.device) -> None:
    case = Conv2dCase("many-images", 700, 1, 4, 3, 4, 3, 3, (1, 1), (1, 1))
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    check(case, values, by_stem(case, values))


def test_images_more_than_31_bits_apart(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Memory that nobody touches costs nothing.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    case = replace(CASES[2], N=2)
    near = tensors_of(case, torch.bfloat16, True, cuda_device)
    expected = by_stem(case, near)
    apart = 2**31 + 16
    memory = torch.empty(apart + 2**14, dtype=torch.bfloat16, device=cuda_device)
    far = dict(near)
    for name in ("input", "grad"):
        channels, w = near[name].shape[1], near[name].shape[3]
        strides = apart, 1, w * channels, channels
        far[name] = memory.as_strided(near[name].shape, strides).copy_(near[name])
        input, weight, bias, grad = far.values()
        query = query_of(case, far)
        if name == "input":
            query = replace(query, strides=(*query.strides[:2], near["grad"].stride()))
            output = cuda_conv2d.conv2d(query, "stem")(input, weight, bias)
            assert torch.equal(output, expected[0])
        results = cuda_conv2d.conv2d_grad_weight(query_of(case, far), "stem")(grad, input, True)
        for result, wanted in zip(results, expected[2:], strict=True):
            assert torch.equal(result, wanted)
        far[name] = near[name]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_do_not_depend_on_the_order_of_threads(
    precision: str, cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.cuda_is_simulated:
        pytest.skip("needs `make cuda-simulator`")
    dtype, tf32 = PRECISIONS[precision]
    monkeypatch.setattr(cuda_stem, "tiles_of_block", lambda query: 2)
    for case in (RESNET, CASES[5]):
        values = tensors_of(case, dtype, True, cuda_device)
        input, weight, bias, _ = values.values()
        results = []
        for order in ("ascending", "descending"):
            monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                kernel = cuda_conv2d.conv2d(query_of(case, values), "stem")
                moments = kernel.with_moments(input, weight, bias)[1]
                results.append((*by_stem(case, values), moments))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", OFTEN, ids=str)
def test_moments(case: Conv2dCase, precision: str, cuda_device: torch.device) -> None:
    dtype, tf32 = PRECISIONS[precision]
    values = tensors_of(case, dtype, True, cuda_device)
    input, weight, bias, _ = values.values()
    bias += 100
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        kernel = cuda_conv2d.conv2d(query_of(case, values), "stem")
        output, moments = kernel.with_moments(input, weight, bias)
    count, mean, variance = joined(moments)
    exact = torch.var_mean(output.double(), (0, 2, 3), correction=0)
    assert count == output[:, 0].numel()
    torch.testing.assert_close((variance, mean), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_is_written_beside_the_outputs(
    dtype: torch.dtype, channels_last: bool, cuda_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Outputs lie within larger memory, whose other elements stay as they are."""
    plain = torch.empty_strided
    views: list[tuple[Tensor, Tensor]] = []

    def within(size: Any, strides: Any, **options: Any) -> Tensor:
        whole = torch.full_like(plain(size, strides, **options), 7).flatten()
        whole = torch.cat([whole, whole, whole])
        count = len(whole) // 3
        views.append((whole, whole[count : 2 * count].as_strided(size, strides, count)))
        return views[-1][1]

    monkeypatch.setattr(torch, "empty_strided", within)
    for case in OFTEN:
        values = tensors_of(case, dtype, channels_last, cuda_device)
        views.clear()
        ours = by_stem(case, values)
        assert len(views) == 2
        for (whole, _), result in zip(views, (ours[0], ours[2]), strict=True):
            count = len(whole) // 3
            assert result.data_ptr() == whole[count:].data_ptr()
            assert (whole[:count] == 7).all()
            assert (whole[2 * count :] == 7).all()


def test_what_fits() -> None:
    image = Conv2dCase("", 64, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3))
    assert cuda_stem.fits("conv2d", on_a_gpu(image))
    assert cuda_stem.fits("conv2d", on_a_gpu(image, torch.float32))
    with gdfast.precision("strict"):
        assert not cuda_stem.fits("conv2d", on_a_gpu(image, torch.float32))
    for other in (
        replace(image, C=5), replace(image, dilation=(2, 1)), replace(image, C=2, groups=2),
        replace(image, R=40, S=40), replace(image, stride=(90, 90)),
    ):  # fmt: skip
        assert not cuda_stem.fits("conv2d", on_a_gpu(other))
    assert not cuda_stem.fits("conv2d", on_a_gpu(image, torch.float64))
    assert not cuda_stem.fits("conv2d", on_a_gpu(replace(image, C=4), torch.float32))


def test_a_candidate_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_tiles, "multiprocessors", lambda device: 132)
    image = on_a_gpu(Conv2dCase("", 64, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3)))
    for op in ("conv2d", "conv2d_act", "conv2d_grad_weight"):
        names = cuda_candidates.candidates(op, image)
        assert names[0] == "stem", op
        assert "128x64-padded" in names, op
    assert "stem" not in cuda_candidates.candidates("conv2d_grad_input", image)
    assert cuda_stem.tiles_of_block(image) == 7
    assert cuda_stem.splits(image) == 264
    small = on_a_gpu(Conv2dCase("", 1, 3, 16, 16, 64, 3, 3, (1, 1), (1, 1)))
    assert (cuda_stem.tiles_of_block(small), cuda_stem.splits(small)) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_memory_is_what_was_counted(
    case: Conv2dCase, dtype: torch.dtype, cuda_device: torch.device
) -> None:
    query = query_of(case, tensors_of(case, dtype, True, cuda_device))
    bytes = native.cuda.conv2d_stem_shared_bytes(cuda_problem.problem_of(query)[0])
    assert bytes <= cuda_stem.shared_bytes(query) <= 1.4 * bytes


def test_a_layer_trains_on_it(cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolution, statistics and normalisation, as a tuner would run them."""
    plain = cuda_tiles.candidates
    monkeypatch.setattr(
        cuda_tiles, "candidates",
        lambda op, query: ("stem",) if cuda_stem.fits(op, query) else plain(op, query),
    )  # fmt: skip
    layer = nn.ConvNormAct(3, 8, 7, stride=2, padding=3).to(cuda_device)
    images = torch.randn(2, 3, 21, 18, device=cuda_device)
    results = []
    for backend in ("cuda", "native"):
        layer.zero_grad()
        layer.norm.reset_running_stats()
        with gdfast.backend(backend):
            output = layer(images)
            output.square().sum().backward()
        results.append([output, layer.conv.weight.grad.clone(), *layer.norm.buffers()])
        results[-1] = [t.clone() for t in results[-1]]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
