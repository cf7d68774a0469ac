"""The kernels of max pooling in Triton's interpreter, against native PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_max_pool2d import image_of
from triton_here import IN_INTERPRETER

from gdfast import ops
from gdfast.bench.cases import ODD_POOLS, PoolCase
from gdfast.ops.max_pool2d import pool

pytestmark = [
    *IN_INTERPRETER,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
    # Of infinities and NaN, in the interpreter.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", ODD_POOLS, ids=str)
def test_values_and_gradients_are_native_s(case: PoolCase, layout: str) -> None:
    dtype = torch.bfloat16 if layout == "sliced" else torch.float32
    image = image_of(case, dtype, layout)
    results = []
    for max_pool2d, options in ((ops.max_pool2d, {"backend": "triton"}), (F.max_pool2d, {})):
        leaf = image.detach().requires_grad_()
        output = max_pool2d(leaf, **case.arguments, **options)
        generator = torch.Generator().manual_seed(2)
        # Whole numbers, whose sums are exact in every order and dtype.
        grad = torch.randint(-3, 4, output.shape, generator=generator).to(dtype)
        results.append((output, *torch.autograd.grad(output, leaf, grad)))
    for ours, native_s in zip(*results, strict=True):
        torch.testing.assert_close(ours, native_s, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", ODD_POOLS[:4], ids=str)
def test_relu(case: PoolCase) -> None:
    image = image_of(case, torch.float32, "channels_last")
    results = []
    for ours in (True, False):
        leaf = image.detach().requires_grad_()
        if ours:
            kernel, stride, padding, dilation, ceil_mode = case.arguments.values()
            output = pool(leaf, kernel, stride, padding, dilation, ceil_mode, True, "triton")
        else:
            output = F.max_pool2d(F.relu(leaf), **case.arguments)
        results.append((output, *torch.autograd.grad(output.sum(), leaf)))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_a_window_that_sees_no_pixel() -> None:
    image = torch.randn(2, 3, 5, 2).requires_grad_()
    output = ops.max_pool2d(
        image, (3, 2), stride=1, padding=(0, 1), dilation=(1, 3), backend="triton"
    )
    assert output.shape == (2, 3, 3, 1) and output.isneginf().all()
    (grad,) = torch.autograd.grad(output, image, torch.ones_like(output))
    assert torch.equal(grad, torch.zeros_like(image))
