"""Batch normalisation in training with ReLU and, in some layers, a residual: both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gdfast.bench.cases import NormCase
from gdfast.bench.workload import LAYOUTS, Check, Workload, allowed_error, relative_error

PASSES = ("forward", "backward")

# How far rounding may move what ReLU gets: some roundings, and sums of many values in float32.
_ROUNDINGS = 4
_SUMS_APART = 1e-5

Normalise = Callable[..., Tensor]  # the signature of gdfast.ops.batch_norm_act


def native(
    input: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    residual: Tensor | None, *, training: bool,
) -> Tensor:  # fmt: skip
    """What PyTorch runs for the same: two operators, or three."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training)
    return F.relu(output if residual is None else output + residual)


def workload(
    case: NormCase,
    task: str,
    dtype: torch.dtype = torch.float32,
    *,
    normalise: Normalise,
    backend: str = "",
) -> Workload:
    """One pass ("forward" or "backward") of one layer, in both layouts.

    `normalise` is our batch_norm_act. Images are normal random numbers, drawn from a fixed seed, a
    mean and a spread for each channel; parameters are float32 beside half types. The check compares
    with float64 on the same values: the output, or all gradients end to end.

    Raises:
        ValueError: no such pass.
    """
    if task not in PASSES:
        raise ValueError(f"norm.workload: task: expected one of {PASSES}, got {task!r}")
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    C = case.size[1]
    input = random(*case.size) * (0.5 + random(C, 1, 1).abs()) + random(C, 1, 1)
    images = [value.to(dtype) for value in (input, random(*case.size), random(*case.size))]
    param_dtype = dtype if dtype == torch.float64 else torch.float32
    params = [value.to(param_dtype) for value in (random(C).abs() + 0.5, random(C))]
    images[2][_near_bend(case.residual, images, params)] = 0
    laid_out = {
        layout: [value.to(memory_format=memory_format, copy=True) for value in images]
        for layout, memory_format in LAYOUTS.items()
    }

    def calls(function: Normalise) -> dict[str, Callable[[], Sequence[Tensor]]]:
        return {
            layout: _pass(task, function, case.residual, *laid_out[layout], *params)
            for layout in LAYOUTS
        }

    ours, natives = calls(normalise), calls(native)

    def check() -> Check:
        exact = [value.double() for value in (*images, *params)]
        reference = _flat(_pass(task, native, case.residual, *exact)())
        terms = input.numel() // C
        return Check(
            {layout: relative_error(_flat(call()), reference) for layout, call in ours.items()},
            {
                layout: allowed_error(relative_error(_flat(call()), reference), dtype, terms)
                for layout, call in natives.items()
            },
        )

    # Least traffic: forward reads input and residual and writes output; backward reads grad_output,
    # input and, with a residual, output, and writes the gradients of input and residual.
    tensors = {"forward": (2, 3), "backward": (3, 5)}[task][case.residual]
    return Workload(
        "norm", case.name, task, ours, natives, check, flops=8 * input.numel(),
        bytes=tensors * input.numel() * dtype.itemsize, backend=backend,
    )  # fmt: skip


def _near_bend(with_residual: bool, images: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Where rounding decides on which side of zero ReLU's argument is: both gradients are right."""
    input, residual, _, weight, bias = (value.double() for value in (*images, *params))
    argument = F.batch_norm(input, None, None, weight, bias, training=True)
    if with_residual:
        argument += residual
    return argument.abs() < _ROUNDINGS * torch.finfo(images[0].dtype).eps + _SUMS_APART


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.detach().double().flatten() for value in values])


def _pass(
    task: str, function: Normalise, with_residual: bool, input: Tensor, residual: Tensor,
    grad_output: Tensor, weight: Tensor, bias: Tensor,
) -> Callable[[], Sequence[Tensor]]:  # fmt: skip
    """A call without arguments that does one pass, through autograd as a training step does."""
    leaves = [value.detach().requires_grad_() for value in (input, weight, bias)]
    leaves += [residual.detach().requires_grad_()] * with_residual
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)

    def forward() -> Tensor:
        more = leaves[3] if with_residual else None
        return function(*leaves[:3], mean, var, more, training=True)

    if task == "forward":
        return lambda: [forward().detach()]
    output = forward()
    return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
