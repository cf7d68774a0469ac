"""Updating parameters in the backward pass, each as soon as its gradient is there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gdfast.backends.cuda_grad_weight import BegunGradWeight
from gdfast.errors import mismatch
from gdfast.ops import in_backward

_OP = "SGD(in_backward=True)"
_ORDINARY = "Or leave in_backward out"


class InBackward:
    """Calls `update(group, param, grad)` in backward, for each parameter once between two steps.

    Autograd runs a parameter's hook when its gradient is complete: every operation that used the
    parameter has run its backward by then, and needs it no longer. The gradient is handed on rather
    than kept, so that its memory is free before the next one is computed.

    Where a convolution has begun the only gradient of a weight, `finish(group, param, begun)` is
    called instead, in the same place (see `ops.in_backward`). It returns False, with nothing done,
    where it cannot use that; the gradient comes by the hook then.

    Raises RuntimeError, or ValueError for a parameter that is listed twice, where it sees what it
    would get wrong.
    """

    def __init__(
        self, update: Callable[[int, Tensor, Tensor], None],
        finish: Callable[[int, Tensor, BegunGradWeight], bool],
    ) -> None:  # fmt: skip
        self._update = weakref.WeakMethod(update)  # of the optimizer, which owns this
        self._finish = weakref.WeakMethod(finish)
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._groups: dict[Tensor, int] = {}
        self._updated: set[Tensor] = set()  # since the last step

    def __del__(self) -> None:
        for param, handle in self._handles.items():
            handle.remove()
            in_backward.targets.pop(id(param), None)

    def watch(self, groups: list[dict[str, Any]]) -> None:
        """Sets hooks for parameters that have none yet. Frozen ones get theirs when they thaw."""
        _refuse_processes()
        this = weakref.ref(self)

        def hook(param: Tensor) -> None:
            live = this()
            if live is not None:
                live._on_gradient(param)

        def update(param: Tensor, begun: BegunGradWeight) -> bool:
            live = this()
            return live is not None and live._on_begun(param, begun)

        new: set[Tensor] = set()
        for index, group in enumerate(groups):
            for param in group["params"]:
                if param in new:
                    raise ValueError(mismatch(_OP, "params", "each parameter once", "one twice"))
                if param.requires_grad and param not in self._handles:
                    _refuse_hooks(param, ours=0)
                    new.add(param)
                    self._handles[param] = param.register_post_accumulate_grad_hook(hook)
                    self._groups[param] = index
                    in_backward.targets[id(param)] = in_backward.Target(update, hook)

    def refuse_unfinished(self) -> None:
        """Raises where gradients are to be thrown away that have been used already."""
        if self._updated:
            expected, got = "step() after each backward", "zero_grad(), though weights have changed"
            raise RuntimeError(mismatch(_OP, "zero_grad", expected, got, _ORDINARY))

    def finish(self, groups: list[dict[str, Any]], scaled: bool) -> None:
        """Ends a step: what was updated may be updated again."""
        if scaled:
            expected = "gradients without a scale, because weights change before it is known"
            raise RuntimeError(mismatch(_OP, "step", expected, "those of a GradScaler", _ORDINARY))
        if any(param.grad is not None for param in self._updated):
            expected = "no gradient where backward has updated a parameter"
            got = "one, as DistributedDataParallel puts it there"
            raise RuntimeError(mismatch(_OP, "step", expected, got, _ORDINARY))
        self._updated.clear()
        self.watch(groups)

    def _on_gradient(self, param: Tensor) -> None:
        update, grad = self._update(), param.grad
        if update is None or grad is None:
            return
        if not self._updated:
            _refuse_processes()
        if param in self._updated:
            expected, got = "one backward before each step()", "a second gradient of a parameter"
            raise RuntimeError(mismatch(_OP, "backward", expected, got, _ORDINARY))
        if torch.is_grad_enabled():
            expected, got = "create_graph=False", "True: the graph needs weights as they were"
            raise RuntimeError(mismatch(_OP, "backward", expected, got, _ORDINARY))
        _refuse_hooks(param, ours=1)
        self._updated.add(param)
        param.grad = None
        update(self._groups[param], param, grad)

    def _on_begun(self, param: Tensor, begun: BegunGradWeight) -> bool:
        finish = self._finish()
        if finish is None or param.grad is not None or param in self._updated:
            return False
        if not self._updated:
            _refuse_processes()
        _refuse_hooks(param, ours=1)
        if not finish(self._groups[param], param, begun):
            return False
        self._updated.add(param)
        return True


def _refuse_hooks(param: Tensor, ours: int) -> None:
    """Another hook would find a gradient that is used up, or use one that we need."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    if len(hooks) > ours:
        expected = "parameters without other post-accumulate-grad hooks"
        got = f"a parameter of shape {list(param.shape)} with one"
        fix = "Remove the hook, or the optimizer that set it"
        raise RuntimeError(mismatch(_OP, "params", expected, got, fix))


def _refuse_processes() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        size = distributed.get_world_size()
        if size > 1:
            expected = "one process, because gradients are not averaged before they are used"
            raise RuntimeError(mismatch(_OP, "processes", expected, size, _ORDINARY))
