"""ops.conv2d as a function: native's results, layouts, errors and ways of being called."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gdfast
from gdfast import ops
from gdfast.bench.cases import ODD, Conv2dCase
from gdfast.errors import BackendError, FallbackWarning
from gdfast.ops import conv2d_dispatch

pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory", "fresh_registry", "compiled_cpu"),
    # Nothing here may slip to native PyTorch unseen.
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]
BACKENDS = ("cpu", "reference")


def tensors_of(
    case: Conv2dCase, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        torch.randn(shape).to(dtype) for shape in (case.input_shape, case.weight_shape, case.K)
    )  # type: ignore[return-value]


def kernels_conv2d(
    input: Tensor, weight: Tensor, bias: Any, arguments: Any, backend: str
) -> Tensor:
    """The dispatcher operation, so that "reference" too goes through our own code."""
    case_padding = arguments["padding"]
    return torch.ops.gdfast.conv2d(
        input, weight, bias, arguments["stride"], case_padding * 2, arguments["dilation"],
        arguments["groups"], backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_equals_native(case: Conv2dCase, backend: str) -> None:
    input, weight, bias = tensors_of(case, torch.float64)
    expected = F.conv2d(input, weight, bias, **case.geometry)
    output = kernels_conv2d(input, weight, bias, case.geometry, backend)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ops.conv2d(input, weight, bias, **case.geometry), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "meta"])
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("input_last", [False, True])
@pytest.mark.parametrize("case", ODD, ids=str)
def test_layouts_are_native_s(
    case: Conv2dCase, input_last: bool, weight_last: bool, backend: str
) -> None:
    formats = {False: torch.contiguous_format, True: torch.channels_last}
    input, weight, _ = tensors_of(case)
    input = input.to(memory_format=formats[input_last])
    weight = weight.to(memory_format=formats[weight_last])
    native = F.conv2d(input, weight, **case.geometry)
    if backend == "meta":
        input, weight, backend = input.to("meta"), weight.to("meta"), "auto"
    output = kernels_conv2d(input, weight, None, case.geometry, backend)
    assert output.shape == native.shape
    assert output.stride() == native.stride()


def test_gradients_have_native_s_layouts() -> None:
    for input_last, weight_last in ((False, True), (True, False), (True, True), (False, False)):
        formats = {False: torch.contiguous_format, True: torch.channels_last}
        input = torch.randn(2, 4, 6, 5).to(memory_format=formats[input_last]).requires_grad_()
        weight = torch.randn(6, 4, 3, 2).to(memory_format=formats[weight_last]).requires_grad_()
        strides = []
        for conv2d in (ops.conv2d, F.conv2d):
            input.grad = weight.grad = None
            output = conv2d(input, weight)
            (grad_input,) = torch.autograd.grad(output.sum(), input, retain_graph=True)
            output.sum().backward()
            strides.append((output.stride(), grad_input.stride(), weight.grad.stride()))
        assert strides[0] == strides[1]


def test_grad_weight_needs_no_copy_into_its_parameter() -> None:
    input = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    weight = torch.randn(6, 4, 3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.conv2d(input, weight).sum(), weight)
    assert grad.stride() == weight.stride()


def test_unbatched() -> None:
    input, weight, bias = torch.randn(4, 6, 5), torch.randn(6, 4, 3, 2), torch.randn(6)
    input.requires_grad_()
    output = ops.conv2d(input, weight, bias, 1, 1)
    torch.testing.assert_close(output, F.conv2d(input, weight, bias, 1, 1))
    output.sum().backward()
    assert input.grad is not None
    assert input.grad.shape == input.shape


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # native's
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (4, 1)])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_padding(kernel: Any, dilation: Any, backend: str) -> None:
    input = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 2, *kernel, dtype=torch.float64, requires_grad=True)
    results = []
    for conv2d in (ops.conv2d, F.conv2d):
        output = conv2d(input, weight, None, 1, "same", dilation, 2)
        grads = torch.autograd.grad(output.square().sum(), (input, weight))
        results.append((output, *grads))
    assert results[0][0].shape[2:] == (9, 8)
    torch.testing.assert_close(*results)
    # The operations themselves, on either backend.
    pair = gdfast.geometry.pair("dilation", dilation)
    sides = gdfast.geometry.named_padding("same", kernel, (1, 1), pair)
    arguments = (1, 1), sides, pair, 2, backend
    grad = 2 * results[1][0].detach()
    inputs = input.detach(), weight.detach()
    ours = (
        torch.ops.gdfast.conv2d(*inputs, None, *arguments),
        torch.ops.gdfast.conv2d_grad_input(grad, inputs[1], input.shape, False, *arguments),
        torch.ops.gdfast.conv2d_grad_weight(
            grad, inputs[0], weight.shape, False, False, *arguments
        )[0],
    )
    torch.testing.assert_close(ours, tuple(r.detach() for r in results[1]))


def test_same_padding_warns_of_no_copy(recwarn: pytest.WarningsRecorder) -> None:
    # Native warns that it may have to copy the input; we need no copy.
    ops.conv2d(torch.randn(1, 2, 5, 5), torch.randn(3, 2, 2, 2), padding="same")
    assert not recwarn.list


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": [2, 1]},
        {"stride": (2,)},
        {"padding": "valid", "stride": 2},
        {"padding": [1, 0], "dilation": 2},
    ],
    ids=str,
)
def test_ways_to_write_arguments(arguments: Any) -> None:
    input, weight = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 2)
    expected = F.conv2d(input, weight, **arguments)
    torch.testing.assert_close(ops.conv2d(input, weight, **arguments), expected)


def test_zero_channels_are_left_to_native() -> None:
    input, weight = torch.randn(2, 0, 6, 5), torch.randn(6, 0, 3, 2)
    with pytest.warns(FallbackWarning, match="cpu: it takes at least one input channel"):
        output = ops.conv2d(input, weight)
    assert output.shape == F.conv2d(input, weight).shape
    with pytest.raises(BackendError, match="at least one input channel"):
        ops.conv2d(input, weight, backend="cpu")


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_computes_in_the_lower_precision(self, dtype: torch.dtype) -> None:
        input, weight, bias = torch.randn(2, 4, 6, 5), torch.randn(6, 4, 3, 2), torch.randn(6)
        input, weight = input.requires_grad_(), weight.requires_grad_()
        results = []
        for conv2d in (ops.conv2d, F.conv2d):
            with torch.autocast("cpu", dtype=dtype):
                output = conv2d(input, weight, bias)
            grads = torch.autograd.grad(output.float().square().sum(), (input, weight))
            results.append((output, *grads))
        ours, native = results
        assert [t.dtype for t in ours] == [t.dtype for t in native]
        assert ours[0].dtype == dtype
        eps = torch.finfo(dtype).eps
        for a, b in zip(ours, native, strict=True):
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps * b.abs().max().item())

    def test_follows_native_in_what_it_casts(self) -> None:
        x, w = torch.randn(2, 4, 6, 5), torch.randn(6, 4, 3, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for input, weight in (
                (x, w),
                (x.double(), w.double()),
                (x.bfloat16(), w),
                (x.half(), w.half()),
                (x.to("meta"), w.to("meta")),
            ):
                assert ops.conv2d(input, weight).dtype == F.conv2d(input, weight).dtype
            with pytest.raises(RuntimeError, match=r"weight: expected torch\.bfloat16 like input"):
                ops.conv2d(x, w.double())
            with torch.autocast("cpu", enabled=False):
                assert ops.conv2d(x, w).dtype == torch.float32

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_leaves_the_operations_alone(self, backend: str) -> None:
        # The fake kernels promise the type of the inputs.
        x, w = torch.randn(2, 4, 6, 5), torch.randn(6, 4, 3, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = torch.ops.gdfast.conv2d(x, w, None, (1, 1), (0,) * 4, (1, 1), 1, backend)
        assert output.dtype == torch.float32


class TestUnusualTensors:
    """Memory that is not what it seems has to be made so before a kernel reads it."""

    w = torch.ones(6, 4, 3, 2)

    def test_negated(self) -> None:
        imag = torch.randn(2, 4, 6, 5, dtype=torch.complex64).conj().imag
        assert imag.is_neg()
        torch.testing.assert_close(ops.conv2d(imag, self.w), F.conv2d(imag, self.w))

    def test_zero_without_memory(self) -> None:
        zero = torch._efficientzerotensor((2, 4, 6, 5))
        assert torch.equal(ops.conv2d(zero, self.w), torch.zeros(2, 6, 4, 4))

    def test_expanded(self) -> None:
        input = torch.randn(1, 1, 6, 5).expand(2, 4, 6, 5)
        weight = torch.randn(1, 4, 1, 2).expand(6, 4, 3, 2)
        torch.testing.assert_close(ops.conv2d(input, weight), F.conv2d(input, weight))

    def test_strided_bias(self) -> None:
        bias = torch.randn(6, 3)[:, 1]
        input = torch.randn(2, 4, 6, 5)
        expected = F.conv2d(input, self.w, bias)
        torch.testing.assert_close(ops.conv2d(input, self.w, bias), expected)

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            input = torch.randn(2, 4, 6, 5)
            torch.testing.assert_close(ops.conv2d(input, self.w), F.conv2d(input, self.w))

    def test_under_another_default_device_and_dtype(self) -> None:
        input = torch.randn(2, 4, 6, 5, requires_grad=True)
        with torch.device("meta"):
            output = ops.conv2d(input, self.w)
            output.sum().backward()
        assert output.device.type == input.grad.device.type == "cpu"

    def test_meta(self) -> None:
        input = torch.randn(2, 4, 6, 5, device="meta", requires_grad=True)
        weight = self.w.to("meta").requires_grad_()
        output = ops.conv2d(input, weight)
        output.sum().backward()
        assert output.device.type == "meta"
        assert (output.shape, input.grad.shape, weight.grad.shape) == (
            (2, 6, 4, 4), input.shape, weight.shape,
        )  # fmt: skip


class Tagged(Tensor):
    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_see_the_call() -> None:
    input = torch.randn(2, 4, 6, 5)
    weight = torch.randn(6, 4, 3, 2)
    Tagged.calls.clear()
    output = ops.conv2d(input.as_subclass(Tagged), weight, stride=2)
    assert Tagged.calls == ["conv2d"]
    assert isinstance(output, Tagged)
    torch.testing.assert_close(output.as_subclass(Tensor), F.conv2d(input, weight, stride=2))


def test_few_kernels_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    # Images of ever new sizes must not fill the memory.
    monkeypatch.setattr(conv2d_dispatch, "KERNELS_LIMIT", 8)
    weight = torch.randn(1, 1, 3, 3)
    for width in range(3, 60):
        input = torch.randn(1, 1, 3, width)
        torch.testing.assert_close(ops.conv2d(input, weight), F.conv2d(input, weight))
        assert len(conv2d_dispatch._kernels) <= 8


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork() -> None:
    # Threads do not survive a fork, and waiting for them would never end: DataLoader workers fork.
    code = (
        "import os, torch; from gdfast import ops\n"
        "torch.set_num_threads(2)\n"
        "x, w = torch.randn(4, 16, 30, 30), torch.randn(16, 16, 3, 3)\n"
        "expected = ops.conv2d(x, w)[0, 0, :, 0].tolist()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    output = ops.conv2d(x, w)[0, 0, :, 0].tolist()\n"
        "    right = all(abs(a - b) < 1e-4 for a, b in zip(output, expected))\n"
        "    os._exit(0 if right else 3)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], timeout=60, env=dict(os.environ))
    assert result.returncode == 0
