"""Convolution, bias and activation on the Triton kernels, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from test_conv2d_act import SETTINGS, composed, tensors_of
from test_triton_conv2d import BY_NAME
from triton_here import IN_INTERPRETER

import gdfast
from gdfast import nn, ops
from gdfast.bench.cases import Conv2dCase

pytestmark = [
    *IN_INTERPRETER,
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
# Matrix kernels with many channels and with few, and the depthwise one.
CASES = [
    BY_NAME[name] for name in ("1x1-stride-2", "everything-asymmetric", "depthwise-multiplier-2")
]


@pytest.mark.parametrize("setting", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Conv2dCase, setting: str) -> None:
    tensors = tensors_of(case, torch.float32, "channels_last")
    results = []
    for function, options in ((ops.conv2d_act, {"backend": "triton"}), (composed, {})):
        output = function(*tensors, **case.geometry, **SETTINGS[setting], **options)
        grads = torch.autograd.grad(output.square().sum(), tensors)
        results.append((output, *(grad / grad.norm() for grad in grads)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_types_without_gradients(case: Conv2dCase, dtype: torch.dtype) -> None:
    tensors = [tensor.detach() for tensor in tensors_of(case, dtype, "channels_last")]
    for setting in ("relu6", "silu"):
        settings = SETTINGS[setting]
        output = ops.conv2d_act(*tensors, **case.geometry, **settings, backend="triton")
        exact = composed(*(t.double() for t in tensors), **case.geometry, **settings)
        assert output.dtype == dtype
        error = (output.double() - exact).norm() / exact.norm()
        assert error < torch.finfo(dtype).eps


def test_a_fused_model() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), nn.ConvAct(4, 5, 3, activation="silu")
    )
    batch, results = torch.randn(2, 3, 7, 6), []
    for backend in ("native", "triton"):
        with gdfast.swapped(model, fuse=True), gdfast.backend(backend):
            output = model(batch)
            results.append((output, *torch.autograd.grad(output.sum(), model.parameters())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
