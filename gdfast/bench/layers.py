"""Single convolutions: forward, grad_input and grad_weight as a training step runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from gdfast.bench.cases import Conv2dCase
from gdfast.bench.workload import LAYOUTS, Check, Workload, allowed_error, relative_error

PASSES = ("forward", "grad_input", "grad_weight")

Convolve = Callable[..., Tensor]  # the signature of torch.nn.functional.conv2d


def workload(
    case: Conv2dCase,
    task: str,
    dtype: torch.dtype = torch.float32,
    *,
    convolve: Convolve,
    backend: str = "",
    stated_error: float = 0.0,
) -> Workload:
    """One pass ("forward", "grad_input" or "grad_weight") of one layer, in both layouts.

    `convolve` is our conv2d, with the signature of torch.nn.functional.conv2d. Inputs are normal
    random numbers, drawn from a fixed seed; the check compares with float64 on the same inputs and
    allows the relative error that our algorithm states, where that is larger than native's.

    Raises:
        ValueError: no such pass.
    """
    if task not in PASSES:
        raise ValueError(f"layers.workload: task: expected one of {PASSES}, got {task!r}")
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (case.input_shape, case.weight_shape, case.output_shape)
    ]
    # Both sides read the same memory: where a tensor happens to lie can cost 15 %. Converted with
    # to(), since contiguous() leaves the strides of a tensor with one channel as they are.
    laid_out = {
        layout: [tensor.to(memory_format=memory_format, copy=True) for tensor in tensors]
        for layout, memory_format in LAYOUTS.items()
    }

    def calls(function: Convolve) -> dict[str, Callable[[], Tensor]]:
        convolve = partial(function, **case.geometry)
        return {layout: _pass(task, convolve, *laid_out[layout]) for layout in LAYOUTS}

    ours, native = calls(convolve), calls(F.conv2d)

    terms = {
        "forward": prod(case.weight_shape[1:]),
        "grad_input": case.K // case.groups * case.R * case.S,
        "grad_weight": case.N * case.P * case.Q,
    }[task]

    def check() -> Check:
        exact = partial(F.conv2d, **case.geometry)
        reference = _pass(task, exact, *(tensor.double() for tensor in tensors))()
        return Check(
            {layout: relative_error(call(), reference) for layout, call in ours.items()},
            {
                layout: max(
                    stated_error, allowed_error(relative_error(call(), reference), dtype, terms)
                )
                for layout, call in native.items()
            },
        )

    traffic = case.bytes * dtype.itemsize // 4
    return Workload(
        case.model, case.name, task, ours, native, check, case.flops, traffic, backend=backend
    )


def _pass(
    task: str, convolve: Convolve, input: Tensor, weight: Tensor, grad_output: Tensor
) -> Callable[[], Tensor]:
    """A call without arguments that does one pass, through autograd as a training step does."""
    # A training step asks for gradients in its forward too: what is saved is part of the cost.
    input = input.detach().requires_grad_(task == "grad_input")
    weight = weight.detach().requires_grad_(task != "grad_input")
    if task == "forward":
        return lambda: convolve(input, weight).detach()
    output = convolve(input, weight)
    wanted = input if task == "grad_input" else weight
    return lambda: torch.autograd.grad(output, wanted, grad_output, retain_graph=True)[0]
