"""What ops.conv2d refuses, and what it leaves to native PyTorch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gdfast
from gdfast import ops
from gdfast.errors import BackendError, FallbackWarning

pytestmark = [
    pytest.mark.usefixtures("fresh_registry", "compiled_cpu"),
    pytest.mark.filterwarnings("error::gdfast.errors.FallbackWarning"),
]


class TestErrors:
    """Native's exception types, better words."""

    x = torch.ones(2, 4, 6, 5)
    w = torch.ones(6, 4, 3, 2)
    b = torch.ones(6)
    CALLS: tuple[tuple[tuple[Any, ...], str], ...] = (
        ((x, w, b, (1, 2, 3)), "conv2d: stride: expected one number or a pair"),
        ((x, w, b, ()), "conv2d: stride: expected one number or a pair"),
        ((x, w, b, 1.5), "conv2d: stride: expected an int, got 1.5 (float)"),
        ((x, w, b, None), "conv2d: stride: expected an int"),
        ((x, w, b, True), "conv2d: stride: expected an int"),
        ((x, w, b, 0), "conv2d: stride: expected at least 1, got (0, 0)"),
        ((x, w, b, -1), "conv2d: stride: expected at least 1"),
        ((x, w, b, 1, -1), "conv2d: padding: expected at least 0"),
        ((x, w, b, 1, "foo"), "conv2d: padding: expected 'same', 'valid'"),
        ((x, w, b, 2, "same"), "conv2d: padding: expected numbers, for a stride"),
        ((x, w, b, 1, 0, 0), "conv2d: dilation: expected at least 1"),
        ((x, w, b, 1, 0, 1, 0), "conv2d: groups: expected at least 1, got 0"),
        ((x, w, b, 1, 0, 1, (1,)), "conv2d: groups: expected an int"),
        ((x, w, b, 1, 0, 1, 1.0), "conv2d: groups: expected an int"),
        ((x, w, b, 1, 0, 1, 3), "conv2d: input: expected 12 channels"),
        ((x, w[:, :1], b, 1, 0, 1, 4), "conv2d: weight: expected a multiple of groups=4"),
        ((x, torch.ones(6, 5, 3, 2), b), "conv2d: input: expected 5 channels"),
        ((x[:0, :3], w, b), "conv2d: input: expected 4 channels"),
        ((x[0, :3], w, b), "conv2d: input: expected 4 channels"),
        ((x, w, b[:5]), "conv2d: bias: expected size [6], one for each output channel, got"),
        ((x, w, b[:, None]), "conv2d: bias: expected size [6]"),
        ((x, w, torch.tensor(1.0)), "conv2d: bias: expected size [6]"),
        ((x[0, 0], w, b), "conv2d: input: expected [N, C, H, W] or [C, H, W]"),
        ((x[None], w, b), "conv2d: input: expected [N, C, H, W] or [C, H, W]"),
        ((x, w[0], b), "conv2d: weight: expected [K, C / groups, R, S]"),
        ((x, w[None], b), "conv2d: weight: expected [K, C / groups, R, S]"),
        ((x, w.double(), b), "conv2d: weight: expected torch.float32 like input"),
        ((x, w, b.double()), "conv2d: bias: expected torch.float32 like input"),
        ((x.bfloat16(), w.half(), None), "conv2d: weight: expected torch.bfloat16 like input"),
        ((x, w[:0], None), "conv2d: weight: expected a multiple of groups=1"),
        ((x[:, :, :2], w, b), "conv2d: input: expected a padded image of at least 3 x 2"),
        ((x[:0, :, :2], w, b), "conv2d: input: expected a padded image of at least 3 x 2"),
        ((x, w, b, 1, 0, 4), "conv2d: input: expected a padded image of at least 9 x 5"),
        ((x[:, :, :0], w, b, 1, 3), "conv2d: input: expected at least one row"),
        ((x, w[:, :, :0], None), "conv2d: weight: expected a kernel of at least 1 x 1"),
        ((x, w, b, 2**63), "conv2d: stride: expected numbers of at most 64 bits, got"),
        ((x, w, b, 1, -(2**64)), "conv2d: padding: expected numbers of at most 64 bits, got"),
        ((x, w, b, 1, 0, 2**63), "conv2d: dilation: expected numbers of at most 64 bits, got"),
        ((x, w, b, 1, 0, 1, 2**63), "conv2d: groups: expected numbers of at most 64 bits, got"),
        ((x, w, b, 1, 2**62), "conv2d: padding: expected at most 2147483647, got"),
        ((x, w, b, 2**62, 2**62), "conv2d: padding: expected at most 2147483647, got"),
        ((x, w, b, 1, 2**31 - 1), "conv2d: padding: expected an output of at most"),
    )  # fmt: skip

    @pytest.mark.parametrize(("arguments", "words"), CALLS, ids=[words for _, words in CALLS])
    def test_of_arguments(self, arguments: tuple[Any, ...], words: str) -> None:
        with pytest.raises((RuntimeError, TypeError, ValueError)) as native:
            F.conv2d(*arguments)
        with pytest.raises(type(native.value)) as ours:
            ops.conv2d(*arguments)
        assert words in str(ours.value)

    def test_the_largest_numbers_that_native_takes(self) -> None:
        for arguments in (
            (self.w, self.b, 2**63 - 1),
            (self.w, self.b, 2**31 - 1, 2**31 - 1),
            (self.w[..., :1, :1], self.b, 1, 0, 2**63 - 1),
        ):
            torch.testing.assert_close(ops.conv2d(self.x, *arguments), F.conv2d(self.x, *arguments))

    @pytest.mark.parametrize(
        "arguments",
        [([1], w), (x, None), (x, w, "b"), (x, w, b.numpy()), (x.numpy(), w)],
        ids=["input", "weight", "bias", "numpy bias", "numpy input"],
    )
    def test_of_what_is_no_tensor(self, arguments: Any) -> None:
        with pytest.raises(TypeError):
            F.conv2d(*arguments)
        with pytest.raises(TypeError):
            ops.conv2d(*arguments)

    def test_of_devices(self) -> None:
        # Native lets meta tensors mix and computes nothing; a forgotten .to(device) should show.
        with pytest.raises(RuntimeError, match=r"conv2d: weight: .* got meta. Move one of them"):
            ops.conv2d(self.x, self.w.to("meta"))

    def test_of_the_operations(self) -> None:
        arguments = (1, 1), (0, 0, 0, 0), (1, 1), 1, "auto"
        grad = torch.ones(2, 6, 4, 4)
        conv2d_grad_input = torch.ops.gdfast.conv2d_grad_input
        conv2d_grad_weight = torch.ops.gdfast.conv2d_grad_weight
        with pytest.raises(RuntimeError, match="conv2d_grad_input: grad_output: expected size"):
            conv2d_grad_input(grad[..., :3], self.w, self.x.shape, False, *arguments)
        with pytest.raises(RuntimeError, match="conv2d_grad_input: weight: expected torch"):
            conv2d_grad_input(grad, self.w.double(), self.x.shape, False, *arguments)
        with pytest.raises(RuntimeError, match="conv2d_grad_weight: grad_output: expected size"):
            conv2d_grad_weight(grad[:1], self.x, self.w.shape, False, True, *arguments)
        with pytest.raises(RuntimeError, match="conv2d_grad_weight: input: expected torch"):
            conv2d_grad_weight(grad, self.x.half(), self.w.shape, False, True, *arguments)
        with pytest.raises(ValueError, match="backend: name: expected one of"):
            torch.ops.gdfast.conv2d(self.x, self.w, None, *arguments[:4], "gpu")


