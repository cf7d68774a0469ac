"""Moments that CUDA's convolution hands to batch normalisation, in the simulator or on a GPU."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cuda_batch_norm import given_to_forward
from test_cuda_conv2d import BY_NAME, WHOLE, query_of, tensors_of
from test_norm import NATIVE_ACTS, passes
from torch import Tensor

import gdfast
from gdfast import native, nn, ops
from gdfast.backends import batch_norm, cuda_conv2d, tuning, tuning_norm, tuning_timer
from gdfast.bench.cases import Conv2dCase
from gdfast.bench.workload import allowed_error, relative_error
from gdfast.errors import FallbackWarning
from gdfast.ops import batch_norm_dispatch, conv2d_dispatch

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "float32_as_it_is"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]

# More than one split, tile and part of a tile; groups.
MANY = Conv2dCase("many-pixels", 3, 6, 29, 31, 70, 1, 1, groups=2)


@pytest.fixture
def float32_as_it_is() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch, cuda_device: torch.device) -> list[bool]:
    """Of each batch normalisation by our kernels, whether it was given moments."""
    return given_to_forward(13, monkeypatch)


def joined(moments: Tensor) -> tuple[float, Tensor, Tensor]:
    """Count, mean and variance."""
    counts, means, squares = moments.double().unbind(1)
    count = float(counts[:, 0].sum())
    mean = (means * counts).sum(0) / count
    return count, mean, (squares + counts * (means - mean).square()).sum(0) / count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [WHOLE, MANY, BY_NAME["c17-k10"], BY_NAME["batch-33"]], ids=str)
def test_of_the_output(case: Conv2dCase, dtype: torch.dtype, cuda_device: torch.device) -> None:
    values = tensors_of(case, dtype, True, cuda_device)
    input, weight, bias, _ = values.values()
    bias += 100
    kernel = cuda_conv2d.conv2d(query_of(case, values))
    output, moments = kernel.with_moments(input, weight, bias)
    assert torch.equal(output, kernel(input, weight, bias))
    count, mean, variance = joined(moments)
    assert count == output[:, 0].numel()
    exact = torch.var_mean(output.double(), (0, 2, 3), correction=0)
    type = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(type).eps
    torch.testing.assert_close(mean, exact[1], rtol=max(4 * eps, 1e-13), atol=0)
    torch.testing.assert_close(variance, exact[0], rtol=max(64 * eps, 1e-12), atol=0)


@pytest.mark.parametrize("tile", ["64x64", "128x64", "128x128", "64x64-padded"])
def test_of_every_tile(tile: str, cuda_device: torch.device) -> None:
    case = Conv2dCase("", 2, 8, 13, 11, 136, 1, 1)
    case = replace(case, C=3) if tile.endswith("padded") else case
    values = tensors_of(case, torch.bfloat16, True, cuda_device)
    input, weight, bias, _ = values.values()
    output, moments = cuda_conv2d.conv2d(query_of(case, values), tile).with_moments(
        input, weight, bias
    )
    exact = torch.var_mean(output.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(joined(moments)[1:], exact[::-1], rtol=1e-5, atol=1e-6)


def test_a_large_mean_costs_no_more_than_without_them(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean 1000, deviation 1: their difference from float64 is that of a pass of its own."""
    monkeypatch.setenv("GDFAST_HOPPER", "0")  # whose kernels of float32 take none
    torch.manual_seed(0)
    input = torch.randn(4, 8, 40, 33, device=cuda_device).to(memory_format=torch.channels_last)
    weight = torch.eye(8, device=cuda_device)[:, :, None, None]
    bias = torch.full((8,), 1000.0, device=cuda_device)
    output, moments = ops.conv2d_moments(input, weight, bias, backend="cuda")
    assert moments is not None
    exact = torch.nn.functional.batch_norm(output.double(), None, None, training=True)
    errors = []
    for given in (moments, None):
        result = ops.batch_norm_act(
            output, None, None, None, None, training=True, activation="none", moments=given,
            backend="cuda",
        )  # fmt: skip
        errors.append(float((result.double() - exact).abs().max()))
    # A rounding of the mean, which is one of 1000 / 2^24.
    assert errors[0] < max(2 * errors[1], 1e-4)
    (variance,) = torch.var(output.double(), (0, 2, 3), correction=0)[None]
    torch.testing.assert_close(joined(moments)[2], variance, rtol=1e-5, atol=0)


