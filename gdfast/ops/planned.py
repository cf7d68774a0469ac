"""Layers of which each pass is a plan: one node of autograd's graph, one call of kernels both ways.

Only layers that have run before, by their operations, become one: checks, errors and choices of
kernels are those of the operations, and so is what a plan does not do: gradients of gradients,
updates in backward, and all that is not as it was when the plan was drafted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdfast import native
from gdfast.backends import _precision, chosen, plans, registry, tuning
from gdfast.ops import conv2d_dispatch, in_backward
from gdfast.ops.casts import autocast
from gdfast.ops.ordinary import apply_to_ordinary, unwatched_facts
from gdfast.tensor_cores import allows_tf32, asked_of_tf32

_MOST_BACKWARD = 64  # layouts and subsets of gradients that one layer meets
Gradients = tuple[Tensor | None, ...]


def situation(backend: str) -> tuple[str, int, bool]:
    """What kernels depend on beside the tensors: plans have the precision of theirs fixed."""
    tf32 = native.cuda is not None and allows_tf32()
    return chosen(backend), tuning.situation(), tf32


def known_situation(device: torch.device) -> tuple[list[Any], list[Any]]:
    """What `situation` and looking for a layer go by beside tensors and arguments, as `make_memo`
    of gdfast._cpu takes it: what modules have under a name, and what functions answer."""
    names = (
        (registry, "_switch"), (tuning, "_epoch"), (conv2d_dispatch, "generation"),
        (_precision, "_precision"),
    )  # fmt: skip
    kept = [(vars(module), name, vars(module)[name]) for module, name in names]
    functions: list[Any] = [
        torch.get_num_threads, torch._C._get_deterministic_algorithms, torch.is_grad_enabled,
        torch._C._is_any_autocast_enabled,
    ]  # fmt: skip
    if native.cuda is not None:
        functions.append(asked_of_tf32())
    if torch._C._is_any_autocast_enabled():
        for function in (torch.is_autocast_enabled, torch.get_autocast_dtype):
            functions.append(partial(function, device.type))
    return kept, [(function, function()) for function in functions]


def backward_memo(facts: bytes, count: int, device: torch.device) -> Any:
    """What `recall` goes by for a backward pass like one now: on so many tensors, with `facts`."""
    assert native.cpu is not None
    kept, asked = known_situation(device)
    kept.append((vars(in_backward), "targets", ...))  # empty
    return native.cpu.make_memo(tuple(kept), tuple(asked), tuple(range(count)), facts, ())


def run_again(plan: plans.Plan | None, memo: Any, tensors: tuple[Any, ...], place: Any) -> Any:
    """What a backward pass's plan gives, or None where the call is not one that its memo knows."""
    if plan is None or not plans.enabled:
        return None
    assert native.cpu is not None
    known = native.cpu.recall(memo, *tensors)
    if known is None or torch.compiler.is_compiling():
        return None
    return plan(known, 0.0, *place())