class TestLeftToNative:
    """What no kernel of ours takes runs natively, and says so; by name it raises."""

    x = torch.ones(2, 4, 6, 5)
    w = torch.ones(6, 4, 3, 2)

    @pytest.mark.parametrize(
        ("input", "weight"),
        [
            (x.to(torch.complex64), w.to(torch.complex64)),
            (x.long(), w.long()),
            (x.to_mkldnn(), w.to_mkldnn()),
        ],
        ids=["complex", "int64", "mkldnn"],
    )
    def test_what_native_can(self, input: Tensor, weight: Tensor) -> None:
        with pytest.warns(FallbackWarning, match="conv2d: running on native PyTorch"):
            output = ops.conv2d(input, weight)
        expected = F.conv2d(input, weight)
        if expected.layout == torch._mkldnn:  # type: ignore[attr-defined]
            output, expected = output.to_dense(), expected.to_dense()
        assert torch.equal(output, expected)
        with pytest.raises(BackendError, match="'cpu' was asked for and cannot run this"):
            ops.conv2d(input, weight, backend="cpu")

    @pytest.mark.parametrize(
        ("input", "weight"),
        [
            (x.to_sparse(), w),
            (x, w.to_sparse()),
            (x.bool(), w.bool()),
            (x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)),
            (x.int(), w),
        ],
        ids=["sparse input", "sparse weight", "bool", "float8", "int32 and float32"],
    )
    def test_what_native_cannot_either(self, input: Tensor, weight: Tensor) -> None:
        with pytest.raises(RuntimeError) as native:
            F.conv2d(input, weight)
        with pytest.raises(type(native.value)), warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            ops.conv2d(input, weight)

    def test_it_says_so_once(self) -> None:
        with pytest.warns(FallbackWarning):
            ops.conv2d(self.x.long(), self.w.long())
        ops.conv2d(self.x.long(), self.w.long())  # a second warning would be an error here

    def test_the_native_backend_is_native_itself(self) -> None:
        input = self.x.clone().requires_grad_()
        with gdfast.backend("native"):
            output = ops.conv2d(input, self.w)
        assert output.grad_fn is not None
        assert output.grad_fn.name() == F.conv2d(input, self.w).grad_fn.name()
        named = ops.conv2d(input, self.w, backend="native")
        assert named.grad_fn.name() == output.grad_fn.name()