def test_batch_normalisation_believes_them(cuda_device: torch.device) -> None:
    input = torch.randn(2, 8, 5, 4, device=cuda_device)
    query = batch_norm_dispatch.forward_query(
        input, None, None, None, None, None, True, 1e-5, "none", 0.0
    )
    moments = torch.tensor([40.0, 3.0, 40 * 4.0], device=cuda_device)[None, :, None].repeat(1, 1, 8)
    output, *_ = batch_norm.CudaForward(query)(input, *[None] * 5, 0.1, moments)
    torch.testing.assert_close(output, (input - 3) / (4 + 1e-5) ** 0.5)
    with pytest.raises(RuntimeError, match=r"moments: expected size \[splits, 3, 8\]"):
        batch_norm.CudaForward(query)(input, *[None] * 5, 0.1, moments[:, :1])


@pytest.mark.parametrize("activation", NATIVE_ACTS)
def test_conv_norm_act(activation: str, handed_on: list[bool], cuda_device: torch.device) -> None:
    for bias, residual, momentum in ((False, False, 0.3), (True, True, None)):
        ours = nn.ConvNormAct(
            4, 6, 3, stride=2, bias=bias, activation=activation, negative_slope=0.2,
            momentum=momentum,
        ).to(cuda_device)  # fmt: skip
        native_s = copy.deepcopy(ours)
        native_s.requires_grad_()
        input = torch.randn(3, 4, 9, 8, device=cuda_device)
        more = (torch.randn(3, 6, 5, 4, device=cuda_device),) if residual else ()
        handed_on.clear()
        with gdfast.backend("cuda"):
            results = passes(ours, input, *more)
        assert handed_on == [True, True, True, False]  # three batches, and one in evaluation
        with gdfast.backend("native"):
            expected = passes(native_s, input, *more)
        torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)


def test_without_running_statistics_they_serve_evaluation_too(
    handed_on: list[bool], cuda_device: torch.device
) -> None:
    layer = nn.ConvNormAct(4, 6, 3).to(cuda_device).eval()
    layer.norm = nn.BatchNorm2d(6, track_running_stats=False).to(cuda_device).eval()
    input = torch.randn(3, 4, 9, 8, device=cuda_device)
    with gdfast.backend("cuda"):
        output = layer(input)
    assert handed_on == [True]
    with gdfast.backend("native"):
        torch.testing.assert_close(output, layer(input))


def test_hooks_of_the_convolution_run(handed_on: list[bool], cuda_device: torch.device) -> None:
    layer = nn.ConvNormAct(4, 6, 3).to(cuda_device)
    input = torch.randn(3, 4, 9, 8, device=cuda_device)
    with gdfast.backend("cuda"):
        plain = layer(input)
        layer.conv.register_forward_hook(lambda _, __, output: output * 2)
        torch.testing.assert_close(layer(input), plain, rtol=1e-4, atol=1e-4)
    assert handed_on == [True, False]


def test_autocast(handed_on: list[bool], cuda_device: torch.device) -> None:
    layer = nn.ConvNormAct(4, 6, 3).to(cuda_device)
    images = torch.randn(3, 4, 9, 8, device=cuda_device)

    def results(layer: nn.ConvNormAct, images: Tensor) -> list[Tensor]:
        layer.zero_grad()
        output = layer(images)
        output.to(torch.promote_types(output.dtype, torch.float32)).square().sum().backward()
        return [output.detach(), *(p.grad for p in (layer.conv.weight, layer.norm.weight))]

    with gdfast.backend("native"):
        exact = results(copy.deepcopy(layer).double(), images.double())
    rounded = {}
    for backend in ("cuda", "native"):
        with gdfast.backend(backend), torch.autocast(cuda_device.type, torch.bfloat16):
            rounded[backend] = results(layer, images)
    assert handed_on == [True]
    for ours, natives, expected in zip(rounded["cuda"], rounded["native"], exact, strict=True):
        assert ours.dtype == natives.dtype
        # Whatever the type of a gradient, what it is the sum of was rounded to bfloat16.
        allowed = allowed_error(relative_error(natives, expected), torch.bfloat16, 1)
        assert relative_error(ours, expected) <= allowed
    assert rounded["cuda"][0].dtype == torch.bfloat16


