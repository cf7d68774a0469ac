"""A training step on the CPU that was recorded: its tape, and what it holds for.

A tape names memory. Where a parameter, a buffer or a state of the optimizer has moved since, or a
module of the model was replaced, it is of no use any more; `Surroundings` are what tells so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from gdfast import native
from gdfast.backends import available, chosen, triton_backend, tuning
from gdfast.ops.ordinary import dispatch_modes
from gdfast.tape import Recorder, Tape, extent

# Why a step may have to be recorded once more.
UNSETTLED = "the model's or the optimizer's state is another one after each step"

_OURS = {"cpu", "cuda", "triton", "reference"}
_address = torch._C.TensorBase.data_ptr


class Surroundings(NamedTuple):
    """What a step finds, with lists that can be compared: modules and how they are set, where
    parameters and buffers are, and the optimizer's parameters and state."""

    modules: list[Module]
    training: list[bool]
    addresses: list[int]
    requires_grad: list[bool]
    updated: list[int]
    state: list[Any]

    @classmethod
    def of(cls, roots: Sequence[Module], optimizer: Optimizer) -> Surroundings:
        modules = _modules(roots)
        tensors = _tensors(modules)
        return cls(
            modules, [module.training for module in modules], list(map(_address, tensors)),
            [x.requires_grad for x in tensors],
            list(map(id, _updated(optimizer))),
            [x.data_ptr() if isinstance(x, Tensor) else x for x in _state(optimizer)],
        )  # fmt: skip


def _modules(roots: Sequence[Module]) -> list[Module]:
    modules = list(roots)
    for module in modules:  # which grows meanwhile
        modules.extend(x for x in module._modules.values() if x is not None)
    return modules


def _tensors(modules: list[Module]) -> list[Tensor]:
    """Parameters and buffers; shared ones as often as they are found."""
    found = chain.from_iterable((*m._parameters.values(), *m._buffers.values()) for m in modules)
    return [x for x in found if x is not None]


def _updated(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _state(optimizer: Optimizer) -> list[Any]:
    return list(chain.from_iterable(each.values() for each in optimizer.state.values()))


def situation() -> tuple[Any, ...]:
    """What decides how a step runs beside the model, the optimizer and the batch."""
    return (
        tuning.situation(), chosen(), torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
    )  # fmt: skip


def takes(batch: tuple[Any, ...]) -> bool:
    """Whether a batch can be copied to where a tape reads it, and nobody looks at operators."""
    if dispatch_modes() or torch._C._is_torch_function_mode_enabled() or native.recorder():
        return False
    return all(
        type(x) is Tensor and x.is_cpu and x.layout is torch.strided and not x.requires_grad
        for x in batch
    )


def why_not(roots: Sequence[Module], optimizer: Optimizer, criterion: Any) -> str:
    """Why steps of a model cannot be recorded at all, or ""."""
    if native.cuda_is_simulated or triton_backend.is_interpreted():
        return "GPU kernels are simulated on the CPU"
    if others := {each.name for each in available()} - _OURS:
        return f"other backends are registered: {', '.join(sorted(others))}"
    modules = _modules(roots)
    compiled = [m for m in modules if m._compiled_call_impl is not None]
    if compiled or hasattr(criterion, "_torchdynamo_orig_callable"):
        return "parts of it are compiled"
    for tensor in (*_tensors(modules), *_updated(optimizer)):
        if type(tensor) not in (Tensor, Parameter) or tensor.layout is not torch.strided:
            return f"a parameter or buffer is a {type(tensor).__name__}, {tensor.layout}"
    return ""


class TapedStep:
    """A recorded step: a call with another batch of the same kind repeats it, and gives the loss.

    Parameters have the gradients of the last call then.
    """

    def __init__(
        self, tape: Tape, loss: Tensor, grads: list[tuple[Tensor, Tensor | None]],
        added: list[tuple[Tensor, Tensor | None]], moved: list[Tensor],
    ) -> None:  # fmt: skip
        self.tape, self._loss = tape, loss
        # What parameters end with; what those that the optimizer leaves alone began with; what is
        # written in place, of which autograd is told.
        self._grads, self._added, self._moved = grads, added, moved

    def holds(self) -> bool:
        """Whether gradients that a step adds to are where they were."""
        return all(param.grad is grad for param, grad in self._added)

    def __call__(self, batch: tuple[Tensor, ...]) -> Tensor:
        self.tape.bind(batch)
        self.tape.replay()
        increment_version(self._moved)
        for param, grad in self._grads:
            if param.grad is not grad:
                param.grad = grad
        return self._loss.clone()


class Recording(NamedTuple):
    """A step that ran: its loss, and what repeats it or why nothing can."""

    loss: Tensor
    taped: TapedStep | None
    why_not: str


def record(
    step: Callable[[tuple[Tensor, ...]], Tensor], batch: tuple[Tensor, ...],
    roots: Sequence[Module], optimizer: Optimizer,
) -> Recording:  # fmt: skip
    """Takes a step, and records it."""
    batch = _apart(batch)
    before = Surroundings.of(roots, optimizer)
    tensors = _tensors(before.modules)
    updated = _updated(optimizer)
    others = [x for x in tensors if x.requires_grad and id(x) not in before.updated]
    known = *tensors, *updated, *(x for x in _state(optimizer) if isinstance(x, Tensor))
    versions = [x._version for x in known]
    added = [(param, param.grad) for param in others]
    recorder = Recorder(batch, (*known, *(x for _, x in added if x is not None)))
    with recorder.running():
        loss = step(batch)
    reason = recorder.why_not
    if before != Surroundings.of(roots, optimizer):
        reason = reason or UNSETTLED
    if reason:
        return Recording(loss, None, reason)
    moved = [x for x, version in zip(known, versions, strict=True) if x._version != version]
    grads = [(param, param.grad) for param in dict.fromkeys((*updated, *others))]
    return Recording(
        loss.clone(), TapedStep(recorder.tape, loss, grads, added, moved), ""
    )


def _apart(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The batch, with a copy of each tensor that shares memory with one before it: addresses tell
    them from each other."""
    found: list[Tensor] = []
    for tensor in batch:
        memory = extent(tensor)
        if any(x.start < memory.stop and memory.start < x.stop for x in map(extent, found)):
            tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(
                tensor
            )
        found.append(tensor)
    return tuple(found)
