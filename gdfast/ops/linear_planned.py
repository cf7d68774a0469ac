"""`linear` on the CPU's kernels as a plan each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdfast.backends import linear as kernels
from gdfast.backends.plans import Plan
from gdfast.ops.linear import gradients, is_ours, saved
from gdfast.ops.planned import Gradients, Planned, keep, lookup

Tensors = tuple[Any, ...]


class _Linear(Planned):
    def __init__(self, forward: Plan, input: Tensor) -> None:
        super().__init__(forward, input.device)
        self._columns = input.shape[1]

    def kernels(self, *tensors: Any) -> Tensors:
        return (kernels.linear(*tensors),)

    def saved(self, needs: Any, tensors: Any, made: Any) -> Tensors:
        return saved(needs, *tensors[:2])

    def operations(self, ctx: Any, grad_output: Tensor, saved: Tensors) -> Gradients:
        return gradients(ctx.needs_input_grad, self._columns, grad_output, saved)

    def backward_plan(self, needs: Any, grad_output: Tensor, saved: Any) -> Plan | None:
        input, weight = saved
        return kernels.backward_plan(grad_output, input, weight, self._columns, needs)


def planned_linear(tensors: Tensors) -> Planned | None:
    """What runs `linear` on input, weight and bias; None where the function does."""
    # Facts of a key do not tell of autocast, under which the function calls native's product.
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"):
        return None
    key, found = lookup("linear", tensors)
    if found is None and key is not None:
        forward = kernels.plan(*tensors) if is_ours(*tensors) else None
        return keep(key, forward and _Linear(forward, tensors[0]))
    return found or None