class Residual(torch.nn.Module):
    """As models for PyTorch are written."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(inplace=True)
        )
        self.conv1 = torch.nn.Conv2d(8, 8, 3, padding="same", bias=False)
        self.conv2 = torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.bn1, self.bn2 = torch.nn.BatchNorm2d(8), torch.nn.BatchNorm2d(8)

    def forward(self, input: Tensor) -> Tensor:
        input = self.stem(input)
        output = torch.relu(self.bn1(self.conv1(input)))
        output = self.bn2(self.conv2(output))
        output += input
        return torch.relu_(output)


def test_a_fused_model(handed_on: list[bool], cuda_device: torch.device) -> None:
    ours = Residual().to(cuda_device)
    native_s = copy.deepcopy(ours)
    gdfast.swap_(ours, fuse=True)
    input = torch.randn(2, 3, 11, 9, device=cuda_device)
    with gdfast.backend("cuda"):
        results = passes(ours, input)
        # Copied and hooked, it still does what its modules say.
        again = copy.deepcopy(ours).train()
        again.conv1.register_forward_hook(lambda *_: None)
        again(input)
    assert handed_on == [True] * 9 + [False] * 3 + [True, False, True]
    torch.testing.assert_close(results, passes(native_s, input), rtol=1e-3, atol=1e-3)


def test_depthwise_layers_and_no_images_have_none(cuda_device: torch.device) -> None:
    depthwise = torch.randn(2, 4, 5, 5, device=cuda_device), torch.randn(4, 1, 3, 3).to(cuda_device)
    assert ops.conv2d_moments(*depthwise, groups=4, backend="cuda")[1] is None
    none = torch.randn(0, 3, 5, 5, device=cuda_device), torch.randn(4, 3, 3, 3).to(cuda_device)
    output, moments = ops.conv2d_moments(*none, backend="cuda")
    assert output.shape == (0, 4, 3, 3)
    assert moments is None
    assert ops.conv2d_moments(*none, backend="native")[1] is None


def test_the_kernel_is_one_of_conv2d(cuda_device: torch.device) -> None:
    values = tensors_of(BY_NAME["c17-k10"], torch.float32, True, cuda_device)
    input, weight, bias, _ = values.values()
    before = len(conv2d_dispatch._kernels)
    with gdfast.autotune("off"):
        output, moments = ops.conv2d_moments(input, weight, bias, padding=1, backend="cuda")
        assert torch.equal(output, ops.conv2d(input, weight, bias, padding=1, backend="cuda"))
    assert moments is not None
    assert len(conv2d_dispatch._kernels) == before + 2  # chosen each for itself


@pytest.mark.parametrize("given", [True, False])
def test_the_tuner_times_them_with_the_normalisation(
    given: bool, cuda_device: torch.device, handed_on: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a training step runs, with moments from a kernel that has them and a pass for others."""
    values = tensors_of(WHOLE, torch.float32, True, cuda_device)
    query = query_of(WHOLE, values)
    kernel = cuda_conv2d.conv2d(query)
    calls = {"ours": kernel if given else lambda *tensors: kernel(*tensors)}
    input, weight, bias, _ = values.values()
    result = tuning_norm.followed(calls, query)["ours"](input, weight, bias)
    assert handed_on == [given]
    expected = torch.nn.functional.batch_norm(
        kernel(input, weight, bias), None, None, None, None, True
    )
    torch.testing.assert_close(result[0], expected, rtol=1e-4, atol=1e-4)


