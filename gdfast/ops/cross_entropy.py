"""cross_entropy as one kernel each way, on the CPU for few logits.

It is made for recorded steps: there a call costs what its kernel does, and native's needs five. In
ordinary steps what autograd does for a node in Python takes longer than native's operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from gdfast.backends import chosen
from gdfast.backends import cross_entropy as kernels
from gdfast.ops.ordinary import (
    apply_to_ordinary,
    are_ordinary,
    batched_gradients,
    is_watched,
    ordinary_facts,
)

_OURS = {"auto", "cpu"}
# By sizes and settings: what our kernels compute, or None where native's are the faster.
_problems: dict[tuple[Any, ...], Any] = {}
_MOST = 4096


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of logits, as `torch.nn.functional.cross_entropy` and with its signature.

    For `gdfast.GraphedStep` on the CPU, where it takes a sixth of the time; in ordinary steps
    native's takes less.

    input [N, C], target [N]: classes. Ours are up to 8,192 float32 logits on the CPU with reduction
    "mean" or "sum", label smoothing and ignored classes, without weights; sums are taken in
    float64. Unlike native's, backward must find the logits unchanged. All else, and what a
    transform or torch.compile calls, runs on native PyTorch, without a warning. Raises what native
    raises.
    """
    settings = size_average, ignore_index, reduce, reduction, label_smoothing
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy, (input, target, weight), input, target, weight, *settings
        )
    problem = _problem(input, target, settings) if weight is None else None
    if problem is None:
        return F.cross_entropy(input, target, weight, *settings)
    if torch.is_grad_enabled() and input.requires_grad:
        loss: Tensor = _apply(input, target, problem, settings)  # all are ordinary
        return loss
    return kernels.cross_entropy(problem, input, target, False)[0]


def _problem(input: Any, target: Any, settings: tuple[Any, ...]) -> Any:
    """What the kernels compute where they take a call, else None."""
    if is_watched() or chosen() not in _OURS:
        return None
    facts = ordinary_facts(input, target)
    if facts is None:
        return None
    key = facts, *settings
    try:
        return _problems[key]
    except KeyError:
        pass
    if len(_problems) >= _MOST:
        _problems.clear()
    made = _problems[key] = _new_problem(input, target, *settings)
    return made


def _new_problem(
    input: Tensor, target: Tensor, size_average: Any, ignore_index: int, reduce: Any,
    reduction: str, label_smoothing: float,
) -> Any:  # fmt: skip
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum"):
        return None
    if not 0.0 <= label_smoothing <= 1.0 or not kernels.fits(input, target):
        return None
    (N, C), step = input.shape, input.stride(0)
    return kernels.problem(N, C, step, ignore_index, label_smoothing, reduction == "mean")


class _CrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        input, target, ctx.problem, ctx.settings = inputs
        loss, probabilities = kernels.cross_entropy(ctx.problem, input, target, True)
        ctx.save_for_backward(input, target, probabilities)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        input, target, probabilities = ctx.saved_tensors
        if torch.is_grad_enabled() or batched_gradients() or not are_ordinary(grad_loss):
            return _gradient(grad_loss, input, target, ctx.settings), None, None, None
        grad = kernels.cross_entropy_backward(ctx.problem, grad_loss, probabilities, target)
        return grad, None, None, None


def _gradient(
    grad_loss: Tensor, input: Tensor, target: Tensor, settings: tuple[Any, ...]
) -> Tensor:
    """The gradient of the logits by operators that autograd and vmap know."""
    _, ignore_index, _, reduction, smoothing = settings
    counts = target != ignore_index
    classes = F.one_hot(torch.where(counts, target, 0), input.shape[1])
    wanted = (1 - smoothing) * classes + smoothing / input.shape[1]
    scale = grad_loss / counts.sum() if reduction == "mean" else grad_loss
    return torch.where(counts[:, None], (input.softmax(1) - wanted) * scale, 0.0)


_apply = apply_to_ordinary(_CrossEntropyFunction)
