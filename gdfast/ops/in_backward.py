"""Weights that an optimizer updates where their gradient is computed, which is then never stored.

A convolution's backward runs before others that use the same weight, so that it may not change it
yet. It leaves the last pass of the gradient's kernel to the node of autograd's graph that
accumulates the weight's gradient. That runs when every use of the weight in this backward pass has
run its own, the gradient of the input included. What it finds there decides:

- one gradient, begun by one convolution, and nothing else: the pass updates the weight;
- more: gradients are made of all that was begun and added up, and go on as any gradient does.

Kernels that can do that have a method `begin`. Everything else, and whatever watches gradients
(hooks on the weight, torch.autograd.grad, graphs of gradients, tensors that are not plain ones,
torch.compile) takes the ordinary way, on which an optimizer sees gradients by its hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gdfast.backends.cuda_grad_weight import BegunGradWeight
from gdfast.backends.sgd import HALF_TYPES
from gdfast.ops import conv2d_dispatch
from gdfast.ops.sgd_dispatch import is_plain


class Target:
    """What becomes of a weight's gradient.

    `update(weight, begun)` updates the weight by a gradient that was begun, or returns False, with
    nothing done; `accept(weight)` uses `weight.grad`.
    """

    def __init__(
        self, update: Callable[[Tensor, BegunGradWeight], bool], accept: Callable[[Tensor], None]
    ) -> None:
        self.update, self.accept = update, accept
        self.is_shared = False  # seen to be used more than once: what waits would hold memory


# By the id of the weight, which whoever asks for the update keeps alive. Empty without such an
# optimizer: then all of this costs backward one look.
targets: dict[int, Target] = {}

_AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
_OUR_CAST = "gdfast: cast for a convolution"

# By the id of the weight and the number of the backward pass. Only nodes keep what waits there.
_waiting: weakref.WeakValueDictionary[tuple[int, int], _Waiting] = weakref.WeakValueDictionary()


def note_cast(weight: Tensor) -> None:
    """Notes that it was we who cast a weight, for autocast: nobody else sees its gradient there."""
    node: Any = weight.grad_fn
    if node is not None:
        node.metadata[_OUR_CAST] = True


def begin(ctx: Any, grad_output: Tensor, input: Tensor | None) -> tuple[Tensor | None] | None:
    """The bias's gradient, where the weight's was left to its update; None where it was not.

    ctx is a convolution's, in backward, with the sizes that `note_sizes` keeps.
    """
    _, need_weight, need_bias, *_ = ctx.needs_input_grad
    if not need_weight or input is None:
        return None
    node = ctx.next_functions[1][0]
    if not isinstance(node, _AccumulateGrad) and _OUR_CAST in getattr(node, "metadata", ()):
        node = node.next_functions[0][0]
    if not isinstance(node, _AccumulateGrad):
        return None
    weight = node.variable
    target = targets.get(id(weight))
    if target is None or target.is_shared:
        return None
    if not _is_ordinary(weight, grad_output, input) or weight.shape != ctx.weight_size:
        return None
    if not _accumulates(node, weight):
        return None
    arguments = ctx.weight_size, ctx.weight_channels_last, need_bias, *ctx.arguments
    kernel = conv2d_dispatch.grad_weight_kernel(grad_output, input, *arguments)
    if not hasattr(kernel, "begin"):
        return None
    begun, grad_bias = kernel.begin(grad_output, input, need_bias)
    key = id(weight), torch._C._current_graph_task_id()
    waiting = _waiting.get(key)
    if waiting is None:
        waiting = _waiting[key] = _Waiting(weight, target, node)
    waiting.add(begun)
    return (grad_bias,)


def _is_ordinary(weight: Tensor, *operands: Tensor) -> bool:
    """Whether all are plain tensors in memory, of types that go together, and nobody looks on."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    tensors = weight, *operands
    if torch._C._are_functorch_transforms_active() or not is_plain(tensors):
        return False
    dtype = operands[0].dtype
    if weight.dtype != dtype and (weight.dtype, dtype in HALF_TYPES) != (torch.float32, True):
        return False
    keys = _ordinary_keys(weight.device.type)
    return all(
        torch._C._dispatch_keys(each).raw_repr() == keys and each.device == weight.device
        for each in tensors
    ) and all(each.dtype == dtype for each in operands)


@lru_cache(maxsize=8)
def _ordinary_keys(device: str) -> int:
    return int(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())


def _accumulates(node: Any, weight: Tensor) -> bool:
    """Whether a gradient would be kept for the weight, where no other has been and none looks."""
    if torch.is_grad_enabled() or weight.grad is not None or weight._backward_hooks:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # in torch.autograd.grad, which asks for it
        return False


class _Waiting:
    """What one backward pass has begun of a weight's gradient, until `node` accumulates that."""

    def __init__(self, weight: Tensor, target: Target, node: Any) -> None:
        self._weight, self._target = weight, target
        self._task = torch._C._current_graph_task_id()
        self._begun: list[tuple[BegunGradWeight, Any]] = []
        # The node keeps it, with the graph: nothing is left where a backward pass fails.
        self._handle = node.register_prehook(self._finish)

    def add(self, begun: BegunGradWeight) -> None:
        self._begun.append((begun, _current_stream(self._weight.device)))

    def _finish(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor] | None:
        if self._task != torch._C._current_graph_task_id():
            return None  # another pass: within this one, beside it, or after it failed
        self._handle.remove()
        begun, self._begun = self._begun, []
        weight, target, (rest,) = self._weight, self._target, gradients
        if rest is None and len(begun) == 1:
            ((one, stream),) = begun
            with _after(stream, weight.device):
                if target.update(weight, one):
                    return None
        else:
            target.is_shared = True
        total = _sum(begun, weight)
        if rest is not None:
            return (rest + total,)
        # Autograd lets nobody make a gradient of none.
        weight.grad = total if weight.grad is None else weight.grad + total
        target.accept(weight)
        return None


def _sum(begun: list[tuple[BegunGradWeight, Any]], weight: Tensor) -> Tensor:
    """The gradients that were begun, on the current stream."""
    current, total = _current_stream(weight.device), None
    for one, stream in begun:
        with _after(stream, weight.device):
            gradient = one.gradient().to(weight.dtype)
        if stream != current:
            gradient.record_stream(current)
        total = gradient if total is None else total + gradient
    assert total is not None
    return total


def _current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@contextmanager
def _after(stream: Any, device: torch.device) -> Iterator[None]:
    """Goes on with what a stream has begun, for the current one to go on with.

    Autograd makes streams wait for gradients, and here there are none.
    """
    current = _current_stream(device)
    if stream == current:
        yield
        return
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)