def test_the_tuner_does_so_for_them_alone(
    handed_on: list[bool], cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("GDFAST_CACHE_DIR", str(tmp_path))

    def measure(calls: dict[str, Any], *_: Any) -> dict[str, float]:
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(tuning_timer, "measure", measure)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(tuning.cuda, "candidates", lambda *_: ("64x64", "128x64"))
    case = Conv2dCase("", 2, 16, 9, 9, 128, 3, 3, padding=(1, 1))
    input, weight, bias, _ = tensors_of(case, torch.float16, True, cuda_device).values()
    with gdfast.autotune("force"), tuning.recorded({}) as uses:
        ops.conv2d(input, weight, bias, padding=1, backend="cuda")
        assert handed_on == []
        ops.conv2d_moments(input, weight, bias, padding=1, backend="cuda")
    assert [use.op for use in uses] == ["conv2d", "conv2d_moments"]
    assert handed_on == [True, True]


def test_the_tuner_leaves_out_whose_moments_are_wrong(cuda_device: torch.device) -> None:
    values = tensors_of(WHOLE, torch.bfloat16, True, cuda_device)
    input, weight, bias, _ = values.values()
    kernel = cuda_conv2d.conv2d(query_of(WHOLE, values))

    def with_fault(part: int, factor: float, more: float = 0.0) -> cuda_conv2d.Kernel:
        def run(*arguments: Any) -> tuple[Tensor, Tensor | None]:
            output, moments = kernel.with_moments(*arguments[:3])
            largest = moments[:, 0, 0].argmax()  # some parts are empty
            moments[largest, part, 0] = moments[largest, part, 0] * factor + more
            return output, moments

        return cuda_conv2d.Kernel(run)

    calls = {
        "right": kernel, "without": lambda *tensors: kernel(*tensors), "count": with_fault(0, 0.5),
        "mean": with_fault(1, 1.0, 0.5), "squares": with_fault(2, 1.01),
    }  # fmt: skip
    with pytest.warns(FallbackWarning, match="expected the moments of the output") as warned:
        assert tuning_norm.agreeing(calls, (input, weight, bias)) == ["right", "without"]
    assert len(warned) == 3


def test_other_backends_of_the_normalisation_do_without(cuda_device: torch.device) -> None:
    input, weight = torch.randn(2, 3, 6, 5).to(cuda_device), torch.randn(4, 3, 3, 3).to(cuda_device)
    output, moments = ops.conv2d_moments(input, weight, backend="cuda")
    assert moments is not None
    arguments = output, None, None, None, None, None, True, 0.1, 1e-5, "none", 0.0
    result = batch_norm_dispatch.forward(*arguments, "reference", moments)[0]
    torch.testing.assert_close(
        result, torch.nn.functional.batch_norm(output, None, None, training=True)
    )


def test_compiled_layers_take_the_separate_way(
    handed_on: list[bool], cuda_device: torch.device
) -> None:
    layer = nn.ConvNormAct(4, 6, 3).to(cuda_device)
    input = torch.randn(3, 4, 9, 8, device=cuda_device)
    torch.compiler.reset()
    with gdfast.backend("cuda"):
        expected = layer(input)
        output = torch.compile(layer, backend="aot_eager", fullgraph=True)(input)
    torch.testing.assert_close(output, expected)
    assert handed_on == [True, False]


def test_gradients_by_finite_differences(cuda_device: torch.device) -> None:
    def layer(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output, moments = ops.conv2d_moments(input, weight, bias, backend="cuda")
        assert moments is not None
        assert not moments.requires_grad
        return ops.batch_norm_act(
            output, None, None, None, None, training=True, activation="silu", moments=moments,
            backend="cuda",
        )  # fmt: skip

    inputs = (
        torch.randn(size, dtype=torch.float64, device=cuda_device, requires_grad=True)
        for size in ((2, 2, 3, 3), (2, 2, 2, 2), (2,))
    )
    assert torch.autograd.gradcheck(layer, tuple(inputs))


def test_bits_do_not_depend_on_the_order_of_threads(
    cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.cuda_is_simulated:
        pytest.skip("needs `make cuda-simulator`")
    values = tensors_of(MANY, torch.bfloat16, True, cuda_device)
    input, weight, bias, _ = values.values()
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("GDFAST_CUDA_SIMULATOR_ORDER", order)
        results.append(ops.conv2d_moments(input, weight, bias, groups=2, backend="cuda")[1])
    assert torch.equal(*results)


def test_by_the_dispatcher_as_tensors_on_a_gpu_go(
    handed_on: list[bool], cuda_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("ordinary", "conv2d_autograd", "conv2d_moments", "batch_norm"):
        monkeypatch.setattr(sys.modules[f"gdfast.ops.{module}"], "are_ordinary", lambda *_: False)
    ours = nn.ConvNormAct(4, 6, 3, bias=True).to(cuda_device)
    natives = copy.deepcopy(ours)
    input = torch.randn(3, 4, 9, 8, device=cuda_device)
    with gdfast.backend("cuda"):
        results = passes(ours, input)
    assert handed_on == [True, True, True, False]
    with gdfast.backend("native"):
        torch.testing.assert_close(results, passes(natives, input), rtol=1e-4, atol=1e-4)
    depthwise = torch.randn(2, 4, 5, 5, device=cuda_device), torch.randn(4, 1, 3, 3).to(cuda_device)
    assert ops.conv2d_moments(*depthwise, groups=4, backend="cuda")[1] is None


def test_opcheck(cuda_device: torch.device) -> None:
    """The operation that others than ours may call: its gradient is that of conv2d."""
    input, weight, bias = (
        torch.randn(size, device=cuda_device, requires_grad=True)
        for size in ((2, 3, 6, 5), (4, 3, 3, 3), (4,))
    )
    arguments = (1, 2), (1, 0, 1, 0), (1, 1), 1, "cuda"
    output, moments = torch.ops.gdfast.conv2d_moments(input, weight, bias, *arguments)
    assert not moments.requires_grad
    grad = torch.randn_like(output)
    ours = torch.autograd.grad(output, (input, weight, bias), grad)
    output = torch.ops.gdfast.conv2d(input, weight, bias, *arguments)
    expected = torch.autograd.grad(output, (input, weight, bias), grad)
    for gradient, same in zip(ours, expected, strict=True):
        assert torch.equal(gradient, same)
    tests = "test_schema", "test_autograd_registration"
    torch.library.opcheck(
        torch.ops.gdfast.conv2d_moments.default, (input, weight, bias, *arguments), test_utils=tests
    )
