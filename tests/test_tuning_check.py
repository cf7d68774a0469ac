"""Which candidates agree with native PyTorch, before times may choose one of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gdfast.backends import Conv2dQuery, tuning, tuning_check
from gdfast.errors import FallbackWarning
from gdfast.geometry import Conv2dGeometry, dense_strides


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

    with pytest.warns(FallbackWarning, match="conv2d: ours: expected the right result"):
        assert agreeing(ours, *arguments(dtype)) == []


def test_tf32_agrees_only_where_it_is_allowed() -> None:
    def ours(input: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        rounded = (t.view(torch.int32).add(0x1000).bitwise_and(-0x2000).view(torch.float32)
                   for t in (input, weight))  # fmt: skip
        return native(*rounded, bias)[0], native(input, weight, bias)[1]

    assert agreeing(ours, *arguments(channels=2), tf32=True) == ["ours"]
    with pytest.warns(FallbackWarning):
        assert agreeing(ours, *arguments(channels=2)) == []


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_what_tells_nothing_is_not_what_is_compared(value: float) -> None:
    input, weight, bias = arguments()

    def zeros(*args: Any) -> tuple[Tensor, Tensor | None]:
        output, total = native(*args)
        return torch.zeros_like(output), total

    with pytest.warns(FallbackWarning):
        assert agreeing(zeros, input, torch.full_like(weight, value), bias) == []


def test_a_lost_part_of_a_long_sum_is_found() -> None:
    def long_sum(input: Tensor, grad: Tensor) -> Tensor:
        return (grad.float() @ input.float()).bfloat16()

    def ours(input: Tensor, grad: Tensor) -> Tensor:
        rest = len(input) - len(input) // 64
        return long_sum(input[:rest], grad[:, :rest])

    values = torch.empty(200_000, 16, dtype=torch.bfloat16), torch.empty(16, 200_000).bfloat16()
    check = {"ours": ours, "native": long_sum}
    with pytest.warns(FallbackWarning):
        found = tuning_check.agreeing("sum", check, long_sum, long_sum, values, False)
    assert found == ["native"]


def test_no_numbers_are_compared_where_native_has_none() -> None:
    def infinite(*args: Any) -> tuple[Tensor, Tensor | None]:
        output, total = native(*args)
        output[0, 0, 5, 5] = float("inf")
        return output, total

    def ours(*args: Any) -> tuple[Tensor, Tensor | None]:
        output, total = infinite(*args)
        return output.where(output.isfinite(), float("nan")), total

    calls = {"ours": ours}
    assert tuning_check.agreeing("conv2d", calls, infinite, native, arguments(), False) == ["ours"]


def test_an_activation_does_not_hide_the_size_of_what_it_was_given() -> None:
    def relu6(*args: Any) -> tuple[Tensor, Tensor | None]:
        return F.relu6(native(*args)[0]), None

    def ours(input: Tensor, weight: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        return relu6(input + 2e-5 * input.abs().max(), weight, bias)

    def products(*args: Any) -> tuple[Tensor, Tensor | None]:
        return native(*args)[0], None

    args = arguments(channels=512)
    assert tuning_check.agreeing("conv2d_act", {"ours": ours}, relu6, products, args, False)
    with pytest.warns(FallbackWarning):
        assert not tuning_check.agreeing("conv2d_act", {"ours": ours}, relu6, relu6, args, False)


def test_what_raises_is_passed_over_but_for_want_of_memory() -> None:
    def wrong(*_: Any) -> Any:
        raise RuntimeError("no such thing")

    def large(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    assert agreeing(wrong, *arguments()) == []
    with pytest.raises(torch.OutOfMemoryError):
        agreeing(large, *arguments())


@pytest.mark.usefixtures("compiled_cpu")
def test_the_tuner_asks_what_agrees() -> None:
    input, weight = torch.randn(2, 8, 12, 9), torch.randn(8, 8, 3, 3)
    geometry = Conv2dGeometry.of("conv2d", input.shape, weight.shape, (1, 1), (1,) * 4, (1, 1), 1)
    strides = input.stride(), weight.stride(), dense_strides(geometry.output_size, False)
    query = Conv2dQuery(input.device, input.dtype, geometry=geometry, strides=strides)

    def zeros(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.zeros(geometry.output_size)

    def ours(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input.double(), weight.double(), padding=1).float()

    calls = {"zeros": zeros, "ours": ours}
    with pytest.warns(FallbackWarning, match="conv2d: zeros"):
        assert tuning._agreeing("conv2d", query, calls, (input, weight, None)) == ["ours"]
