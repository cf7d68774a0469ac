"""Layers for which native PyTorch was chosen throughout: its own operator runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_tuning import Stopwatch, stopwatch, tensors  # noqa: F401  (a fixture)

import gdfast
from gdfast import ops
from gdfast.backends import tuning
from gdfast.ops import conv2d_dispatch

pytestmark = pytest.mark.usefixtures("compiled_cpu", "threads")

NATIVE = {"direct": 2.0, "winograd": 3.0, "bf16": 3.0, "native": 1.0}


def function(output: torch.Tensor) -> str:
    return type(output.grad_fn).__name__


def step(*arguments: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    output = ops.conv2d(*arguments, padding=1, **options)
    grads = torch.autograd.grad(output.sin().sum(), [a for a in arguments if a.requires_grad])
    return output, *grads


def test_the_second_call_is_native_s_own_with_the_same_results(stopwatch: Stopwatch) -> None:  # noqa: F811
    stopwatch.seconds = NATIVE
    arguments = tensors()
    first, second = step(*arguments), step(*arguments)
    assert [function(each[0]) for each in (first, second)] == [
        "Conv2dFunctionBackward", "ConvolutionBackward0",
    ]  # fmt: skip
    output = F.conv2d(*arguments, padding=1)
    native = (output, *torch.autograd.grad(output.sin().sum(), arguments))
    assert all(torch.equal(a, b) for a, b in zip(second, native, strict=True))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(first, native, strict=True))


@pytest.mark.parametrize("ours", ["conv2d", "conv2d_grad_input", "conv2d_grad_weight"])
def test_not_where_one_pass_is_ours(
    ours: str,
    stopwatch: Stopwatch,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = iter(("conv2d", "conv2d_grad_input", "conv2d_grad_weight"))

    def choose(calls: dict[str, Any]) -> dict[str, float]:
        seconds = NATIVE if next(order) != ours else {**NATIVE, "direct": 0.1}
        return {name: seconds[name] for name in calls}

    monkeypatch.setattr("gdfast.backends.tuning_timer.measure", choose)
    arguments = tensors()
    assert [function(step(*arguments)[0]) for _ in range(3)] == [
        "Conv2dFunctionBackward",
        *["PlannedFunctionBackward"] * 2,
    ]


def test_only_where_the_choice_holds(stopwatch: Stopwatch) -> None:  # noqa: F811
    stopwatch.seconds = NATIVE
    arguments = tensors()
    step(*arguments)
    ours = "Conv2dFunctionBackward", "PlannedFunctionBackward"
    assert function(step(*arguments, backend="cpu")[0]) in ours
    assert function(step(*tensors(size=41))[0]) in ours
    assert function(step(arguments[0].detach(), arguments[1])[0]) in ours
    assert function(step(*arguments, torch.zeros(16))[0]) in ours
    with gdfast.autotune("off"):
        assert function(step(*arguments)[0]) in ours
    with gdfast.precision("strict"):
        assert function(step(*arguments)[0]) in ours
    step(*arguments)  # in yet another situation
    assert function(step(*arguments)[0]) == "ConvolutionBackward0"
    conv2d_dispatch.forget_kernels()
    assert function(step(*arguments)[0]) in ours


def test_autocast_and_gradients_of_gradients(stopwatch: Stopwatch) -> None:  # noqa: F811
    stopwatch.seconds = NATIVE
    arguments = tensors()
    half = [a.detach().bfloat16().requires_grad_() for a in arguments]
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            output = ops.conv2d(*arguments, padding=1)
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and arguments[0].grad.dtype == torch.float32
    for each in (arguments, half):
        step(*each)
    output = ops.conv2d(*arguments, padding=1)
    assert function(output) == "ConvolutionBackward0"
    (grad,) = torch.autograd.grad(output.pow(2).sum(), arguments[0], create_graph=True)
    (again,) = torch.autograd.grad(grad.sum(), arguments[1])
    assert again.isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_an_activation_follows_in_place(
    activation: str,
    with_bias: bool,
    stopwatch: Stopwatch,  # noqa: F811
) -> None:
    stopwatch.seconds = NATIVE
    arguments = [*tensors(), *[torch.randn(16, requires_grad=True)] * with_bias]
    results = []
    for convolve in (ops.conv2d_act, ops.conv2d_act, composed):
        output = convolve(*arguments, padding=1, activation=activation)
        results.append((output, *torch.autograd.grad(output.sin().sum(), arguments)))
    first, second, native = results
    assert function(first[0]) == "Conv2dActFunctionBackward"
    assert function(second[0]) == function(native[0])
    assert all(torch.equal(a, b) for a, b in zip(second, native, strict=True))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(first, native, strict=True))
    with torch.no_grad():
        output = ops.conv2d_act(*arguments, padding=1, activation=activation)
    assert torch.equal(output, native[0])
    # Other activations, backends and plain convolutions are layers of their own.
    other = ops.conv2d_act(*arguments, padding=1, activation="leaky_relu", negative_slope=0.5)
    assert function(other) == "Conv2dActFunctionBackward"
    named = ops.conv2d_act(*arguments, padding=1, activation=activation, backend="cpu")
    assert function(named) == "Conv2dActFunctionBackward"


def composed(*arguments: torch.Tensor, padding: int, activation: str) -> torch.Tensor:
    return getattr(F, activation)(F.conv2d(*arguments, padding=padding), inplace=True)


def test_a_convolution_is_chosen_with_its_activation(stopwatch: Stopwatch) -> None:  # noqa: F811
    arguments = tensors()
    with tuning.recorded({}) as uses:
        stopwatch.seconds = NATIVE
        ops.conv2d(*arguments, padding=1)
        stopwatch.seconds = {**NATIVE, "direct": 0.1}
        ops.conv2d_act(*arguments, padding=1)
    assert [(use.op, use.choice.name) for use in uses] == [
        ("conv2d", "native"), ("conv2d_act", "direct"),
    ]  # fmt: skip
