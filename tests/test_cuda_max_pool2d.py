"""The CUDA kernels of max pooling, in their simulator or on a GPU, against native PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_max_pool2d import image_of

from gdfast import ops
from gdfast.bench.cases import ODD_POOLS, PoolCase
from gdfast.ops.max_pool2d import pool

pytestmark = [
    pytest.mark.cuda_simulator,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CASES = [
    *ODD_POOLS,
    # Whole vectors of channels.
    PoolCase("vectors", 3, 16, 9, 8, (3, 3), (2, 2), (1, 1)),
    PoolCase("vectors-odd", 2, 32, 7, 9, (3, 2), (1, 2), (1, 0), (1, 2)),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_native_s(
    case: PoolCase, dtype: torch.dtype, layout: str, cuda_device: torch.device, thread_order: str
) -> None:
    image = image_of(case, dtype, layout)
    # Whole numbers, whose sums are exact in every order and dtype.
    results = []
    for max_pool2d, options in ((ops.max_pool2d, {"backend": "cuda"}), (F.max_pool2d, {})):
        # Native's on the CPU: for NaN its GPU kernels differ from those.
        leaf = image.to(cuda_device if options else "cpu").detach().requires_grad_()
        output = max_pool2d(leaf, **case.arguments, **options)
        generator = torch.Generator().manual_seed(2)
        grad = torch.randint(-3, 4, output.shape, generator=generator).to(output)
        results.append((output.cpu(), *(g.cpu() for g in torch.autograd.grad(output, leaf, grad))))
    for ours, native_s in zip(*results, strict=True):
        torch.testing.assert_close(ours, native_s, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES[-6:], ids=str)
def test_relu(case: PoolCase, layout: str, cuda_device: torch.device) -> None:
    image = image_of(case, torch.float32, layout)
    results = []
    for ours in (True, False):
        leaf = image.to(cuda_device if ours else "cpu").detach().requires_grad_()
        if ours:
            kernel, stride, padding, dilation, ceil_mode = case.arguments.values()
            output = pool(leaf, kernel, stride, padding, dilation, ceil_mode, True, "cuda")
        else:
            output = F.max_pool2d(F.relu(leaf), **case.arguments)
        (grad,) = torch.autograd.grad(output.sum(), leaf)
        results.append((output.cpu(), grad.cpu()))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_a_window_that_sees_no_pixel(cuda_device: torch.device) -> None:
    image = torch.randn(2, 3, 5, 2, device=cuda_device).requires_grad_()
    output = ops.max_pool2d(
        image, (3, 2), stride=1, padding=(0, 1), dilation=(1, 3), backend="cuda"
    )
    assert output.shape == (2, 3, 3, 1) and output.isneginf().all()
    (grad,) = torch.autograd.grad(output, image, torch.ones_like(output))
    assert torch.equal(grad, torch.zeros_like(image))


def test_windows_of_more_places_than_a_byte_counts(cuda_device: torch.device) -> None:
    image = torch.randn(2, 3, 20, 19)
    results = []
    for device, max_pool2d, options in (
        (cuda_device, ops.max_pool2d, {"backend": "cuda"}),
        ("cpu", F.max_pool2d, {}),
    ):
        leaf = image.to(device).requires_grad_()
        output = max_pool2d(leaf, 17, 2, 8, **options)
        (grad,) = torch.autograd.grad(output.sum(), leaf)
        results.append((output.cpu(), grad.cpu()))
    torch.testing.assert_close(*results, rtol=0, atol=0)
