"""`max_pool2d` as a plan each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gdfast.backends import chosen
from gdfast.backends.plans import NONE, Draft, Plan, draft_of, is_on_gpu
from gdfast.geometry import is_channels_last
from gdfast.ops import max_pool2d_dispatch as dispatch
from gdfast.ops.max_pool2d import pool_grad, settings
from gdfast.ops.planned import Gradients, Planned, keep, lookup


class _Pool(Planned):
    def __init__(
        self, forward: Plan, kernel: Callable[..., Any], input: Tensor, arguments: tuple[Any, ...]
    ) -> None:
        super().__init__(forward, input.device, is_on_gpu(kernel))
        self._kernel = kernel
        channels_last = is_channels_last(input.shape, input.stride())
        self._how = input.shape, channels_last, *arguments, self.backend

    def kernels(self, *tensors: Any) -> tuple[Any, ...]:
        results: tuple[Any, ...] = self._kernel(*tensors)
        return results

    def saved(self, needs: Any, tensors: Any, made: Any) -> tuple[Tensor | None, ...]:
        return tuple(made)

    def operations(self, ctx: Any, grad_output: Tensor, saved: tuple[Any, ...]) -> Gradients:
        if not ctx.needs_input_grad[0]:
            return (None,)
        return (pool_grad(grad_output, *saved, *self._how),)

    def backward_plan(self, needs: Any, grad_output: Tensor, saved: Any) -> Plan | None:
        key = dispatch.max_pool2d_grad_key(grad_output, *saved, *self._how)
        make = draft_of(dispatch.known_kernel(key)) if needs[0] else None
        if make is None:
            return None
        draft = Draft(2)
        return draft.plan((*make(draft, 0, 1), NONE), device=grad_output.device)


def planned_max_pool2d(input: Tensor, *arguments: Any) -> Planned | None:
    """What runs `max_pool2d` on these arguments of it, None where the function does."""
    key, found = lookup("max_pool2d", (input,), *arguments)
    if found is None and key is not None:
        return _find(key, input, settings(*arguments))
    return found or None


def _find(key: Any, input: Tensor, arguments: tuple[Any, ...]) -> Planned | None:
    settings = *arguments, False, chosen()
    kernel = dispatch.known_kernel(dispatch.max_pool2d_key(input, *settings))
    if kernel is None:
        return None  # not run yet
    make = draft_of(kernel)
    if make is None:
        return keep(key, None)
    draft = Draft(1)
    forward = draft.plan(make(draft, 0), device=input.device)
    return keep(key, _Pool(forward, kernel, input, arguments))
