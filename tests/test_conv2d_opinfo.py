"""PyTorch's own samples and error inputs for conv2d, run on ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gdfast import ops
from gdfast.errors import FallbackWarning

invocations: Any = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations",
    reason="needs PyTorch's OpInfo (pip install expecttest)",
    exc_type=ImportError,
)

pytestmark = [pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "compiled_cpu")]

(OPINFO,) = [info for info in invocations.op_db if info.name == "nn.functional.conv2d"]
# Errors judged against float64, which is native's in both; half types add their own rounding.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (4e-2, 4e-2),
    torch.float16: (5e-3, 5e-3),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # native's
@pytest.mark.parametrize("backend", ["cpu", "auto"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_samples(dtype: torch.dtype, backend: str) -> None:
    count = 0
    for sample in OPINFO.sample_inputs("cpu", dtype, requires_grad=True):
        tensors = [sample.input, *(t for t in sample.args if isinstance(t, Tensor))]
        tensors = [t for t in tensors if t.requires_grad]
        ours = ops.conv2d(sample.input, *sample.args, **sample.kwargs, backend=backend)
        native = OPINFO(sample.input, *sample.args, **sample.kwargs)
        assert ours.shape == native.shape
        assert ours.dtype == native.dtype
        grad = torch.randn(native.shape).to(dtype)
        results = (
            (ours, *torch.autograd.grad(ours, tensors, grad)),
            (native, *torch.autograd.grad(native, tensors, grad)),
        )
        rtol, atol = TOLERANCE[dtype]
        for a, b in zip(*results, strict=True):
            scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol * scale)
        count += 1
    assert count >= 10


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
@pytest.mark.filterwarnings("ignore::gdfast.errors.FallbackWarning")
def test_samples_of_types_that_are_native_s(dtype: torch.dtype) -> None:
    for sample in OPINFO.sample_inputs("cpu", dtype):
        ours = ops.conv2d(sample.input, *sample.args, **sample.kwargs)
        native = OPINFO(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(ours, native, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::gdfast.errors.FallbackWarning")
def test_error_inputs() -> None:
    count = 0
    for error in OPINFO.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type):
            OPINFO(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises(error.error_type):
            ops.conv2d(sample.input, *sample.args, **sample.kwargs)
        count += 1
    assert count >= 5


def test_fallbacks_are_what_the_samples_need() -> None:
    # Complex numbers and integers have no kernel of ours; if they got one, the test above should
    # compare gradients too.
    with pytest.warns(FallbackWarning):
        ops.conv2d(*(torch.ones(1, 1, 2, 2, dtype=torch.complex64) for _ in range(2)))
