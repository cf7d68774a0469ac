"""Triton convolutions of others that benchmarks/gpu_layers.py times, where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gdfast.bench.cases import Conv2dCase

# Inductor's templates alone, tuned, for all that a layer may become. A search of tiles under load
# would be remembered, so its kernels are compiled when they are timed.
_TEMPLATES = {
    "max_autotune": True,
    "max_autotune_gemm_backends": "TRITON",
    "max_autotune_conv_backends": "TRITON",
}
_TEMPLATE_OF_PASS = {
    "grad_input": "max_autotune_conv_bwd_input_backends",
    "grad_weight": "max_autotune_conv_bwd_weight_backends",
}


class Absent(Exception):
    """It is not installed, or has no kernel for this."""


def call(
    rival: str, case: Conv2dCase, task: str, tensors: Sequence[Tensor]
) -> Callable[[], Tensor]:
    """One pass by "inductor", "flag_gems" or "attorch", on input, weight and grad_output.

    What is not there raises Absent when it is called.
    """
    make = {"inductor": _inductor, "flag_gems": _flag_gems, "attorch": _attorch}[rival]
    made: list[Callable[[], Tensor]] = []

    def run() -> Tensor:
        if not made:
            made.append(make(case, task, *tensors))
        return made[0]()

    return run


def inductor_options(task: str) -> dict[str, Any]:
    """Of torch.compile, to have a pass run by Inductor's templates in Triton."""
    if task == "forward":
        return _TEMPLATES
    from torch._inductor import config

    name = _TEMPLATE_OF_PASS[task]
    if not hasattr(config, name):
        raise Absent(f"Inductor of torch {torch.__version__} has no template for {task}")
    return {**_TEMPLATES, name: "TRITON"}


def _inductor(
    case: Conv2dCase, task: str, input: Tensor, weight: Tensor, grad: Tensor
) -> Callable[[], Tensor]:
    window = list(case.stride), list(case.padding), list(case.dilation)
    wanted = [task == "grad_input", task == "grad_weight", False]
    run = torch.ops.aten

    def forward(input: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        output: Tensor = run.convolution(input, weight, None, *window, False, [0, 0], case.groups)
        return output

    def backward(input: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
        grads = run.convolution_backward(
            grad, input, weight, None, *window, False, [0, 0], case.groups, wanted
        )
        output: Tensor = grads[wanted.index(True)]
        return output

    function = forward if task == "forward" else backward
    compiled = torch.compile(function, dynamic=False, options=inductor_options(task))
    return lambda: compiled(input, weight, grad)


def _flag_gems(
    case: Conv2dCase, task: str, input: Tensor, weight: Tensor, grad: Tensor
) -> Callable[[], Tensor]:
    conv2d = _module("flag_gems", task).conv2d
    return lambda: conv2d(
        input, weight, bias=None, stride=case.stride, padding=case.padding,
        dilation=case.dilation, groups=case.groups,
    )  # fmt: skip


def _attorch(
    case: Conv2dCase, task: str, input: Tensor, weight: Tensor, grad: Tensor
) -> Callable[[], Tensor]:
    apply = _module("attorch.conv_layer", task).Conv2dAutoGrad.apply
    return lambda: apply(input, weight, None, *case.stride, *case.padding, case.groups)


def _module(name: str, task: str) -> Any:
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    if task != "forward":
        raise Absent(f"{package}: forward alone is compared")
    return importlib.import_module(name)
