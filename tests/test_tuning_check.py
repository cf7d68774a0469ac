"""Which candidates agree with native PyTorch, before times may choose one of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast.backends import tuning_check
from gdfast.errors import FallbackWarning


def native(input: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    return F.conv2d(input, weight, padding=1), input.sum((0, 2, 3)) if bias else None


def arguments(dtype: torch.dtype = torch.float32, channels: int = 64) -> tuple[Any, ...]:
    torch.manual_seed(3)
    return torch.randn(2, channels, 12, 9).to(dtype), torch.randn(8, channels, 3, 3).to(dtype), True


def agreeing(call: Callable[..., Any], *args: Any, tf32: bool = False) -> list[str]:
    return tuning_check.agreeing("conv2d", {"ours": call}, native, native, args, tf32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_otherwise_agrees(dtype: torch.dtype) -> None:
    def ours(input: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(dtype, torch.float32)
        parts = native(input.flip(1).to(wide), weight.flip(1).to(wide), bias)
        return tuple(p if p is None else p.to(dtype) for p in (parts[0], parts[1].flip(0)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agreeing(ours, *arguments(dtype)) == ["ours"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["border", "tap", "bias", "unwritten"])
def test_a_fault_is_found(dtype: torch.dtype, fault: str) -> None:
    def ours(input: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        if fault == "tap":
            weight = weight.clone()
            weight[:, :, 2, 1] = 0
        output, total = native(input, weight, bias)
        assert total is not None
        if fault == "border":
            output[:, :, -1] = native(input[:, :, :-1], weight, bias)[0][:, :, -1]
        elif fault == "bias":
            total = total + 0.05 * input.abs().sum((0, 2, 3))
        elif fault == "unwritten":
            output[1, 3, 4, 5] = float("nan")
        return output, total

    with pytest.warns(FallbackWarning, match="conv2d: ours: expected native PyTorch's result"):
        assert agreeing(ours, *arguments(dtype)) == []


def test_tf32_agrees_only_where_it_is_allowed() -> None:
    def ours(input: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        rounded = (t.view(torch.int32).add(0x1000).bitwise_and(-0x2000).view(torch.float32)
                   for t in (input, weight))  # fmt: skip
        return native(*rounded, bias)[0], native(input, weight, bias)[1]

    assert agreeing(ours, *arguments(channels=2), tf32=True) == ["ours"]
    with pytest.warns(FallbackWarning):
        assert agreeing(ours, *arguments(channels=2)) == []


def test_no_numbers_are_compared_where_native_has_none() -> None:
    input, weight, bias = arguments()
    input[0, 0, 5, 5] = float("inf")

    def ours(*args: Any) -> tuple[Tensor, Tensor | None]:
        output, total = native(*args)
        return output.where(output.isfinite(), float("nan")), total

    assert agreeing(ours, input, weight, bias) == ["ours"]


def test_an_activation_does_not_hide_the_size_of_what_it_was_given() -> None:
    def relu6(*args: Any) -> tuple[Tensor, Tensor | None]:
        return F.relu6(native(*args)[0]), None

    def ours(input: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        return relu6(input + 3e-5 * input.abs().max(), weight, bias)

    def products(*args: Any) -> tuple[Tensor, Tensor | None]:
        return native(*args)[0], None

    args = arguments(channels=512)
    assert tuning_check.agreeing("conv2d_act", {"ours": ours}, relu6, products, args, False)
    with pytest.warns(FallbackWarning):
        assert not tuning_check.agreeing("conv2d_act", {"ours": ours}, relu6, relu6, args, False)


def test_what_raises_is_passed_over() -> None:
    def ours(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    assert agreeing(ours, *arguments()) == []
    assert tuning_check.agreeing("conv2d", {"ours": native}, ours, ours, arguments(), False) == []
