"""The cross entropy of few classes, on our CPU kernels: which calls they take, and the calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdfast import native

# Above it native's operators on all threads are as fast: the kernels run on one.
_MOST_LOGITS = 8 * 1024


def fits(input: Tensor, target: Tensor) -> bool:
    """Whether the kernels take logits [N, C] and classes [N], and are the faster way."""
    return (
        hasattr(native.cpu, "cross_entropy")
        and input.dim() == 2
        and target.dim() == 1
        and 0 < input.numel() <= _MOST_LOGITS
        and input.shape[0] == target.shape[0]
        and input.is_cpu
        and target.is_cpu
        and input.dtype == torch.float32
        and target.dtype == torch.int64
        and input.stride(1) == 1
        and target.is_contiguous()
    )


def problem(N: int, C: int, step: int, ignore_index: int, smoothing: float, mean: bool) -> Any:
    """What the kernels are to compute, of rows that begin `step` elements apart."""
    assert native.cpu is not None
    return native.cpu.CrossEntropyProblem(N, C, step, ignore_index, smoothing, mean)


def cross_entropy(
    problem: Any, input: Tensor, target: Tensor, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and what its gradient is computed from. Raises IndexError for a wrong class."""
    assert native.cpu is not None
    loss = torch.empty((), dtype=input.dtype)
    probabilities = torch.empty(input.shape, dtype=input.dtype) if wants_gradient else None
    native.cpu.cross_entropy(
        problem, input.data_ptr(), target.data_ptr(), loss.data_ptr(),
        0 if probabilities is None else probabilities.data_ptr(),
    )  # fmt: skip
    return loss, probabilities


def cross_entropy_backward(
    problem: Any, grad_loss: Tensor, probabilities: Tensor, target: Tensor
) -> Tensor:
    """The gradient of the logits, for a gradient of the loss."""
    assert native.cpu is not None
    grad_input = torch.empty(probabilities.shape, dtype=probabilities.dtype)
    native.cpu.cross_entropy_backward(
        problem, grad_loss.data_ptr(), probabilities.data_ptr(), target.data_ptr(),
        grad_input.data_ptr(),
    )  # fmt: skip
    return grad_input