class Planned(ABC):
    """A layer on tensors of certain sizes, strides and types, which has run before.

    `forward` is a plan that takes its tensors, and gives the output and what backward reads beside
    them; `on_gpu` tells whether its kernels are launched on a GPU, `backend` what was asked for.
    """

    def __init__(
        self, forward: plans.Plan, device: torch.device, on_gpu: bool = False,
        backend: str = registry.AUTO,
    ) -> None:  # fmt: skip
        self._forward, self._device, self.backend = forward, device, chosen(backend)
        self._place: Any = plans.place(device, on_gpu)
        # By which gradients are asked for, the facts of the tensors (what was saved may come back
        # in another layout, from hooks that pack it) and what kernels depend on beside them.
        self._backward: dict[tuple[Any, ...], _Pass] = {}
        self._last: _Pass | None = None

    @abstractmethod
    def kernels(self, *tensors: Any) -> tuple[Any, ...]:
        """What the plan gives, by single calls."""

    @abstractmethod
    def saved(
        self, needs: tuple[bool, ...], tensors: tuple[Any, ...], made: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...]:
        """What the operations save for backward, in their order: checkpointing compares."""

    @abstractmethod
    def operations(self, ctx: Any, grad_output: Tensor, saved: tuple[Any, ...]) -> Gradients:
        """The gradients of all tensors by the operations, differentiable again."""

    @abstractmethod
    def backward_plan(
        self, needs: tuple[bool, ...], grad_output: Tensor, saved: tuple[Any, ...]
    ) -> plans.Plan | None:
        """A plan of what `operations` has just run, on grad_output and what was saved: it gives
        the gradients of all tensors, and a None."""

    def cast(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """What autocast makes of input, weight and bias."""
        return autocast(*tensors)

    def run(self, tensors: tuple[Any, ...], momentum: float = 0.0) -> Tensor:
        """The layer's output; tensors are as those that it was found for."""
        if torch.is_grad_enabled():
            output: Tensor = _apply_to_ordinary(*tensors, self)
        else:
            output = self.forward(tensors)[0]
        return output

    def forward(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """The output, and what backward reads beside the tensors."""
        if plans.enabled:
            results: Any = self._forward(tensors, 0.0, *self._place())
            if results is not None:
                return results
        return self.kernels(*tensors)

    def gradients(self, ctx: Any, grad_output: Tensor, saved: tuple[Any, ...]) -> Gradients:
        """The gradients of all tensors that a context asks for, and a None."""
        needs, last = ctx.needs_input_grad, self._last
        if last is not None and last.needs == needs:
            results = run_again(last.plan, last.memo, (grad_output, *saved), self._place)
            if results is not None:
                return results
        facts = self._facts(grad_output, saved)
        key = needs, facts, situation(self.backend)
        found = self._backward.get(key)
        if found is not None and found.plan is not None and plans.enabled:
            self._last = found
            results = found.plan((grad_output, *saved), 0.0, *self._place())
            if results is not None:
                return results
        gradients = self.operations(ctx, grad_output, saved)
        # While a graph is recorded kernels are not looked for: a later pass may find them.
        if facts is not None and found is None and not _is_capturing(self._device):
            plan = self.backward_plan(needs, grad_output, saved)
            memo = plan and backward_memo(facts, 1 + len(saved), self._device)
            if len(self._backward) >= _MOST_BACKWARD:
                self._backward.clear()
            self._backward[key] = _Pass(plan, needs, memo)
        return *gradients, None

    def _facts(self, grad_output: Tensor, saved: tuple[Any, ...]) -> bytes | None:
        """The facts of all tensors where a plan could run now."""
        if torch.is_grad_enabled() or in_backward.targets or torch.compiler.is_compiling():
            return None
        if self.backend != chosen(self.backend):
            return None
        facts = unwatched_facts(grad_output, *saved)
        return facts if isinstance(facts, bytes) else None


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Pass(NamedTuple):
    plan: plans.Plan | None
    needs: tuple[bool, ...]
    memo: Any


class PlannedFunction(torch.autograd.Function):
    """`apply(*tensors, planned)`, of a `Planned` layer on tensors that it takes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.planned = planned = inputs[-1]
        output, *made = planned.forward(inputs[:-1])
        ctx.save_for_backward(*planned.saved(ctx.needs_input_grad, inputs, made))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        saved = ctx.saved_tensors  # once: checkpointing allows no second time
        gradients: Gradients = ctx.planned.gradients(ctx, grad_output, saved)
        return gradients


_apply_to_ordinary = apply_to_ordinary(PlannedFunction)


def lookup(kind: str, tensors: tuple[Any, ...], *settings: Any) -> tuple[Any, Any]:
    """A key of a layer of a kind on tensors, as they and all around them are now, and what is kept
    by it: a layer, False where there is none, None where that is not known.

    The key is None where there never is one.
    """
    facts = unwatched_facts(*tensors)
    if tensors[0] is None or not isinstance(facts, bytes) or not plans.enabled:
        return None, None
    grads = torch.is_grad_enabled() and tuple(t is not None and t.requires_grad for t in tensors)
    # As text: lists for stride and so on may be changed, and 2.0, which is refused, equals 2.
    key = kind, facts, repr(settings), grads, situation(chosen())
    return key, conv2d_dispatch.units.get(key)


def keep(key: tuple[Any, ...], found: Planned | None) -> Planned | None:
    """Keeps what was found for a key of `lookup`, None for no layer, and returns it."""
    units = conv2d_dispatch.units
    if len(units) >= conv2d_dispatch.KERNELS_LIMIT:
        units.clear()
    units[key] = found or False
    return found
